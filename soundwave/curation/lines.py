"""Read a manifest line by line, so that a line whose recording is missing is not lost."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from soundwave.data.audio import shown
from soundwave.data.chats import Refused
from soundwave.data.manifest import AudioMissing, EntryReader, Sample, empty
from soundwave.data.source import ManifestError, Source, parse

Row = dict[str, Any]


class Found(NamedTuple):
    """A line of a manifest.

    Attributes:
        id: that of its sample.
        row: what the line holds.
        sample: None if its recording is missing.
        fault: what is wrong with the recording.
    """

    id: str
    row: Row
    sample: Sample | None
    fault: str = ""


def read_lines(
    source: Source,
    *,
    allow_outside: bool = False,
    note: Callable[[str], None] | None = None,
    change: Callable[[Row], Row | None] = lambda row: row,
) -> Iterator[Found]:
    """The lines of a manifest in their order.

    Args:
        source: the manifest, see `soundwave.data.readers.source_of`.
        allow_outside, note: as in `read_manifest`.
        change: called with what each line holds; gives what is read in its place, or None to pass over the line.

    Raises:
        ManifestError: the manifest cannot be read, a line is no sample, or there is none.
    """
    told: set[str] = set()

    def tell(place: str, about: str, sentence: str) -> None:
        if about not in told:
            told.add(about)
            line = f"{shown(source.path)}:{place}: {sentence}"
            note(line) if note is not None else warnings.warn(line, stacklevel=4)

    read = EntryReader(source.path.name, source.root, allow_outside=allow_outside, tell=tell)
    entries = 0
    for place, entry in source.entries():
        entries += 1
        try:
            if isinstance(entry, Refused):
                raise entry
            row = change(parse(entry) if isinstance(entry, bytes) else dict(entry))
            if row is None:
                continue
            try:
                sample = read(place, dict(row))
                found = Found(sample.id, row, sample)
            except AudioMissing as error:
                found = Found(read.id_of(place), row, None, error.fault)
        except (ManifestError, Refused) as error:
            raise ManifestError(f"{shown(source.path)}:{place}: {error}") from None
        yield found
    if not entries:
        raise empty(source)
