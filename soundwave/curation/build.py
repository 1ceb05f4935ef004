"""Build a data set from manifests by a recipe: the tasks of Soundwave (arXiv 2502.12900) as building blocks.

    strings    clips of one speaker spliced into one, to be transcribed
    speakers   several speakers spliced into one clip: "The first speaker says …", how many there are, what one says
    sound      an environmental sound between two utterances, with its own token in the text of CTC
    question   a question about each recording, answered by a key of its line

Answers are direct, chosen from shuffled options, a sentence, or given after a transcript. Phrasings come from a file of
templates. All that is drawn for a sample follows from the seed, the number of its task in the recipe and its own
number, so the same recipe gives the same bytes, wherever a run is killed and begun again.

The folder that is built holds `manifest.jsonl`, `audio/` and `build.json`, which tells what it was built of. Until it
is complete it is called `NAME.partial`, beside `NAME.partial.jsonl`, the samples that are done.
"""

import hashlib
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from soundwave.curation.journal import Journal, named
from soundwave.curation.lines import Row, read_lines
from soundwave.curation.recipes import (
    FORMATS,
    Format,
    Phrasings,
    Question,
    Recipe,
    RecipeError,
    Sound,
    SourceOf,
    Speakers,
    Strings,
    Task,
    fill,
    load_recipe,
    token_of,
)
from soundwave.data.audio import SAMPLING_RATE, AudioError, load_audio, shown
from soundwave.data.manifest import Sample, write_manifest
from soundwave.data.readers import source_of
from soundwave.data.splicing import Clips, at_level, choose_words, join, loudest_part
from soundwave.evaluation.progress import Progress

FORM = 1  # raise it when the same recipe gives other bytes
TRIES = 50  # draws of a sample until it is short enough
CACHED = 512  # recordings in memory
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Rng = np.random.Generator


@dataclass
class Built:
    """What has been built.

    Attributes:
        manifest: the manifest.
        samples: how many, by task.
        hours: of audio.
        done_before: samples that a killed run had done.
        was_there: the folder was complete already.
    """

    manifest: Path
    samples: Counter[str] = field(default_factory=Counter)
    hours: float = 0.0
    done_before: int = 0
    was_there: bool = False


def build(
    recipe: str | Path,
    out: str | Path,
    *,
    note: Callable[[str], None] | None = None,
    progress: str | None = None,
) -> Built:
    """Build the data set of a recipe in a folder, which must not exist yet, or be empty.

    Args:
        note: as in `read_manifest`.
        progress: title of a progress bar on stderr.

    Raises:
        RecipeError: the recipe or its phrasings cannot be used.
        ManifestError, AudioError: nor can a source, or a recording.
        ValueError: the folder holds something else, or the unfinished build of another recipe.
    """
    chosen, phrasings = load_recipe(recipe)
    _check_phrasings(Path(recipe), chosen, phrasings)
    out = Path(os.path.abspath(out))
    partial, done = (out.with_name(f"{out.name}.partial{ending}") for ending in ("", ".jsonl"))
    sources = {
        name: _Source(name, source, Path(recipe).parent, note, spoken=_is_spoken(chosen, name))
        for name, source in chosen.sources.items()
    }
    blocks = [_Block(number, task, chosen, phrasings, sources) for number, task in enumerate(chosen.tasks)]
    made_by = {
        "form": FORM,
        "recipe": _hash(chosen.model_dump(mode="json", exclude_defaults=True)),
        "phrasings": _hash(phrasings.model_dump(mode="json")),
        "sources": {name: source.hash for name, source in sources.items()},
    }
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if _made_by(out) != made_by:
            raise ValueError(f"out = {out} holds something already, not of this recipe; name a new folder")
        done.unlink(missing_ok=True)
        return _built(out, was_there=True)
    with Journal(done, made_by, key="sample") as journal:
        (partial / "audio").mkdir(parents=True, exist_ok=True)
        before = len(journal.results)
        total = sum(block.count for block in blocks)
        with Progress(progress, total) as bar:
            for number, (block, place) in enumerate(_samples(blocks)):
                if number not in journal.results:
                    row = block.make(place, partial)
                    journal.write([{"sample": number, "row": row}])
                bar.step()
        write_manifest(partial / "manifest.jsonl", (journal.results[number]["row"] for number in range(total)))
        text = json.dumps({"made_by": made_by, "recipe": chosen.model_dump(mode="json")}, indent=1, ensure_ascii=False)
        _write(partial / "build.json", (text + "\n").encode())
        for stray in [*partial.glob(".*"), *(partial / "audio").glob(".*")]:  # half a file, from a run that was killed
            stray.unlink()
        os.replace(partial, out)
        done.unlink()
    built = _built(out)
    built.done_before = before
    return built


def _samples(blocks: list["_Block"]) -> Iterator[tuple["_Block", int]]:
    for block in blocks:
        for place in range(block.count):
            yield block, place


def _built(out: Path, *, was_there: bool = False) -> Built:
    built = Built(out / "manifest.jsonl", was_there=was_there)
    with open(built.manifest, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            built.samples[row["task"]] += 1
            built.hours += row["duration"] / 3600
    return built


def _made_by(out: Path) -> Any:
    try:
        return json.loads((out / "build.json").read_text(encoding="utf-8"))["made_by"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Write a file aside and rename it, so that a kill leaves no half of it."""
    aside = path.with_name(f".{path.name}")
    with named(path):
        aside.write_bytes(content)
        os.replace(aside, path)


def _is_spoken(recipe: Recipe, name: str) -> bool:
    """Whether a source gives speakers, who need names."""
    return any(not isinstance(task, Question) and task.source == name for task in recipe.tasks)


def _check_phrasings(path: Path, recipe: Recipe, phrasings: Phrasings) -> None:
    """Refuse a recipe whose phrasings lack a task or a format of it."""
    file = recipe.phrasings
    for number, task in enumerate(recipe.tasks):
        place = f"{shown(path)}: tasks.{number}"
        for name in (name for name, weight in _asked(task).items() if weight > 0):
            found, forms = phrasings.tasks.get(name), _formats_of(name)
            if found is None:
                known = ", ".join(phrasings.tasks)
                raise RecipeError(f"{place} asks for {name!r}, but {file} has phrasings of {known}; add tasks.{name}")
            if not any(task.formats.get(form) for form in forms):
                raise RecipeError(f"{place}.formats has no weight for a format that {name!r} can have: {forms}")
            if found.natural is None and (name == "said" or "natural" in forms and task.formats.get("natural")):
                raise RecipeError(f"{place} wants sentences that answer {name!r}; add tasks.{name}.natural to {file}")
        for form, weight in task.formats.items():
            if weight > 0 and form != "direct" and form not in phrasings.formats:
                raise RecipeError(f"{place} has the format {form!r}, but {file} does not say it; add formats.{form}")


def _asked(task: Task) -> dict[str, float]:
    """The questions of a task, with their weights."""
    if isinstance(task, Question):
        return {task.task: 1.0}
    return {"transcribe": 1.0} if isinstance(task, Strings) else dict(task.ask)


def _formats_of(name: str) -> tuple[Format, ...]:
    """The formats that the answer to a question can have."""
    if name == "said":
        return ("direct",)
    return ("direct", "natural") if name in ("transcribe", "turn") else FORMATS


class _Source:
    """The lines of a manifest that a recipe uses.

    Attributes:
        samples: in the manifest's order.
        speakers: speaker -> text -> its samples, where the source is spoken.
        labels: label -> its samples, where it has labels.
        hash: of all that is taken from it.
    """

    def __init__(self, name: str, source: SourceOf, folder: Path, note: Callable[[str], None] | None, *, spoken: bool):
        self.name, self.source = name, source
        path = folder / source.manifest
        self.where = shown(path)
        values: dict[str, dict[str, None]] = {key: {} for key in source.where}

        def change(row: Row) -> Row | None:
            for key, wanted in source.where.items():
                values[key][str(row.get(key))] = None
                if row.get(key) not in (wanted if isinstance(wanted, list) else [wanted]):
                    return None
            if source.label is not None:
                if not isinstance(row.get(source.label), str) or not row[source.label].strip():
                    raise _LabelMissing(f'lacks a string "{source.label}", the label of source {name}', row)
                row = row | {"text": row[source.label].strip()}
            return row

        self.samples: list[Sample] = []
        try:
            lines = read_lines(source_of(path), allow_outside=source.allow_outside, note=note, change=change)
            for line in lines:
                if line.sample is None or line.sample.audio is None:
                    raise ValueError(f"{self.where}: {line.id}: {line.fault or 'has no recording'}")
                self.samples.append(line.sample)
        except _LabelMissing as error:
            fault, row = error.args
            raise ValueError(f"{self.where}: {_name_of(row)} {fault}") from None
        if not self.samples:
            found = "; ".join(f"{key} is {', '.join(list(seen)[:10])}" for key, seen in values.items())
            raise ValueError(f"{self.where}: no line is as `where` of source {name!r} says; {found}")
        self.speakers: dict[str, Clips] = {}
        if spoken:
            if source.label is not None:
                raise ValueError(f"source {name!r} has a label, so it is no speech; take speakers from another one")
            self._sort_by_speaker()
        self.labels: dict[str, list[Sample]] = defaultdict(list)
        for sample in self.samples if source.label is not None else ():
            self.labels[sample.text or ""].append(sample)
        keys = [
            [sample.id, os.path.basename(str(sample.audio)), sample.offset, sample.duration, sample.text, sample.extra]
            for sample in self.samples
        ]
        self.hash = _hash(keys)

    def _sort_by_speaker(self) -> None:
        key = self.source.speaker
        for sample in self.samples:
            speaker = sample.extra.get(key)
            if not isinstance(speaker, str | int) or not (sample.text or "").strip():
                lacks = f'"{key}", which tells who speaks' if (sample.text or "").strip() else "a text"
                raise ValueError(f"{self.where}: {sample.id}: lacks {lacks}; add it")
            clips = self.speakers.setdefault(str(speaker), defaultdict(list))
            clips[(sample.text or "").strip()].append(sample)


def _name_of(row: Row) -> str:
    """How a message names a line: by its recording."""
    audio = row.get("audio_filepath")
    return f"the line of {shown(audio)}" if isinstance(audio, str) else "a line"


class _LabelMissing(Exception):
    """A line of a source lacks its label."""


class _TooLong(Exception):
    """A draw that gives a longer recording than the recipe allows."""


@lru_cache(maxsize=CACHED)
def _load(audio: str, offset: float, duration: float | None) -> np.ndarray:
    return load_audio(audio, offset=offset, duration=duration)


def _samples_of(sample: Sample) -> np.ndarray:
    return _load(str(sample.audio), sample.offset, sample.duration)


def _at_speed(rng: Rng, samples: np.ndarray, speeds: tuple[float, float]) -> tuple[np.ndarray, Row]:
    """Samples played at a speed that is drawn, and the speed for the row; nothing is drawn where there is no choice."""
    if speeds == (1.0, 1.0):
        return samples, {}
    speed = round(float(rng.uniform(*speeds)), 3)
    return soxr.resample(samples, speed * SAMPLING_RATE, SAMPLING_RATE), {"speed": speed}


class _Block:
    """One task of a recipe: makes its samples, each from its number alone."""

    def __init__(self, number: int, task: Task, recipe: Recipe, phrasings: Phrasings, sources: dict[str, _Source]):
        self.number, self.task, self.recipe, self.phrasings = number, task, recipe, phrasings
        self.source = sources[task.source]
        self.sounds = sources[task.sounds] if isinstance(task, Sound) else None
        self.count = task.count or len(self.source.samples) * getattr(task, "times", 1)
        self.place = f"tasks.{number}"
        if isinstance(task, Speakers) and len(self.source.speakers) < task.speakers[1]:
            raise RecipeError(
                f"{self.place}: speakers = {list(task.speakers)}, but source {task.source!r} has "
                f"{len(self.source.speakers)} speakers; lower the number"
            )
        if isinstance(task, Speakers) and task.ask.get("speakers") and len(phrasings.numbers) < task.speakers[1]:
            raise RecipeError(f"{self.place}: {recipe.phrasings} has words for {len(phrasings.numbers)} numbers only")
        if isinstance(task, Speakers) and len(phrasings.ordinals) < task.speakers[1]:
            raise RecipeError(f"{self.place}: {recipe.phrasings} has only {len(phrasings.ordinals)} ordinals")
        if not isinstance(task, Question) and task.clips[1] > 1:
            for speaker, clips in self.source.speakers.items():
                if len(clips) < 2:
                    raise RecipeError(
                        f"{self.place}: clips = {list(task.clips)}, but speaker {speaker!r} says one text only; leave "
                        "the speaker out (where), or write clips: [1, 1]"
                    )
        labels = self.sounds or self.source
        if isinstance(token := getattr(task, "token", None), dict):
            without = [label for label in sorted(labels.labels) if label not in token]
            unknown = [label for label in token if label not in labels.labels]
            if without or unknown:
                fault = f"no word for {without[0]!r}" if without else f"{unknown[0]!r}, which nothing in the source is"
                raise RecipeError(f"{self.place}: token has {fault}; the labels are {', '.join(sorted(labels.labels))}")
        self.answers: list[str] = []
        self.key = ""
        if isinstance(task, Question):
            self.key = task.answer or self.source.source.label or "text"
            answers = [self._answer(sample) for sample in self.source.samples]
            self.answers = task.choices or sorted(set(answers))
            self.order = np.random.default_rng([recipe.seed, number]).permutation(len(self.source.samples))
            if task.formats.get("choice") and len(set(self.answers)) < 2:
                raise RecipeError(f"{self.place}: a choice needs two answers, but {self.key!r} has one; set choices")
        elif self.sounds is not None:
            self.answers = sorted(self.sounds.labels)
            if task.formats.get("choice") and len(self.answers) < 2:
                raise RecipeError(f"{self.place}: a choice needs two sounds, but there is one; use another format")
        elif isinstance(task, Speakers):
            self.answers = phrasings.numbers

    def _answer(self, sample: Sample) -> str:
        value = sample.text if self.key in ("text", self.source.source.label) else sample.extra.get(self.key)
        value = getattr(sample, self.key, None) if value is None and self.key in ("answer", "source_lang") else value
        if not isinstance(value, str | int | float) or not str(value).strip():
            raise RecipeError(f"{self.place}: {self.source.where}: {sample.id}: has no {self.key!r} to ask for")
        return str(value).strip()

    def make(self, place: int, folder: Path) -> Row:
        """The row of a sample, whose recording is written to the folder."""
        rng = np.random.default_rng([self.recipe.seed, self.number, place])
        for _ in range(TRIES):
            try:
                audio, name, row = self._draw(rng, place)
            except _TooLong:
                continue
            break
        else:
            if isinstance(self.task, Question):
                sample = self.source.samples[int(self.order[place % len(self.order)])]
                longer = f"is longer than max_seconds = {self.task.max_seconds:g}"
                tail = f", with its tail of {self.task.tail:g} s" if self.task.tail else ""
                slow = f", at speeds of {list(self.task.speed)}" if self.task.speed != (1.0, 1.0) else ""
                raise AudioError(sample.audio or "", f"{longer}{tail}{slow}; cut it")
            raise RecipeError(
                f"{self.place}: {TRIES} draws gave no recording of at most {self.task.max_seconds:g} s; use fewer "
                "clips or speakers"
            )
        file = folder / "audio" / f"{name}.{self.recipe.audio}"
        if not (isinstance(self.task, Question) and file.exists()):
            content = io.BytesIO()
            soundfile.write(content, audio, SAMPLING_RATE, format=self.recipe.audio.upper(), subtype="PCM_16")
            _write(file, content.getvalue())
        return {"audio_filepath": f"audio/{file.name}", "duration": len(audio) / SAMPLING_RATE} | row

    def _draw(self, rng: Rng, place: int) -> tuple[np.ndarray, str, Row]:
        """Samples, the name of their file, and the rest of the row."""
        task, name = self.task, f"{self.number:02d}-{place:06d}"
        if isinstance(task, Question):
            index = int(self.order[place % len(self.order)])
            return self._question(rng, task, index, name)
        if isinstance(task, Speakers):
            return self._speakers(rng, task, name)
        speaker = self._speaker(rng)
        parts, texts = [], []
        for _ in range(2 if isinstance(task, Sound) else 1):
            clips = choose_words(rng, self.source.speakers[speaker], task.clips)
            parts.append(join(rng, [_samples_of(clip) for clip in clips]))
            texts.append(" ".join((clip.text or "").strip() for clip in clips))
        text, row = " ".join(texts), {"speaker": speaker}
        ask = _pick(rng, _asked(task))
        if isinstance(task, Strings):
            return self._short(parts), name, {"text": text} | self._phrased(rng, ask, text, text) | row
        label = self.answers[int(rng.integers(len(self.answers)))]
        assert self.sounds is not None
        sounds = self.sounds.labels[label]
        sound = sounds[int(rng.integers(len(sounds)))]
        samples, speed = _at_speed(rng, _samples_of(sound), task.speed)
        loudest = loudest_part(samples, task.seconds)
        try:
            parts.insert(1, at_level(loudest, np.concatenate(parts), float(rng.uniform(*task.level))))
        except ValueError as error:
            raise AudioError(sound.audio or "", f"{error}; leave it out of source {task.sounds!r}") from None
        token = token_of(task.token, label)
        written = [*texts, token] if task.token_at == "end" else [texts[0], token, texts[1]]
        row |= {"sound": label, "ctc_text": " ".join(written)} | speed
        answer = text if ask == "transcribe" else label
        return self._short(parts), name, {"text": text} | self._phrased(rng, ask, answer, text) | row

    def _speaker(self, rng: Rng) -> str:
        names = sorted(self.source.speakers)
        return names[int(rng.integers(len(names)))]

    def _speakers(self, rng: Rng, task: Speakers, name: str) -> tuple[np.ndarray, str, Row]:
        count = int(rng.integers(task.speakers[0], task.speakers[1] + 1))
        names = sorted(self.source.speakers)
        chosen = [names[int(place)] for place in rng.permutation(len(names))[:count]]
        parts, texts = [], []
        for speaker in chosen:
            clips = choose_words(rng, self.source.speakers[speaker], task.clips)
            parts.append(join(rng, [_samples_of(clip) for clip in clips]))
            texts.append(" ".join((clip.text or "").strip() for clip in clips))
        text, ask, values = " ".join(texts), _pick(rng, dict(task.ask)), {}
        if ask == "said":
            sentence = self._one(rng, self.phrasings.tasks["said"].natural or [])
            answer = " ".join(
                fill(sentence, nth=self.phrasings.ordinals[turn], number=str(turn + 1), answer=said)
                for turn, said in enumerate(texts)
            )
        elif ask == "turn":
            turn = int(rng.integers(count))
            values = {"nth": self.phrasings.ordinals[turn], "number": str(turn + 1)}
            answer = texts[turn]
        else:
            answer = self.phrasings.numbers[count - 1] if ask == "speakers" else text
        row = self._phrased(rng, ask, answer, text, **values)
        return self._short(parts), name, {"text": text} | row | {"speakers": chosen}

    def _question(self, rng: Rng, task: Question, index: int, name: str) -> tuple[np.ndarray, str, Row]:
        sample = self.source.samples[index]
        samples, speed = _at_speed(rng, _samples_of(sample), task.speed)
        audio = self._short([samples])
        text = None if self.source.source.label else (sample.text or "").strip() or None
        row = self._phrased(rng, task.task, self._answer(sample), text)
        if task.token:
            row["ctc_text"] = token_of(task.token, (sample.text or "").strip())
        if speed:
            return audio, name, ({"text": text} if text else {}) | row | speed
        # Other questions may ask about the same recording with another tail.
        tail = f"-tail{round(task.tail * SAMPLING_RATE)}" if task.tail else ""
        return audio, f"{self.source.name}-{index:06d}{tail}", ({"text": text} if text else {}) | row

    def _short(self, parts: list[np.ndarray]) -> np.ndarray:
        audio = np.concatenate([*parts, np.zeros(round(self.task.tail * SAMPLING_RATE), parts[0].dtype)])
        if len(audio) > self.task.max_seconds * SAMPLING_RATE:
            raise _TooLong
        return audio / max(1.0, float(np.abs(audio).max(initial=0)))

    def _phrased(self, rng: Rng, name: str, answer: str, text: str | None, **values: str) -> Row:
        """Task, prompt and answer of a sample in a format that is drawn."""
        forms = [form for form in _formats_of(name) if form != "transcribe" or text]
        weights = {form: self.task.formats.get(form, 0.0) for form in forms}
        form = _pick(rng, weights) if any(weights.values()) else "direct"
        phrases = self.phrasings.tasks[name]
        prompt = fill(self._one(rng, phrases.prompts), **values)
        wanted = self._one(rng, self.phrasings.formats.get(form, [""]))
        if form == "choice":
            answers = [each for each in self.answers if each != answer]
            wrong = [answers[int(place)] for place in rng.permutation(len(answers))[: self.task.options - 1]]
            options = [answer, *wrong]
            options = [options[int(place)] for place in rng.permutation(len(options))]
            wanted = fill(wanted, options=" ".join(f"({LETTERS[at]}) {each}" for at, each in enumerate(options)))
            letter = LETTERS[options.index(answer)]
            answer = {"text": answer, "letter": letter, "both": f"({letter}) {answer}"}[self.task.answer_with]
        elif form == "natural":
            answer = fill(self._one(rng, phrases.natural or []), answer=answer, **values)
        elif form == "transcribe":
            answer = f"{text}\n{answer}"
        return {"task": name, "prompt": prompt + wanted, "answer": answer, "format": form}

    def _one(self, rng: Rng, phrases: list[str]) -> str:
        return phrases[int(rng.integers(len(phrases)))]


def _pick(rng: Rng, weights: dict[str, float]) -> str:
    """A key, drawn by its weight."""
    names = [name for name, weight in weights.items() if weight > 0]
    edges = np.cumsum([weights[name] for name in names])
    return names[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]
