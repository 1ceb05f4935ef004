"""Read windows of recordings: their text, and what two of them that overlap say together.

A language model that was trained on sentences may write the first sentence of a window and end, or write what nobody
says. That would lose speech without a word, so its text is compared with what CTC reads: where `MISSED` words and more
have no counterpart, the window is cut at its pauses into pieces as long as what was read, and they are read again,
until nothing is missing. If CTC reads less than half of the text's words, the phrases between the pauses are read
again. A phrase whose text CTC does not read may have been cut off inside of a sentence: it is read once more with the
phrase beside it. As CTC may be wrong, what is read again is taken only if it agrees with CTC better.
"""

from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import numpy as np

from soundwave.data.audio import LONGEST_SECONDS, SAMPLING_RATE
from soundwave.data.collate import SILENCE, TRANSCRIBE_PROMPT
from soundwave.inference.answer import LoadedModel, answer
from soundwave.inference.timestamps import (
    ENERGY_FRAME,
    PAUSE,
    Reading,
    TimedWord,
    frame_powers,
    is_quiet,
    quiet_runs,
    read_clips,
    text_of,
    timed_words,
)

FRAME = 0.02  # seconds of a frame among which the place of a cut is chosen
SEARCH = 5.0  # seconds before the limit in which a pause is looked for
OVERLAP = 3.0  # seconds that two windows share where there is no pause
MEL_FRAME = 160  # samples of a mel frame
MISSED = 5  # words; the labels that CTC may write behind a text are fewer
SHORTEST = 2.0  # seconds of a window that is still cut
# Of the silence around a phrase, so many seconds are kept. The embedded default has heard none before the first word in
# its training: 6.5 % word errors with 0.3 s on both sides, 1.2 % with none, 1.1 % with 0.2 s behind (150 sentences). If
# nothing before the first loud frame is kept, its onset is lost: 2.1 % instead of 1.1 % (110 sentences).
LEAD, TAIL = 0.04, 0.2
SILENT = 1e-4  # of the power of the loud frames (-40 dB)
SAME_WORD = 0.3  # seconds between the times at which two windows hear the same word; 90 % are within 0.18 of the truth


class Window(NamedTuple):
    """A part of a recording that is read at once.

    Attributes:
        samples: float32 [samples] at 16 kHz.
        start: the second at which it begins.
        before, after: seconds that it shares with the window before and behind it.
    """

    samples: np.ndarray
    start: float = 0.0
    before: float = 0.0
    after: float = 0.0

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLING_RATE

    @property
    def silent(self) -> bool:
        """Whether nothing is in it: a language model would invent words."""
        return np.abs(self.samples).max(initial=0) <= SILENCE


class Text(NamedTuple):
    """What a window says.

    Attributes:
        text: its words.
        words: the same with times in seconds of the recording; None where nobody needs them.
        cut_off: whether the limit of new tokens has cut it off.
    """

    text: str
    words: tuple[TimedWord, ...] | None = None
    cut_off: bool = False


def cut_into_windows(
    blocks: Iterator[np.ndarray],
    *,
    sampling_rate: int = SAMPLING_RATE,
    seconds: float = LONGEST_SECONDS,
    overlap: float = OVERLAP,
    spare: int = MEL_FRAME - 1,
) -> Iterator[Window]:
    """Cut a recording that comes block by block, each [samples], into windows; one is held at a time.

    A cut is in the middle of the longest pause of the last 5 s before the limit; if `seconds` is under 10, of the last
    half of the window. Where there is none, two windows share `overlap` seconds; with 0 the cut is in the middle of the
    quietest frame of 20 ms. The last window may be longer than `seconds` by `spare` samples, by default what makes no
    further mel frame at 16 kHz.

    Raises:
        ValueError: `seconds` is under 0.08, so there are no two frames among which to choose.
    """
    limit, frame, search = _sizes(sampling_rate, seconds)
    shared = int(overlap * sampling_rate)
    waiting: list[np.ndarray] = []
    count = start = before = 0  # samples

    def window(audio: np.ndarray, after: int) -> Window:
        return Window(audio, start / sampling_rate, before / sampling_rate, after / sampling_rate)

    def cut(audio: np.ndarray) -> tuple[Window, np.ndarray]:
        nonlocal start, before
        end, paused = _cut(audio, limit, frame, search)
        end, after = (end, 0) if paused or not shared else (limit, shared)
        found = window(audio[:end], after)
        start, before = start + end - after, after
        return found, audio[end - after :]

    for block in blocks:
        waiting.append(block)
        count += len(block)
        while count > limit + max(search // 5, spare):  # where a cut falls does not depend on what comes later
            found, rest = cut(waiting[0] if len(waiting) == 1 else np.concatenate(waiting))
            yield found
            waiting, count = [rest], len(rest)
    audio = np.concatenate(waiting) if waiting else np.empty(0, np.float32)
    while len(audio) > limit + spare:
        found, audio = cut(audio)
        yield found
        spare = 0
    yield window(audio, 0)


def _sizes(sampling_rate: int, seconds: float) -> tuple[int, int, int]:
    """Samples of a window, of a frame, and of the part before the limit in which a cut is looked for."""
    limit = int(seconds * sampling_rate)
    frame = int(FRAME * sampling_rate)
    search = min(int(SEARCH * sampling_rate), limit // 2)
    if search < 2 * frame:
        raise ValueError(f"seconds = {seconds:g}; wanted at least {4 * FRAME:g}")
    return limit, frame, search


def _cut(audio: np.ndarray, limit: int, frame: int, search: int) -> tuple[int, bool]:
    """Where the first window of a recording ends that is longer than `limit`, and whether a pause is there."""
    first = limit - search
    last = min(limit, len(audio) - search // 5)  # The rest must be long enough to hold a word, too.
    count = (last - first) // frame
    power = frame_powers(audio[first % frame : first + count * frame], frame)
    runs = [run for run in quiet_runs(is_quiet(power)[-count:]) if (run[1] - run[0]) * FRAME >= PAUSE]
    if runs:
        a, b = max(runs, key=lambda run: run[1] - run[0])
        return first + (a + b) * frame // 2, True
    return first + int(power[-count:].argmin()) * frame + frame // 2, False


class Reader:
    """Reads windows with a model.

    Args:
        loaded: the model.
        batch_size: windows that are read together.
        max_new_tokens, draft, accept: as in `answer`.
        ctc: give what CTC reads, as of a model of stage I.
        seen: called with the reading of each window that was read, second readings included.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        batch_size: int = 1,
        max_new_tokens: int = 256,
        draft: str = "none",
        accept: float | None = None,
        ctc: bool = False,
        seen: Callable[[Reading], None] | None = None,
    ):
        self.model, self.processor = loaded
        self.ctc = ctc or self.model.config.stage == 1
        self.seen = seen
        self.batch_size, self.max_new_tokens, self.draft, self.accept = batch_size, max_new_tokens, draft, accept

    def read(self, windows: Sequence[Window], *, timed: bool = False) -> list[Text]:
        """The text of each window.

        Args:
            timed: give the words with their times. Windows that overlap others have them anyway.
        """
        return [text for text, _ in self._read(windows, timed)]

    def _read(self, windows: Sequence[Window], timed: bool, again: int = 0) -> list[tuple[Text, int]]:
        """The text of each window and its `agreement` with CTC.

        Args:
            again: 1 for pieces of a window whose text CTC does not confirm, which are not cut for that reason again;
                2 for pieces that were put together, which are not cut at all.
        """
        found: list[tuple[Text, int]] = []
        for start in range(0, len(windows), self.batch_size):
            found += self._read_batch(windows[start : start + self.batch_size], timed, again)
        return found

    def _read_batch(self, windows: Sequence[Window], timed: bool, again: int) -> list[tuple[Text, int]]:
        nothing = Text("", ()), 0
        loud = [window for window in windows if not window.silent]
        if not loud:
            return [nothing] * len(windows)
        clips, cut, readings = [self.processor.features(window.samples) for window in loud], [], []
        if self.ctc:
            readings = read_clips(self.model, self.processor, clips)
        else:
            texts = answer(
                self.model,
                self.processor,
                [TRANSCRIBE_PROMPT] * len(clips),
                clips,
                max_new_tokens=self.max_new_tokens,
                cut_off=cut,
                draft=self.draft,
                accept=self.accept,
                readings=readings,
            )
        if self.seen is not None:
            for reading in readings:
                self.seen(reading)
        found: dict[int, tuple[Text, int]] = {}
        for place, (window, reading) in enumerate(zip(loud, readings, strict=True)):
            by_ctc = self.processor.ctc_text(reading.path.cpu(), self.model.blank)
            text = " ".join((by_ctc if self.ctc else texts[place]).split())
            agreed = agreement(text, by_ctc)
            wanted = bool(timed or window.before or window.after)
            pieces, confirmed = [], agreed >= 0
            share = None if self.ctc or place in cut or again == 2 else share_read(text, by_ctc)
            if share is not None:
                pieces = split(window, share)
            elif not self.ctc and not again and not confirmed and len(by_ctc.split()) >= MISSED:
                pieces = split(window, 0.0, overlap=False)
            if pieces:
                pieces, parts = self._read_pieces(window, pieces, wanted, again if confirmed else 1)
                joined = join(pieces, [part for part, _ in parts])
                doubled = sum(len(part.text.split()) for part, _ in parts) - len(joined.text.split())
                if (better := sum(each for _, each in parts) - doubled) > agreed:
                    found[id(window)] = joined, better
                    continue
            words = timed_words(self.model, self.processor, reading, text, window.samples) if wanted else None
            words = words and [
                word._replace(start=word.start + window.start, end=word.end + window.start) for word in words
            ]
            found[id(window)] = Text(text, None if words is None else tuple(words), place in cut), agreed
        return [found.get(id(window), nothing) for window in windows]

    def _read_pieces(
        self, window: Window, pieces: list[Window], timed: bool, again: int
    ) -> tuple[list[Window], list[tuple[Text, int]]]:
        """Read the pieces of a window, and once more `together` those that CTC does not confirm."""
        parts = self._read(pieces, timed, again)
        runs = [run for run in together(pieces, [agreed for _, agreed in parts]) if len(run) < len(pieces)]
        wider = [_span(window, pieces[run[0]], pieces[run[-1]]) for run in runs]
        for run, whole, part in reversed(list(zip(runs, wider, self._read(wider, timed, 2), strict=True))):
            if part[1] > sum(parts[place][1] for place in run):
                pieces[run[0] : run[-1] + 1], parts[run[0] : run[-1] + 1] = [whole], [part]
        return pieces, parts


def share_read(text: str, by_ctc: str) -> float | None:
    """Which share of the words that CTC reads a text has, if `MISSED` of them and more are missing in one place.

    None if nothing is missing, or if the text is no part of what CTC reads: then CTC may be wrong.
    """
    a, b, matcher, matched = _matched(text, by_ctc)
    missed = max(
        ((i2 - i1) - (j2 - j1) for kind, i1, i2, j1, j2 in matcher.get_opcodes() if kind != "equal"), default=0
    )
    return matched / len(a) if missed >= MISSED and 2 * matched >= len(b) else None


def agreement(text: str, by_ctc: str) -> int:
    """How many words of a text CTC reads, too, less those that it does not read."""
    _, b, _, matched = _matched(text, by_ctc)
    return 2 * matched - len(b)


def _matched(text: str, by_ctc: str) -> tuple[list[str], list[str], SequenceMatcher, int]:
    """The words that CTC reads, those of a text, how they match, and how many do."""
    a, b = by_ctc.casefold().split(), text.casefold().split()
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    return a, b, matcher, sum(block.size for block in matcher.get_matching_blocks())


def split(window: Window, share: float, *, overlap: bool = True) -> list[Window]:
    """Pieces of a window of which a model has read only `share`: phrases between pauses, or else windows that overlap.

    Where it has read more than half, two phrases and more stay together, up to 0.6 of the window's length. Empty if the
    window is too short to be cut, or without pauses if nothing may `overlap`. Silence around the phrases is left out.
    """
    if window.seconds <= SHORTEST:
        return []
    target = 0.6 * window.seconds if share > 0.5 else SHORTEST / 2
    size = round(ENERGY_FRAME * SAMPLING_RATE)
    powers = frame_powers(window.samples, size)
    quiet, silent = is_quiet(powers), is_quiet(powers, SILENT)
    cuts = [
        (a + b) // 2 * size
        for a, b in quiet_runs(quiet)
        if a > 0 and b < len(quiet) and (b - a) * size >= PAUSE * SAMPLING_RATE
    ]
    if not cuts and not overlap:
        return []
    if not cuts:
        parts = list(cut_into_windows(iter([window.samples]), seconds=max(target, SHORTEST), overlap=SHORTEST / 4))
    else:
        bounds, begun = [*cuts, len(window.samples)], 0
        parts = []
        for end, following in zip(bounds, [*bounds[1:], None], strict=True):
            if following is None or following - begun > target * SAMPLING_RATE:
                sound = np.flatnonzero(~silent[begun // size : end // size]) * size + begun
                first = max(begun, sound[0] - round(LEAD * SAMPLING_RATE)) if len(sound) else begun
                last = min(end, sound[-1] + size + round(TAIL * SAMPLING_RATE)) if len(sound) else end
                parts.append(Window(window.samples[first:last], first / SAMPLING_RATE))
                begun = end
    parts = [part._replace(start=window.start + part.start) for part in parts]
    parts[0] = parts[0]._replace(before=window.before)
    parts[-1] = parts[-1]._replace(after=window.after)
    return parts if len(parts) > 1 else []


def together(pieces: Sequence[Window], agreed: Sequence[int]) -> list[range]:
    """Runs of pieces that are read together, because a text has a negative `agreement` with CTC.

    Each such piece is put together with the neighbour behind the shorter pause. Pieces that overlap have none.
    """
    gaps = [b.start - a.start - a.seconds for a, b in zip(pieces, pieces[1:], strict=False)]
    closed = set()
    for place, each in enumerate(agreed):
        beside = [gap for gap in (place - 1, place) if 0 <= gap < len(gaps) and not pieces[gap + 1].before]
        if each < 0 and beside:
            closed.add(min(beside, key=lambda gap: gaps[gap]))
    firsts = [place for place in range(len(pieces)) if place - 1 not in closed]
    runs = [range(a, b) for a, b in zip(firsts, [*firsts[1:], len(pieces)], strict=True)]
    return [run for run in runs if len(run) > 1]


def _span(window: Window, first: Window, last: Window) -> Window:
    """The part of a window from one of its pieces to another."""
    start, end = (round((second - window.start) * SAMPLING_RATE) for second in (first.start, last.start + last.seconds))
    return Window(window.samples[start:end], first.start, first.before, last.after)


def join(windows: Sequence[Window], texts: Sequence[Text]) -> Text:
    """The text of windows that follow each other."""
    joined: list[Text] = []
    for window, text in zip(windows, texts, strict=True):
        if joined and window.before:
            joined[-1], text = seam(joined[-1], text, window)
        joined.append(text)
    words = None
    if all(text.words is not None for text in joined):
        words = tuple(word for text in joined for word in text.words or ())
    return Text(" ".join(text.text for text in joined if text.text), words, any(text.cut_off for text in joined))


def seam(before: Text, after: Text, window: Window) -> tuple[Text, Text]:
    """Two texts without the words that both have, because `window`, whose text is `after`, shares its beginning.

    The two are joined behind the word nearest to the middle of what they share that both have heard at the same time;
    without such a word each has the words of its half.
    """
    left, right = list(before.words or ()), list(after.words or ())
    start, end = window.start, window.start + window.before
    middle = (start + end) / 2

    def centre(word: TimedWord) -> float:
        return (word.start + word.end) / 2

    pairs = [  # the factor keeps a word from being taken for an equal one beside it
        (abs(centre(a) + centre(b) - 2 * middle) / 2 + 3 * abs(a.start - b.start), i, j)
        for i, a in enumerate(left)
        for j, b in enumerate(right)
        if a.end > start
        and b.start < end
        and abs(a.start - b.start) <= SAME_WORD
        and letters(a.word) == letters(b.word)
    ]
    if pairs:
        _, i, j = min(pairs)
        left, right = left[: i + 1], right[j + 1 :]
    else:
        left = [word for word in left if centre(word) < middle]
        right = [word for word in right if centre(word) >= middle]
    left_text, right_text = (
        part._replace(text=text_of(words), words=tuple(words)) for part, words in ((before, left), (after, right))
    )
    return left_text, right_text


def letters(word: str) -> str:
    """A word without punctuation, in small letters; punctuation alone stays."""
    return "".join(letter for letter in word if letter.isalnum()).casefold() or word
