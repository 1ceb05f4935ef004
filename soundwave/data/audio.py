"""Read audio files as mono float32 arrays: `decoders` decodes them, soxr resamples them."""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from soundwave.data.containers import CONVERT, RATES, Fault
from soundwave.data.decoders import MISSING, Source, open_source
from soundwave.data.members import member_of, open_member

SAMPLING_RATE = 16_000  # Whisper's
LONGEST_SECONDS = 30.0  # of one input of Whisper's encoder
LONGEST_SAMPLES = 480_159  # at 16 kHz; they still give no more mel frames than 30 s, one for every 160 samples
ROUNDING = 0.05  # s, because manifests often round durations to one decimal
TO_THE_END = 1 << 62  # samples
CANCELLED = 0.01  # A mean of channels with less than this share of their energy: one is the other, turned over.


class AudioError(ValueError):
    """An audio file that cannot be used. The message is one line: file, what was found, how to mend it.

    Attributes:
        path: the file.
        fault: the message without the file.
    """

    def __init__(self, path: str | Path, fault: str):
        super().__init__(path, fault)
        self.path, self.fault = path, fault

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.fault}"


def shown(path: str | Path) -> str:
    """A path on one line, with escapes if it has unprintable characters."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def load_audio(
    path: str | Path,
    *,
    sampling_rate: int = SAMPLING_RATE,
    offset: float = 0.0,
    duration: float | None = None,
) -> np.ndarray:
    """Read an audio file -> float32 [samples] at `sampling_rate` Hz, mono, full scale ±1.

    WAV, FLAC, Ogg (Vorbis, Opus), MP3, M4A (AAC), WebM, AIFF, AU, SPHERE, CAF and others are read. Channels are
    averaged. The path may also name a recording inside a file, as `soundwave.data.members` says.

    Args:
        offset, duration: the part to read, in seconds. With duration None it reaches to the end of the file; a
            duration may exceed the end by 0.05 s.

    Raises:
        AudioError: the file is missing, a folder, empty, not audio, cut short or damaged, holds NaN or infinite
            samples, has channels that cancel each other, or ends before offset + duration.
    """
    return np.concatenate(
        list(read_blocks(path, sampling_rate=sampling_rate, offset=offset, duration=duration)), dtype=np.float32
    )


def read_blocks(
    path: str | Path,
    *,
    sampling_rate: int = SAMPLING_RATE,
    offset: float = 0.0,
    duration: float | None = None,
) -> Iterator[np.ndarray]:
    """Read an audio file block by block: joined, the blocks are what `load_audio` returns.

    The memory that this takes does not grow with the recording's length. Damage that only decoding finds raises in
    its place, after the blocks before it.

    Raises:
        AudioError: as in `load_audio`.
    """
    with _opened(path) as source:
        rate = source.rate
        start, stop = _bounds(source, offset, duration)
        resampler = soxr.ResampleStream(rate, sampling_rate, 1, dtype="float32") if rate != sampling_rate else None
        found = given = 0
        for block in _mono(source.blocks(start, stop)):
            found += len(block)
            if resampler is not None:
                block = resampler.resample_chunk(block)
            given += len(block)
            if len(block):
                yield block
        wanted = min(stop, source.frames) - start
        if wanted - found > (0 if source.exact else MISSING * rate):
            part = f"{found / rate:g} s of a part of {wanted / rate:g} s"
            raise Fault(f"ends after {part}: it is cut short or damaged; {CONVERT}")
        if resampler is not None and len(block := resampler.resample_chunk(np.empty(0, np.float32), last=True)):
            given += len(block)
            yield block
        if not given:
            raise Fault("holds no samples; record it again")


def seconds_of(path: str | Path) -> float:
    """Length of a recording in seconds, from its header, or by counting where its header does not tell.

    Raises:
        AudioError: the file is missing, not audio, or seen to be cut short without decoding it.
    """
    return rate_and_seconds_of(path)[1]


def rate_and_seconds_of(path: str | Path) -> tuple[int, float]:
    """Samples a second and length in seconds of a recording, as `seconds_of` finds it.

    Raises:
        AudioError: as in `seconds_of`.
    """
    with _opened(path) as source:
        return source.rate, source.frames / source.rate


@contextmanager
def _opened(path: str | Path) -> Iterator[Source]:
    """Open a file for reading; every error with it becomes an AudioError."""
    try:
        member = member_of(path)
        if member is not None:
            with ExitStack() as stack:
                inside, file = stack.enter_context(open_member(member))
                yield _checked(open_source(inside, file, stack))
            return
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Fault("is not a file; name an audio file")
        if status.st_size == 0:
            raise Fault("is empty; record it again")
        if Path(path).suffix.lower() == ".raw":  # soundfile would need its rate and format
            raise Fault("is raw samples without a header; convert it to WAV")
        with ExitStack() as stack:
            file = stack.enter_context(open(path, "rb"))
            if Path(path).suffix.lower() in (".jsonl", ".json") and file.peek(1)[:1] in (b"{", b"["):
                raise Fault(
                    "is JSON, but not audio; name an audio file, or score a model on a manifest with "
                    "`soundwave evaluate MANIFEST --model FOLDER`"
                )
            yield _checked(open_source(path, file, stack))
    except FileNotFoundError:
        raise AudioError(path, "does not exist; name an audio file") from None
    except OSError as error:
        raise AudioError(path, f"cannot be opened ({error.strerror}); name a readable audio file") from None
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".") or "damaged"
        raise AudioError(path, f"cannot be decoded ({reason}); {CONVERT}") from None
    except Fault as fault:
        raise AudioError(path, str(fault)) from None


def _checked(source: Source) -> Source:
    if not RATES[0] <= source.rate <= RATES[1]:
        raise Fault(f"its header says {source.rate} samples a second; {CONVERT}")
    return source


def _bounds(source: Source, offset: float, duration: float | None) -> tuple[int, int]:
    """The first sample of a part, and the one after its last."""
    if not 0 <= offset < math.inf:
        raise Fault(f"offset = {offset:g}; give seconds from 0 up")
    if duration is not None and not 0 < duration < math.inf:
        raise Fault(f"duration = {duration:g}; give seconds above 0, or None")
    rate = source.rate
    length = source.frames / rate
    end = length if duration is None else offset + duration
    if offset > 0 and offset >= length:
        raise Fault(f"offset = {offset:g} s, but the file lasts {length:g} s; give an offset inside it")
    if end > length + (ROUNDING if source.exact else ROUNDING + MISSING):
        raise Fault(f"offset + duration = {end:g} s, but the file lasts {length:g} s; correct the duration")
    start, stop = round(offset * rate), min(round(end * rate), source.frames)
    if stop <= start and source.frames:
        raise Fault(f"offset = {offset:g} s and end = {end:g} s have no sample between them; give a longer part")
    return start, stop if source.exact or stop < source.frames else TO_THE_END


def _mono(blocks: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The mean of the channels, float32 [n] of each block [n, channels].

    Raises:
        Fault: samples are no numbers, or the channels cancel each other.
    """
    energy, left = 0.0, 0.0
    for block in blocks:
        if not np.isfinite(block).all():
            raise Fault("holds NaN or infinite samples; export it again")
        mean = block.mean(axis=1)
        if block.shape[1] > 1:
            energy += float(np.square(block, dtype=np.float64).mean(axis=1).sum())
            left += float(np.square(mean, dtype=np.float64).sum()) * block.shape[1] / 2  # 1/n of n independent ones
        yield mean
    if left < CANCELLED * energy:
        raise Fault(
            "has channels of opposite phase, whose mean is next to silent; keep one of them: "
            "ffmpeg -i FILE -af 'pan=mono|c0=c0' FILE.wav"
        )


def __getattr__(name: str) -> Any:
    """`windows`, which has moved to `soundwave.inference.long`; this path is kept for one version."""
    if name == "windows":
        from soundwave.inference.long import windows

        return windows
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
