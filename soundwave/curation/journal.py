"""A file to which results are added while they come, so that a killed run loses none and makes none twice."""

import fcntl
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from soundwave.data.audio import shown

_SUM = len(', "crc32": "01234567"}')  # how each line ends


class Journal:
    """JSON lines with a checksum each, behind a line that says what made them. It is locked against a second run.

    A last line that a kill has torn is removed. A line whose checksum is wrong counts as not there.

    Args:
        path: the file; it is made, with its folder, if it is not there.
        made_by: all that the results depend on, in JSON's types. Results of anything else are refused.
        key: the name of the number that each result has of its own.

    Attributes:
        results: the results by their number.
        damaged: how many lines had a wrong checksum.

    Raises:
        ValueError: another run writes the file, or it holds something else, or results of something else.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any], key: str = "line"):
        self.path, self.key = path, key
        self.results: dict[int, dict[str, Any]] = {}
        self.damaged = 0
        self._head = _line({"made_by": dict(made_by)})
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _locked(path)
        try:
            self._read(dict(made_by))
        except BaseException:
            self._file.close()
            raise

    def _read(self, made_by: dict[str, Any]) -> None:
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                row = _row(line)
                if number == 0:
                    self._check(None if row is None else row.get("made_by"), made_by)
                elif row is not None and isinstance(row.get(self.key), int):
                    self.results.setdefault(row[self.key], row)
                else:
                    self.damaged += 1
        with named(self.path):
            self._file.truncate(end)
            if not end:
                self._write(self._head)

    def _check(self, found: Any, made_by: dict[str, Any]) -> None:
        if not isinstance(found, dict):
            raise ValueError(f"{shown(self.path)}: holds something else; move it away, or name another folder")
        for name in made_by | found:
            if found.get(name) != made_by.get(name):
                then, now = (json.dumps(values.get(name), ensure_ascii=False) for values in (found, made_by))
                raise ValueError(
                    f"{shown(self.path)}: holds results of {name} = {then}, but now it is {now}; delete this file to "
                    "begin anew, or name another folder"
                )

    def write(self, results: Iterable[dict[str, Any]]) -> None:
        """Add results at once. Those whose number is there already are not added again."""
        new = {row[self.key]: row for row in results if row[self.key] not in self.results}
        with named(self.path):
            self._write(b"".join(map(_line, new.values())))
        self.results |= new

    def _write(self, lines: bytes) -> None:
        rest = memoryview(lines)
        while rest:  # a disk that becomes full takes a part
            rest = rest[self._file.write(rest) :]

    def finish(self) -> None:
        """Put the results into the order of their numbers, so that the file does not tell how they came."""
        aside = self.path.with_name(f".{self.path.name}.partial")
        try:
            with named(aside), open(aside, "wb") as file:
                file.write(self._head)
                file.writelines(_line(self.results[number]) for number in sorted(self.results))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
        finally:
            aside.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Within its `with` block an error of the system gets the name of the file, which that of a write lacks."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


def _locked(path: Path) -> FileIO:
    """The file, opened to add to it without a buffer, and locked."""
    while True:
        file = open(path, "ab", buffering=0)  # noqa: SIM115 (it stays open)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"{shown(path)} is being written by another run; wait for it") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # the run before has put another file in its place


def _line(row: dict[str, Any]) -> bytes:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    return text[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(text)


def _row(line: bytes) -> dict[str, Any] | None:
    """The result on a line without its checksum; None if that is wrong."""
    text = line[: -_SUM - 1] + b"}"
    if line[-_SUM - 1 :] != b', "crc32": "%08x"}\n' % zlib.crc32(text):
        return None
    return json.loads(text)
