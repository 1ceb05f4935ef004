"""Audio files to mono float32 arrays. soundfile decodes, soxr resamples."""

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
LONGEST_SECONDS = 30.0  # that Whisper's encoder takes at a time
RATES = (1_000, 1_000_000)  # Hz; others come from damaged headers, and would blow memory up
ROUNDING = 0.05  # s; manifests often give durations with one decimal
BLOCK = 1 << 22  # frames a read; headers may promise 2**63
CONVERT = "get a whole copy, or convert it: ffmpeg -i FILE FILE.wav"


class AudioError(ValueError):
    """An audio file that cannot be used. One line: file, what was found, how to mend it.

    `fault` is the line without the file.
    """

    def __init__(self, path: str | Path, fault: str):
        super().__init__(path, fault)
        self.path, self.fault = path, fault

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.fault}"


def shown(path: str | Path) -> str:
    """A path on one line: as it is, or with its unprintable characters escaped."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def load_audio(
    path: str | Path,
    *,
    sampling_rate: int = SAMPLING_RATE,
    offset: float = 0.0,
    duration: float | None = None,
) -> np.ndarray:
    """Read a WAV, FLAC, Ogg or MP3 file -> float32 [samples] at `sampling_rate` Hz, mono, full scale ±1.

    offset, duration [s]: read that part only; duration None reads to the end, another may pass it by 0.05 s.
    Channels are averaged.

    Raises AudioError: the file is missing, a folder, empty, not audio, truncated or damaged, holds NaN or
    infinite samples, or ends before offset + duration. (An Ogg file cut short is a whole, shorter file.)
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
    """Length of a recording in seconds, from its header; AudioError if it is no recording."""
    with _opened(path) as (file, _):
        _refuse_odd_rate(file)
        return file.frames / file.samplerate


class _Fault(Exception):
    """Fault and mend, without the file's name."""


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[soundfile.SoundFile, BinaryIO]]:
    """The file, to read from; whatever goes wrong with it becomes an AudioError."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise _Fault("is not a file; name an audio file")
        if status.st_size == 0:
            raise _Fault("is empty; record it again")
        if Path(path).suffix.lower() == ".raw":  # soundfile would want to be told its rate and format
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
    """-> float32 [frames], the mean of the channels"""
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
    if start > 0:
        file.seek(start)
    blocks, found = [np.empty(0, np.float32)], 0  # not one array: a damaged header's length may be absurd
    while found < wanted:
        block = file.read(min(wanted - found, BLOCK), dtype="float32", always_2d=True)
        if len(block) == 0:
            raise _Fault(f"ends {found / rate:g} s into a part of {wanted / rate:g} s; {CONVERT}")
        blocks.append(block.mean(axis=1))
        found += len(block)
    if duration is None and file.format == "MP3":
        _refuse_misjudged_mp3(handle)
    return np.concatenate(blocks)


def _refuse_odd_rate(file: soundfile.SoundFile) -> None:
    if not RATES[0] <= file.samplerate <= RATES[1]:
        raise _Fault(f"its header says {file.samplerate} samples a second; {CONVERT}")


def _refuse_cut_wav(file: soundfile.SoundFile) -> None:
    """libsndfile shortens a cut WAV without an error; its log alone says so."""
    for said, held in re.findall(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE):
        # recorders that write into a pipe announce about 2 or 4 GiB; careless ones count the header in
        if int(held) + 1024 < int(said) < 0x7FFF0000:
            raise _Fault(f"is truncated, {held} of {said} bytes are there; {CONVERT}")


def _refuse_misjudged_mp3(handle: BinaryIO) -> None:
    """An MP3's length, when its header has none, is guessed from the first bit rate; reading stops there."""
    position, size = handle.tell(), os.fstat(handle.fileno()).st_size
    if position < 0.9 * size:  # what follows the audio is tags: a few kilobytes
        raise _Fault(f"has no length in its header, {position} of {size} bytes could be read; {CONVERT}")


def __getattr__(name: str) -> Any:
    """`windows`, which stands in `soundwave.inference.long` now; this path is kept for one version."""
    if name == "windows":
        from soundwave.inference.long import windows

        return windows
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
