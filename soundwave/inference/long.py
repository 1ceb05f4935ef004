"""Recordings of any length: cut into windows of at most 30 s, transcribed, or asked about."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import soxr
from numpy.typing import ArrayLike
from torch import Tensor

from soundwave.data.audio import LONGEST_SECONDS, SAMPLING_RATE, load_audio, seconds_of
from soundwave.data.collate import TRANSCRIBE_PROMPT
from soundwave.inference.answer import LoadedModel, answer, load_model, read_ctc

FRAME = 0.02  # s; a frame of `windows`
SEARCH = 5.0  # s; how far before the limit `windows` looks for a pause

Audio = str | Path | ArrayLike


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
        heard: seconds of it, from its beginning, that the model has heard; less than `seconds` for a long recording.
    """

    text: str
    seconds: float
    heard: float

    def __str__(self) -> str:
        return self.text


@dataclass
class _Recording:
    """A recording whose windows are being transcribed."""

    seconds: float
    waiting: int
    texts: list[str] = field(default_factory=list)


@overload
def transcribe(
    audio: str | Path | np.ndarray | Tensor,
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

    A recording over 30 s is cut into windows where it is quietest. A model of stage I is read by CTC.

    Args:
        audio: a file (WAV, FLAC, Ogg or MP3), or an array float [samples], mono, full scale ±1; or a list of these.
        model: what `soundwave.load` returned, or the folder of a trained model, which is then loaded for this call.
        sampling_rate: of arrays, in Hz. Files bring their own.
        batch_size: windows that are transcribed together, of one recording or of several. More than 1 is faster; in
            half types a text may then depend on its neighbours, since products are rounded in another order.
        max_new_tokens: longest text of a window, in tokens of the language model.

    Returns:
        A `Transcript` (`text`, `seconds`), or a list of them in the order of `audio`.

    Raises:
        AudioError: a file that cannot be used.
        ValueError: an array that is not mono, not floating point, empty or not finite.
        FileNotFoundError: the folder holds no model.
    """
    many = isinstance(audio, (list, tuple)) and not _is_numbers(audio)
    recordings = audio if many else [audio]
    found = list(
        transcribe_each(
            recordings, model, sampling_rate=sampling_rate, batch_size=batch_size, max_new_tokens=max_new_tokens
        )
    )
    return found if many else found[0]


def transcribe_each(
    recordings: Iterable[Audio],
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = SAMPLING_RATE,
    batch_size: int = 1,
    max_new_tokens: int = 256,
) -> Iterator[Transcript]:
    """As `transcribe`, but recordings are read, and transcripts given, one after the other, in order."""
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}, but it must be 1 or more")
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
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

    for audio in recordings:
        samples = as_samples(audio, sampling_rate)
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


def ask(
    audio: Audio,
    question: str,
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = SAMPLING_RATE,
    max_new_tokens: int = 128,
) -> Answer:
    """Ask a question about a recording; of a long one the first window, at most 30 s, is heard.

    Args:
        audio, model, sampling_rate: as in `transcribe`.
        question: what to ask.
        max_new_tokens: longest answer, in tokens of the language model.

    Returns:
        An `Answer` (`text`, `seconds`, `heard`).

    Raises:
        ValueError: the model has seen stage I only, and cannot answer; and as in `transcribe`.
    """
    loaded = model if isinstance(model, LoadedModel) else load_model(model)
    if loaded.model.config.stage == 1:
        raise ValueError("the model has seen stage 1 only and cannot answer; train stage 2, or transcribe with it")
    seconds = seconds_of(audio) if isinstance(audio, (str, Path)) else None
    if seconds is not None and seconds > 2 * LONGEST_SECONDS:
        # The first window of an hour is the same without the rest of it.
        samples = load_audio(audio, duration=2 * LONGEST_SECONDS)
    else:
        samples = as_samples(audio, sampling_rate)
        seconds = len(samples) / SAMPLING_RATE
    first = windows(samples)[0]
    text = answer(*loaded, [question], [loaded.processor.features(first)], max_new_tokens=max_new_tokens)[0]
    return Answer(text, round(seconds, 3), round(len(first) / SAMPLING_RATE, 3))


def as_samples(audio: Audio, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
    """A file, or an array of samples at `sampling_rate` Hz, as float32 [samples] at 16 kHz.

    Raises:
        AudioError: a file that cannot be used.
        ValueError: an array that is not [samples], not floating point, empty or not finite.
    """
    if isinstance(audio, (str, Path)):
        return load_audio(audio)
    samples = np.asarray(audio)
    if samples.ndim != 1 or not len(samples):
        raise ValueError(f"audio has shape {list(samples.shape)}, but one recording is [samples], mono and not empty")
    if samples.dtype.kind != "f":
        raise ValueError(f"audio is {samples.dtype}, but samples are floating point with a full scale of ±1")
    if not np.isfinite(samples).all():
        raise ValueError("audio holds NaN or infinite samples")
    samples = samples.astype(np.float32)
    return samples if sampling_rate == SAMPLING_RATE else soxr.resample(samples, sampling_rate, SAMPLING_RATE)


def _is_numbers(audio: Sequence) -> bool:
    """Whether a list holds samples and not recordings."""
    return len(audio) > 0 and isinstance(audio[0], (int, float))


def windows(
    audio: np.ndarray, *, sampling_rate: int = SAMPLING_RATE, seconds: float = LONGEST_SECONDS
) -> list[np.ndarray]:
    """Cut a recording [samples] into views of at most `seconds`; joined, they are the recording again.

    A cut falls into the middle of the quietest 20 ms frame in the last 5 s (or half window) before the limit.

    Raises ValueError: `seconds` under 0.08, less than a frame to choose.
    """
    limit = int(seconds * sampling_rate)
    frame = int(FRAME * sampling_rate)
    search = min(int(SEARCH * sampling_rate), limit // 2)
    if search < 2 * frame:
        raise ValueError(f"seconds = {seconds:g}; wanted at least {4 * FRAME:g}")
    pieces = []
    while len(audio) > limit:
        first = limit - search
        last = min(limit, len(audio) - search // 5)  # the rest, too, is long enough to hold a word
        count = (last - first) // frame
        frames = audio[first : first + count * frame].reshape(count, frame)
        quietest = int(np.square(frames).mean(axis=1).argmin())
        cut = first + quietest * frame + frame // 2
        pieces.append(audio[:cut])
        audio = audio[cut:]
    return [*pieces, audio]
