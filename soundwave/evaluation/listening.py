"""Takes samples' recordings in batches of windows of at most 30 s, and leaves out those that cannot be used."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import regex
from torch import Tensor

from soundwave.data.audio import SAMPLING_RATE, AudioError, read_blocks, shown
from soundwave.data.collate import SILENCE, LeftOut, with_duration
from soundwave.data.manifest import Sample
from soundwave.evaluation.progress import NAMED, Progress, say
from soundwave.inference.long import stream_windows
from soundwave.model.processing import SoundwaveProcessor

SHORTEST = 400  # samples at 16 kHz: 25 ms, the first window of Whisper's analysis
LETTERS_A_SECOND = 50  # Nobody says so many: fast speech has 25. Such a text belongs to another recording.

T = TypeVar("T")
_END: Any = object()


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
    """The samples that are left out, by their place. The first `NAMED` are named on stderr at once."""

    def add(self, index: int, one: LeftOut) -> None:
        self[index] = one
        if len(self) <= NAMED:
            say(f"left out: {one}")
        elif len(self) == NAMED + 1:
            say("left out: more samples, which the scores list (left_out)")

    def in_order(self) -> list[LeftOut]:
        return [self[index] for index in sorted(self)]


@dataclass
class Heard(Generic[T]):
    """A sample whose clips are being answered.

    Attributes:
        index: place of the sample.
        results: what its clips so far gave, in order.
        waiting: number of clips that wait for their batch.
        read: whether all clips were taken from the recording.
        fault: why it is left out.
        more: whether the recording goes on behind what is heard of it.
    """

    index: int
    results: list[T] = field(default_factory=list)
    waiting: int = 0
    read: bool = False
    fault: AudioError | None = None
    more: bool = False


def listen(
    samples: Sequence[Sample],
    wanted: Sequence[str],
    processor: SoundwaveProcessor,
    batch_size: int,
    respond: Callable[[Sequence[Sample], Sequence[Tensor | None]], Sequence[T]],
    left: Omissions,
    *,
    to_the_end: Callable[[Sample], bool],
    strict: bool,
    progress: str | None,
) -> Iterator[Heard[T]]:
    """Give every sample that is not in `left` with the results of its clips, as soon as it has them all.

    `wanted` are the references, and `respond` gives a result for each clip of a batch. Recordings for which
    `to_the_end` is false are heard up to the end of their first window.

    Batches hold clips of one task and, as far as possible, of similar duration, the longest recordings first. Of a
    recording no more is in memory than what its batch holds.

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
    begun: list[Heard[T]] = []
    batch: list[tuple[Heard[T], Tensor | None]] = []
    given = 0

    def finished() -> Iterator[Heard[T]]:
        nonlocal given
        for heard in [heard for heard in begun if heard.read and not heard.waiting]:
            begun.remove(heard)
            shown.step()
            if heard.fault is not None:
                _leave_out(heard.index, samples[heard.index], heard.fault, left, strict)
            else:
                given += 1
                yield heard

    def flush() -> Iterator[Heard[T]]:
        if batch:
            results = respond([samples[heard.index] for heard, _ in batch], [clip for _, clip in batch])
            for (heard, _), result in zip(batch, results, strict=True):
                heard.results.append(result)
                heard.waiting -= 1
            batch.clear()
        yield from finished()

    with Progress(progress, len(places)) as shown:
        for order in _by_task([lengths[index] for index in places]):
            for place in order:
                heard: Heard[T] = Heard(places[place])
                begun.append(heard)
                sample = samples[heard.index]
                clips = _clips(sample, wanted[heard.index], processor, heard, to_the_end=to_the_end(sample))
                while not heard.read:
                    try:
                        clip = next(clips, _END)
                    except AudioError as error:
                        heard.fault, clip = error, _END
                        batch[:] = [one for one in batch if one[0] is not heard]
                        heard.waiting = 0
                    if clip is _END:
                        heard.read = True
                        yield from finished()
                        break
                    heard.waiting += 1
                    batch.append((heard, clip))
                    if len(batch) == batch_size:
                        yield from flush()
            yield from flush()
    if not given:
        raise ValueError(f"no sample can be used; the first: {left.in_order()[0]}")


def _leave_out(index: int, sample: Sample, error: AudioError, left: Omissions, strict: bool) -> None:
    if strict:
        raise AudioError(f"{sample.id}: {shown(error.path)}", error.fault)
    left.add(index, LeftOut(sample.id, str(sample.audio), error.fault))


def _clips(
    sample: Sample, wanted: str, processor: SoundwaveProcessor, heard: Heard[Any], *, to_the_end: bool
) -> Iterator[Tensor | None]:
    """Log-mel features [n_mels, T_mel] of the windows of a sample's recording, at most 30 s each; None for text only.

    Without `to_the_end` the first window alone is given, and `heard.more` says whether there are more.

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
            heard.more, following = True, None
        if following is None:
            _refuse(sample, text, samples, peak, whole=not heard.more)
        clip = processor.features(piece)
        if not clip.isfinite().all():
            fault = f"has samples up to {np.abs(piece).max():.3g}; export it again with a full scale of 1"
            raise AudioError(sample.audio, fault)
        yield clip
        piece = following


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
