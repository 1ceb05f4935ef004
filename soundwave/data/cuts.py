"""Cuts of Lhotse as manifests: files of cuts, JSON lines or compressed with gzip, and folders in its Shar form.

A cut with one supervision is one sample: the cut's part of the recording, and the supervision's text. A cut with
several gives one sample for each, which ends where the supervision does. Keys under "custom" are read like those of a
line, so that prompts and answers may stand there.

Lhotse itself is not needed, and is not asked: its own reader would run the commands and fetch the addresses that a
manifest names. A cut that means more than one channel of one file, unchanged, is refused by name.
"""

import os
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from soundwave.data.audio import shown
from soundwave.data.chats import Refused
from soundwave.data.chats import show as _show
from soundwave.data.forms import READ_KEYS
from soundwave.data.members import Member
from soundwave.data.source import KEYS, ManifestError, Source, parse, stamp_of
from soundwave.data.tables import Entry, lines_of

SAVE = "write the cuts anew with `cuts.save_audios(folder)`"


def is_cut(row: dict[str, Any]) -> bool:
    """Whether a line is a cut of Lhotse."""
    of_a_kind = isinstance(row.get("type"), str) and row["type"].endswith("Cut")
    return (
        of_a_kind
        and bool(row.keys() & {"recording", "supervisions", "tracks"})
        or {
            "supervisions",
            "recording",
        }
        <= row.keys()
    )


def cuts_source(path: Path) -> Source:
    """The cuts of a file."""
    return Source(path, path.parent, partial(_cuts, path), lambda: stamp_of(os.stat(path)))


def shar_source(folder: Path) -> Source:
    """The cuts of a folder in Shar form: cuts.000000.jsonl.gz with recording.000000.tar, and so on.

    Raises:
        ManifestError: there is not one archive for each file of cuts.
    """
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    cuts = [name for name in names if name.startswith("cuts.") and ".jsonl" in name]
    archives = [name for name in names if name.startswith("recording.")]
    if not archives:
        raise ManifestError(
            f"{shown(folder)}: has cuts of Lhotse, but no archives recording.*.tar; name a file of cuts"
        )
    if [name.split(".")[1] for name in cuts] != [name.split(".")[1] for name in archives]:
        raise ManifestError(
            f"{shown(folder)}: has {len(cuts)} files of cuts and {len(archives)} archives of recordings, which do not "
            "belong together; get a whole copy"
        )
    if other := [name for name in archives if not name.endswith(".tar")]:
        raise ManifestError(
            f"{shown(folder)}: {shown(other[0])} is no plain tar archive; write Shar with plain .tar files"
        )
    shards = list(zip(cuts, archives, strict=True))
    return Source(
        folder,
        folder,
        partial(_shar, folder, shards),
        lambda: [[name, *stamp_of(os.stat(folder / name))] for name in (*cuts, *archives)],
    )


def _cuts(path: Path) -> Iterator[Entry]:
    for number, cut in _lines(path):
        for supervision, row in _samples(cut, None):
            yield f"{number}, supervision {supervision}" if supervision else number, row


def _shar(folder: Path, shards: list[tuple[str, str]]) -> Iterator[Entry]:
    for name, archive in shards:
        members = _members(folder / archive)
        for number, cut in _lines(folder / name):
            inside = next(members, None)
            if inside is None:
                raise ManifestError(
                    f"{shown(folder)}: {archive} ends before line {number} of {name}; get a whole copy of both"
                )
            key, at = inside
            if isinstance(cut, dict) and key != str(cut.get("id")):
                raise ManifestError(
                    f"{shown(folder)}: line {number} of {name} is the cut {_show(cut.get('id'))}, but {archive} has "
                    f"{_show(key)} in its place; get a whole copy of both"
                )
            audio = None if at is None else str(Member(archive, "", at))
            for supervision, row in _samples(cut, audio):
                part = f", supervision {supervision}" if supervision else ""
                yield f"{name}, line {number}{part}", row
        if next(members, None) is not None:
            raise ManifestError(
                f"{shown(folder)}: {archive} has more recordings than {name} has cuts; get a whole copy"
            )


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | Refused]]:
    for number, line in lines_of(path):
        try:
            yield number, parse(line)
        except ManifestError as error:
            yield number, Refused(str(error))


def _members(archive: Path) -> Iterator[tuple[str, int | None]]:
    """The recordings of an archive: the id of their cut, and where the header begins; None for a missing one."""
    try:
        with tarfile.open(archive, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # they would be kept
                stem, ending = os.path.splitext(member.name)
                if member.isreg() and ending not in (".json", ".nometa"):
                    yield stem, None if ending == ".nodata" else member.offset_data - tarfile.BLOCKSIZE
    except (tarfile.TarError, EOFError) as error:
        raise ManifestError(f"{shown(archive)}: is no tar archive, or damaged ({error}); get a whole copy") from None
    except OSError as error:
        raise ManifestError(f"{shown(archive)}: cannot be read ({error.strerror}); name a readable folder") from None


def _samples(cut: dict[str, Any] | Refused, inside: str | None) -> Iterator[tuple[int, dict[str, Any] | Refused]]:
    """The rows of a cut, each with the number of its supervision, 0 if the cut has only one."""
    if isinstance(cut, Refused):
        yield 0, cut
        return
    try:
        if not is_cut(cut):
            raise Refused(
                f"is no cut of Lhotse, but has the keys {_show(sorted(cut))}; keep cuts and other lines apart"
            )
        audio = _recording(cut, inside)
        start, duration = _seconds(cut, "start"), _seconds(cut, "duration")
        supervisions = cut.get("supervisions")
        if not isinstance(supervisions, list) or not supervisions:
            raise Refused('is a cut of Lhotse without a transcript: its "supervisions" are empty; leave it out')
    except Refused as error:
        yield 0, error
        return
    for number, supervision in enumerate(supervisions, start=1):
        several = len(supervisions) > 1
        try:
            row = _own_keys(cut) | _own_keys(supervision) | _words(supervision)
            begin, length = 0.0, duration
            if several:
                begin = max(_seconds(supervision, "start", negative=True), 0.0)
                length = min(
                    _seconds(supervision, "start", negative=True) + _seconds(supervision, "duration"), duration
                )
                length = round(length - begin, 9)
            if length <= 0:
                raise Refused(f"its supervision lasts {length:g} s inside the cut; correct it, or leave it out")
            row |= {"audio_filepath": audio, "offset": round(start + begin, 9), "duration": length}
        except Refused as error:
            yield number if several else 0, error
        else:
            yield number if several else 0, row


def _recording(cut: dict[str, Any], inside: str | None) -> str:
    """The path of a cut's recording.

    Raises:
        Refused: the cut means more than one channel of one file.
    """
    kind = cut.get("type", "MonoCut")
    if kind != "MonoCut":
        raise Refused(f"is a cut of Lhotse of the kind {_show(kind)}, but only MonoCut is read; {SAVE}")
    recording = cut.get("recording")
    sources = recording.get("sources") if isinstance(recording, dict) else None
    if not isinstance(recording, dict) or not isinstance(sources, list) or not sources:
        raise Refused(f"is a cut of Lhotse without a recording; {SAVE}")
    if len(sources) > 1 or not isinstance(sources[0], dict):
        raise Refused(f"is a cut of Lhotse whose recording has {len(sources)} files; {SAVE}")
    if transforms := recording.get("transforms"):
        names = [one.get("name") if isinstance(one, dict) else one for one in transforms if one]
        raise Refused(
            f"is a cut of Lhotse whose recording is transformed, {_show(names)}, which is not done here; {SAVE}"
        )
    channels = recording.get("channel_ids") or sources[0].get("channels") or [0]
    if not isinstance(channels, list) or len(channels) > 1:
        raise Refused(f"is a cut of Lhotse that means one of the channels {_show(channels)} of its recording; {SAVE}")
    source, where = sources[0].get("source"), sources[0].get("type")
    if where == "shar":
        if inside is None:
            raise Refused("is a cut of Lhotse without a recording in its archive; leave it out")
        return inside
    if where == "command":
        raise Refused(f"is a cut of Lhotse whose recording is made by a command, which is never run; {SAVE}")
    if where != "file" or not isinstance(source, str):
        raise Refused(
            f"is a cut of Lhotse whose recording is of the type {_show(where)}, but only files are read; {SAVE}"
        )
    return source


def _own_keys(part: Any) -> dict[str, Any]:
    """What a cut or a supervision says under "custom", but no arrays or recordings of Lhotse."""
    custom = part.get("custom") if isinstance(part, dict) else None
    if not isinstance(custom, dict):
        return {}
    return {key: one for key, one in custom.items() if key in (*KEYS, *READ_KEYS) or not isinstance(one, dict)}


def _words(supervision: Any) -> dict[str, Any]:
    if not isinstance(supervision, dict) or not isinstance(text := supervision.get("text"), str):
        raise Refused('is a cut of Lhotse whose supervision has no "text"; add it, or leave the cut out')
    names = {"speaker": "speaker", "language": "source_lang"}
    given = {own: supervision[key] for key, own in names.items() if supervision.get(key) is not None}
    return {"text": text} | given


def _seconds(part: dict[str, Any], key: str, negative: bool = False) -> float:
    value = part.get(key, 0.0 if key == "start" else None)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not (negative or value >= 0)
        or abs(value) > 1e9
    ):
        raise Refused(f"is a cut of Lhotse with {key} = {_show(value)}; write seconds")
    return float(value)
