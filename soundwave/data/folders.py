"""Folders as manifests: recordings with a text beside each, and the data sets that come in a form of their own.

    a/1.wav, a/1.txt                  any recordings; the text file has the words of the one that is named like it
    84/121123/84-121123.trans.txt     LibriSpeech: a line has the name of a recording beside the file, and its words
    metadata.csv, wavs/LJ001-1.wav    LJSpeech: name|words|words with numbers written out, the last of which are taken
    state.json, data-….arrow          Hugging Face's `save_to_disk`
    *.parquet                         the parts of one split
    cuts.000000.jsonl.gz, recording.000000.tar    Lhotse's Shar

A folder that holds several data sets, or their splits, is refused: the message names them.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from soundwave.data.audio import shown
from soundwave.data.chats import Refused
from soundwave.data.chats import show as _show
from soundwave.data.cuts import shar_source
from soundwave.data.files import ENDINGS
from soundwave.data.source import LONGEST_LINE, ManifestError, Source, stamp_of
from soundwave.data.tables import Entry, columns_source, is_table, reading, table_source

MANIFESTS = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".tsv.gz")
NO_TRANSCRIPTS = {"readme", "license", "licence", "copying", "changelog", "notice", "requirements", "speakers", "books"}
SHARD = re.compile(r"[-_.]?\d+(-of-\d+)?(-[0-9a-f]{8,})?$")  # the number at the end of a part's name


def folder_source(folder: Path) -> Source:
    """What a folder holds.

    Raises:
        ManifestError: nothing that is read, or several things.
    """
    folder = folder if folder.name not in ("", "..") else Path(os.path.abspath(folder))  # the ids need a name
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if "dataset_dict.json" in names:
        splits = [name for name in names if (folder / name).is_dir()]
        raise _several(folder, "splits", [f"{name}/" for name in splits])
    if "state.json" in names and any(name.endswith(".arrow") for name in names):
        return columns_source(folder, _arrow_files(folder))
    if parquet := [name for name in names if name.lower().endswith(".parquet") and (folder / name).is_file()]:
        if len({SHARD.sub("", name[: -len(".parquet")]) for name in parquet}) > 1:
            raise _several(folder, "Parquet files of several names", parquet)
        return columns_source(folder, [folder / name for name in parquet])
    if any(name.startswith("cuts.") and ".jsonl" in name for name in names):
        return shar_source(folder)
    if "metadata.csv" in names:
        return metadata_source(folder / "metadata.csv")
    if tables := [name for name in names if name.lower().endswith(MANIFESTS)]:
        raise _several(folder, "manifests", tables)
    files = _files(folder)
    if transcripts := [file for file in files if file.endswith(".trans.txt")]:
        return Source(folder, folder, partial(_librispeech, folder, transcripts), lambda: _stamp(folder))
    if any(os.path.splitext(file)[1].lower() in ENDINGS for file in files):
        if any(_is_transcript(file) for file in files):
            return Source(folder, folder, partial(_beside, folder, files), lambda: _stamp(folder))
        raise ManifestError(
            f"{shown(folder)}: is a folder of recordings without texts; put a .txt file beside each, named like it, or "
            "write a manifest (.jsonl)"
        )
    raise ManifestError(f"{shown(folder)}: is a folder; name a manifest (.jsonl) in it")


def metadata_source(path: Path) -> Source:
    """A file metadata.csv: a table with a header, or LJSpeech's."""
    with reading(path) as file:
        head = file.readline(LONGEST_LINE)
    first = head.decode("utf-8", "replace").strip()
    is_ljspeech = "|" in first and (path.parent / "wavs").is_dir() and not is_table(Path("metadata"), head)
    if not is_ljspeech:
        return table_source(path)
    return Source(path, path.parent, partial(_ljspeech, path), lambda: stamp_of(os.stat(path)))


def _several(folder: Path, what: str, names: Sequence[str]) -> ManifestError:
    shortened = ", ".join(shown(name) for name in names[:5]) + (", …" if len(names) > 5 else "")
    return ManifestError(f"{shown(folder)}: is a folder that holds {what}; name one of them: {shortened}")


def _arrow_files(folder: Path) -> list[Path]:
    """The files that Hugging Face's state.json names, in its order."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [part["filename"] for part in state["_data_files"]]
    except (ValueError, KeyError, TypeError, OSError):
        raise ManifestError(f"{shown(folder)}: its state.json is damaged; save the data set again") from None
    if not names:
        raise ManifestError(f"{shown(folder)}: its state.json names no files; save the data set again")
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name):
            raise ManifestError(
                f"{shown(folder)}: its state.json names {_show(name)}, no file in the folder; save it again"
            )
        if not (folder / name).is_file():
            raise ManifestError(
                f"{shown(folder)}: {shown(name)}, which its state.json names, is missing; get a whole copy"
            )
    return [folder / name for name in names]


def _files(folder: Path) -> list[str]:
    """All files below, also of linked folders, relative to it and in alphabetical order; no hidden ones."""
    found, seen = [], set()

    def fail(error: OSError) -> None:
        raise ManifestError(f"{shown(error.filename)}: cannot be read ({error.strerror}); name a readable folder")

    for place, inner, names in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(place)
        inner[:] = [] if real in seen else sorted(name for name in inner if not name.startswith("."))
        if real not in seen:
            found += [os.path.relpath(os.path.join(place, name), folder) for name in names if not name.startswith(".")]
        seen.add(real)
    return sorted(found)


def _stamp(folder: Path) -> str:
    """The names of all files, and the sizes and times of the text files."""
    digest = hashlib.sha256()
    for name in _files(folder):
        about = stamp_of(os.stat(folder / name)) if name.endswith(".txt") and os.path.exists(folder / name) else []
        digest.update(json.dumps([name, *about]).encode())
    return digest.hexdigest()


def _is_transcript(name: str) -> bool:
    stem, ending = os.path.splitext(os.path.basename(name))
    return ending.lower() == ".txt" and stem.lower() not in NO_TRANSCRIPTS


def _refuse_link(folder: Path, name: str) -> None:
    """Refuse a file that leads out of the folder: its text would get into the data, and from there into pages."""
    real, root = os.path.realpath(folder / name), os.path.realpath(os.path.dirname(folder / name))
    if os.path.islink(folder / name) and os.path.commonpath([real, root]) != root:
        raise Refused(f"{_show(name)} is a symbolic link out of its folder, to {_show(real)}; copy the file")


def _words_in(folder: Path, name: str) -> str:
    """The text of a file, on one line.

    Raises:
        Refused: it is no text, or leads out of the folder.
    """
    _refuse_link(folder, name)
    if os.path.exists(folder / name) and not os.path.isfile(folder / name):
        raise Refused(f"{_show(name)} is a folder, a pipe or a device; write the words into a file")
    try:
        with open(folder / name, "rb") as file:
            raw = file.read(LONGEST_LINE + 1)
    except OSError as error:
        raise Refused(f"{_show(name)} cannot be read ({error.strerror}); give yourself permission to read it") from None
    if len(raw) > LONGEST_LINE:
        raise Refused(
            f"{_show(name)} has more than {LONGEST_LINE >> 20} MiB; it should have the words of one recording"
        )
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise Refused(f"{_show(name)} is UTF-16 text; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{_show(name)}: byte {raw[error.start]:#04x} is not UTF-8; save it as UTF-8 text") from None
    if "\0" in text:
        raise Refused(f"{_show(name)} is a binary file; save it as UTF-8 text")
    words = " ".join(text.split())
    if not words:
        raise Refused(f"{_show(name)} is empty; write what is said, or move it and its recording away")
    return words


def _beside(folder: Path, files: list[str]) -> Iterator[Entry]:
    texts = {os.path.splitext(name)[0]: name for name in files if name.lower().endswith(".txt")}
    recordings: dict[str, list[str]] = {}
    for name in files:
        stem, ending = os.path.splitext(name)
        if ending.lower() in ENDINGS:
            recordings.setdefault(stem, []).append(name)
    for stem, names in recordings.items():
        place = shown(names[0])
        if len(names) > 1:
            both = " and ".join(map(_show, names[:2]))
            yield place, Refused(f"{both} have one text; keep one of them")
        elif stem not in texts:
            yield (
                place,
                Refused(f"has no text: {_show(stem + '.txt')} is not there; write it, or move the recording away"),
            )
        else:
            try:
                yield place, {"audio_filepath": names[0], "text": _words_in(folder, texts[stem])}
            except Refused as error:
                yield place, error
    for stem, name in texts.items():
        if stem not in recordings and _is_transcript(name):
            yield (
                shown(name),
                Refused(f"has no recording: none is named {_show(stem)} with .wav or the like; move it away"),
            )


def _librispeech(folder: Path, transcripts: list[str]) -> Iterator[Entry]:
    for name in transcripts:
        folder_of = os.path.dirname(name)
        there: dict[str, str] = {}
        for file in sorted(os.listdir(folder / folder_of), reverse=True):
            if os.path.splitext(file)[1].lower() in ENDINGS:
                there[os.path.splitext(file)[0]] = file
        try:
            _refuse_link(folder, name)
        except Refused as error:
            raise ManifestError(f"{shown(folder)}: {error}") from None
        for number, line in _text_lines(folder / name):
            where = f"{shown(name)}, line {number}"
            if isinstance(line, Refused):
                yield where, line
                continue
            key, _, words = line.partition(" ")
            if not words.strip():
                yield where, Refused(f"has no words after the name {_show(key)}; write what is said")
            else:
                file = there.pop(key, f"{key}.flac")
                yield where, {"audio_filepath": os.path.join(folder_of, file), "text": words.strip()}
        for file in sorted(there.values()):
            yield (
                os.path.join(folder_of, file),
                Refused(f"has no line in {_show(name)}; add one, or move the recording away"),
            )


def _ljspeech(path: Path) -> Iterator[Entry]:
    for number, line in _text_lines(path):
        if isinstance(line, Refused):
            yield str(number), line
            continue
        key, *texts = line.split("|")
        words = next((text.strip() for text in reversed(texts) if text.strip()), "")
        if len(texts) not in (1, 2) or not key.strip() or not words:
            yield str(number), Refused(f"is no line of LJSpeech, name|words|words: {_show(line[:40])}; correct it")
        else:
            yield str(number), {"audio_filepath": f"wavs/{key.strip()}.wav", "text": words}


def _text_lines(path: Path) -> Iterator[tuple[int, str | Refused]]:
    """The lines of a text file that are not blank, without their ends."""
    with reading(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise ManifestError(
                    f"{shown(path)}:{number}: is longer than {LONGEST_LINE >> 20} MiB; it is no transcript"
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                yield number, Refused(f"byte {line[error.start]:#04x} is not UTF-8; save the file as UTF-8 text")
                continue
            if text:
                yield number, text
