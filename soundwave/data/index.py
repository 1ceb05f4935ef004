"""The index of a manifest: what training needs of each sample before it reads one, made once and memory-mapped.

A manifest is read and checked line by line, its audio files are looked at, and their headers are opened where the
manifest has no durations. For a million lines that takes a minute of all cores, and as objects they would fill
gigabytes. So the result is kept in one file, `.NAME.index` beside the manifest, or in the user's cache where that
folder cannot be written: for each sample the place of its line, its duration, the length of its texts, its task and
licence, and a hash of its line. `soundwave.data.samples` makes a sample of its line when a batch needs it.

    magic, CRC-32 of all that follows, place of the header
    rows        if the manifest is no file of JSON lines: JSON lines of [place, row], see `soundwave.data.source`
    columns     see `soundwave.data.scan`
    header      JSON: what was read, where the columns are, and what was left out

Stale: the index is made again if the manifest has another size, or another time and another content; if it lies
elsewhere; if a file that was left out has changed; if audio outside the folder was allowed and is not any more; or with
another version of this package. An index that is damaged or cut short counts as none.

Kills and full disks: it is written aside and renamed, so that it is whole or not there. Its bytes do not depend on the
number of processes. Where it cannot be kept it is made in memory, at each start.

Trust: an index that came with somebody's data may be forged. So whether a path leads out of the folder is asked again
when a sample is read, and what it tells is printed only if it is printable.

Manifests below `SMALL` are read directly, and no file is written: they take about half a second at most, and most of
a user's folders have only such. The same code reads them, so that all else is equal.
"""

import hashlib
import io
import json
import mmap
import os
import platform
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from soundwave.backbones.wheels import EmbeddedError, cache_dir
from soundwave.data.audio import shown
from soundwave.data.manifest import Sample, empty
from soundwave.data.readers import source_of
from soundwave.data.scan import COLUMNS, Range, Tables, cut, line_of, scan, scan_in_parallel, state_of
from soundwave.data.source import LONGEST_LINE, TOO_LONG, ManifestError, Source, stamp_of
from soundwave.provenance import versions

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1  # increase it when the file, or what is in it, changes
MAGIC = b"swindex\n"
PREFIX = struct.Struct("<8sIQ")
ALIGNED = 64  # bytes, where rows and columns begin
BLOCK = 1 << 20  # bytes read at once
SMALL = 1 << 20  # bytes of JSON: some 4 000 lines
PATIENCE = 15.0  # seconds between two lines that tell how far it is

Say = Callable[[str], object]


class Index(NamedTuple):
    """A manifest that has been read and checked, without its samples.

    Attributes:
        path, root: of its source.
        allow_outside: audio may lie outside the root.
        is_lines: its lines are the manifest's own, else [place, row].
        data: the file that holds the lines.
        columns: by name, each with one value a sample; see `soundwave.data.scan`.
        tasks, licences: the names that the columns number.
        missing: [place, audio file, fault, state] of each line whose audio file cannot be read: it is no sample.
        faults: [sample, place, audio file, fault, state] of each sample whose header cannot be used.
        notes: [place, what it is about, sentence] of what is passed over.
        held: the samples; only of small manifests.
    """

    path: Path
    root: Path
    allow_outside: bool
    is_lines: bool
    data: Path
    columns: dict[str, np.ndarray]
    tasks: list[str]
    licences: list[str]
    missing: list[list[Any]]
    faults: list[list[Any]]
    notes: list[list[str]]
    held: list[Sample] | None = None


class Refusal(ManifestError):
    """A line is no sample.

    Attributes:
        before: what the lines before it hold.
    """

    def __init__(self, message: str, before: Index):
        super().__init__(message)
        self.before = before


def open_index(
    path: str | Path, *, allow_outside: bool = False, say: Say | None = None, processes: int | None = None
) -> Index:
    """The index of a manifest, which is made if there is none, or if it is stale.

    Args:
        allow_outside: as in `read_manifest`.
        say: called with one line where it takes time, or where the index is not kept beside the manifest.
        processes: that read the manifest; None for one on each core.

    Raises:
        ManifestError: as in `read_manifest`; Refusal for a line that is no sample.
    """
    source = source_of(path)
    if source.is_lines:
        with _errors_of(source):
            small = os.path.getsize(source.path) < SMALL
            raw = source.path.read_bytes() if small else b""
        if small:
            return _read_small(source, raw, allow_outside)
    return _find(source, allow_outside) or _make_alone(source, allow_outside, say or (lambda _: None), processes)


def index_files(path: Path) -> list[Path]:
    """Where the index of a manifest may be kept: beside it, or in the user's cache."""
    files = [path.parent / f".{path.name}.index"]
    with suppress(EmbeddedError):  # there is no cache
        name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:32]
        files.append(cache_dir() / "indexes" / f"{name}.index")
    return files


# --- making one


def _read_small(source: Source, raw: bytes, allow_outside: bool, fault: ManifestError | None = None) -> Index:
    tables = Tables(source.is_lines)
    tables.add(scan(_range(source, source.path, allow_outside, 0, len(raw)), io.BytesIO(raw), hold=True))
    index = _index_of(source, tables, allow_outside)._replace(held=tables.samples)
    _refuse(source, tables, index, fault)
    return index


def _make_alone(source: Source, allow_outside: bool, say: Say, processes: int | None) -> Index:
    """Make an index, or take the one that another process makes in the meantime."""
    with ExitStack() as stack:
        # The system releases the lock when the process ends. Without one, as on some network file systems, several
        # processes do the same work, and the last one's index stays.
        aside = f".part-{platform.node()}-{os.getpid()}"
        with suppress(OSError, AttributeError):
            lock = os.open(source.path, os.O_RDONLY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX)
            aside = ".part"  # what a process that was killed has left there is replaced
        found = _find(source, allow_outside, renew=aside)
        return found or _make(source, allow_outside, say, processes or _cores(), aside)


def _make(source: Source, allow_outside: bool, say: Say, processes: int, aside: str) -> Index:
    name = shown(source.path)
    with _errors_of(source):
        stamp = _stamp_of(source)
    with ExitStack() as stack:
        data, start, fault = source.path, 0, None
        if not source.is_lines:
            rows = _Rows(source, aside)
            stack.callback(rows.remove)
            fault = rows.fault
            if rows.file is None:
                return _read_small(source, rows.small, allow_outside, fault)
            data, start = rows.file, ALIGNED
        tables, begun = Tables(source.is_lines), time.monotonic()
        told = begun
        with _errors_of(source), open(data, "rb") as file:
            cuts = cut(file, start)
            size = cuts[-1][1]
            say(f"indexing {name} ({size / 1e6:.0f} MB), once")
            parts = [_range(source, data, allow_outside, *ends) for ends in cuts]
            with closing(scan_in_parallel(parts, processes)) as found:
                for part, content in zip(parts, found, strict=False):
                    tables.add(content)
                    if tables.fault:
                        break
                    if time.monotonic() - told > PATIENCE:
                        told = time.monotonic()
                        say(f"indexing {name}: {part.stop / size:.0%} after {told - begun:.0f} s")
            index = _index_of(source, tables, allow_outside)
            _refuse(source, tables, index, fault)
            digest = _hash_of(file) if source.is_lines else ""
            if _stamp_of(source) != stamp:
                raise ManifestError(f"{name}: was changed while it was read; start again when it is complete")
        say(f"indexed {len(index.columns['line'])} samples in {time.monotonic() - begun:.0f} s")
        about = {"stamp": stamp, "hash": digest}
        return _keep(source, index, about, say, aside, None if source.is_lines else rows.file)


def _index_of(source: Source, tables: Tables, allow_outside: bool) -> Index:
    return Index(
        source.path,
        Path(os.path.abspath(source.root)),
        allow_outside,
        source.is_lines,
        source.path,
        tables.joined(),
        tables.tasks,
        tables.licences,
        tables.missing,
        tables.faults,
        [[place, about, sentence] for about, (place, sentence) in tables.notes.items()],
    )


def _refuse(source: Source, tables: Tables, index: Index, fault: ManifestError | None) -> None:
    """Refuse a manifest with a line that is no sample, with a fault behind its last row, or without any."""
    if tables.fault:
        raise Refusal(f"{shown(source.path)}:{tables.fault[0]}: {tables.fault[1]}", index)
    if fault is not None:
        raise Refusal(str(fault), index)
    if not tables.entries:
        raise empty(source)


def _range(source: Source, data: Path, allow_outside: bool, start: int, stop: int) -> Range:
    return Range(source.path.name, source.root, source.is_lines, allow_outside, data, start, stop)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _errors_of(source: Source) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ManifestError(
            f"{shown(source.path)}: cannot be read ({error.strerror}); name a readable manifest"
        ) from None


class _Rows:
    """The rows of a source that is no file of JSON lines, as JSON lines of [place, row].

    Attributes:
        small: the lines, if they are few.
        file: else the file that holds them, from byte ALIGNED on; it becomes the index.
        fault: what ended reading them.
    """

    def __init__(self, source: Source, aside: str):
        self.small = b""
        self.file: Path | None = None
        self.fault: ManifestError | None = None
        lines = io.BytesIO()
        rows = self._lines(source)
        for line in rows:
            lines.write(line)
            if lines.tell() >= SMALL:
                break
        else:
            self.small = lines.getvalue()
            return
        why = ""
        for place in index_files(source.path):
            try:
                self.file = place.with_name(place.name + aside)
                with _created(self.file) as file:
                    file.write(b"\0" * ALIGNED)
                    file.write(lines.getvalue())
                    file.writelines(rows)
                return
            except OSError as error:
                why = why or f"{shown(place)} cannot be written ({error.strerror})"
                self.remove()
                lines, rows, self.fault = io.BytesIO(), self._lines(source), None
        raise ManifestError(
            f"{shown(source.path)}: its rows cannot be kept as JSON lines: {why}; make room there, or set "
            "XDG_CACHE_HOME to a folder that has room and can be written"
        )

    def _lines(self, source: Source) -> Iterator[bytes]:
        try:
            for place, row in source.entries():
                line = line_of(place, row)
                if len(line) > LONGEST_LINE:
                    raise ManifestError(f"{shown(source.path)}:{place}: {TOO_LONG}")
                yield line
        except ManifestError as error:
            self.fault = error

    def remove(self) -> None:
        """Remove the file, if it has not become an index."""
        if self.file is not None:
            with suppress(OSError):
                self.file.unlink()


# --- the file


def _created(file: Path) -> BinaryIO:
    """A new file in place of what was left there. A link, perhaps of somebody else, is not followed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    return open(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "w+b")


def _keep(source: Source, index: Index, about: dict[str, Any], say: Say, aside: str, rows: Path | None) -> Index:
    """Write an index, behind its rows if there are any, and open it. Where that is not possible it stays in memory."""
    why = ""
    header = {
        "format": FORMAT,
        "version": _version(),
        "root": str(index.root),
        "allow_outside": index.allow_outside,
        "is_lines": index.is_lines,
        **about,
        **{name: getattr(index, name) for name in ("tasks", "licences", "missing", "faults", "notes")},
    }
    places = index_files(source.path)
    if rows is not None:
        places = [place for place in places if place.with_name(place.name + aside) == rows]
    for place in places:
        try:
            _put(place, aside, header, index.columns, behind_rows=rows is not None)
            if place != places[0]:
                say(f"the index of {shown(source.path)} is kept in {shown(place)}: {why}")
        except OSError as error:
            why = why or f"{shown(place)} cannot be written ({error.strerror})"
            continue
        if found := _read(place, source, index.allow_outside):
            return found[0]
        why = why or f"{shown(place)} cannot be read again"
    if rows is not None:
        raise ManifestError(f"{shown(source.path)}: {why}; make room, or set XDG_CACHE_HOME to a folder that has room")
    say(f"the index of {shown(source.path)} is not kept, and will be made again at the next start: {why}")
    return index


def _put(
    place: Path, aside: str, header: dict[str, Any], columns: dict[str, np.ndarray], behind_rows: bool = False
) -> None:
    """Write an index aside, in a new file or behind the rows that are there, and rename it."""
    part = place.with_name(place.name + aside)
    try:
        with open(part, "r+b") if behind_rows else _created(part) as file:
            _write(file, header, columns)
        os.replace(part, place)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def _write(file: BinaryIO, header: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
    """Write columns and header behind the rows, if there are any, and then what tells that all is there."""
    end = max(file.seek(0, os.SEEK_END), ALIGNED)
    places = {}
    for name, column in columns.items():
        end = -(-end // ALIGNED) * ALIGNED
        places[name] = [end, len(column)]
        file.seek(end)
        file.write(column.tobytes())
        end += column.nbytes
    file.seek(end)
    file.write(json.dumps({**header, "columns": places}, ensure_ascii=False).encode("utf-8", "surrogateescape"))
    file.flush()
    file.seek(0)
    file.write(PREFIX.pack(MAGIC, _crc_of(file), end))
    file.flush()
    os.fsync(file.fileno())


def _crc_of(file: BinaryIO) -> int:
    crc = 0
    file.seek(PREFIX.size)
    while block := file.read(BLOCK):
        crc = zlib.crc32(block, crc)
    file.seek(0)
    return crc


def _hash_of(file: BinaryIO) -> str:
    digest = hashlib.blake2b(digest_size=16)
    file.seek(0)
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


def _version() -> str:
    return versions(["soundwave"]).get("soundwave", "")


# --- finding one


def _find(source: Source, allow_outside: bool, renew: str | None = None) -> Index | None:
    """An index of the manifest that is not stale.

    Args:
        renew: look at the content where only the time differs; the index then gets the new time, by a file of this
            ending. Without it the index counts as stale.
    """
    for place in index_files(source.path):
        with suppress(OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, struct.error):
            if (found := _read(place, source, allow_outside)) and _is_fresh(*found, place, source, renew):
                return found[0]
    return None


def _read(place: Path, source: Source, allow_outside: bool) -> tuple[Index, dict[str, Any]] | None:
    """The index in a file and its header; None if it is not whole, or of something else."""
    if not stat.S_ISREG(os.lstat(place).st_mode):
        return None
    with open(place, "rb") as file:
        magic, crc, at = PREFIX.unpack(file.read(PREFIX.size))
        if magic != MAGIC or crc != _crc_of(file):
            return None
        file.seek(at)
        header = json.loads(file.read().decode("utf-8", "surrogateescape"))
        wanted = {"format": FORMAT, "version": _version(), "is_lines": source.is_lines}
        wanted["root"] = os.path.abspath(source.root)
        if any(header[name] != value for name, value in wanted.items()) or header["allow_outside"] > allow_outside:
            return None
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    columns = {
        name: np.frombuffer(content, dtype, count, begin)
        for name, dtype in COLUMNS.items()
        for begin, count in [header["columns"][name]]
    }
    index = Index(
        source.path,
        Path(wanted["root"]),
        allow_outside,
        source.is_lines,
        source.path if source.is_lines else place,
        columns,
        *(header[name] for name in ("tasks", "licences", "missing", "faults", "notes")),
    )
    return (index, header) if _is_sound(index) else None


def _is_sound(index: Index) -> bool:
    """Whether columns and lists fit each other, and what is printed cannot harm a terminal."""
    count = len(index.columns["line"])
    told = [text for note in index.notes for text in note]
    told += [text for _, place, _, fault, _ in index.faults for text in (place, fault)]
    told += [text for place, _, fault, _ in index.missing for text in (place, fault)]
    names = [*index.tasks, *index.licences, *(file for _, file, *_ in index.missing)]
    return (
        all(len(column) == count for column in index.columns.values())
        and all(isinstance(text, str) for text in names)
        and all(isinstance(text, str) and text.isprintable() for text in told)
        and all(0 <= sample < count for sample, *_ in index.faults)
        and all(
            not count or int(index.columns[column].max()) < len(numbered)
            for column, numbered in (("task", index.tasks), ("licence", index.licences))
        )
    )


def _is_fresh(index: Index, header: dict[str, Any], place: Path, source: Source, renew: str | None) -> bool:
    """Whether the manifest, and the files that were left out, are what they were when the index was made."""
    stamp = _stamp_of(source)
    if header["stamp"] != stamp:
        if renew is None or not source.is_lines or header["stamp"][0] != stamp[0]:
            return False
        with open(source.path, "rb") as file:
            if _hash_of(file) != header["hash"] or stamp_of(os.fstat(file.fileno())) != stamp:
                return False
        with suppress(OSError):
            _put(place, renew, {**header, "stamp": stamp}, index.columns)
    return all(
        state_of(os.path.join(index.root, file)) == state
        for file, state in (
            *((file, state) for _, file, _, state in index.missing),
            *((file, state) for _, _, file, _, state in index.faults),
        )
    )


def _stamp_of(source: Source) -> Any:
    return json.loads(json.dumps(source.stamp()))
