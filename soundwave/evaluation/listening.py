"""Takes samples' recordings in batches of windows of at most 30 s, and leaves out those that cannot be used."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import numpy as np
import regex
from torch import Tensor

from soundwave.data.audio import SAMPLING_RATE, AudioError, read_blocks, shown
from soundwave.data.collate import SILENCE, LeftOut, with_duration
from soundwave.data.manifest import Sample
from soundwave.evaluation.progress import NAMED, Progress, say
from soundwave.inference.long import stream_windows
from soundwave.inference.reading import Window, cut_into_windows
from soundwave.model.processing import SoundwaveProcessor

SHORTEST = 400  # samples at 16 kHz: 25 ms, the first window of Whisper's analysis
LOUD = 1e6  # full scale is 1; features of samples below this are finite
LETTERS_A_SECOND = 50  # Nobody says so many: fast speech has 25. Such a text belongs to another recording.

T = TypeVar("T")


def alike(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Give the indices of the samples in batches of one task and similar duration, the longest samples first.

    A batch generates until its longest answer ends. In batches of one task no one-word answer waits for a transcript.

    Raises:
        ValueError: a batch size below 1.
    """
    check_batch_size(batch_size)
    for order in _by_task(samples):
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def check_batch_size(batch_size: int) -> None:
    """Raise ValueError for a batch size below 1."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}, but it must be 1 or more")


def _by_task(samples: Sequence[Sample]) -> Iterable[list[int]]:
    """The indices of the samples of each task, the longest samples first."""
    tasks: dict[str, list[int]] = defaultdict(list)
    for index in sorted(range(len(samples)), key=lambda i: -(samples[i].duration or 0.0)):
        tasks[samples[index].task].append(index)
    return tasks.values()


class Omissions(dict[int, LeftOut]):
    """The samples that are left out, by their place. The first `NAMED` are named on stderr at once.

    Args:
        each: called with each of them.
    """

    def __init__(self, each: Callable[[LeftOut], None] | None = None):
        super().__init__()
        self.each = each

    def add(self, index: int, one: LeftOut) -> None:
        self[index] = one
        if self.each is not None:
            self.each(one)
        if len(self) <= NAMED:
            say(f"left out: {one}")
        elif len(self) == NAMED + 1:
            say("left out: more samples, which the scores list (left_out)")

    def in_order(self) -> list[LeftOut]:
        return [self[index] for index in sorted(self)]


@dataclass
class Heard(Generic[T]):
    """A sample, and what its recording gave.

    Attributes:
        index: place of the sample.
        seconds: how much of the recording was heard.
        first_window: whether the recording goes on behind what was heard.
        in_pieces: whether it was read in windows, because it is longer than one.
        results: what its clip gave, or the whole of its windows: one entry.
    """

    index: int
    seconds: float = 0.0
    first_window: bool = False
    in_pieces: bool = False
    results: list[T] = field(default_factory=list)


def listen(
    samples: Sequence[Sample],
    wanted: Sequence[str],
    processor: SoundwaveProcessor,
    batch_size: int,
    respond: Callable[[Sequence[Sample], Sequence[Tensor | None]], Sequence[T]],
    left: Omissions,
    *,
    to_the_end: Callable[[Sample], bool],
    whole: Callable[[Sample, Iterator[Window]], T],
    strict: bool,
    progress: str | None,
    done: Mapping[int, bool] = MappingProxyType({}),
) -> Iterator[Heard[T]]:
    """Give every sample that is not in `left` with its result, as soon as it has one.

    `wanted` are the references. `respond` gives a result for each clip of a batch, and `whole` one for the windows of a
    recording of more than 30 s for which `to_the_end` is true; of others the first window is a clip. Each recording is
    read once.

    Batches hold clips of one task and, as far as possible, of similar duration, the longest recordings first. Of a
    recording no more is in memory than what its batch holds.

    Args:
        done: the samples whose results an earlier, interrupted evaluation has given, with whether they were read in
            pieces. They are not given again. Every other sample stands in the same batch as it would without them: an
            answer may depend on the batch in its last bits.

    Raises:
        AudioError: with `strict`, a recording cannot be used.
        ValueError: no sample can be used.
    """
    places = [index for index in range(len(samples)) if index not in left]
    lengths = {}
    for index in places:
        try:
            lengths[index] = with_duration(samples[index])  # for the order alone: a header may be wrong
        except AudioError as error:
            if index in done:
                raise _changed(samples[index], error) from None
            _leave_out(index, samples[index], AudioError(samples[index].audio or "", error.fault), left, strict)
    places = list(lengths)
    if strict:
        with Progress(progress and f"{progress}: recordings", len(places)) as shown:
            for index in places:
                try:
                    for _ in _clips(samples[index], wanted[index], processor, Heard(index), to_the_end=True):
                        pass
                except AudioError as error:
                    _leave_out(index, samples[index], error, left, strict)
                shown.step()
    batch: list[tuple[Heard[T], Tensor | None]] = []
    given = len(done)

    def flush() -> Iterator[Heard[T]]:
        nonlocal given
        new = [heard for heard, _ in batch if heard.index not in done]
        if new:
            clips = [again(heard.index) if heard.index in done else clip for heard, clip in batch]
            results = respond([samples[heard.index] for heard, _ in batch], clips)
            for (heard, _), result in zip(batch, results, strict=True):
                heard.results.append(result)
        for heard, _ in batch:
            shown.step()
            if heard.index not in done:
                given += 1
                yield heard
        batch.clear()

    def again(index: int) -> Tensor | None:
        """The clip of a sample that is done, for its place in a batch."""
        try:
            return hear(index)[1]
        except AudioError as error:
            raise _changed(samples[index], error) from None

    def hear(index: int) -> tuple[Heard[T], Tensor | None]:
        heard: Heard[T] = Heard(index)
        if not to_the_end(samples[index]):
            return heard, next(_clips(samples[index], wanted[index], processor, heard, to_the_end=False))
        found = _clip_or_windows(samples[index], wanted[index], processor, heard)
        if isinstance(found, Tensor) or found is None:
            return heard, found
        heard.in_pieces = True
        heard.results.append(whole(samples[index], found))
        return heard, None

    with Progress(progress, len(places)) as shown:
        for order in _by_task([lengths[index] for index in places]):
            for place in order:
                index = places[place]
                if index in done:
                    if done[index]:
                        shown.step()
                    else:
                        batch.append((Heard(index), None))
                else:
                    try:
                        heard, clip = hear(index)
                    except AudioError as error:
                        _leave_out(index, samples[index], error, left, strict)
                        shown.step()
                        continue
                    if heard.in_pieces:
                        shown.step()
                        given += 1
                        yield heard
                        continue
                    batch.append((heard, clip))
                if len(batch) == batch_size:
                    yield from flush()
            yield from flush()
    if not given:
        raise ValueError(f"no sample can be used; the first: {left.in_order()[0]}")


def _changed(sample: Sample, error: AudioError) -> AudioError:
    fault = f"was answered before, but now {error.fault}; begin the evaluation anew"
    return AudioError(sample.audio or "", fault)


def _leave_out(index: int, sample: Sample, error: AudioError, left: Omissions, strict: bool) -> None:
    if strict:
        raise AudioError(f"{sample.id}: {shown(error.path)}", error.fault)
    left.add(index, LeftOut(sample.id, str(sample.audio), error.fault))


def _clips(
    sample: Sample, wanted: str, processor: SoundwaveProcessor, heard: Heard[Any], *, to_the_end: bool
) -> Iterator[Tensor | None]:
    """Log-mel features [n_mels, T_mel] of the windows of a sample's recording, at most 30 s each; None for text only.

    Without `to_the_end` the first window alone is given, and `heard.first_window` says whether there are more.

    Raises:
        AudioError: the recording cannot be used.
    """
    if sample.audio is None:
        yield None
        return
    text = wanted if sample.task == "transcribe" else sample.text or ""  # what is said in the recording
    pieces = stream_windows(read_blocks(sample.audio, offset=sample.offset, duration=sample.duration))
    samples, peak, piece = 0, 0.0, next(pieces)
    while piece is not None:
        samples, peak = samples + len(piece), max(peak, float(np.abs(piece).max(initial=0.0)))
        following = next(pieces, None)
        if not to_the_end and following is not None:
            heard.first_window, following = True, None
        if following is None:
            heard.seconds = samples / SAMPLING_RATE
            _refuse(sample, text, samples, peak, whole=not heard.first_window)
        yield _features(sample, processor, piece)
        piece = following


def _features(sample: Sample, processor: SoundwaveProcessor, piece: np.ndarray) -> Tensor:
    """Log-mel features [n_mels, T_mel] of samples. AudioError: they are so loud that the features are not finite."""
    clip = processor.features(piece)
    if not clip.isfinite().all():
        fault = f"has samples up to {np.abs(piece).max():.3g}; export it again with a full scale of 1"
        raise AudioError(sample.audio or "", fault)
    return clip


def _clip_or_windows(
    sample: Sample, wanted: str, processor: SoundwaveProcessor, heard: Heard[Any]
) -> Tensor | None | Iterator[Window]:
    """The features [n_mels, T_mel] of a recording of one window, or else its windows; None for text only.

    The windows are checked as they are taken, and the recording as a whole behind the last one.

    Raises:
        AudioError: the recording cannot be used.
    """
    if sample.audio is None:
        return None
    text = wanted if sample.task == "transcribe" else sample.text or ""
    samples, peak = 0, 0.0

    def measured() -> Iterator[np.ndarray]:
        nonlocal samples, peak
        assert sample.audio is not None
        for block in read_blocks(sample.audio, offset=sample.offset, duration=sample.duration):
            samples, peak = samples + len(block), max(peak, float(np.abs(block).max(initial=0.0)))
            yield block

    windows = cut_into_windows(measured())
    first = next(windows)
    second = next(windows, None)
    if second is None:
        heard.seconds = samples / SAMPLING_RATE
        _refuse(sample, text, samples, peak, whole=True)
        return _features(sample, processor, first.samples)

    def checked() -> Iterator[Window]:
        for window in chain([first, second], windows):
            if peak > LOUD:
                _features(sample, processor, window.samples)
            yield window
        heard.seconds = samples / SAMPLING_RATE
        _refuse(sample, text, samples, peak, whole=True)

    return checked()


def _refuse(sample: Sample, text: str, samples: int, peak: float, whole: bool) -> None:
    """Raise AudioError for a recording of so many samples and such a peak in which `text` cannot have been said."""
    audio, seconds, short = sample.audio or "", samples / SAMPLING_RATE, text if len(text) <= 40 else f"{text[:40]}…"
    if samples < SHORTEST:
        raise AudioError(audio, f"lasts {1000 * seconds:.3g} ms, too short for speech; correct the offset and duration")
    if peak <= SILENCE and text.strip():
        raise AudioError(audio, f"is silent, but its text is {short!r}; record it again")
    letters = len(regex.findall(r"\p{L}", text))
    if whole and letters > LETTERS_A_SECOND * seconds:
        fault = f"lasts {seconds:.3g} s, too short for its text {short!r}; correct the text, or the offset and duration"
        raise AudioError(audio, fault)
