"""Read the lines of a manifest in parallel: what each sample needs to be chosen and put into a batch.

Each process takes a range of bytes that begins and ends with a line, looks at the audio files, opens the headers of
those without a duration, and returns columns with one value a sample:

    offset, length  the line in the file                  line        its number
    duration        seconds; NaN for none                 characters  of prompt and answer, see `tokens_of`
    task, licence   numbers of names                      flags       HAS_AUDIO, FIT, FROM_HEADER, PLAIN
    hash            of the bytes of the line              audio       hash of the file's size and time, with FROM_HEADER
"""

import json
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from pydantic import ValidationError

from soundwave.data.audio import LONGEST_SAMPLES, LONGEST_SECONDS, SAMPLING_RATE, AudioError, shown
from soundwave.data.chats import Refused
from soundwave.data.collate import characters_of, ctc_text_of, with_duration
from soundwave.data.manifest import AudioMissing, EntryReader, Sample
from soundwave.data.members import split_member
from soundwave.data.source import BLANK, LONGEST_LINE, TOO_LONG, ManifestError, parse

COLUMNS = {
    **{"offset": np.uint64, "length": np.uint32, "line": np.uint32, "duration": np.float64, "characters": np.uint32},
    **{"task": np.uint32, "licence": np.uint32, "flags": np.uint8, "hash": np.uint64, "audio": np.uint64},
}
# FIT: stage I can learn from it, because it is a recording with a text. PLAIN: `EntryReader.plain` gives the sample.
HAS_AUDIO, FIT, FROM_HEADER, PLAIN = 1, 2, 4, 8
LICENCES = ("license", "licence")  # keys of a manifest's lines
RANGE = 1 << 20  # bytes that a process reads at once: some 4 000 lines, half a second


class Range(NamedTuple):
    """A part of a file with lines of JSON.

    Attributes:
        name, root: name of the manifest, and the folder that its audio paths are relative to.
        is_lines: the lines are the manifest's own, else [place, row].
        file: the file; start, stop: its bytes to read.
    """

    name: str
    root: Path
    is_lines: bool
    allow_outside: bool
    file: Path
    start: int
    stop: int


class Scanned(NamedTuple):
    """What a range holds. A place is the number of a line in the range, or what the reader of another form calls it.

    Attributes:
        columns: by name.
        tasks, licences: the names that the columns number, in order of appearance; "" is no licence.
        missing: [place, audio file, fault, state] of each line whose audio file cannot be read: it is no sample.
        faults: [sample, place, audio file, fault, state] of each sample whose header cannot be used.
        notes: [place, what it is about, sentence] of what is passed over, once for each thing.
        fault: place and fault of the first line that is no sample. What follows it is not read.
        lines: number of lines, blank ones too. entries: without these.
        samples: with durations; only if they are held.
    """

    columns: dict[str, np.ndarray]
    tasks: list[str]
    licences: list[str]
    missing: list[list[Any]]
    faults: list[list[Any]]
    notes: list[list[Any]]
    fault: tuple[Any, str] | None
    lines: int
    entries: int
    samples: list[Sample]


def hash_of(line: bytes) -> int:
    """64 bits that tell whether a line is still what was indexed."""
    return int.from_bytes(blake2b(line, digest_size=8).digest(), "little")


def licence_of(sample: Sample) -> str | None:
    """The licence that a manifest's line states."""
    return next((str(sample.extra[key]) for key in LICENCES if sample.extra.get(key)), None)


def line_of(place: str, entry: bytes | dict[str, Any] | Refused) -> bytes:
    """An entry of another source as a line of JSON: [place, row], or [place, why it is none]."""
    if isinstance(entry, bytes):
        try:
            entry = parse(entry)
        except ManifestError as error:
            entry = Refused(str(error))
    return json.dumps([place, str(entry) if isinstance(entry, Refused) else entry]).encode() + b"\n"


def entry_of(line: bytes) -> tuple[str, dict[str, Any] | Refused]:
    """The place and the entry of such a line."""
    place, row = json.loads(line)
    return place, Refused(row) if isinstance(row, str) else row


def state_of(file: str | Path) -> list[int]:
    """What tells whether a file that could not be used has been changed since."""
    on_disk, _ = split_member(str(file))
    try:
        status = os.stat(on_disk)
    except OSError as error:
        return [error.errno or 0]
    except ValueError:  # a null byte
        return []
    return [status.st_size, status.st_mtime_ns, status.st_mode, int(os.access(on_disk, os.R_OK))]


def audio_stamp(file: str | Path) -> int:
    """64 bits of an audio file's size and time; 0 if it is gone."""
    try:
        status = os.stat(split_member(str(file))[0])
    except OSError:
        return 0
    return hash_of(b"%d %d" % (status.st_size, status.st_mtime_ns)) | 1


def checked_duration(sample: Sample) -> Sample:
    """The sample with its duration.

    Raises:
        AudioError: its file cannot be used, or it lasts longer than can be trained on.
    """
    sample = with_duration(sample)
    if sample.audio and sample.duration and round(sample.duration * SAMPLING_RATE) > LONGEST_SAMPLES:
        raise AudioError(
            sample.audio,
            f"duration = {sample.duration:g}, but at most {LONGEST_SECONDS:g} s can be trained on; cut it, or "
            "give offset and duration",
        )
    return sample


class Collected:
    """Columns that grow by a sample at a time."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []
        self.tasks: dict[str, int] = {}
        self.licences: dict[str, int] = {"": 0}
        self.samples: list[Sample] = []

    def add(
        self, sample: Sample, place: tuple[int, int, int], line_hash: int, measured: bool, plain: bool, hold: bool
    ) -> None:
        """Add a sample whose line has (offset, length, number); `measured` if its header gave the duration."""
        flags = HAS_AUDIO * (sample.audio is not None) | FROM_HEADER * measured | PLAIN * plain
        flags |= FIT * (sample.audio is not None and bool((ctc_text_of(sample) or "").strip()))
        self.rows.append(
            (
                *place,
                np.nan if sample.duration is None else sample.duration,
                characters_of(sample),
                self.tasks.setdefault(sample.task, len(self.tasks)),
                self.licences.setdefault(licence_of(sample) or "", len(self.licences)),
                flags,
                line_hash,
                audio_stamp(sample.audio) if measured and sample.audio else 0,
            )
        )
        if hold:
            self.samples.append(sample)

    def columns(self) -> dict[str, np.ndarray]:
        """By name, in the order of COLUMNS."""
        values = zip(*self.rows, strict=True) if self.rows else ([] for _ in COLUMNS)
        return {name: np.array(found, dtype) for (name, dtype), found in zip(COLUMNS.items(), values, strict=True)}


def scan(part: Range, file: BinaryIO, hold: bool = False) -> Scanned:
    """Read and check the lines of a range.

    Args:
        file: opened; in its place `part.file` is not read.
        hold: return the samples, too.
    """
    notes: dict[str, tuple[Any, str]] = {}
    missing: list[list[Any]] = []
    faults: list[list[Any]] = []
    fault: tuple[Any, str] | None = None
    collected = Collected()
    read = EntryReader(
        part.name,
        part.root,
        allow_outside=part.allow_outside,
        tell=lambda _, about, sentence: notes.setdefault(about, (place, sentence)),
    )
    number = entries = 0
    file.seek(part.start)
    offset = part.start
    while offset < part.stop and (line := file.readline(LONGEST_LINE + 1)):
        number += 1
        place: Any = number
        at, offset = offset, offset + len(line)
        if part.is_lines and len(line) > LONGEST_LINE:
            fault, entries = (place, TOO_LONG), entries + 1
            break
        if line.strip() in BLANK:
            continue
        entries += 1
        try:
            if part.is_lines:
                entry: Any = parse(line)
            else:
                place, entry = entry_of(line)
            sample = read(str(place), entry)
        except AudioMissing as error:
            missing.append([place, error.name, error.fault, state_of(os.path.join(read.root, error.name))])
            continue
        except (ManifestError, Refused) as error:
            fault = (place, str(error))
            break
        plain = not hold and _is_plain(read, str(place), entry, sample)
        measured = False
        try:
            known = checked_duration(sample)
            measured, sample = known.duration is not None and sample.duration is None, known
        except AudioError as error:
            file_of = str(sample.audio)
            faults.append([len(collected.rows), place, file_of, error.fault, state_of(file_of)])
        collected.add(sample, (at, len(line), number), hash_of(line), measured, plain, hold)
    told = [[where, about, sentence] for about, (where, sentence) in notes.items()]
    return Scanned(
        collected.columns(), list(collected.tasks), list(collected.licences), missing, faults, told, fault, number,
        entries, collected.samples,
    )  # fmt: skip


def _is_plain(read: EntryReader, place: str, row: dict[str, Any], sample: Sample) -> bool:
    if sample.chat or (row.get("audio_filepath") is None) is not (sample.audio is None):
        return False
    try:
        return read.plain(place, row, sample.audio) == sample
    except ValidationError:  # what is meant is not what is written
        return False


class Tables:
    """What several ranges hold together, in their order."""

    def __init__(self, is_lines: bool) -> None:
        self.is_lines, self.lines, self.entries = is_lines, 0, 0
        self.fault: tuple[str, str] | None = None
        self.columns: list[dict[str, np.ndarray]] = []
        self.samples: list[Sample] = []
        self.missing: list[list[Any]] = []
        self.faults: list[list[Any]] = []
        self.notes: dict[str, tuple[str, str]] = {}
        self.count = 0
        self._tasks: dict[str, int] = {}
        self._licences: dict[str, int] = {"": 0}

    def add(self, found: Scanned) -> None:
        """Add the range that follows."""
        columns = found.columns
        columns["line"] = columns["line"] + np.uint32(self.lines)
        for column, names, table in (
            ("task", found.tasks, self._tasks),
            ("licence", found.licences, self._licences),
        ):
            numbers = np.array([table.setdefault(name, len(table)) for name in names], np.uint32)
            columns[column] = numbers[columns[column]] if len(names) else columns[column]
        self.columns.append(columns)
        self.missing += [[self._place(place), *rest] for place, *rest in found.missing]
        self.faults += [[self.count + sample, self._place(place), *rest] for sample, place, *rest in found.faults]
        for place, about, sentence in found.notes:
            self.notes.setdefault(about, (self._place(place), sentence))
        if found.fault:
            self.fault = self._place(found.fault[0]), found.fault[1]
        self.samples += found.samples
        self.count += len(columns["line"])
        self.lines += found.lines
        self.entries += found.entries

    def _place(self, place: Any) -> str:
        return str(self.lines + place) if self.is_lines else str(place)

    @property
    def tasks(self) -> list[str]:
        return list(self._tasks)

    @property
    def licences(self) -> list[str]:
        return list(self._licences)

    def joined(self) -> dict[str, np.ndarray]:
        """The columns of all ranges."""
        return {
            name: np.concatenate([columns[name] for columns in self.columns] or [np.empty(0, dtype)])
            for name, dtype in COLUMNS.items()
        }


def cut(file: BinaryIO, start: int, size: int = 0) -> list[tuple[int, int]]:
    """Ranges of a file of about RANGE bytes (or `size`), each of whole lines, from `start` on."""
    end = file.seek(0, os.SEEK_END)
    cuts = []
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        while start < end:
            found = content.find(b"\n", min(start + (size or RANGE), end - 1))
            stop = end if found < 0 else found + 1
            cuts.append((start, stop))
            start = stop
    return cuts


def scan_in_parallel(parts: list[Range], processes: int) -> Iterator[Scanned]:
    """Read ranges, in their order.

    Raises:
        ManifestError: a process was ended by somebody else.
    """
    if min(len(parts), processes) < 2:
        yield from map(scan_range, parts)
        return
    # A process that is spawned would import torch again. None of them touches it here.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = min(len(parts), processes)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(os.getpid(),))
    try:
        yield from pool.map(scan_range, parts)
    except BrokenProcessPool:
        raise ManifestError(
            f"{shown(parts[0].name)}: a process that read it was ended; close other programs if the memory was full, "
            "and start again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def scan_range(part: Range) -> Scanned:
    """Read and check the lines of a range of a file."""
    with open(part.file, "rb") as file:
        return scan(part, file)


def _begin(parent: int) -> None:
    """Leave Ctrl-C to the first process, and end when it has been killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
