"""Read audio files as mono float32 arrays: soundfile decodes them, soxr resamples them."""

import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import soxr

SAMPLING_RATE = 16_000  # Whisper's
LONGEST_SECONDS = 30.0  # of one input of Whisper's encoder
RATES = (
    1_000,
    1_000_000,
)  # Hz; other rates come from damaged headers, and resampling could then exhaust the memory
ROUNDING = 0.05  # s, because manifests often round durations to one decimal
BLOCK = 1 << 22  # frames per read, because a damaged header may promise 2**63
CONVERT = "get a whole copy, or convert it: ffmpeg -i FILE FILE.wav"


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
    """Read a WAV, FLAC, Ogg or MP3 file -> float32 [samples] at `sampling_rate` Hz, mono, full scale ±1.

    Channels are averaged.

    Args:
        offset, duration: the part to read, in seconds. With duration None it reaches to the end of the file; a
            duration may exceed the end by 0.05 s.

    Raises:
        AudioError: the file is missing, a folder, empty, not audio, truncated or damaged, holds NaN or infinite
            samples, or ends before offset + duration. (A truncated Ogg file is valid, only shorter.)
    """
    with _opened(path) as (file, handle):
        rate = file.samplerate
        audio = _read_part(file, handle, offset, duration)
    if not np.isfinite(audio).all():
        raise AudioError(path, "holds NaN or infinite samples; export it again")
    if rate != sampling_rate:
        audio = soxr.resample(audio, rate, sampling_rate)
    if len(audio) == 0:
        raise AudioError(path, "holds no samples; record it again")
    return audio


def seconds_of(path: str | Path) -> float:
    """Length of a recording in seconds, from its header.

    Raises:
        AudioError: the file is missing or not audio.
    """
    with _opened(path) as (file, _):
        _refuse_odd_rate(file)
        return file.frames / file.samplerate


class _Fault(Exception):
    """What was found and how to mend it, without the file's name."""


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[soundfile.SoundFile, BinaryIO]]:
    """Open a file for reading; every error with it becomes an AudioError."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise _Fault("is not a file; name an audio file")
        if status.st_size == 0:
            raise _Fault("is empty; record it again")
        if Path(path).suffix.lower() == ".raw":  # soundfile would need its rate and format
            raise _Fault("is raw samples without a header; convert it to WAV")
        with open(path, "rb") as handle, soundfile.SoundFile(handle) as file:
            yield file, handle
    except FileNotFoundError:
        raise AudioError(path, "does not exist; name an audio file") from None
    except OSError as error:
        raise AudioError(path, f"cannot be opened ({error.strerror}); name a readable audio file") from None
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".") or "damaged"
        raise AudioError(path, f"cannot be decoded ({reason}); {CONVERT}") from None
    except _Fault as fault:
        raise AudioError(path, str(fault)) from None


def _read_part(file: soundfile.SoundFile, handle: BinaryIO, offset: float, duration: float | None) -> np.ndarray:
    """Read a part of the file -> float32 [frames], the mean of the channels."""
    if not 0 <= offset < math.inf:
        raise _Fault(f"offset = {offset:g}; give seconds from 0 up")
    if duration is not None and not 0 < duration < math.inf:
        raise _Fault(f"duration = {duration:g}; give seconds above 0, or None")
    rate = file.samplerate
    _refuse_odd_rate(file)
    _refuse_cut_wav(file)

    length = file.frames / rate
    end = length if duration is None else offset + duration
    if offset > 0 and offset >= length:
        raise _Fault(f"offset = {offset:g} s, but the file lasts {length:g} s; give an offset inside it")
    if end > length + ROUNDING:
        raise _Fault(f"offset + duration = {end:g} s, but the file lasts {length:g} s; correct the duration")

    start = round(offset * rate)
    wanted = min(round(end * rate), file.frames) - start
    if wanted <= 0 < file.frames:
        raise _Fault(f"offset = {offset:g} s and end = {end:g} s have no sample between them; give a longer part")
    if start > 0:
        file.seek(start)
    blocks, found = [np.empty(0, np.float32)], 0  # no array of the full length, which is absurd in a damaged header
    while found < wanted:
        block = file.read(min(wanted - found, BLOCK), dtype="float32", always_2d=True)
        if len(block) == 0:
            raise _Fault(f"ends after {found / rate:g} s of a part of {wanted / rate:g} s; {CONVERT}")
        blocks.append(block.mean(axis=1))
        found += len(block)
    if duration is None and file.format == "MP3":
        _refuse_misjudged_mp3(handle)
    return np.concatenate(blocks)


def _refuse_odd_rate(file: soundfile.SoundFile) -> None:
    if not RATES[0] <= file.samplerate <= RATES[1]:
        raise _Fault(f"its header says {file.samplerate} samples a second; {CONVERT}")


def _refuse_cut_wav(file: soundfile.SoundFile) -> None:
    """Refuse a truncated WAV file. libsndfile shortens it without an error, but its log tells both lengths."""
    for said, held in re.findall(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE):
        # recorders that write into a pipe announce about 2 or 4 GiB, and some include the header in the length
        if int(held) + 1024 < int(said) < 0x7FFF0000:
            raise _Fault(f"is truncated, {held} of {said} bytes are there; {CONVERT}")


def _refuse_misjudged_mp3(handle: BinaryIO) -> None:
    """Refuse an MP3 file that was not read to its end.

    If its header has no length, libsndfile guesses it from the first bit rate and stops reading there.
    """
    position, size = handle.tell(), os.fstat(handle.fileno()).st_size
    if position < 0.9 * size:  # only tags may follow the audio, a few kilobytes
        raise _Fault(f"has no length in its header, {position} of {size} bytes could be read; {CONVERT}")


def __getattr__(name: str) -> Any:
    """`windows`, which has moved to `soundwave.inference.long`; this path is kept for one version."""
    if name == "windows":
        from soundwave.inference.long import windows

        return windows
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
