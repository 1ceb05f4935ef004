"""Recordings of any length: they are cut into windows of at most 30 s, and transcribed or asked about."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import soxr
from numpy.typing import ArrayLike
from torch import Tensor

from soundwave.data.audio import LONGEST_SECONDS, RATES, SAMPLING_RATE, load_audio, seconds_of
from soundwave.data.collate import TRANSCRIBE_PROMPT
from soundwave.inference.answer import LoadedModel, answer, load_model, read_ctc

FRAME = 0.02  # seconds of a frame among which `windows` chooses the place of a cut
SEARCH = 5.0  # seconds before the limit in which `windows` looks for a pause
LOUDEST = 100.0  # Larger samples are integers that were cast to floating point without being scaled.

Audio = str | os.PathLike[str] | ArrayLike


class Transcript(NamedTuple):
    """What was said in a recording.

    Attributes:
        text: the words, on one line.
        seconds: length of the recording.
    """

    text: str
    seconds: float

    def __str__(self) -> str:
        return self.text


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
    """A recording whose windows are being transcribed; `waiting` of them have no text yet."""

    seconds: float
    waiting: int
    texts: list[str] = field(default_factory=list)


@overload
def transcribe(
    audio: str | os.PathLike[str] | np.ndarray | Tensor | Sequence[float],
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = ...,
    batch_size: int = ...,
    max_new_tokens: int = ...,
) -> Transcript: ...
@overload
def transcribe(
    audio: Sequence[Audio],
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = ...,
    batch_size: int = ...,
    max_new_tokens: int = ...,
) -> list[Transcript]: ...
def transcribe(
    audio: Audio | Sequence[Audio],
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = SAMPLING_RATE,
    batch_size: int = 1,
    max_new_tokens: int = 256,
) -> Transcript | list[Transcript]:
    """Write down what is said in one recording, or in each of a list of recordings.

    A recording over 30 s is cut into windows where it is quietest. A model of stage I is read by CTC. Every recording
    is checked before the model is loaded; of a file only the header is read for this.

    Args:
        audio: a file (WAV, FLAC, Ogg or MP3), or samples: an array, tensor or list of numbers, floating point
            [samples], mono, full scale ±1. Or a list or tuple of files and samples.
        model: what `soundwave.load` returned, or the folder of a trained model, which is then loaded for this call.
        sampling_rate: sampling rate of the arrays, in Hz. Files bring their own.
        batch_size: number of windows that are transcribed together, of one recording or of several. More than 1 is
            faster. In half precision a text may then depend on the other windows of its batch, because their number
            and lengths change the order in which a product is summed.
        max_new_tokens: longest text of a window, in tokens of the language model.

    Returns:
        A `Transcript` (`text`, `seconds`), or a list of them in the order of `audio`.

    Raises:
        AudioError: a file cannot be used.
        ValueError: samples that are not mono, not floating point, empty, not finite or far above full scale; a
            sampling rate outside 1 kHz to 1 MHz; a `batch_size` below 1.
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
            recordings, model, sampling_rate=sampling_rate, batch_size=batch_size, max_new_tokens=max_new_tokens
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
) -> Iterator[Transcript]:
    """Transcribe any number of recordings, read and given one after the other, in order.

    `recordings` may be an iterator over more recordings than fit into memory: the next one is taken from it only when
    the batch needs more windows. The other arguments are those of `transcribe`.

    A recording that cannot be used raises when its turn comes; the transcripts of those before it are given first.

    Raises:
        AudioError, ValueError, FileNotFoundError, TypeError: as in `transcribe`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}, but it must be 1 or more")
    if (path := _path(recordings)) is not None:
        raise TypeError(f"recordings = {path!r}, but it must be an iterable; use transcribe for one file")
    return _transcripts(recordings, _loaded(model), sampling_rate, batch_size, max_new_tokens)


def _transcripts(
    recordings: Iterable[Audio], loaded: LoadedModel, sampling_rate: int, batch_size: int, max_new_tokens: int
) -> Iterator[Transcript]:
    started: deque[_Recording] = deque()
    batch: list[tuple[_Recording, Tensor]] = []

    def transcribe_batch() -> None:
        clips = [clip for _, clip in batch]
        if loaded.model.config.stage == 1:
            texts = read_ctc(*loaded, clips)[0]
        else:
            texts = answer(*loaded, [TRANSCRIBE_PROMPT] * len(clips), clips, max_new_tokens=max_new_tokens)
        for (recording, _), text in zip(batch, texts, strict=True):
            recording.texts.append(text)
            recording.waiting -= 1
        batch.clear()

    def finished() -> Iterator[Transcript]:
        while started and not started[0].waiting:
            recording = started.popleft()
            yield Transcript(" ".join(" ".join(recording.texts).split()), recording.seconds)

    fault = None
    for index, audio in enumerate(recordings):
        try:
            samples = as_samples(audio, sampling_rate, name=f"recordings[{index}]")
        except ValueError as error:
            fault = error
            break
        pieces = windows(samples)
        recording = _Recording(round(len(samples) / SAMPLING_RATE, 3), len(pieces))
        started.append(recording)
        for piece in pieces:
            batch.append((recording, loaded.processor.features(piece)))
            if len(batch) == batch_size:
                transcribe_batch()
                yield from finished()
    if batch:
        transcribe_batch()
    yield from finished()
    if fault:
        raise fault


def ask(
    audio: Audio,
    question: str,
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = SAMPLING_RATE,
    max_new_tokens: int = 128,
) -> Answer:
    """Ask a question about a recording. Of a long recording the model hears the first window, at most 30 s.

    Args:
        audio, model, sampling_rate: as in `transcribe`, for one recording.
        question: what to ask.
        max_new_tokens: longest answer, in tokens of the language model.

    Returns:
        An `Answer` (`text`, `seconds`, `heard`).

    Raises:
        ValueError: the model has seen stage I only and cannot answer.
        AudioError, ValueError, FileNotFoundError, TypeError: as in `transcribe`.
    """
    path = _path(audio)
    seconds = 0.0 if path is None else seconds_of(path)
    if path is not None and seconds > 2 * LONGEST_SECONDS:
        # The first window ends within the first 30 s and is the same whatever follows; an hour need not be read.
        samples = load_audio(path, duration=2 * LONGEST_SECONDS)
    else:
        samples = as_samples(audio, sampling_rate)
        seconds = len(samples) / SAMPLING_RATE
    loaded = _loaded(model)
    if loaded.model.config.stage == 1:
        raise ValueError("the model has seen stage 1 only and cannot answer; train stage 2, or transcribe with it")
    first = windows(samples)[0]
    text = answer(*loaded, [question], [loaded.processor.features(first)], max_new_tokens=max_new_tokens)[0]
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
    limit = int(seconds * sampling_rate)
    frame = int(FRAME * sampling_rate)
    search = min(int(SEARCH * sampling_rate), limit // 2)
    if search < 2 * frame:
        raise ValueError(f"seconds = {seconds:g}; wanted at least {4 * FRAME:g}")
    pieces = []
    while len(audio) > limit:
        first = limit - search
        last = min(limit, len(audio) - search // 5)  # The rest must be long enough to hold a word, too.
        count = (last - first) // frame
        frames = audio[first : first + count * frame].reshape(count, frame)
        quietest = int(np.square(frames).mean(axis=1).argmin())
        cut = first + quietest * frame + frame // 2
        pieces.append(audio[:cut])
        audio = audio[cut:]
    return [*pieces, audio]
