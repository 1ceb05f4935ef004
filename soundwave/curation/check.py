"""Read a manifest and all its recordings once, and say what is in it and what is wrong with it.

A fault is what training or scoring would stop at, leave out, or learn wrongly:

    line        a line that is no sample
    audio       a recording that is missing, empty, damaged, holds NaN, or does not last as long as it says
    silent      nothing is heard where the text has words
    long        over 30 s, which cannot be trained on; `soundwave transcribe` and `evaluate` read it in pieces
    labels      CTC cannot align the text: it has more labels, with a blank between equal ones, than there are frames
    texts       the same sound has another text in another line

A remark is what a person may want to look at:

    twice       the same sound with the same task and the same texts
    part        the line takes less of the recording, from its beginning on, than there is
    unknown     the tokenizer has no token for a part of the text, or does not give the text back
"""

import bisect
import hashlib
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from soundwave.curation.sounds import Part, Sound, measure_all
from soundwave.data.audio import LONGEST_SAMPLES, LONGEST_SECONDS, SAMPLING_RATE, shown
from soundwave.data.chats import Refused
from soundwave.data.collate import SILENCE, ctc_text_of
from soundwave.data.manifest import AudioMissing, EntryReader, ManifestError, Sample, empty
from soundwave.data.readers import source_of
from soundwave.model.processing import INVISIBLE, MINIMUM_SECONDS

FAULTS = {
    "line": "lines that are no samples",
    "audio": "recordings that cannot be used",
    "silent": "silent recordings with a text",
    "long": f"recordings over {LONGEST_SECONDS:g} s, which cannot be trained on",
    "labels": "texts with more labels than CTC has frames for",
    "texts": "the same sound with another text",
}
REMARKS = {
    "twice": "the same sound, task and texts again",
    "part": "lines that take only the beginning of their recording",
    "unknown": "texts that the tokenizer does not give back",
}
EDGES = (0, 1, 2, 3, 5, 8, 12, 16, 20, 25, 30)  # seconds: the bins of the histogram; the last one is open
HOP = 160  # samples of a log-mel frame; the encoder makes one frame of two
UNUSED = 0.5  # s that a recording may go on after the part that a line takes, before that is remarked
SHORT = 40  # characters of a text in a message
REMEMBERED = 65_536  # recordings that need not be decoded again if another line names them


class Finding(NamedTuple):
    """Something that was found in one line.

    Attributes:
        kind: a key of `FAULTS` or `REMARKS`.
        place: the sample's id, "train.jsonl:12".
        text: one line: what was found, and how to mend it.
        part: what can be listened to, if it can.
    """

    kind: str
    place: str
    text: str
    part: Part | None = None


@dataclass
class Totals:
    """Figures of some samples: their number, the length of their recordings, and the words of their texts."""

    samples: int = 0
    recordings: int = 0
    seconds: float = 0.0
    words: int = 0


@dataclass
class Coverage:
    """How a tokenizer writes the texts that CTC learns.

    Attributes:
        name: the language model, or the folder of the model.
        vocabulary: number of its tokens.
        used: numbers of those that occur.
        tokens, characters: of all texts together.
        texts: number of texts.
    """

    name: str
    vocabulary: int
    used: set[int] = field(default_factory=set)
    tokens: int = 0
    characters: int = 0
    texts: int = 0


@dataclass
class Checked:
    """What a manifest holds.

    Attributes:
        manifest: its path.
        lines: number of lines, or rows.
        samples: number of those that are samples.
        tasks: by name.
        lengths: number of recordings in each bin of `EDGES`, by the length that is used.
        rates: samples a second -> number of recordings.
        texts: number of different texts of recordings.
        coverage: None if no text was looked at.
        findings: all faults and remarks, in the order of the lines.
        spread: samples without a fault from all over the manifest, to listen to.
    """

    manifest: Path
    lines: int = 0
    samples: int = 0
    tasks: dict[str, Totals] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=lambda: [0] * len(EDGES))
    rates: Counter[int] = field(default_factory=Counter)
    texts: int = 0
    coverage: Coverage | None = None
    findings: list[Finding] = field(default_factory=list)
    spread: list[Sample] = field(default_factory=list)

    @property
    def total(self) -> Totals:
        return Totals(*(sum(getattr(one, key) for one in self.tasks.values()) for key in Totals.__dataclass_fields__))

    @property
    def faults(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind in FAULTS]

    def count(self, kind: str) -> int:
        return sum(finding.kind == kind for finding in self.findings)


def check_manifest(
    manifest: str | Path,
    *,
    processor: Any = None,
    tokenizer_name: str = "",
    frame_stack: int = 2,
    allow_outside: bool = False,
    processes: int | None = None,
    listen_to: int = 12,
    note: Callable[[str], None] | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> Checked:
    """Read every line of a manifest, and decode every recording once.

    Args:
        processor: a SoundwaveProcessor, whose tokenizer writes the texts; None looks at no tokens.
        tokenizer_name: what the user calls the processor's tokenizer.
        frame_stack: encoder frames for one CTC frame, as in SoundwaveConfig.
        processes: how many decode; by default one for each core.
        listen_to: number of samples without a fault that are kept in `spread`.
        note: called with one sentence for each thing of other trainers' forms that is passed over, at its first line.
        progress: called with the number of lines that are done.

    Raises:
        ManifestError: it cannot be read at all, or holds no lines.
    """
    check = _Check(Path(manifest), processor, tokenizer_name, frame_stack, listen_to)
    source = source_of(manifest)
    told: set[str] = set()

    def tell(place: str, about: str, sentence: str) -> None:
        if about not in told and note is not None:
            note(f"{shown(source.path)}:{place}: {sentence}")
        told.add(about)

    read = EntryReader(source.path.name, source.root, allow_outside=allow_outside, tell=tell)
    waiting: deque[_Line] = deque()  # for their sounds, or for those of lines before them
    known: OrderedDict[Part, list[Sound]] = OrderedDict()  # recordings that several lines name are decoded once
    done = 0

    def read_line(place: str, entry: Any) -> _Line:
        try:
            sample = read(place, entry)
        except AudioMissing as error:
            return _Line(Finding("audio", read.id_of(place), str(error)))
        except (ManifestError, Refused) as error:
            return _Line(Finding("line", read.id_of(place), str(error)))
        return _Line(sample, None if sample.audio is None else Part(str(sample.audio), sample.offset, sample.duration))

    def parts() -> Iterator[Part]:
        try:
            for place, entry in source.entries():
                check.found.lines += 1
                line = read_line(place, entry)
                if line.part is not None and line.part not in known:
                    known[line.part] = []
                    if len(known) > REMEMBERED:
                        known.popitem(last=False)
                    waiting.append(line._replace(sound=known[line.part]))
                    yield line.part
                else:
                    waiting.append(line if line.part is None else line._replace(sound=known[line.part]))
                    take_those_that_are_ready()
        except ManifestError as error:  # the rest of the manifest cannot be read
            if not check.found.lines:
                raise
            waiting.append(_Line(Finding("line", shown(source.path.name), str(error))))

    def take_those_that_are_ready() -> None:
        nonlocal done
        while waiting and (waiting[0].sound is None or waiting[0].sound):
            line = waiting.popleft()
            check.add(line.what, None if line.sound is None else line.sound[0])
            done += 1
        progress(done)

    for sound in measure_all(parts(), processes or _cores()):
        head = waiting[0].sound
        assert head is not None  # lines without a recording before it are taken already
        head.append(sound)
        take_those_that_are_ready()
    take_those_that_are_ready()
    if not check.found.lines:
        raise empty(source)
    return check.finished()


class _Line(NamedTuple):
    what: Sample | Finding
    part: Part | None = None
    sound: list[Sound] | None = None  # of its part, empty until it is known


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Heard(NamedTuple):
    """The first line with a sound: its id, its text, and what all lines with the sound say of it."""

    place: str
    text: str | None
    said: set[int]


class _Check:
    """Adds up what the lines of a manifest hold."""

    def __init__(self, manifest: Path, processor: Any, tokenizer_name: str, frame_stack: int, listen_to: int):
        self.found = Checked(manifest)
        self.processor, self.frame_stack, self.listen_to = processor, frame_stack, listen_to
        if processor is not None:
            self.found.coverage = Coverage(tokenizer_name, len(processor.tokenizer))
        self._heard: dict[int, _Heard] = {}
        self._texts: set[int] = set()
        self._stride, self._good = 1, 0

    def add(self, what: Sample | Finding, sound: Sound | None) -> None:
        if isinstance(what, Finding):
            self.found.findings.append(what)
            return
        before = len(self.found.findings)
        self.found.samples += 1
        totals = self.found.tasks.setdefault(what.task, Totals())
        totals.samples += 1
        totals.words += len((what.text or "").split())
        if sound is not None:
            ids = self._tokens(what)
            self._add_sound(what, sound, ids, totals)
            if len(self.found.findings) == before:
                self._keep(what)

    def finished(self) -> Checked:
        self.found.texts = len(self._texts)
        kept, wanted = self.found.spread, self.listen_to
        if len(kept) > wanted:
            self.found.spread = [kept[place * len(kept) // wanted] for place in range(wanted)]
        return self.found

    def _keep(self, sample: Sample) -> None:
        """Keep every n-th sample; n doubles when there are enough."""
        if self._good % self._stride == 0 and self.listen_to:
            self.found.spread.append(sample)
            if len(self.found.spread) >= 2 * self.listen_to:
                self.found.spread = self.found.spread[::2]
                self._stride *= 2
        self._good += 1

    def _tokens(self, sample: Sample) -> list[int] | None:
        """The tokens that CTC learns of a sample's text."""
        text = ctc_text_of(sample)
        coverage = self.found.coverage
        if coverage is None or not text or not text.strip():
            return None
        ids = self.processor.ctc_ids(text)
        coverage.used.update(ids)
        coverage.tokens += len(ids)
        coverage.characters += len(" ".join(text.split()))
        coverage.texts += 1
        tokenizer = self.processor.tokenizer
        back = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if back.split() != INVISIBLE.sub("", text).split():
            unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
            why = "the tokenizer has no token for a part of it" if unknown else "the tokenizer writes other characters"
            fault = f"its text {_short(text)} comes back as {_short(back.strip())}: {why}; write it in another way"
            self._say("unknown", sample, fault)
        return ids

    def _add_sound(self, sample: Sample, sound: Sound, ids: list[int] | None, totals: Totals) -> None:
        if sound.fault:
            self._say("audio", sample, f"{shown(sample.audio or '')}: {sound.fault}")
            return
        seconds = sound.samples / SAMPLING_RATE
        totals.recordings += 1
        totals.seconds += seconds
        self.found.lengths[bisect.bisect_right(EDGES, seconds) - 1] += 1
        self.found.rates[sound.rate] += 1
        if sample.text is not None:
            self._texts.add(_hash(sample.text))
        if sound.peak <= SILENCE:
            if (sample.text or "").strip():
                self._say("silent", sample, f"is silent, but its text is {_short(sample.text or '')}; record it again")
            return
        if sound.samples > LONGEST_SAMPLES:
            fault = f"lasts {seconds:.4g} s, but at most {LONGEST_SECONDS:g} s can be trained on"
            self._say("long", sample, f"{fault}; cut it, or give offset and duration")
        elif ids is not None:
            needed, frames = len(ids) + sum(a == b for a, b in pairwise(ids)), self._frames(sound.samples)
            if needed > frames:
                fault = f"has {frames} frames, but its text {_short(ctc_text_of(sample) or '')} needs {needed}"
                self._say("labels", sample, f"{fault}; correct the text, or the offset and duration")
        if sample.duration is not None and not sample.offset and sound.file_seconds > sample.duration + UNUSED:
            fault = f"takes {sample.duration:g} s from the beginning, but the file lasts {sound.file_seconds:g} s"
            self._say("part", sample, f"{fault}; correct the duration if it should be the whole")
        self._compare(sample, sound)

    def _compare(self, sample: Sample, sound: Sound) -> None:
        """Look for other lines with the same sound."""
        words = " ".join((sample.text or "").casefold().split())
        says = _hash("\0".join((sample.task, words, sample.prompt or "", sample.answer or "", sample.ctc_text or "")))
        first = self._heard.setdefault(sound.digest, _Heard(sample.id, sample.text, set()))
        text = first.text
        if text is None:  # that of the first line that has one
            self._heard[sound.digest] = first._replace(text=sample.text)
        elif sample.text is not None and words != " ".join(text.casefold().split()):
            fault = f"has the text {_short(sample.text)}, but the same sound has {_short(text)} in {first.place}"
            self._say("texts", sample, f"{fault}; correct one of them")
            return
        if says in first.said:
            self._say("twice", sample, f"is the same sound, task and text as {first.place}; leave one of them out")
        first.said.add(says)

    def _frames(self, samples: int) -> int:
        """CTC frames of a recording."""
        extractor = self.processor.feature_extractor
        least = extractor.n_samples if self.processor.whole_window else int(MINIMUM_SECONDS * SAMPLING_RATE)
        return -(-(max(samples, least) // HOP) // (2 * self.frame_stack))

    def _say(self, kind: str, sample: Sample, text: str) -> None:
        part = None if kind in ("line", "audio") else Part(str(sample.audio), sample.offset, sample.duration)
        self.found.findings.append(Finding(kind, sample.id, text, part))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _short(text: str) -> str:
    return repr(text) if len(text) <= SHORT else repr(text[:SHORT]) + "…"
