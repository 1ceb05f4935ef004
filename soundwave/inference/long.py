"""Recordings of any length: they are cut into windows of at most 30 s, and transcribed or asked about."""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import soxr
from numpy.typing import ArrayLike
from torch import Tensor

from soundwave.data.audio import LONGEST_SECONDS, RATES, SAMPLING_RATE, load_audio, read_blocks, seconds_of
from soundwave.data.collate import SILENCE, TRANSCRIBE_PROMPT
from soundwave.inference.answer import LoadedModel, answer, check_draft, load_model, read_ctc
from soundwave.inference.transcript import Transcript

FRAME = 0.02  # seconds of a frame among which `windows` chooses the place of a cut
SEARCH = 5.0  # seconds before the limit in which `windows` looks for a pause
MEL_FRAME = 160  # samples of a mel frame
LOUDEST = 100.0  # Larger samples are integers that were cast to floating point without being scaled.

Audio = str | os.PathLike[str] | ArrayLike


class Answer(NamedTuple):
    """An answer about a recording.

    Attributes:
        text: the answer.
        seconds: length of the recording.
        heard: how many seconds the model has heard, counted from the beginning; less than `seconds` for a long
            recording.
    """

    text: str
    seconds: float
    heard: float

    def __str__(self) -> str:
        return self.text


@dataclass
class _Recording:
    """A recording that is being transcribed: `waiting` of its windows have no text yet."""

    number: int
    samples: int = 0
    waiting: int = 0
    read: bool = False  # to its end, or to its fault
    fault: ValueError | None = None
    cut_off: bool = False
    texts: list[str] = field(default_factory=list)

    def transcript(self) -> Transcript:
        return Transcript(" ".join(" ".join(self.texts).split()), round(self.samples / SAMPLING_RATE, 3))


@overload
def transcribe(
    audio: str | os.PathLike[str] | np.ndarray | Tensor | Sequence[float],
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = ...,
    batch_size: int = ...,
    max_new_tokens: int = ...,
    draft: str = ...,
) -> Transcript: ...
@overload
def transcribe(
    audio: Sequence[Audio],
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = ...,
    batch_size: int = ...,
    max_new_tokens: int = ...,
    draft: str = ...,
) -> list[Transcript]: ...
def transcribe(
    audio: Audio | Sequence[Audio],
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = SAMPLING_RATE,
    batch_size: int = 1,
    max_new_tokens: int = 256,
    draft: str = "ctc",
) -> Transcript | list[Transcript]:
    """Write down what is said in one recording, or in each of a list of recordings.

    A recording over 30 s is cut into windows where it is quietest. A model of stage I is read by CTC. Every recording
    is checked before the model is loaded; of a file only the header is read for this.

    Args:
        audio: a file of any usual format, or samples: an array, tensor or list of numbers, floating point
            [samples], mono, full scale ±1. Or a list or tuple of files and samples.
        model: what `soundwave.load` returned, or the folder of a trained model, which is then loaded for this call.
        sampling_rate: sampling rate of the arrays, in Hz. Files bring their own.
        batch_size: number of windows that are transcribed together, of one recording or of several. More than 1 is
            faster. In half precision a text may then depend on the other windows of its batch, because their number
            and lengths change the order in which a product is summed.
        max_new_tokens: longest text of a window, in tokens of the language model.
        draft: "ctc" lets the language model check the text that CTC reads, and write only what it would have written
            otherwise: the same text, sooner. "none" lets it write every token.

    Returns:
        A `Transcript` (`text`, `seconds`), or a list of them in the order of `audio`.

    Raises:
        AudioError: a file cannot be used.
        ValueError: samples that are not mono, not floating point, empty, not finite or far above full scale; a
            sampling rate outside 1 kHz to 1 MHz; a `batch_size` below 1; another `draft`.
        FileNotFoundError: the folder holds no model.
        TypeError: `model` is neither a loaded model nor a folder.
    """
    several = isinstance(audio, (list, tuple)) and not (audio and isinstance(audio[0], Real))
    recordings: Any = audio if several else [audio]
    for index, recording in enumerate(recordings):
        if (path := _path(recording)) is not None:
            seconds_of(path)
        else:
            _check_samples(recording, sampling_rate, f"audio[{index}]" if several else "audio")
    found = list(
        transcribe_each(
            recordings,
            model,
            sampling_rate=sampling_rate,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            draft=draft,
        )
    )
    return found if several else found[0]


def transcribe_each(
    recordings: Iterable[Audio],
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = SAMPLING_RATE,
    batch_size: int = 1,
    max_new_tokens: int = 256,
    draft: str = "ctc",
    leave_out: Callable[[int, ValueError], None] | None = None,
    cut_off: list[int] | None = None,
    heard: Callable[[float], None] | None = None,
) -> Iterator[Transcript]:
    """Transcribe any number of recordings of any length, read and given one after the other, in order.

    `recordings` may be an iterator over more recordings than fit into memory: the next one is taken from it only when
    the batch needs more windows. A file is read block by block, so that an hour of it takes no more memory than a
    minute. The other arguments are those of `transcribe`.

    Args:
        leave_out: called with the number and the fault of each recording that cannot be used, whose transcript is then
            empty and 0 s long. Without it the fault is raised when its turn comes, after the transcripts before it.
        cut_off: the number of each recording with a window whose text `max_new_tokens` has cut off is added to it
            before its transcript is given. Without it a warning says so.
        heard: called after each batch of windows with how many seconds have been transcribed so far, of all recordings
            together.

    Raises:
        AudioError, ValueError, FileNotFoundError, TypeError: as in `transcribe`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}, but it must be 1 or more")
    check_draft(draft)
    if (path := _path(recordings)) is not None:
        raise TypeError(f"recordings = {path!r}, but it must be an iterable; use transcribe for one file")
    return _transcripts(
        recordings,
        _loaded(model),
        sampling_rate,
        batch_size,
        max_new_tokens,
        draft,
        leave_out or _raise,
        cut_off,
        heard,
    )


def _raise(number: int, fault: ValueError) -> None:
    raise fault


def _transcripts(
    recordings: Iterable[Audio],
    loaded: LoadedModel,
    sampling_rate: int,
    batch_size: int,
    max_new_tokens: int,
    draft: str,
    leave_out: Callable[[int, ValueError], None],
    cut_off: list[int] | None,
    heard: Callable[[float], None] | None,
) -> Iterator[Transcript]:
    samples = 0  # of all recordings, as far as they are read
    started: deque[_Recording] = deque()
    batch: list[tuple[_Recording, Tensor]] = []

    def transcribe_batch() -> None:
        clips, cut = [clip for _, clip in batch], []
        if loaded.model.config.stage == 1:
            texts = read_ctc(*loaded, clips)[0]
        else:
            prompts = [TRANSCRIBE_PROMPT] * len(clips)
            texts = answer(*loaded, prompts, clips, max_new_tokens=max_new_tokens, cut_off=cut, draft=draft)
        for place, ((recording, _), text) in enumerate(zip(batch, texts, strict=True)):
            recording.texts.append(text)
            recording.waiting -= 1
            recording.cut_off |= place in cut
        batch.clear()
        tell()

    def tell() -> None:
        if heard is not None and not batch:  # all that is read has its text
            heard(samples / SAMPLING_RATE)

    def finished() -> Iterator[Transcript]:
        while started and started[0].read and not started[0].waiting:
            recording = started.popleft()
            if recording.fault is not None:
                leave_out(recording.number, recording.fault)
                yield Transcript("", 0.0)
                continue
            if recording.cut_off and cut_off is not None:
                cut_off.append(recording.number)
            elif recording.cut_off:
                name = f"recordings[{recording.number}]"
                warnings.warn(f"{name}: a text was cut off after max_new_tokens = {max_new_tokens}", stacklevel=2)
            yield recording.transcript()

    for number, audio in enumerate(recordings):
        recording = _Recording(number)
        started.append(recording)
        pieces = _pieces(audio, sampling_rate, f"recordings[{number}]")
        while True:
            try:
                piece = next(pieces, None)
            except ValueError as fault:
                recording.fault = fault
                piece = None
            if piece is None:
                break
            recording.samples += len(piece)
            samples += len(piece)
            if np.abs(piece).max(initial=0) <= SILENCE:  # nothing was said, and a language model would invent words
                tell()
                continue
            recording.waiting += 1
            batch.append((recording, loaded.processor.features(piece)))
            if len(batch) == batch_size:
                transcribe_batch()
                yield from finished()
        recording.read = True
        if recording.fault is not None and batch:  # what is known before the fault is given first
            transcribe_batch()
        yield from finished()
    if batch:
        transcribe_batch()
    yield from finished()


def _pieces(audio: Audio, sampling_rate: int, name: str) -> Iterator[np.ndarray]:
    """The windows of a recording, float32 [samples] at 16 kHz; a file is read only as far as they are taken."""
    if (path := _path(audio)) is not None:
        yield from stream_windows(read_blocks(path))
    else:
        yield from stream_windows(iter([as_samples(audio, sampling_rate, name=name)]))


def ask(
    audio: Audio,
    question: str,
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = SAMPLING_RATE,
    max_new_tokens: int = 128,
    cut_off: list[int] | None = None,
) -> Answer:
    """Ask a question about a recording. Of a long recording the model hears the first window, at most 30 s.

    Args:
        audio, model, sampling_rate: as in `transcribe`, for one recording.
        question: what to ask.
        max_new_tokens: longest answer, in tokens of the language model.
        cut_off: 0 is added to it if `max_new_tokens` has cut off the answer. Without it a warning says so.

    Returns:
        An `Answer` (`text`, `seconds`, `heard`).

    Raises:
        ValueError: the question is empty, or the model has seen stage I only and cannot answer.
        AudioError, ValueError, FileNotFoundError, TypeError: as in `transcribe`.
    """
    if not question.strip():
        raise ValueError("the question is empty; ask something about the recording")
    if (path := _path(audio)) is not None:
        seconds, pieces = seconds_of(path), stream_windows(read_blocks(path))  # an hour need not be read
    else:
        samples = as_samples(audio, sampling_rate)
        seconds, pieces = len(samples) / SAMPLING_RATE, stream_windows(iter([samples]))
    first = next(pieces)
    loaded = _loaded(model)
    if loaded.model.config.stage == 1:
        raise ValueError("the model has seen stage 1 only and cannot answer; train stage 2, or transcribe with it")
    clip, cut = loaded.processor.features(first), [] if cut_off is None else cut_off
    text = answer(*loaded, [question], [clip], max_new_tokens=max_new_tokens, cut_off=cut)[0]
    if cut and cut_off is None:
        warnings.warn(f"the answer was cut off after max_new_tokens = {max_new_tokens}", stacklevel=2)
    return Answer(text, round(seconds, 3), round(len(first) / SAMPLING_RATE, 3))


def _path(audio: Any) -> str | None:
    """The path of a file; None for samples."""
    return os.fspath(audio) if isinstance(audio, (str, os.PathLike)) else None


def _loaded(model: LoadedModel | str | Path) -> LoadedModel:
    if isinstance(model, LoadedModel):
        return model
    if isinstance(model, (str, os.PathLike)):
        return load_model(model)
    raise TypeError(
        f"model is of type {type(model).__name__}, but it must be what soundwave.load returned, or a model's folder"
    )


def as_samples(audio: Audio, sampling_rate: int = SAMPLING_RATE, *, name: str = "audio") -> np.ndarray:
    """A file, or an array of samples at `sampling_rate` Hz, as float32 [samples] at 16 kHz.

    Args:
        audio: as in `transcribe`, for one recording.
        sampling_rate: sampling rate of an array, in Hz. A file brings its own.
        name: what error messages call an array.

    Raises:
        AudioError: a file cannot be used.
        ValueError: samples that are not mono, not floating point, empty, not finite or far above full scale; or a
            sampling rate outside 1 kHz to 1 MHz.
    """
    if (path := _path(audio)) is not None:
        return load_audio(path)
    samples = _check_samples(audio, sampling_rate, name)
    if sampling_rate != SAMPLING_RATE:
        samples = soxr.resample(samples, sampling_rate, SAMPLING_RATE)
    if not len(samples):
        raise ValueError(f"{name} is too short: no sample is left of it at {SAMPLING_RATE} Hz")
    return samples


def _check_samples(audio: Any, sampling_rate: int, name: str) -> np.ndarray:
    """The samples of an array, tensor or list as float32 [samples]. ValueError: they are no recording."""
    if not RATES[0] <= sampling_rate <= RATES[1]:
        raise ValueError(f"sampling_rate = {sampling_rate:g}, but it must be {RATES[0]} to {RATES[1]} Hz")
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        audio = (audio.float() if audio.is_floating_point() else audio).numpy()
    try:
        samples = np.asarray(audio)
    except ValueError:  # rows of several lengths
        samples = np.empty(0, object)
    if samples.dtype.kind not in "biufc":
        raise ValueError(f"{name} is of type {type(audio).__name__}, but a recording is a file or an array of samples")
    if samples.ndim != 1 or not len(samples):
        raise ValueError(f"{name} has shape {list(samples.shape)}, but one recording is [samples], mono and not empty")
    if samples.dtype.kind != "f":
        raise ValueError(
            f"{name} is {samples.dtype}, but samples are floating point with a full scale of ±1; divide samples of "
            "16 bits by 32768"
        )
    if not np.isfinite(samples).all():
        raise ValueError(f"{name} holds NaN or infinite samples")
    if (loudest := np.abs(samples).max()) > LOUDEST:
        raise ValueError(
            f"{name} has samples up to {loudest:.3g}, but their full scale is ±1; divide samples of 16 bits by 32768"
        )
    return samples.astype(np.float32)


def windows(
    audio: np.ndarray, *, sampling_rate: int = SAMPLING_RATE, seconds: float = LONGEST_SECONDS
) -> list[np.ndarray]:
    """Cut a recording [samples] into views of at most `seconds` each. Joined, they give the recording again.

    Each cut is in the middle of the quietest 20 ms frame of the last 5 s before the limit; if `seconds` is under 10, of
    the last half of the window.

    Raises:
        ValueError: `seconds` is under 0.08, so there are no two frames among which to choose.
    """
    limit, frame, search = _sizes(sampling_rate, seconds)
    pieces = []
    while len(audio) > limit:
        cut = _cut(audio, limit, frame, search)
        pieces.append(audio[:cut])
        audio = audio[cut:]
    return [*pieces, audio]


def stream_windows(
    blocks: Iterator[np.ndarray], *, sampling_rate: int = SAMPLING_RATE, seconds: float = LONGEST_SECONDS
) -> Iterator[np.ndarray]:
    """Cut a recording that comes block by block, each [samples], where `windows` cuts it; one window is held at a time.

    The last window may be longer than `seconds` by what makes no further mel frame, 159 samples at 16 kHz.

    Raises:
        ValueError: as in `windows`.
    """
    limit, frame, search = _sizes(sampling_rate, seconds)
    spare = MEL_FRAME - 1
    waiting: list[np.ndarray] = []
    count = 0
    for block in blocks:
        waiting.append(block)
        count += len(block)
        while count > limit + max(search // 5, spare):  # where a cut falls does not depend on what comes later
            audio = np.concatenate(waiting)
            cut = _cut(audio, limit, frame, search)
            yield audio[:cut]
            waiting, count = [audio[cut:]], count - cut
    audio = np.concatenate(waiting) if waiting else np.empty(0, np.float32)
    yield from [audio] if len(audio) <= limit + spare else windows(audio, sampling_rate=sampling_rate, seconds=seconds)


def _sizes(sampling_rate: int, seconds: float) -> tuple[int, int, int]:
    """Samples of a window, of a frame, and of the part before the limit in which a cut is looked for."""
    limit = int(seconds * sampling_rate)
    frame = int(FRAME * sampling_rate)
    search = min(int(SEARCH * sampling_rate), limit // 2)
    if search < 2 * frame:
        raise ValueError(f"seconds = {seconds:g}; wanted at least {4 * FRAME:g}")
    return limit, frame, search


def _cut(audio: np.ndarray, limit: int, frame: int, search: int) -> int:
    """Where the first window of a recording ends that is longer than `limit`: in the middle of the quietest frame."""
    first = limit - search
    last = min(limit, len(audio) - search // 5)  # The rest must be long enough to hold a word, too.
    count = (last - first) // frame
    frames = audio[first : first + count * frame].reshape(count, frame)
    return first + int(np.square(frames).mean(axis=1).argmin()) * frame + frame // 2
