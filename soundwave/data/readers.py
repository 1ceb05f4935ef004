"""What a user may name as a manifest, and who reads it.

    train.jsonl, train.json           JSON lines, or a JSON array (`soundwave.data.source`)
    train.jsonl.gz                    JSON lines compressed with gzip
    train.csv, train.tsv, ….gz        tables with a header (`soundwave.data.tables`)
    train.parquet, data-00000.arrow   tables with recordings in a column, or the paths of recordings
    cuts.jsonl, cuts.jsonl.gz         cuts of Lhotse (`soundwave.data.cuts`)
    a folder                          `soundwave.data.folders`

All give the same entries, so that the same checks run. A row that is none gives what is wrong with it in its place, so
that all of them can be named.
"""

import os
import stat
from functools import partial
from pathlib import Path

from soundwave.data.audio import shown
from soundwave.data.cuts import cuts_source, is_cut
from soundwave.data.folders import folder_source, metadata_source
from soundwave.data.source import BLANK, ManifestError, Source, parse, stamp_of
from soundwave.data.source import source_of as source_of_json
from soundwave.data.tables import GZIP, arrow_source, is_table, lines_of, parquet_source, reading, table_source

HEAD = 65_536  # bytes by which a file is known
UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def source_of(path: str | Path) -> Source:
    """The source that a path names.

    Raises:
        ManifestError: the file cannot be read, or is of another kind.
    """
    path = Path(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            return folder_source(path)
    except OSError:
        return source_of_json(path)  # says what is wrong
    if not stat.S_ISREG(status.st_mode) or not os.access(path, os.R_OK):
        return source_of_json(path)
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"PAR1"):
        return parquet_source(_named(path, ".parquet", "a Parquet file"))
    if head.startswith(b"ARROW1") or path.suffix.lower() == ".arrow":
        return arrow_source(_named(path, ".arrow", "an Arrow file"))
    if path.suffix.lower() == ".parquet":
        raise ManifestError(f"{shown(path)}: is no Parquet file, or damaged; get a whole copy")
    compressed = head.startswith(GZIP)
    if compressed:
        with reading(path) as file:
            head = file.read(HEAD)
    if head.startswith(UTF_16) or b"\0" in head:
        if compressed:
            raise ManifestError(f"{shown(path)}: holds a binary file or UTF-16 text, compressed; compress UTF-8 text")
        return source_of_json(path)
    if path.name == "metadata.csv":
        return metadata_source(path)
    if is_table(path, head):
        return table_source(path)
    if _begins_with_cut(path, head):
        return cuts_source(path)
    if not compressed:
        return source_of_json(path)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise ManifestError(f"{shown(path)}: is a JSON array, compressed; uncompress it, or write JSON lines")
    return Source(path, path.parent, partial(lines_of, path), lambda: stamp_of(os.stat(path)))


def _named(path: Path, ending: str, kind: str) -> Path:
    if path.suffix.lower() != ending:
        raise ManifestError(f"{shown(path)}: is {kind}; name it {shown(path.stem)}{ending}")
    return path


def _begins_with_cut(path: Path, head: bytes) -> bool:
    first = next((line for line in head.split(b"\n") if line.strip() not in BLANK), b"")
    if b'"supervisions"' not in first and b'"tracks"' not in first:
        return False
    try:  # the line may be longer than the head
        return is_cut(parse(next((line for _, line in lines_of(path)), b"")))
    except ManifestError:
        return False
