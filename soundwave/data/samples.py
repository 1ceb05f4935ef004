"""The samples of manifests of any size: a sequence that makes each sample when it is asked for.

What is needed of all samples at once (lengths, tasks, licences) comes from the columns of the manifests' indexes.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import overload

import numpy as np

from soundwave.data.audio import AudioError, shown
from soundwave.data.chats import Refused
from soundwave.data.collate import CHARACTERS_A_TOKEN, TOKENS_A_SECOND, LeftOut, with_duration
from soundwave.data.index import Index
from soundwave.data.manifest import EntryReader, Sample
from soundwave.data.scan import (
    FROM_HEADER,
    HAS_AUDIO,
    PLAIN,
    Collected,
    audio_stamp,
    checked_duration,
    entry_of,
    hash_of,
)
from soundwave.data.source import ManifestError, parse

LINES = "lines:"  # begins a hash of lines; that of samples themselves has none such
CHANGED = "the line is not what it was when training started; keep the manifest as it is, or start again"


class Samples(Sequence[Sample]):
    """Samples of manifests, in any order, each read when it is asked for.

    Args:
        indexes: of the manifests.
        rows: for each index the samples that are taken; None for all of all.
    """

    def __init__(self, indexes: Sequence[Index], rows: Sequence[np.ndarray] | None = None):
        taken = [np.arange(len(index.columns["line"])) for index in indexes] if rows is None else rows
        self._parts = [_Part(index) for index in indexes]
        self._part = np.repeat(np.arange(len(indexes)), [len(rows) for rows in taken]).astype(np.uint16)
        self._row = np.concatenate([*taken, np.empty(0, np.int64)]).astype(np.int64)

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "Samples":
        """Samples that are in memory already."""
        if isinstance(samples, Samples):
            return samples
        collected = Collected()
        for number, sample in enumerate(samples, start=1):
            collected.add(sample, (0, 0, number), 0, measured=False, plain=False, hold=True)
        names = list(collected.tasks), list(collected.licences)
        here = Path()
        return cls([Index(here, here, True, True, here, collected.columns(), *names, [], [], [], collected.samples)])

    def __len__(self) -> int:
        return len(self._row)

    @overload
    def __getitem__(self, i: int) -> Sample: ...

    @overload
    def __getitem__(self, i: slice) -> "Samples": ...

    def __getitem__(self, i: int | slice) -> "Sample | Samples":
        """A sample, or some of them.

        Raises:
            ManifestError: its line has been changed since, or its audio file leads out of the folder now.
        """
        if isinstance(i, slice):
            return self._like(self._parts, self._part[i], self._row[i])
        return self._parts[self._part[i]].sample(int(self._row[i]))

    def __iter__(self) -> Iterator[Sample]:
        for part, row in zip(self._part, self._row, strict=True):
            yield self._parts[part].sample(int(row))

    def __add__(self, others: Iterable[Sample]) -> "Samples":
        more = Samples.of(others)
        parts = np.concatenate([self._part, more._part + np.uint16(len(self._parts))])
        return self._like(self._parts + more._parts, parts, np.concatenate([self._row, more._row]))

    @staticmethod
    def _like(parts: "list[_Part]", part: np.ndarray, row: np.ndarray) -> "Samples":
        found = Samples([])
        found._parts, found._part, found._row = parts, part, row
        return found

    def column(self, name: str) -> np.ndarray:
        """A column of the indexes, one value a sample; see `soundwave.data.scan`."""
        return self._gather(lambda index: index.columns[name])

    def seconds(self) -> np.ndarray:
        """Duration of each sample's recording, float64; NaN for text only."""
        return np.where(self._has_audio(), np.nan_to_num(self.column("duration")), np.nan)

    def tokens(self) -> np.ndarray:
        """Estimated work of each sample, float64, as `tokens_of` tells it of one."""
        seconds = np.nan_to_num(self.seconds())
        return self.column("characters") / CHARACTERS_A_TOKEN + TOKENS_A_SECOND * seconds

    def tasks(self) -> list[str]:
        """The task of each sample."""
        return self._named("task", lambda index: index.tasks)

    def has_text_only(self) -> bool:
        """Whether a sample has no recording."""
        return not self._has_audio().all()

    def digest(self) -> str | None:
        """Hash of the samples, their order and the folders of their recordings; None if they are all in memory.

        It needs no sample, only the hashes of their lines.
        """
        if all(part.index.held is not None for part in self._parts):
            return None
        digest = hashlib.sha256()
        for number, part in enumerate(self._parts):
            digest.update(f"{number} {part.index.path.name} {part.index.root}\n".encode("utf-8", "surrogateescape"))
            for sample in part.index.held or ():
                digest.update(sample.model_dump_json().encode() + b"\n")
        digest.update(self._part.tobytes())
        for name in ("hash", "line", "duration"):
            digest.update(self.column(name).tobytes())
        return f"{LINES}{digest.hexdigest()[:16]}"

    def licences(self) -> list[str]:
        """The licence that the line of each sample states; "" for none."""
        return self._named("licence", lambda index: index.licences)

    def manifests(self) -> list[str]:
        """The name of each sample's manifest."""
        names = [part.names() for part in self._parts]
        pairs = zip(self._part.tolist(), self._row.tolist(), strict=True)
        return [found if isinstance(found := names[part], str) else found[row] for part, row in pairs]

    def _has_audio(self) -> np.ndarray:
        return self.column("flags") & HAS_AUDIO > 0

    def _gather(self, column: Callable[[Index], np.ndarray]) -> np.ndarray:
        found = [column(part.index)[self._row[self._part == number]] for number, part in enumerate(self._parts)]
        if len(found) == 1:
            return found[0]
        joined = np.empty(len(self), found[0].dtype if found else np.float64)
        for number, values in enumerate(found):
            joined[self._part == number] = values
        return joined

    def _named(self, column: str, names_of: Callable[[Index], list[str]]) -> list[str]:
        numbers = self._gather(lambda index: index.columns[column])
        tables = [names_of(part.index) for part in self._parts]
        return [tables[part][number] for part, number in zip(self._part.tolist(), numbers.tolist(), strict=True)]


class _Part:
    """An index, and what reads its samples. Processes that are forked share the open file."""

    def __init__(self, index: Index):
        self.index = index
        self._read = EntryReader(
            index.path.name, index.root, allow_outside=index.allow_outside, tell=lambda *_: None, look=False
        )
        self._file = None if index.held is not None else os.open(index.data, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        if self._file is not None:
            weakref.finalize(self, os.close, self._file)

    def __reduce__(self) -> tuple[type["_Part"], tuple[Index]]:
        return _Part, (self.index,)

    def names(self) -> str | list[str]:
        """The name of the samples' manifest; of samples in memory one for each."""
        if self.index.held is None:
            return shown(self.index.path.name)
        return [sample.id.rpartition(":")[0] for sample in self.index.held]

    def sample(self, row: int) -> Sample:
        """A sample, of which all but the presence of its audio file is checked again.

        Raises:
            ManifestError: its line cannot be read, or has been changed since; or its audio file leads out of the folder
                now, or is too long now.
        """
        index = self.index
        if self._file is None:
            return index.held[row]
        offset, length, number, hash_ = (int(index.columns[name][row]) for name in ("offset", "length", "line", "hash"))
        try:
            line = os.pread(self._file, length, offset)
        except OSError as error:
            raise ManifestError(f"{shown(index.path)}:{number}: cannot be read any more ({error.strerror})") from None
        if hash_of(line) != hash_:
            raise ManifestError(f"{shown(index.path)}:{number}: {CHANGED}")
        flags, place = int(index.columns["flags"][row]), str(number)
        try:
            if index.is_lines:
                entry = json.loads(line.decode("utf-8-sig").strip()) if flags & PLAIN else parse(line)
            else:
                place, entry = entry_of(line)
            sample = self._read.plain(place, entry) if flags & PLAIN else self._read(place, entry)
        except (ManifestError, Refused) as error:
            raise ManifestError(f"{shown(index.path)}:{place}: {error}") from None
        except (ValueError, AttributeError):  # only a forged index calls such a line plain
            raise ManifestError(f"{shown(index.path)}:{place}: {CHANGED}") from None
        if not flags & FROM_HEADER or sample.duration is not None or sample.audio is None:
            return sample
        if audio_stamp(sample.audio) != index.columns["audio"][row]:
            with suppress(AudioError):  # what is wrong with the file is told when it is read
                sample = with_duration(sample)
            if sample.duration is not None:
                try:
                    return checked_duration(sample)
                except AudioError as error:  # it is too long now
                    raise ManifestError(f"{shown(index.path)}:{place}: {error}") from None
        return sample.model_copy(update={"duration": float(index.columns["duration"][row])})


class TrainingSet(Sequence["Sample | LeftOut"]):
    """Samples for a loader: one whose line has been changed, or whose file leads out of the folder, is left out."""

    def __init__(self, samples: Samples):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> Sample | LeftOut:
        try:
            return self.samples[i]
        except ManifestError as error:
            place, _, fault = str(error).partition(": ")
            return LeftOut(place, "its line", fault)
