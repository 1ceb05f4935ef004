"""Find the recordings that a user names: files, folders and patterns."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

# The usual endings of files that `load_audio` reads. A file that is named by itself may have any other.
ENDINGS = {
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".m4a", ".mp4", ".aac", ".webm", ".mka", ".mkv"),
    *(".aiff", ".aif", ".aifc", ".au", ".snd", ".sph", ".caf", ".w64", ".rf64", ".3gp", ".amr", ".wma", ".mov"),
}


def find_recordings(names: Iterable[str]) -> tuple[list[Path], list[Path]]:
    """The files that names stand for, in the order of the names; those of a folder or pattern in alphabetical order.

    Args:
        names: a file; a folder, whose files are taken with those of its folders, also of linked ones; files and
            folders in it whose names begin with a dot are not taken;
            or a pattern with `*`, `?`, `[…]` or `**`, for shells that do not expand it. A file is not looked at, and
            may be missing.

    Returns:
        The recordings, and the files in folders and patterns that are passed over because their endings are not those
        of audio. A file that several names stand for comes once.

    Raises:
        FileNotFoundError: a folder holds no recording, or nothing fits a pattern.
        OSError: a folder cannot be read.
    """
    found: dict[Path, None] = {}
    passed_over: dict[Path, None] = {}
    for name in names:
        if os.path.isdir(name):
            inside = sorted(_files_of(name))
            what = "is a folder that holds no recording; name an audio file, or a folder of them"
        elif not os.path.lexists(name) and ((fitting := glob.glob(name, recursive=True)) or re.search(r"[*?]", name)):
            inside = sorted(Path(file) for file in fitting if not os.path.isdir(file))
            what = "fits no recording; name audio files, a folder of them, or another pattern"
        else:
            found[Path(name)] = None
            continue
        recordings = [file for file in inside if file.suffix.lower() in ENDINGS]
        if not recordings:
            raise FileNotFoundError(f"{name} {what}")
        found |= dict.fromkeys(recordings)
        passed_over |= dict.fromkeys(file for file in inside if file.suffix.lower() not in ENDINGS)
    return list(found), [file for file in passed_over if file not in found]


def _files_of(name: str) -> Iterator[Path]:
    """The files of a folder and of those in it. A folder that links lead to again is read once."""
    seen: set[str] = set()
    for folder, inner, files in os.walk(name, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        inner[:] = [] if real in seen else sorted(part for part in inner if not part.startswith("."))
        if real not in seen:
            seen.add(real)
            yield from (Path(folder, file) for file in files if not file.startswith("."))


def _raise(error: OSError) -> None:
    raise error
