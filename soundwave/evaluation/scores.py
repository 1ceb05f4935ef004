"""Text normalisation, word error rate, and `Scores`, which an evaluation returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jiwer
from whisper_normalizer.basic import BasicTextNormalizer

_normaliser = BasicTextNormalizer()


def normalise(text: str) -> str:
    """The text in lower case, with one space between words.

    Punctuation and symbols become spaces ("3.5" is "3 5"), text in brackets or parentheses is dropped, and numbers are
    not spelt out.
    """
    return _normaliser(text).strip()  # The normaliser makes a space of a full stop at the end.


@dataclass
class Scores:
    """Scores over a list of samples.

    Attributes:
        wer: word error rate of the transcriptions (0.02 is 2 %): all word errors divided by all reference words. Case
            and punctuation do not count. None without transcriptions.
        accuracy: for each other task the share of answers that equal the reference; case and punctuation do not count.
        samples: number of samples of each task.
        blank_share: share of the frames in which CTC writes the blank.
        kept_per_label: CTC peaks divided by transcript tokens.
        compression: frames of the alignment adapter divided by kept frames.
        answers: (sample id, task, reference, answer) in the order of the samples.
    """

    wer: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    blank_share: float | None = None
    kept_per_label: float | None = None
    compression: float | None = None
    answers: list[tuple[str, str, str, str]] = field(default_factory=list)


def word_error_rate(references: Sequence[str], answers: Sequence[str]) -> float:
    """Word error rate of normalised texts, 0 or more. ValueError: a reference has no words."""
    references = [normalise(text) for text in references]
    for text in references:
        if not text:
            raise ValueError("a reference has no words: leave samples without a transcript out of the word error rate")
    return jiwer.wer(references, [normalise(text) for text in answers])
