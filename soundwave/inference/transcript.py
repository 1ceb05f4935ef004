"""What a recording says, and when: `Transcript` with its `Word`s and `Segment`s."""

from typing import NamedTuple


class Word(NamedTuple):
    """A word of a transcript.

    Attributes:
        word: the word, without white space.
        start, end: seconds from the beginning of the recording.
        probability: how sure CTC is of its labels, the geometric mean of their probabilities; 0 to 1.
    """

    word: str
    start: float
    end: float
    probability: float


class Segment(NamedTuple):
    """A part of a transcript that fits into one subtitle.

    Attributes:
        text: its words.
        start, end: seconds from the beginning of the recording.
        tokens: its CTC labels, which are tokens of the language model.
        avg_logprob: mean logarithm of their probabilities.
        window: the second at which the window begins that it was read in.
    """

    text: str
    start: float
    end: float
    tokens: tuple[int, ...] = ()
    avg_logprob: float = 0.0
    window: float = 0.0


class _Transcript(NamedTuple):
    text: str
    seconds: float


class Transcript(_Transcript):
    """What was said in a recording: a tuple of `text` and `seconds`, which may know times, too.

    Attributes:
        text: the words, on one line.
        seconds: length of the recording.
        words: every word with its times; None unless `timestamps="word"` asked for them.
        segments: parts of a subtitle's length with their times; None without `timestamps`.
    """

    words: tuple[Word, ...] | None = None
    segments: tuple[Segment, ...] | None = None

    def __new__(
        cls,
        text: str,
        seconds: float,
        words: tuple[Word, ...] | None = None,
        segments: tuple[Segment, ...] | None = None,
    ) -> "Transcript":
        self = super().__new__(cls, text, seconds)
        self.words, self.segments = words, segments
        return self

    def __str__(self) -> str:
        return self.text
