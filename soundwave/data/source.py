"""Where samples come from: the entries of a manifest, each with its place in the file.

A manifest is UTF-8 text with one JSON object on each line, or one JSON array of objects. `Source` is also how the
readers of other forms (tables, folders of recordings, parquet) give their rows:

    Source(path, root, entries, stamp)

`entries()` yields `(place, row)`: `place` stands in messages and in the samples' ids (`"12"`, `"7, object 2"`,
`"b.parquet, row 3"`), `row` is a dict in the keys that `soundwave.data.forms` reads. Audio paths in it are relative to
`root`, which they must not leave. In place of a row that is none stands `Refused`, which says why. It
raises ManifestError, with the file and the place, for what cannot be read.
`stamp()` is any JSON value that changes when the content may have changed, such as the names, sizes and times of all
files that are read; it is cheap, and opens none of them.

`soundwave.data.index` calls `entries()` once, keeps the rows as JSON lines in the index, and reads samples from there
until `stamp()` changes. For JSON lines (`is_lines`) it keeps the places of the lines in the file itself.
"""

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from soundwave.data.audio import shown
from soundwave.data.chats import Refused
from soundwave.data.chats import show as _show
from soundwave.data.forms import ANSWER_KEYS, AUDIO_KEYS, PROMPT_KEYS, TEXT_KEYS

LONGEST_LINE = 16 << 20  # bytes; the longest text of a sample has some thousand
TOO_LONG = f"has more than {LONGEST_LINE >> 20} MiB; write one sample on each line, and leave out sound and arrays"
DEEP = 100  # brackets; what has fewer is not nested too deeply to be written again
BLANK = (b"", b"\xef\xbb\xbf")
KEYS = (
    *("audio_filepath", "offset", "duration", "text"),
    *("task", "prompt", "answer", "ctc_text", "source_lang", "target_lang"),
)
ONE_OBJECT_A_LINE = "a manifest is UTF-8 text with one JSON object on each line, or one JSON array of objects"
NO_ARRAY = "write its objects one a line, without brackets"
OTHER_FILES = {b"PK\x03\x04": "a spreadsheet or another archive"}
# What other tools call our keys, where a spelling that is near would lead astray.
CALLED: dict[str, str] = {
    **dict.fromkeys(
        ("wav", "wav_path", "wav_file", "wav_filename", "path", "file", "filename", "filepath"), "audio_filepath"
    ),
    **dict.fromkeys(("speech", "audio_file", "audio_path", "clip", "recording", "sound"), "audio_filepath"),
    **dict.fromkeys(("txt", "words", "utterance", "transcripts", "normalized_text", "raw_text"), "text"),
    **dict.fromkeys(("instructions", "user", "ask", "request"), "prompt"),
    **dict.fromkeys(("reply", "assistant", "label", "answers", "responses", "caption"), "answer"),
}
MEANS = {key: keys[0] for keys in (AUDIO_KEYS, TEXT_KEYS, PROMPT_KEYS, ANSWER_KEYS) for key in keys}


class ManifestError(ValueError):
    """A manifest that cannot be used. The message is one line: file, line number, what was found, how to mend it."""


class Source(NamedTuple):
    """What is read, and how.

    Attributes:
        path: file or folder as the user named it; its name stands in the samples' ids.
        root: the folder that audio paths are relative to, and must not leave.
        entries: yields each row with its place; a line of JSON is `bytes`, which `parse` reads.
        stamp: a JSON value that changes when the content may have changed.
        is_lines: the entries are the lines of the file `path`.
    """

    path: Path
    root: Path
    entries: Callable[[], Iterator[tuple[str, bytes | dict[str, Any] | Refused]]]
    stamp: Callable[[], Any]
    is_lines: bool = False


def source_of(path: str | Path) -> Source:
    """The source that a file of JSON gives. `soundwave.data.readers.source_of` takes all that is read.

    Raises:
        ManifestError: the file cannot be read, or is of another kind.
    """
    path = Path(path)
    with _named(path):
        kind = os.stat(path).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # it could be read once only
            raise ManifestError(f"{shown(path)}: is a pipe or a device; save what it gives as a file (.jsonl)")
        with open(path, "rb") as file:
            head = file.read(65_536)
    _refuse_binary(path, head)
    is_array = head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    entries = partial(_array if is_array else _lines, path)
    return Source(path, path.parent, entries, lambda: stamp_of(os.stat(path)), is_lines=not is_array)


def stamp_of(status: os.stat_result) -> list[int]:
    """What tells of a file that it has not been changed: its size, and the times of its last change in ns.

    The first of the times may be set, as `cp -p` and `rsync -t` do; the second one is the system's own.
    """
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the file system as one line about the manifest."""
    try:
        yield
    except FileNotFoundError:
        raise ManifestError(f"{shown(path)}: does not exist; name a manifest (.jsonl)") from None
    except IsADirectoryError:
        raise ManifestError(f"{shown(path)}: is a folder; name a manifest (.jsonl) in it") from None
    except OSError as error:
        raise ManifestError(f"{shown(path)}: cannot be read ({error.strerror}); name a readable manifest") from None


def _lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a manifest that are not blank."""
    with _named(path), open(path, "rb") as file:
        yield from numbered_lines(path, file)


def numbered_lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """The lines of an open file that are not blank, each with its number. ManifestError: one is too long."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise ManifestError(f"{shown(path)}:{number}: {TOO_LONG}")
        if line.strip() not in BLANK:
            yield str(number), line


def _array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file that is one JSON array. The second object on a line has the place "7, object 2"."""
    with _named(path):
        raw = path.read_bytes()
    at, line, on_line, previous = 0, 1, 0, 0

    def fault(sentence: str) -> ManifestError:
        return ManifestError(f"{shown(path)}:{line}: {sentence}")

    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise fault(f"byte {raw[error.start]:#04x} is not UTF-8; save the manifest as UTF-8 text") from None

    def skip(start: int) -> int:
        nonlocal line
        while start < len(text) and text[start] in " \t\r\n":
            line += text[start] == "\n"
            start += 1
        return start

    at = skip(skip(0) + 1)
    while text[at : at + 1] != "]":
        if at >= len(text):
            raise fault('the JSON array is cut off; it has to end with "]"')
        on_line = on_line + 1 if line == previous else 1
        previous = line
        try:
            row, end = decoded(text, at)
        except ManifestError as error:
            raise fault(str(error)) from None
        yield str(line) if on_line == 1 else f"{line}, object {on_line}", row
        line += text.count("\n", at, end)
        at = skip(end)
        if text[at : at + 1] == ",":
            at = skip(at + 1)
            if text[at : at + 1] == "]":
                raise fault('a "," stands before the closing "]" of the array; remove it')
        elif text[at : at + 1] not in ("]", ""):
            raise fault(f"the objects of an array are divided by commas, but {_show(text[at : at + 20])} follows one")
    at = skip(at + 1)
    if at < len(text):
        raise fault(f"{_show(text[at : at + 20])} follows the end of the JSON array; write one array, or {NO_ARRAY}")


def _refuse_binary(path: Path, head: bytes) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ManifestError(f"{shown(path)}: is UTF-16 text; save it as UTF-8")
    for beginning, name in OTHER_FILES.items():
        if head.startswith(beginning):
            raise ManifestError(f"{shown(path)}: is {name}; {ONE_OBJECT_A_LINE}")
    if b"\0" in head:
        raise ManifestError(f"{shown(path)}: is a binary file (audio?); {ONE_OBJECT_A_LINE}")


def parse(line: bytes) -> dict[str, Any]:
    """The object on a line.

    Raises:
        ManifestError: there is none, or more than one.
    """
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise ManifestError(f"byte {byte:#04x} is not UTF-8; save the manifest as UTF-8 text") from None
    if text.startswith("["):
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            raise ManifestError(f"begins a JSON array; {NO_ARRAY}") from None
        raise ManifestError(f"is a JSON array; {NO_ARRAY}")
    row, end = decoded(text, 0)
    if text[end:].strip():
        raise ManifestError(f"is not JSON (Extra data at column {end + 1}); {ONE_OBJECT_A_LINE}")
    return row


def decoded(text: str, at: int) -> tuple[dict[str, Any], int]:
    """The JSON object that begins at a character of `text`, and the character after it.

    Raises:
        ManifestError: there is none, it has a key twice, or it holds what is no text.
    """
    try:
        row, end = _DECODER.raw_decode(text, at)
        if "\\u" in (written := text[at:end]) or written.count("[") + written.count("{") > DEEP:
            json.dumps(row, ensure_ascii=False).encode()  # no tokenizer takes a lone surrogate, as the decoder does
    except UnicodeEncodeError:
        raise ManifestError("holds half of a surrogate pair (\\ud800 …); write the whole character") from None
    except RecursionError:
        raise ManifestError(f"is nested too deeply; {ONE_OBJECT_A_LINE}") from None
    except json.JSONDecodeError as error:
        raise ManifestError(f"is not JSON ({error.msg} at column {error.colno}); {ONE_OBJECT_A_LINE}") from None
    except ManifestError:
        raise
    except ValueError:
        raise ManifestError(f"is not JSON (a number is too long); {ONE_OBJECT_A_LINE}") from None
    if not isinstance(row, dict):
        raise ManifestError(f"is {_show(row)}, not a JSON object; {ONE_OBJECT_A_LINE}")
    return row, end


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ManifestError(f"has the key {_show(double)} twice; keep one")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles)
