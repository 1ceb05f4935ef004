"""Recordings that lie inside another file: in a column of Parquet or Arrow, or in a tar archive.

A member is named like a file, so that it can stand wherever the path of a recording does:

    train.parquet#audio[12]       row 12, counted from 0, of the column "audio" of a Parquet file
    data-00000.arrow#audio[12]    the same in an Arrow file, as Hugging Face's `datasets` save it
    recording.000000.tar#1024     the member of a tar archive whose header begins at byte 1024

The column holds the bytes of a whole audio file, as binary values or, as Hugging Face's `Audio`, in the field "bytes"
of a struct. Rows of Parquet are decoded in small batches, and an Arrow file is mapped into memory, so the memory does
not grow with the file. Reading one after the other goes through a Parquet file once; a jump back begins its row group
again. Reading Parquet and Arrow needs pyarrow (the extra `parquet`).
"""

import bisect
import os
import re
import tarfile
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from soundwave.data.containers import Fault

PATTERN = re.compile(
    r"(?P<file>.+\.(?:parquet|arrow))#(?P<column>[^\[\]]+)\[(?P<row>\d{1,15})\]|(?P<tar>.+\.tar)#(?P<at>\d{1,15})",
    re.DOTALL | re.IGNORECASE,
)
INSTALL = "install pyarrow: pip install 'soundwave-fused[parquet]'"
ROWS_AT_ONCE = 8  # of a Parquet column: the recordings that are in memory at a time
PAGE = 1 << 20  # bytes of a Parquet column that are read at once, and not a whole row group
OPEN_COLUMNS = 4  # of a thread
TAR_BLOCK = 512  # bytes of a header

_open = threading.local()


class Member(NamedTuple):
    """A recording inside a file.

    Attributes:
        file: the path of the file.
        column: the column of Parquet or Arrow; "" in a tar archive.
        at: the row, or the byte at which the header in the tar archive begins.
    """

    file: str
    column: str
    at: int

    def __str__(self) -> str:
        return f"{self.file}#{self.column}[{self.at}]" if self.column else f"{self.file}#{self.at}"


def member_of(name: str | Path) -> Member | None:
    """The member that a name means; None if it is the name of a file."""
    match = PATTERN.fullmatch(str(name)) if "#" in str(name) else None
    if match is None:
        return None
    if match["tar"]:
        return Member(match["tar"], "", int(match["at"]))
    return Member(match["file"], match["column"], int(match["row"]))


def split_member(name: str) -> tuple[str, str]:
    """A name as the name of the file on the disk and what follows it, "" if it is no member."""
    member = member_of(name)
    return (name, "") if member is None else (member.file, name[len(member.file) :])


@contextmanager
def open_member(member: Member) -> Iterator[tuple[str, BinaryIO]]:
    """A member as an open file in memory, with a path that leads to it while it is open.

    Raises:
        Fault: it is not there, or holds nothing.
        OSError: the file cannot be read.
    """
    data = _read(member)
    if not len(data):
        raise Fault("is empty; record it again")
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("recording"), "w+b") as file:
            file.write(data)
            file.seek(0)
            yield f"/proc/self/fd/{file.fileno()}", file
    else:
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.seek(0)
            yield file.name, cast(BinaryIO, file)


def import_pyarrow() -> Any:
    """pyarrow with its modules for Parquet and IPC.

    Raises:
        Fault: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise Fault(f"reading it needs a package that is not there; {INSTALL}") from None
    return pyarrow


def open_arrow(path: str | Path) -> Any:
    """The table of an Arrow file, in the format of streams or that of files, mapped into memory.

    Raises:
        Fault: it is damaged.
    """
    pyarrow = import_pyarrow()
    try:
        source = pyarrow.memory_map(str(path), "r")
        head = source.read(6)
        source.seek(0)
        reader = pyarrow.ipc.open_file(source) if head == b"ARROW1" else pyarrow.ipc.open_stream(source)
        return reader.read_all()
    except FileNotFoundError:
        raise
    except (pyarrow.ArrowException, OSError) as error:
        raise Fault(damaged("Arrow", error)) from None


def damaged(kind: str, error: Exception) -> str:
    reason = " ".join(str(error).split()).rstrip(".")[:120]
    return f"is no {kind} file, or cut short or damaged ({reason}); get a whole copy"


def holds_bytes(kind: Any) -> str | None:
    """Where values of a column's type hold the bytes of a file: "" itself, "bytes" in that field; None: nowhere."""
    types = import_pyarrow().types

    def is_binary(one: Any) -> bool:
        return types.is_binary(one) or types.is_large_binary(one) or types.is_binary_view(one)

    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_binary(kind.field("bytes").type):
        return "bytes"
    return "" if is_binary(kind) else None


def _read(member: Member) -> Any:
    if not member.column:
        return _read_tar(member)
    status = os.stat(member.file)  # a missing file raises here
    key = (os.getpid(), member.file, member.column, status.st_mtime_ns, status.st_size)
    opened: OrderedDict[tuple[Any, ...], Any] = _open.__dict__.setdefault("columns", OrderedDict())
    if key not in opened:
        kind = _ParquetColumn if member.file.lower().endswith(".parquet") else _ArrowColumn
        opened[key] = _undamaged(member, kind)
        while len(opened) > OPEN_COLUMNS:
            opened.popitem(last=False)
    opened.move_to_end(key)
    try:
        value = opened[key].value(member.at)
    except (import_pyarrow().ArrowException, ValueError) as error:
        del opened[key]
        raise Fault(damaged("Parquet" if member.file.lower().endswith(".parquet") else "Arrow", error)) from None
    if value is None:
        raise Fault("holds no recording: its bytes are missing; leave this row out")
    return value


def _undamaged(member: Member, kind: Any) -> Any:
    try:
        return kind(member.file, member.column)
    except (import_pyarrow().ArrowException, ValueError) as error:  # ValueError: names of columns that are no UTF-8
        raise Fault(damaged("Arrow", error)) from None


def _read_tar(member: Member) -> bytes:
    """The bytes of a tar archive's member, whose own header tells their number."""
    with open(member.file, "rb") as file:
        file.seek(member.at)
        try:
            found = tarfile.TarInfo.frombuf(file.read(TAR_BLOCK), tarfile.ENCODING, "surrogateescape")
        except tarfile.TarError:
            raise Fault(
                f"has no member at byte {member.at}: the archive has changed; read its manifest again"
            ) from None
        if not found.isreg():
            raise Fault(f"has no file at byte {member.at}, but a link or a folder; leave it out")
        there = os.fstat(file.fileno()).st_size - file.tell()
        if there < found.size:
            raise Fault(f"is cut short: {there} of {found.size} bytes are there; get a whole copy of the archive")
        return file.read(found.size)


def _column_of(schema: Any, column: str) -> str:
    """The path of a column's bytes, "audio.bytes"."""
    place = schema.get_field_index(column)
    if place < 0:
        raise Fault(f"has no column {column!r}; its columns are {', '.join(schema.names)[:200]}")
    field = holds_bytes(schema.field(place).type)
    if field is None:
        raise Fault(f"holds no files in its column {column!r}, but {schema.field(place).type}")
    return f"{column}.{field}" if field else column


class _ParquetColumn:
    """A column of a Parquet file, read forwards; a row behind the last one begins its row group again."""

    def __init__(self, path: str, column: str):
        pyarrow = import_pyarrow()
        try:
            self.file = pyarrow.parquet.ParquetFile(path, buffer_size=PAGE, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise Fault(damaged("Parquet", error)) from None
        self.path = _column_of(self.file.schema_arrow, column)
        self.inner = self.path != column
        about = self.file.metadata
        self.starts = [0]
        for group in range(about.num_row_groups):
            self.starts.append(self.starts[-1] + about.row_group(group).num_rows)
        self.group, self.first = -1, 0
        self.rows: list[bytes | None] = []
        self.batches: Iterator[Any] = iter(())

    def value(self, row: int) -> bytes | None:
        if row >= self.starts[-1]:
            raise Fault(f"has {self.starts[-1]} rows, so there is no row {row}; read its manifest again")
        group = bisect.bisect_right(self.starts, row) - 1
        if group != self.group or row < self.first:
            self.group, self.first, self.rows = group, self.starts[group], []
            self.batches = self.file.iter_batches(
                ROWS_AT_ONCE, row_groups=[group], columns=[self.path], use_threads=False
            )
        while row >= self.first + len(self.rows):
            self.first += len(self.rows)
            self.rows = []
            batch = next(self.batches, None)
            if batch is None or not batch.num_rows:
                raise Fault(f"ends before row {row}, which its header tells; get a whole copy")
            found = batch.column(0)
            self.rows = (found.field("bytes") if self.inner else found).to_pylist()
        return self.rows[row - self.first]


class _ArrowColumn:
    """A column of an Arrow file, which is mapped into memory."""

    def __init__(self, path: str, column: str):
        table = open_arrow(path)
        self.inner = _column_of(table.schema, column) != column
        self.column = table.column(column)
        self.column.validate(full=True)  # damaged offsets would lead out of the file

    def value(self, row: int) -> Any:
        if row >= len(self.column):
            raise Fault(f"has {len(self.column)} rows, so there is no row {row}; read its manifest again")
        value = self.column[row]
        if self.inner and value.is_valid:
            value = value["bytes"]
        return memoryview(value.as_buffer()) if value.is_valid else None
