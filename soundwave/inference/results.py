"""Where the transcripts of many recordings go: a file of JSON lines that a later run continues, or a file for each."""

import fcntl
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from soundwave.inference.formats import ENDINGS, verbose
from soundwave.inference.transcript import Transcript

TIMED_ENDINGS = (".srt", ".vtt", ".tsv")
STATE = ("bytes", "modified")  # of a row: the recording's size and time of change


class State(NamedTuple):
    """A recording as it was before it was read: another size or time of change, and it is read again."""

    bytes: int
    modified: int  # ns

    @classmethod
    def of(cls, file: Path) -> "State | None":
        """That of a file; None if it is not there."""
        try:
            status = file.stat()
        except OSError:
            return None
        return cls(status.st_size, status.st_mtime_ns)


def settings_of(model: Path, **settings: Any) -> dict[str, Any]:
    """Settings of `JsonLines` with `trained`, when the weights in the folder of a model were written (ns)."""
    written = [file.stat().st_mtime_ns for file in model.iterdir() if file.suffix in (".safetensors", ".bin")]
    return {"trained": max(written, default=None), **settings}


def row_of(file: Path, transcript: Transcript, *, times: bool = False) -> dict[str, Any]:
    """The row of JSON lines of a recording; with `times`, the words and segments of verbose_json, too."""
    row: dict[str, Any] = {"file": str(file), "seconds": transcript.seconds, "text": transcript.text}
    if times:
        found = verbose(transcript)
        row |= {name: found[name] for name in ("segments", "words") if name in found}
    return row


def line_of(row: dict[str, Any]) -> str:
    """A row as a line; a name that is no Unicode is escaped."""
    return json.dumps(row, ensure_ascii=not str(row["file"]).isprintable()) + "\n"


class JsonLines:
    """A file of JSON lines, one for each recording, that a later run with the same command continues.

    A row counts as finished if the recording has the same size and time of change as when it was read, and the model
    and the settings are the same. Other rows of these recordings are removed, because they are read again; rows of
    other recordings stay. A last line that a kill has torn is removed. The file is locked against a second run.

    Args:
        path: the file; it is made, with its folder, if it is not there.
        files: the recordings of this run.
        model: what the rows call the model.
        times: the rows have words and segments.
        settings: by which texts differ, in JSON's types. They are written into each row.

    Attributes:
        finished: those of the recordings that need not be read.
        again: why others are read again that the file has a row of: each reason, and of how many.

    Raises:
        ValueError: the file holds something else, or another run writes it.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[Path],
        model: str,
        *,
        times: bool = False,
        settings: Mapping[str, Any] | None = None,
    ):
        self.path, self.times, self.again = path, times, Counter[str]()
        self._made_by = {"model": model, **(settings or {})}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._locked()
        self._before = {str(file): State.of(file) for file in files}
        kept, mended = [], False
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            torn = number == len(lines)  # a whole line ends with a line's end, behind which nothing follows
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError:
                row = None if torn else {}
            if row is None:
                mended |= bool(line)
                continue
            if not isinstance(row, dict) or not isinstance(row.get("file"), str) or "text" not in row:
                self._file.close()
                raise ValueError(f"{path}: line {number} is no transcript; name another file, or a new one")
            mended |= torn
            kept.append((row, line))
        faults = {row["file"]: self._fault(row) for row, _ in kept}
        rows = {row["file"]: (row, line) for row, line in kept if self._fault(row) is None}
        self.finished = {file for file in files if str(file) in rows}
        self.again.update(fault for name, fault in faults.items() if fault is not None and name not in rows)
        if mended or len(rows) < len(kept):
            self._replace(b"".join(line + b"\n" for _, line in rows.values()))

    def _fault(self, row: dict[str, Any]) -> str | None:
        """Why the recording of a row is read again; None if it need not be."""
        if row["file"] not in self._before:
            return None
        now = self._before[row["file"]]
        if now is None or [row.get(name) for name in STATE] != [*now]:
            return "the recording has changed"
        for name, value in self._made_by.items():
            if name not in row or row[name] != value:
                if name == "trained" and row.get(name):
                    return "the weights of the model have changed"
                before = json.dumps(row[name], ensure_ascii=False) if name in row else "not known"
                return f"{name} was {before} and is {json.dumps(value, ensure_ascii=False)}"
        return "its words have no times" if self.times and "words" not in row else None

    def _locked(self) -> IO[bytes]:
        file = self.path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"{self.path} is being written by another run; wait for it, or name another file"
            ) from None
        return file

    def _replace(self, content: bytes) -> None:
        """Put `content` in the file's place at once, so that a kill leaves the old one or the new one."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_bytes(content)
        old = self._file
        os.replace(partial, self.path)
        self._file = self._locked()
        old.close()

    def write(self, file: Path, transcript: Transcript) -> None:
        """Add the row of a recording."""
        state = self._before[str(file)]
        row = row_of(file, transcript, times=self.times)
        row |= dict(zip(STATE, state or (None, None), strict=True)) | self._made_by
        self._file.write(line_of(row).encode("utf-8", "surrogateescape"))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class FolderOfFiles:
    """A folder with a file for each recording, in its place below the folder that all recordings have in common.

    A file that is there, and is not older than its recording, is finished. It is written under another name first, so
    that a kill leaves none that is torn.

    Args:
        folder: it is made if it is not there.
        files: the recordings of this run.
        format: one of `soundwave.inference.formats.FORMATS`.

    Attributes:
        finished: those of the recordings that need not be read.

    Raises:
        OSError: the folder cannot be made, or written to.
    """

    def __init__(self, folder: Path, files: Sequence[Path], format: str):
        self.folder, self.ending = folder, ENDINGS[format]
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_bytes(b"")
        probe.unlink()
        absolute = [Path(os.path.abspath(file)) for file in files]
        top = os.path.commonpath([file.parent for file in absolute])
        inside = [Path(os.path.relpath(file, top)) for file in absolute]
        times = Counter(file.with_suffix("") for file in inside)
        self.places = {
            file: folder
            / (f"{place}{self.ending}" if times[place.with_suffix("")] > 1 else place.with_suffix(self.ending))
            for file, place in zip(files, inside, strict=True)
        }
        self.finished = {file for file in files if self._is_finished(file)}

    def _is_finished(self, file: Path) -> bool:
        recording, place = State.of(file), State.of(self.places[file])
        return recording is not None and place is not None and place.modified >= recording.modified

    def write(self, file: Path, text: str) -> None:
        """Write the file of a recording."""
        place = self.places[file]
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(f".{place.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, place)

    def close(self) -> None:
        """Nothing is open."""


def plan(
    out: str | None, files: Sequence[Path], format: str | None, as_json: bool, stream: bool
) -> tuple[str, str, Path | None]:
    """What a command line asks for -> kind of the output, format, and its file or folder.

    Kinds are "lines" (JSON lines, to be continued), "json" (JSON lines), "text" (a line for each recording), "one" (one
    recording in a format) and "folder".

    Args:
        out: the file; or a folder, if it ends with a slash, exists as one, or has to hold several files.
        format: one of the formats, if one is given.
        as_json: JSON lines are asked for.
        stream: windows are asked for as soon as they are read.

    Raises:
        ValueError: what is asked for contradicts itself.
    """
    path = None if out is None else Path(out)
    several, suffix = len(files) > 1, "" if path is None else path.suffix.lower()
    is_folder = path is not None and (path.is_dir() or out.endswith(("/", os.sep)))
    if as_json and format is not None:
        raise ValueError(f"--json gives JSON lines, and --format {format} something else; leave out one of them")
    if stream and (
        as_json or format not in (None, "text") or is_folder or suffix in (".jsonl", ".json", *TIMED_ENDINGS)
    ):
        raise ValueError("--stream prints text as it is read; leave out --json, other formats, and --out for them")
    if is_folder:
        if as_json:
            raise ValueError(
                f"--json gives one file of JSON lines, but --out {out} is a folder; name a file, or a --format"
            )
        return "folder", format or "text", path
    if suffix == ".jsonl":
        if format not in (None, "json", "verbose_json"):
            raise ValueError(f"--out {out} holds JSON lines, but --format is {format}; give another name")
        return "lines", format or "json", path
    if format is None and suffix == ".json":
        return "lines", "json", path
    if as_json:
        return "json", "json", path
    format = format or next((name for name, ending in ENDINGS.items() if ending == suffix and name != "json"), None)
    if not several:
        return ("one" if format else "text"), format or "text", path
    if format in (None, "text"):
        return "text", "text", path
    if path is not None and not suffix:
        return "folder", format, path
    where = "the terminal" if path is None else f"--out {out}"
    raise ValueError(
        f"{len(files)} recordings in the format {format} need a file each, but {where} is one; give --out FOLDER/"
    )
