"""Leave out what is transcribed wrongly: the filters of Soundwave's data (arXiv 2502.12900).

A Whisper transcribes each line of a manifest, and a line is kept if

    the word error rate of its `text` against Whisper's, both normalised, is below 10 %
    it lasts 3 to 30 s
    its text has at most 200 characters
    it has at most 100 frames of 10 ms for each character of its text

The limit of the word error rate is the paper's, for Whisper-medium. The embedded Whisper-tiny makes more errors than
that where a transcript is right, and its limit is 70 %: another recording's transcript has an error rate near 100 %.

The paper does not say what the length of a text is counted in; here it is characters. The last three are looked at
first, and what they leave out is not transcribed. A line without a recording or without words cannot be checked, and is
left out as well.

Three files are written, for `train.jsonl` into its folder:

    train-kept.jsonl         the lines that are kept, with `wer` and `pred_text`
    train-left-out.jsonl     the others, with `reason` and `why`, and the same figures if it was transcribed
    train-transcripts.jsonl  what Whisper has heard; the same command goes on from here after a kill

Lines are in the manifest's order. All three are the same bytes however many processes transcribe, and whether a run was
killed on the way. With another limit of the word error rate nothing is transcribed again.
"""

import glob
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from soundwave import backbones
from soundwave.curation import hearing
from soundwave.curation.hearing import Clip, Heard
from soundwave.curation.journal import Journal
from soundwave.curation.lines import read_lines
from soundwave.data.audio import LONGEST_SECONDS, AudioError, seconds_of
from soundwave.data.manifest import Sample, write_manifest
from soundwave.data.readers import source_of
from soundwave.data.source import Source
from soundwave.evaluation.progress import Progress
from soundwave.evaluation.scores import has_words, word_errors
from soundwave.evaluation.words import Rules, check_language, is_language, rules_for

FRAMES_A_SECOND = 100  # of Whisper's log-mel features
FORM = 1  # of the transcripts' file
LIMITS = {backbones.WHISPER: 0.7}  # of the word error rate, where it is not the paper's (bench/curation.py)
REASONS = ("audio", "text", "seconds", "characters", "frames", "wer")  # in the order in which they are looked for


@dataclass(frozen=True)
class Filters:
    """The limits. A line that is at a limit is kept, except for `wer`, which must be below its own.

    Attributes:
        wer: word error rate, 0.1 for 10 %; of scripts without spaces the character error rate.
        min_seconds, max_seconds: length of the recording; at most 30 s, which is what Whisper hears at once.
        characters: length of the text.
        frames: frames of 10 ms for each character of the text.
    """

    wer: float = 0.1
    min_seconds: float = 3.0
    max_seconds: float = LONGEST_SECONDS
    characters: int = 200
    frames: float = 100.0

    def __post_init__(self) -> None:
        for name in (each.name for each in fields(self)):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} = {getattr(self, name)}; give a number from 0 up")
        if not self.min_seconds <= self.max_seconds <= LONGEST_SECONDS:
            raise ValueError(
                f"min_seconds = {self.min_seconds:g} and max_seconds = {self.max_seconds:g}; give two numbers from 0 "
                f"to {LONGEST_SECONDS:g}, the smaller one first"
            )

    def fault(self, text: str, seconds: float) -> tuple[str, str] | None:
        """Why a line is left out that need not be transcribed for it: the reason, and a sentence."""
        if not self.min_seconds <= seconds <= self.max_seconds:
            return "seconds", f"lasts {seconds:g} s, not {self.min_seconds:g} to {self.max_seconds:g} s"
        if len(text) > self.characters:
            return "characters", f"its text has {len(text)} characters, more than {self.characters}"
        frames = seconds * FRAMES_A_SECOND / len(text)
        if frames > self.frames:
            return "frames", f"has {frames:.0f} frames for each character of its text, more than {self.frames:g}"
        return None


def limit_of(whisper: str) -> float:
    """The limit of the word error rate for a Whisper, unless another one is given."""
    return LIMITS.get(whisper, Filters.wer)


@dataclass
class Curated:
    """What `curate` has done.

    Attributes:
        kept, left_out, transcripts: the files.
        lines, hours: of the lines that are kept ("kept") and of those that each of REASONS has left out.
        heard: seconds of audio that this run has transcribed.
        spent: seconds that it took.
        done_before: lines whose transcripts were there already.
        damaged: transcripts that were made again, because their checksum was wrong.
        rates: word error rates of the lines that the other limits keep.
    """

    kept: Path
    left_out: Path
    transcripts: Path
    lines: Counter[str] = field(default_factory=Counter)
    hours: Counter[str] = field(default_factory=Counter)
    heard: float = 0.0
    spent: float = 0.0
    done_before: int = 0
    damaged: int = 0
    rates: list[float] = field(default_factory=list)


class _Line(NamedTuple):
    """A line of the manifest.

    Attributes:
        id: its sample's.
        row: what the line holds, in our own form; of a missing recording, as it stands there.
        sample: None if its recording is missing.
        seconds: length of the recording.
        fault: why it is left out without being transcribed: the reason, and a sentence.
    """

    id: str
    row: dict[str, Any]
    sample: Sample | None = None
    seconds: float | None = None
    fault: tuple[str, str] | None = None


def curate(
    manifest: str | Path,
    *,
    out: str | Path | None = None,
    whisper: str = backbones.WHISPER,
    filters: Filters | None = None,
    batch_size: int = 16,
    workers: int | None = None,
    threads: int = 1,
    language: str | None = None,
    ray: bool = False,
    allow_outside: bool = False,
    note: Callable[[str], None] | None = None,
    progress: str | None = None,
) -> Curated:
    """Transcribe a manifest, and divide its lines into those that the filters keep and those that they leave out.

    Args:
        out: folder of the files; by default that of the manifest, so that paths of recordings stay as they are.
        whisper: Hub id, folder or embedded name.
        filters: the limits; by default the paper's, with that of the word error rate from `limit_of`.
        batch_size: recordings of similar length that are transcribed together.
        workers: processes on this machine, or Ray's actors. By default one for each core (or GPU).
        threads: threads of each of them. Transcripts of another number may differ.
        language: of all recordings. By default that of each line (`source_lang`, `language`, `lang`) decides about
            normalisation, or else its script; and a multilingual Whisper hears for itself what is spoken.
        ray: transcribe on a Ray cluster.
        allow_outside, note: as in `read_manifest`.
        progress: title of a progress bar on stderr.

    Raises:
        ManifestError: the manifest cannot be used.
        ValueError: an argument is out of range, or the files hold something else.
        ChildProcessError: a worker was ended from outside.
    """
    filters = filters or Filters(wer=limit_of(whisper))
    for name, value in (("batch_size", batch_size), ("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value}; give 1 or more")
    check_language(language)
    source = source_of(manifest)
    hearing.check(whisper, language)
    files = _files(source, out)
    lines = _lines(source, files.kept.parent, filters, language, allow_outside, note)
    rules = {number: rule for number, (_, rule) in enumerate(lines) if rule is not None}
    lines = [line for line, _ in lines]
    batches = _batches(lines, batch_size)

    with ExitStack() as stack:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if ray:
            device = stack.enter_context(hearing.ray_cluster())
        made_by = {
            "form": FORM, "lines": _hash(lines), "whisper": whisper, "language": language,
            "dtype": str(hearing.dtype_of(device)).removeprefix("torch."), "device": device, "batch_size": batch_size,
            "threads": threads,
        }  # fmt: skip
        made_by |= {each.name: getattr(filters, each.name) for each in fields(filters) if each.name != "wer"}
        journal = stack.enter_context(Journal(files.transcripts, made_by))
        files.done_before, files.damaged = len(journal.results), journal.damaged
        wanted = [batch for batch in batches if any(clip.line not in journal.results for clip in batch)]
        settings = {"name": whisper, "device": device, "threads": threads, "language": language}
        start = time.monotonic()
        for heard in _read(wanted, settings, workers, ray, lines, progress):
            journal.write(heard)
            files.heard += sum(each.get("seconds", 0.0) for each in heard)
        files.spent = time.monotonic() - start
        journal.finish()
        _write(files, lines, rules, journal.results, filters)
    return files


def _files(source: Source, out: str | Path | None) -> Curated:
    folder = Path(source.root if out is None else out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out = {folder} is a file; name a folder")
    name = source.path.resolve().name
    name = re.sub(r"(\.(jsonl?|csv|tsv|parquet|arrow))?(\.gz)?$", "", name) or name
    return Curated(*(folder / f"{name}-{kind}.jsonl" for kind in ("kept", "left-out", "transcripts")))


def _language_of(sample: Sample) -> str | None:
    values = (sample.source_lang, sample.extra.get("language"), sample.extra.get("lang"))
    return next((value for value in values if is_language(value)), None)


def _lines(
    source: Source,
    folder: Path,
    filters: Filters,
    language: str | None,
    allow_outside: bool,
    note: Callable[[str], None] | None,
) -> list[tuple[_Line, Rules | None]]:
    """The lines of a manifest, looked at, and the rules by which their words are found."""
    found = [
        _Line(line.id, line.row, None, None, ("audio", line.fault))
        if line.sample is None
        else _Line(line.id, _row(line.sample, folder), line.sample)
        for line in read_lines(source, allow_outside=allow_outside, note=note)
    ]
    samples = [line.sample for line in found if line.sample is not None]
    languages = [language or _language_of(sample) for sample in samples]
    rules = iter(rules_for([sample.text or "" for sample in samples], languages))
    return [(line, None) if line.sample is None else _looked_at(line, next(rules), filters) for line in found]


def _looked_at(line: _Line, rules: Rules, filters: Filters) -> tuple[_Line, Rules]:
    """A line with its length, and why it is left out at once."""
    sample = line.sample
    assert sample is not None
    if sample.audio is None:
        return line._replace(fault=("audio", "has no recording")), rules
    seconds = sample.duration
    try:
        if seconds is None:
            seconds = round(seconds_of(sample.audio) - sample.offset, 4)
    except AudioError as error:
        return line._replace(fault=("audio", error.fault)), rules
    text = (sample.text or "").strip()
    if not text or not has_words(text, rules):
        fault = ("text", f"its text {text!r} has no words" if text else "has no text")
    else:
        fault = filters.fault(text, seconds)
    return line._replace(seconds=seconds, fault=fault), rules


def _batches(lines: Sequence[_Line], batch_size: int) -> list[list[Clip]]:
    """Batches of the lines to transcribe, the longest first: they follow from the manifest and the limits alone."""
    wanted = [number for number, line in enumerate(lines) if line.fault is None]
    wanted.sort(key=lambda number: -(lines[number].seconds or 0.0))  # stable: lines of the same length in their order
    samples = [(number, lines[number].sample) for number in wanted]
    clips = [
        Clip(number, str(sample.audio), sample.offset, sample.duration)
        for number, sample in samples
        if sample is not None
    ]
    return [clips[start : start + batch_size] for start in range(0, len(clips), batch_size)]


def _hash(lines: Iterable[_Line]) -> str:
    """Of all in the manifest that transcripts and their batches depend on."""
    found = hashlib.sha256()
    for line in lines:
        found.update(json.dumps([line.id, line.row, line.seconds], ensure_ascii=False, sort_keys=True).encode())
    return found.hexdigest()


def _read(
    batches: list[list[Clip]],
    settings: dict[str, Any],
    workers: int | None,
    ray: bool,
    lines: Sequence[_Line],
    progress: str | None,
) -> Iterator[list[Heard]]:
    if not batches:
        return
    if ray:
        found = hearing.read_on_ray(batches, settings, workers)
    else:
        gpus = torch.cuda.device_count() if settings["device"] == "cuda" else 0
        workers = min(workers or gpus or max(1, _cores() // settings["threads"]), len(batches))
        if workers == 1:
            found = hearing.read_here(batches, settings)
        else:
            found = hearing.read_in_processes(batches, settings, workers)
    total = sum(lines[clip.line].seconds or 0.0 for batch in batches for clip in batch)
    done = 0.0
    with Progress(progress, round(total), unit="second") as bar:
        for heard in found:
            yield heard
            done += sum(lines[each["line"]].seconds or 0.0 for each in heard)
            bar.go_to(min(round(done), bar.total))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _write(
    files: Curated, lines: Sequence[_Line], rules: Mapping[int, Rules], heard: dict[int, Heard], filters: Filters
) -> None:
    """Write both manifests, and count."""
    kept, left = [], []
    for number, line in enumerate(lines):
        fault, figures, seconds = line.fault, {}, line.seconds
        if fault is None and line.sample is not None:
            fault, figures = _judged(line.sample, heard[number], rules[number], filters)
            seconds = heard[number].get("seconds", seconds)
        if seconds is not None and "duration" not in line.row:
            figures = {"duration": seconds} | figures
        if fault is None:
            kept.append(line.row | figures)
        else:
            left.append(line.row | {"sample": line.id, "reason": fault[0], "why": fault[1]} | figures)
        reason = fault[0] if fault else "kept"
        if reason in ("kept", "wer"):
            files.rates.append(figures["wer"])
        files.lines[reason] += 1
        files.hours[reason] += (seconds or 0.0) / 3600
    for file, rows in ((files.left_out, left), (files.kept, kept)):
        for stray in file.parent.glob(f".{glob.escape(file.name)}.*"):  # half a file, from when a run was killed
            stray.unlink()
        write_manifest(file, rows)


def _judged(
    sample: Sample, heard: Heard, rules: Rules, filters: Filters
) -> tuple[tuple[str, str] | None, dict[str, Any]]:
    """Why a line that was transcribed is left out, and its figures."""
    if "fault" in heard:
        return ("audio", heard["fault"]), {}
    text = (sample.text or "").strip()
    errors, of = word_errors(text, heard["pred_text"], rules)
    rate = errors / of
    figures = {"wer": round(rate, 4), "pred_text": heard["pred_text"], "normaliser": rules.name}
    # The recording may last longer or shorter than the manifest says.
    fault = filters.fault(text, heard["seconds"])
    if fault is None and not rate < filters.wer:
        what = "characters" if rules.kind == "characters" else "words"
        fault = "wer", f"{errors} errors in {of} {what}, {rate:.1%}, which is not below {filters.wer:.1%}"
    return fault, figures


def _row(sample: Sample, folder: Path) -> dict[str, Any]:
    """A line in our own form, with all that it holds; paths are relative to `folder`."""
    row: dict[str, Any] = {}
    if sample.audio is not None:
        row["audio_filepath"] = os.path.relpath(sample.audio, os.path.abspath(folder))
        row["offset"] = sample.offset or None
        row["duration"] = sample.duration
    row["text"] = sample.text
    spoken = sample.task == "transcribe"
    row |= {"task": None if spoken and sample.prompt is None else sample.task, "prompt": sample.prompt}
    row["answer"] = None if spoken and sample.answer == sample.text else sample.answer
    row |= {"ctc_text": sample.ctc_text, "source_lang": sample.source_lang, "target_lang": sample.target_lang}
    return {name: value for name, value in row.items() if value is not None} | sample.extra
