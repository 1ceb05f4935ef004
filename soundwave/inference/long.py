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
from soundwave.inference.answer import LoadedModel, answer, check_draft, check_longest, load_model
from soundwave.inference.reading import Reader, Text, Window, cut_into_windows, seam
from soundwave.inference.timestamps import segments_of
from soundwave.inference.transcript import Segment, Transcript, Word

TIMESTAMPS = ("word", "segment")
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
class Recording:
    """A recording that is being transcribed: `waiting` of its windows have no text yet."""

    number: int
    seconds: float = 0.0
    waiting: int = 0
    read: bool = False  # to its end, or to its fault
    fault: ValueError | None = None
    cut_off: bool = False
    open: tuple[Window, Text] | None = None  # the last window, if the one behind it shares its end
    until: float = 0.0  # where its last word ends
    texts: list[str] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def take(self, window: Window, text: Text) -> list[tuple[Window, Text]]:
        """The windows whose texts are settled once `window` says `text`."""
        settled = []
        if self.open is not None:
            before, text = seam(self.open[1], text, window)
            settled.append((self.open[0], before))
            self.open = None
        if window.after:
            self.open = window, text
        else:
            settled.append((window, text))
        return settled

    def add(self, window: Window, text: Text, timestamps: str | None) -> Transcript:
        """The transcript of a window whose text is settled; it becomes a part of the recording's."""
        self.cut_off |= text.cut_off
        self.texts.append(text.text)
        timed = []
        for word in () if timestamps is None else text.words or ():  # two windows may time the words of a seam apart
            start = max(word.start, self.until)
            timed.append(word._replace(start=start, end=max(word.end, start)))
            self.until = timed[-1].end
        segments = segments_of(timed, window.start)
        words = [word.public() for word in timed] if timestamps == "word" else []
        self.segments += segments
        self.words += words
        seconds = round(len(window.samples) / SAMPLING_RATE - window.before, 3)
        return _transcript(text.text, seconds, words, segments, timestamps)

    def transcript(self, timestamps: str | None) -> Transcript:
        text = " ".join(text for text in self.texts if text)
        return _transcript(text, round(self.seconds, 3), self.words, self.segments, timestamps)


def _transcript(
    text: str, seconds: float, words: Sequence[Word], segments: Sequence[Segment], timestamps: str | None
) -> Transcript:
    return Transcript(
        text,
        seconds,
        tuple(words) if timestamps == "word" else None,
        None if timestamps is None else tuple(segments),
    )


@overload
def transcribe(
    audio: str | os.PathLike[str] | np.ndarray | Tensor | Sequence[float],
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = ...,
    batch_size: int = ...,
    max_new_tokens: int = ...,
    draft: str = ...,
    accept: float | None = ...,
    timestamps: str | None = ...,
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
    accept: float | None = ...,
    timestamps: str | None = ...,
) -> list[Transcript]: ...
def transcribe(
    audio: Audio | Sequence[Audio],
    model: LoadedModel | str | Path,
    *,
    sampling_rate: int = SAMPLING_RATE,
    batch_size: int = 1,
    max_new_tokens: int = 256,
    draft: str = "ctc",
    accept: float | None = None,
    timestamps: str | None = None,
) -> Transcript | list[Transcript]:
    """Write down what is said in one recording, or in each of a list of recordings.

    A recording over 30 s is cut into windows at its pauses; where there is none, two windows overlap, and no word is
    lost or doubled. Where the language model leaves out five words or more in a row that CTC reads, the window is cut
    into smaller ones, which are read again. A model of stage I is read by CTC. Every recording is checked before the
    model is loaded; of a file only the header is read for this.

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
        accept: with `draft="ctc"`, a probability from which on what CTC reads is the text, unread by the language
            model: that of the least sure token of a window. Faster, but not the same text; for models whose CTC writes
            the transcript alone. None lets the language model check everything.
        timestamps: "segment" gives the transcript `segments` with their times, "word" also `words`. None saves the time
            that this takes.

    Returns:
        A `Transcript` (`text`, `seconds`), or a list of them in the order of `audio`.

    Raises:
        AudioError: a file cannot be used.
        ValueError: samples that are not mono, not floating point, empty, not finite or far above full scale; a
            sampling rate outside 1 kHz to 1 MHz; a `batch_size` below 1; another `draft`, `accept` or
            `timestamps`.
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
            accept=accept,
            timestamps=timestamps,
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
    accept: float | None = None,
    timestamps: str | None = None,
    leave_out: Callable[[int, ValueError], None] | None = None,
    cut_off: list[int] | None = None,
    heard: Callable[[float], None] | None = None,
    said: Callable[[int, Transcript], None] | None = None,
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
        said: called with the number of the recording and the transcript of each window, as soon as its text is settled:
            in order within a recording, and before the transcript of the whole is given. Silent windows have none.

    Raises:
        AudioError, ValueError, FileNotFoundError, TypeError: as in `transcribe`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}, but it must be 1 or more")
    check_draft(draft, accept)
    if timestamps is not None and timestamps not in TIMESTAMPS:
        raise ValueError(f"timestamps = {timestamps!r}, but it must be {' or '.join(map(repr, TIMESTAMPS))}, or None")
    check_longest(max_new_tokens)
    if (path := _path(recordings)) is not None:
        raise TypeError(f"recordings = {path!r}, but it must be an iterable; use transcribe for one file")
    reader = Reader(_loaded(model), batch_size=batch_size, max_new_tokens=max_new_tokens, draft=draft, accept=accept)
    return _transcripts(recordings, reader, sampling_rate, timestamps, leave_out or _raise, cut_off, heard, said)


def _raise(number: int, fault: ValueError) -> None:
    raise fault


def _transcripts(
    recordings: Iterable[Audio],
    reader: Reader,
    sampling_rate: int,
    timestamps: str | None,
    leave_out: Callable[[int, ValueError], None],
    cut_off: list[int] | None,
    heard: Callable[[float], None] | None,
    said: Callable[[int, Transcript], None] | None,
) -> Iterator[Transcript]:
    seconds = 0.0  # of all recordings, as far as they are read
    started: deque[Recording] = deque()
    batch: list[tuple[Recording, Window]] = []

    def transcribe_batch() -> None:
        texts = reader.read([window for _, window in batch], timed=timestamps is not None)
        for (recording, window), text in zip(batch, texts, strict=True):
            for settled in recording.take(window, text):
                part = recording.add(*settled, timestamps)
                if said is not None and part.text:
                    said(recording.number, part)
            recording.waiting -= 1
        batch.clear()
        tell()

    def tell() -> None:
        if heard is not None and not batch:  # all that is read has its text
            heard(seconds)

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
                limit, name = reader.max_new_tokens, f"recordings[{recording.number}]"
                warnings.warn(f"{name}: a text was cut off after max_new_tokens = {limit}", stacklevel=2)
            yield recording.transcript(timestamps)

    for number, audio in enumerate(recordings):
        recording = Recording(number)
        started.append(recording)
        pieces = _pieces(audio, sampling_rate, f"recordings[{number}]")
        while True:
            try:
                window = next(pieces, None)
            except ValueError as fault:
                recording.fault = fault
                window = None
            if window is None:
                break
            recording.seconds += window.seconds - window.before
            seconds += window.seconds - window.before
            # Nothing is said in a silent window. One that shares a part with others is read for their sake.
            if window.silent and not (window.before or window.after):
                tell()
                continue
            recording.waiting += 1
            batch.append((recording, window))
            if len(batch) == reader.batch_size:
                transcribe_batch()
                yield from finished()
        recording.read = True
        if recording.fault is not None and batch:  # what is known before the fault is given first
            transcribe_batch()
        yield from finished()
    if batch:
        transcribe_batch()
    yield from finished()


def read_whole(reader: Reader, blocks: Iterator[np.ndarray]) -> tuple[str, bool]:
    """The text of one recording that comes block by block, each float32 [samples] at 16 kHz, as `transcribe` gives it.

    Returns:
        The text, and whether the limit of new tokens has cut off a part of it.
    """
    return read_windows(reader, cut_into_windows(blocks))


def read_windows(reader: Reader, windows: Iterable[Window]) -> tuple[str, bool]:
    """As `read_whole`, of a recording that `cut_into_windows` has cut."""
    recording, batch = Recording(0), []

    def read_batch() -> None:
        for window, text in zip(batch, reader.read(batch), strict=True):
            for settled in recording.take(window, text):
                recording.add(*settled, None)
        batch.clear()

    for window in windows:
        if window.silent and not (window.before or window.after):
            continue
        batch.append(window)
        if len(batch) == reader.batch_size:
            read_batch()
    read_batch()
    return recording.transcript(None).text, recording.cut_off


def _pieces(audio: Audio, sampling_rate: int, name: str) -> Iterator[Window]:
    """The windows of a recording at 16 kHz; a file is read only as far as they are taken."""
    if (path := _path(audio)) is not None:
        yield from cut_into_windows(read_blocks(path))
    else:
        yield from cut_into_windows(iter([as_samples(audio, sampling_rate, name=name)]))


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

    Each cut is in the middle of the longest pause of the last 5 s before the limit; if `seconds` is under 10, of the
    last half of the window. Without a pause it is in the middle of the quietest frame of 20 ms.

    Raises:
        ValueError: `seconds` is under 0.08, so there are no two frames among which to choose.
    """
    found = cut_into_windows(iter([audio]), sampling_rate=sampling_rate, seconds=seconds, overlap=0, spare=0)
    return [window.samples for window in found]


def stream_windows(
    blocks: Iterator[np.ndarray], *, sampling_rate: int = SAMPLING_RATE, seconds: float = LONGEST_SECONDS
) -> Iterator[np.ndarray]:
    """Cut a recording that comes block by block, each [samples], where `windows` cuts it; one window is held at a time.

    The last window may be longer than `seconds` by what makes no further mel frame, 159 samples at 16 kHz.

    Raises:
        ValueError: as in `windows`.
    """
    for window in cut_into_windows(blocks, sampling_rate=sampling_rate, seconds=seconds, overlap=0):
        yield window.samples
