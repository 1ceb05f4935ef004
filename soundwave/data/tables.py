"""Rows of tables as manifests: CSV and TSV with a header, Parquet, and Arrow as Hugging Face's `datasets` save it.

The columns are named like the keys of a line (`soundwave.data.forms`): audio_filepath, text, prompt, answer, …; Common
Voice's path and sentence; the data sets' audio and text. Empty cells are absent.

    audio_filepath,duration,text            path	sentence	locale
    a/1.wav,2.1,"on, then off"              common_voice_en_1.mp3	Turn it on.	en

In CSV a field in double quotes may hold the delimiter, line breaks and doubled quotes. TSV has one row on each line;
only a field that is quoted as a whole, as spreadsheets write it, loses its quotes. Recordings in a column of Parquet or
Arrow stay where they are: the row names them as `soundwave.data.members` says.
"""

import csv
import decimal
import gzip
import itertools
import json
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from soundwave.data.audio import shown
from soundwave.data.chats import Refused
from soundwave.data.chats import show as _show
from soundwave.data.containers import Fault
from soundwave.data.forms import ANSWER_KEYS, AUDIO_KEYS, CHAT_KEYS, PROMPT_KEYS, READ_KEYS, TEXT_KEYS
from soundwave.data.members import Member, damaged, holds_bytes, import_pyarrow, open_arrow
from soundwave.data.source import (
    CALLED,
    KEYS,
    LONGEST_LINE,
    TOO_LONG,
    ManifestError,
    Source,
    numbered_lines,
    stamp_of,
)

GZIP = b"\x1f\x8b"  # the beginning of a file
DELIMITERS = (",", ";", "\t", "|")
NUMBERS = ("offset", "duration")  # seconds; all other cells of CSV are text
COLUMNS = {*KEYS, *READ_KEYS, *CALLED}
ROWS_AT_ONCE = 1000  # of Parquet and Arrow, without their recordings
Entry = tuple[str, dict[str, Any] | Refused]  # the place, and the row or what is wrong with it


def opened(path: Path) -> BinaryIO:
    """A file, or what a gzip file holds."""
    with open(path, "rb") as file:
        compressed = file.read(2) == GZIP
    return cast(BinaryIO, gzip.open(path, "rb") if compressed else open(path, "rb"))


def is_table(path: Path, head: bytes) -> bool:
    """Whether a text is a table: its ending says so, or its first line is a header that names a column of ours."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    name = path.name.lower().removesuffix(".gz")
    if not text or text.startswith((b"{", b"[")):
        return False
    fields = re.split(r"[,;|\t]", text.splitlines()[0].decode("utf-8", "replace"))
    return name.endswith((".csv", ".tsv")) or len(fields) > 1 and any(_name(field) in COLUMNS for field in fields)


def table_source(path: Path) -> Source:
    """The rows of a CSV or TSV file; also of one that is compressed with gzip."""
    return Source(path, path.parent, partial(_rows, path), lambda: [*stamp_of(os.stat(path)), _has_clips(path)])


def parquet_source(path: Path) -> Source:
    """The rows of a Parquet file."""
    return Source(
        path,
        path.parent,
        partial(_placed, path, (path,), read_parquet, "row {row}"),
        lambda: stamp_of(os.stat(path)),
    )


def arrow_source(path: Path) -> Source:
    """The rows of an Arrow file."""
    return Source(
        path,
        path.parent,
        partial(_placed, path, (path,), read_arrow, "row {row}"),
        lambda: stamp_of(os.stat(path)),
    )


def columns_source(folder: Path, files: Sequence[Path]) -> Source:
    """The rows of several Parquet or Arrow files of one folder, one after the other."""
    read = read_parquet if files[0].suffix.lower() == ".parquet" else read_arrow
    return Source(
        folder,
        folder,
        partial(_placed, folder, tuple(files), read, "{file}, row {row}"),
        lambda: [[str(file.relative_to(folder)), *stamp_of(os.stat(file))] for file in files],
    )


# --- CSV and TSV


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A file, or what a gzip file holds, for reading.

    Raises:
        ManifestError: it cannot be read, or is damaged.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ManifestError(f"{shown(path)}: is a pipe or a device; save what it gives as a file")
        with opened(path) as file:
            yield file
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise ManifestError(f"{shown(path)}: cannot be read ({error.strerror}); name a readable file") from None
        reason = " ".join(str(error).split()).rstrip(".")
        raise ManifestError(f"{shown(path)}: is cut short or damaged ({reason}); get a whole copy") from None


def lines_of(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines that are not blank of a file, or of what a gzip file holds, each with its number."""
    with reading(path) as file:
        yield from numbered_lines(path, file)


def _rows(path: Path) -> Iterator[Entry]:
    with reading(path) as file:
        yield from _table(path, file)


def _table(path: Path, file: BinaryIO) -> Iterator[Entry]:
    lines = _Lines(path, file)
    first = next(lines, "")
    delimiter = _delimiter(path, first)
    records = _plain_records if delimiter == "\t" else _quoted_records
    found = records(itertools.chain([first], lines), delimiter)
    line, header = next(found, (1, []))
    if isinstance(header, Refused):
        raise ManifestError(f"{shown(path)}:{line}: {header}")
    names = [name.strip() for name in header]
    if not {_name(name) for name in names} & COLUMNS:
        wanted = "audio_filepath and text, or path and sentence"
        fault = f"its first line {_show(first.strip())} names no column; write a header, such as {wanted}"
        raise ManifestError(f"{shown(path)}:{line}: {fault}")
    for name in names:
        if name and names.count(name) > 1:
            raise ManifestError(f"{shown(path)}:{line}: has the column {_show(name)} twice; keep one")
    in_clips = {"path", "sentence"} <= set(names) and _has_clips(path)
    for line, fields in found:
        if isinstance(fields, Refused):
            yield str(line), fields
        elif any(field.strip() for field in fields):
            yield str(line), _cells(names, fields, in_clips)


def _has_clips(path: Path) -> bool:
    """Whether the recordings of Common Voice may lie beside the table."""
    return (path.parent / "clips").is_dir()


def _cells(names: list[str], fields: list[str], in_clips: bool) -> dict[str, Any] | Refused:
    if len(fields) != len(names):
        advice = "quote fields that hold delimiters or quotes, and keep one row on one line"
        return Refused(f"has {len(fields)} fields, but the header names {len(names)}; {advice}")
    for field in fields:
        if any("\udc80" <= character <= "\udcff" for character in field):
            byte = next(ord(character) - 0xDC00 for character in field if "\udc80" <= character <= "\udcff")
            return Refused(f"byte {byte:#04x} is not UTF-8; save the table as UTF-8 text")
        if "\0" in field:
            return Refused("holds a null byte; save the table as UTF-8 text")
    row: dict[str, Any] = {name: field for name, field in zip(names, fields, strict=True) if name and field.strip()}
    silent = [name for name in names if name in TEXT_KEYS and name not in row]
    if silent and not row.keys() & {*TEXT_KEYS, *PROMPT_KEYS, *ANSWER_KEYS}:
        return Refused(f"has an empty cell in the column {_show(silent[0])}; write what is said, or leave the row out")
    for key in NUMBERS:
        if re.fullmatch(r"\s*\d{1,12}(\.\d*)?([eE][-+]?\d{1,2})?\s*", row.get(key, "")):
            row[key] = float(row[key])
    if in_clips and "path" in row and "/" not in row["path"]:
        row["audio_filepath"] = f"clips/{row.pop('path')}"
    return row


class _Lines:
    """The lines of a text file, with their ends. What is not UTF-8 becomes lone surrogates.

    Raises:
        ManifestError: a line is too long.
    """

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file, self.number = path, file, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self.file.readline(LONGEST_LINE + 1)
        if not line:
            raise StopIteration
        self.number += 1
        if len(line) > LONGEST_LINE:
            raise ManifestError(f"{shown(self.path)}:{self.number}: {TOO_LONG}")
        return (line.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else line).decode("utf-8", "surrogateescape")


def _delimiter(path: Path, header: str) -> str:
    if ".tsv" in path.suffixes:
        return "\t"
    known = {one: sum(_name(field) in COLUMNS for field in header.split(one)) for one in DELIMITERS}
    return max(DELIMITERS, key=lambda one: (known[one], header.count(one)))


def _name(field: str) -> str:
    return field.strip(" \"'\r\n").lower()


def _quoted_records(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str] | Refused]]:
    """The records of CSV (RFC 4180), each with the line on which it begins."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        begin = reader.line_num + 1
        try:
            yield begin, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines_read = reader.line_num - begin
            over = f", which goes on over {lines_read} lines," if lines_read > 0 else ""
            yield begin, Refused(f"is no row of CSV{over} ({error}); double the quotes in quoted fields and close them")


def _plain_records(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str] | Refused]]:
    """The records of TSV: one a line."""
    for number, line in enumerate(lines, start=1):
        fields = line.rstrip("\r\n").split(delimiter)
        if "\r" in line.rstrip("\r\n"):
            yield number, Refused("has a carriage return inside; end the lines with newlines")
            continue
        yield number, [_unquoted(field) for field in fields]


def _unquoted(field: str) -> str:
    inner = field[1:-1]
    whole = len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if whole else field


# --- Parquet and Arrow


def read_parquet(file: Path, name: str) -> Iterator[dict[str, Any] | Refused]:
    """The rows of a Parquet file; `name` is how the rows name the file itself."""
    pyarrow = import_pyarrow()
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        columns = _Columns(parquet.schema_arrow, name)
        row, about = 0, parquet.metadata
        for group in range(about.num_row_groups):
            there = about.row_group(group).num_rows
            without = _missing(parquet, group, columns)
            kept = [*columns.kept, *([f"{columns.audio}.path"] if columns.has_path and without is not None else [])]
            if not kept:
                values: Iterator[dict[str, Any]] = iter({} for _ in range(there))
            else:
                batches = parquet.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=kept, use_threads=False)
                values = (value for batch in batches for value in _values(batch))
            for value in values:
                yield columns.row(value, row, next(without) if without is not None else False)
                row += 1
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: texts that are no UTF-8
        raise Fault(damaged("Parquet", error)) from None


def _missing(parquet: Any, group: int, columns: "_Columns") -> Iterator[bool] | None:
    """For each row of a row group whether the bytes of its recording are missing; None if no row's are."""
    if columns.audio is None:
        return None
    about = parquet.metadata.row_group(group)
    for number in range(about.num_columns):
        found = about.column(number)
        statistics = found.statistics if found.path_in_schema == columns.bytes else None
        if statistics is not None and statistics.has_null_count:
            if statistics.null_count == 0:
                return None
            if statistics.null_count == found.num_values:
                return itertools.repeat(True)
    batches = parquet.iter_batches(8, row_groups=[group], columns=[columns.bytes], use_threads=False)
    return (value for batch in batches for value in columns.nulls(batch.column(0)))


def read_arrow(file: Path, name: str) -> Iterator[dict[str, Any] | Refused]:
    """The rows of an Arrow file; `name` is how the rows name the file itself."""
    table = open_arrow(file)
    try:
        columns, row = _Columns(table.schema, name), 0
        table.validate(full=True)  # damaged offsets would lead out of the file
        for batch in table.to_batches(max_chunksize=ROWS_AT_ONCE):
            values = _values(batch.select(columns.kept)) if columns.kept else [{} for _ in range(batch.num_rows)]
            without = [False] * len(values)
            if columns.audio is not None:
                audio = batch.column(columns.audio)
                without = columns.nulls(audio)
                if columns.has_path and any(without):
                    paths = audio.field("path").to_pylist()
                    values = [
                        value | {columns.audio: {"path": path}} for value, path in zip(values, paths, strict=True)
                    ]
            for value, missing in zip(values, without, strict=True):
                yield columns.row(value, row, missing)
                row += 1
    except (import_pyarrow().ArrowException, ValueError) as error:  # ValueError: texts that are no UTF-8
        raise Fault(damaged("Arrow", error)) from None


class _Columns:
    """The columns of a Parquet or Arrow file, and how its rows become those of a manifest.

    Attributes:
        audio: the column that holds recordings, or None.
        bytes: the path of their bytes, "audio.bytes".
        has_path: they have a name, too.
        kept: the other columns that are read.
    """

    def __init__(self, schema: Any, name: str):
        self.name = name
        features = _features(schema)
        self.labels = {key: one["names"] for key, one in features.items() if isinstance(one.get("names"), list)}
        pictures = {key for key, one in features.items() if one.get("_type") in ("Image", "Video", "Pdf")}
        types = {field.name: field.type for field in schema}
        files = {key: holds_bytes(one) for key, one in types.items() if holds_bytes(one) is not None}
        sounds = [key for key in files if key not in pictures]
        named = [key for key in sounds if key in AUDIO_KEYS or features.get(key, {}).get("_type") == "Audio"]
        self.audio = next(iter(named or sounds), None)
        if len(named) != 1 and len(named or sounds) > 1:
            raise Fault(f"has recordings in the columns {', '.join(named or sounds)}; keep one of them")
        if self.audio is None:
            _refuse_without_audio(types)
        elif re.search(r"[\[\]#/]", self.audio):
            raise Fault(
                f"has its recordings in the column {_show(self.audio)}; give it another name, without [, ], # and /"
            )
        field = files[self.audio] if self.audio is not None else ""
        self.bytes = f"{self.audio}.{field}" if field else self.audio
        self.has_path = bool(field) and types[self.audio].get_field_index("path") >= 0
        self.kept = [key for key in types if key not in files]

    def nulls(self, audio: Any) -> list[bool]:
        """Of a part of the column `audio`, for each row whether it has no bytes."""
        inner = audio.field("bytes") if self.bytes != self.audio else audio
        return [
            one or other for one, other in zip(audio.is_null().to_pylist(), inner.is_null().to_pylist(), strict=True)
        ]

    def row(self, value: dict[str, Any], at: int, missing: bool) -> dict[str, Any] | Refused:
        row = {key: plain for key, one in value.items() if (plain := _plain(one)) is not None}
        for key, names in self.labels.items():
            if isinstance(number := row.get(key), int):
                if not 0 <= number < len(names):
                    return Refused(f"{key} = {number}, but it has {len(names)} labels; correct it")
                row[key] = names[number]
        if self.audio is None:
            return row
        inside = row.pop(self.audio, None) or {}
        if not missing:
            row["audio_filepath"] = str(Member(self.name, self.audio, at))
        elif isinstance(inside.get("path"), str):
            row["audio_filepath"] = inside["path"]
        else:
            return Refused(f"has no recording in its column {_show(self.audio)}; leave this row out")
        return row


def _refuse_without_audio(types: dict[str, Any]) -> None:
    for key, one in types.items():
        if (
            "list" in str(one)
            and re.search(r"float|double|int16", str(one))
            and (key in AUDIO_KEYS or "array" in str(one))
        ):
            raise Fault(f"holds samples of sound as numbers in its column {_show(key)}; save whole audio files' bytes")
    asks = types.keys() & {*PROMPT_KEYS} and types.keys() & {*ANSWER_KEYS}
    if not asks and not types.keys() & {*AUDIO_KEYS, *CHAT_KEYS, "path", "source"}:
        names = ", ".join(types)[:200]
        raise Fault(f"has no column with recordings, but {names}; add one, audio, with bytes or paths of audio files")


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's `datasets` say of the columns."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {key: one for key, one in found.items() if isinstance(one, dict)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _values(batch: Any) -> list[dict[str, Any]]:
    """The rows of a part of a table. Times lose what is below a microsecond, because Python's have no place for it."""
    pyarrow = import_pyarrow()
    coarser = {kind("ns"): kind("us") for kind in (pyarrow.duration, pyarrow.time64)}
    coarser |= {
        kind: pyarrow.timestamp("us", kind.tz)
        for kind in batch.schema.types
        if pyarrow.types.is_timestamp(kind) and kind.unit == "ns"
    }
    columns = [one.cast(coarser[one.type], safe=False) if one.type in coarser else one for one in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()


def _plain(value: Any) -> Any:
    """The value as JSON has it; None for bytes."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        return None
    if isinstance(value, decimal.Decimal):
        return float(value)
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _placed(path: Path, files: Sequence[Path], read: Any, place: str) -> Iterator[Entry]:
    """The rows of files with their places; faults of a file become a ManifestError."""
    for file in files:
        name = file.name if path == file else file.relative_to(path).as_posix()
        try:
            for number, row in enumerate(read(file, name)):
                yield place.format(file=name, row=number), row
        except Fault as fault:
            where = shown(path) if path == file else f"{shown(path)}:{name}"
            raise ManifestError(f"{where}: {fault}") from None
        except OSError as error:
            raise ManifestError(f"{shown(file)}: cannot be read ({error.strerror}); name a readable file") from None
