"""Evaluation of a model on samples: its transcripts and answers are compared with the references.

A recording over 30 s is transcribed in pieces, as `soundwave transcribe` does; for another task its first window is
heard. A sample whose recording cannot be used is left out and named, and the others are scored.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soundwave.data.audio import LONGEST_SECONDS, AudioError
from soundwave.data.collate import LeftOut, answer_of, chat_fault, ctc_text_of, features, prompt_of
from soundwave.data.manifest import Sample
from soundwave.evaluation.choices import listed_options
from soundwave.evaluation.classes import labels_of
from soundwave.evaluation.listening import Heard, Omissions, check_batch_size, listen
from soundwave.evaluation.listening import alike as alike
from soundwave.evaluation.progress import named, say
from soundwave.evaluation.results import Results
from soundwave.evaluation.scores import ANSWER_RULES, Scores, classes_named, has_words, judge, word_errors
from soundwave.evaluation.summary import score_rows
from soundwave.evaluation.translation import is_translation, require_sacrebleu, tokenizer_for
from soundwave.evaluation.words import Rules, check_language, is_language, rules_for
from soundwave.inference.answer import LoadedModel, answer, check_draft, check_longest, read_ctc
from soundwave.inference.long import read_windows
from soundwave.inference.reading import Reader, Window
from soundwave.inference.timestamps import Reading
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor

EachRow = Callable[[dict[str, Any]], None]


@dataclass
class _Frames:
    """Counts of frames: all, those in which CTC writes the blank, CTC's peaks, and those that the LLM reads."""

    frames: int = 0
    blanks: int = 0
    peaks: int = 0
    kept: int = 0

    @classmethod
    def of(cls, path: Tensor, model: SoundwaveForConditionalGeneration) -> "_Frames":
        """The counts of a path int64 [T], -1 in the padding."""
        path = path[path >= 0].cpu()
        runs = torch.unique_consecutive(path)
        peaks = int((runs != model.blank).sum())
        kept = {"peaks": max(peaks, 1), "runs": len(runs), "frames": len(path)}[model.config.keep]
        return cls(len(path), int((path == model.blank).sum()), peaks, kept)

    def seen_by(self, model: SoundwaveForConditionalGeneration) -> Callable[[Reading], None]:
        """A function that adds the counts of a reading."""

        def seen(reading: Reading) -> None:
            found = self.of(reading.path, model)
            for name, value in vars(found).items():
                setattr(self, name, getattr(self, name) + value)

        return seen


class _Answered(NamedTuple):
    """An answer, its frames (None without a recording), and whether the token limit has cut it off."""

    text: str
    frames: _Frames | None
    cut_off: bool = False


def evaluate_ctc(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    language: str | None = None,
    normaliser: str = "auto",
    strict: bool = False,
    each: EachRow | None = None,
    progress: str | None = None,
    results: Results | None = None,
) -> Scores:
    """Score the CTC reading, without the language model: word error rate and use of the blank.

    The reference is a sample's `ctc_text`, or its `text` if it has none. Samples without audio or reference are left
    out, and those whose recording cannot be used.

    Args:
        language, normaliser, strict, each, progress, results: as in `evaluate`.

    Raises:
        ValueError: no sample is left, a batch size below 1, or an unknown language or normaliser.
        AudioError: with `strict`, a recording cannot be used.
    """
    check_batch_size(batch_size)
    wanted = [ctc_text_of(sample) or "" for sample in samples]
    rules = _rules(samples, wanted, language, normaliser, ("source_lang", "lang", "language", "target_lang"))
    left = Omissions(None if results is None else results.leave_out)
    for index, sample in enumerate(samples):
        if sample.audio is None:
            left.add(index, LeftOut(sample.id, "no recording", "there is nothing that CTC could read"))
        elif not has_words(wanted[index], rules[index]):
            left.add(index, _wordless(sample, wanted[index]))
    if len(left) == len(samples):
        raise ValueError("samples holds no recording with a transcript")

    def read(_: Sequence[Sample], clips: Sequence[Tensor | None]) -> list[_Answered]:
        texts, path = read_ctc(model, processor, [clip for clip in clips if clip is not None])
        return [_Answered(text, _Frames.of(row, model)) for text, row in zip(texts, path, strict=True)]

    def whole(sample: Sample, windows: Iterator[Window]) -> _Answered:
        frames = _Frames()
        reader = Reader(LoadedModel(model, processor), batch_size=batch_size, ctc=True, seen=frames.seen_by(model))
        return _Answered(read_windows(reader, windows)[0], frames)

    def row_of(heard: Heard[_Answered]) -> dict[str, Any]:
        (answered,), index = heard.results, heard.index
        row = {"sample": samples[index].id, "task": "transcribe", "reference": wanted[index], "answer": answered.text}
        row |= {"normaliser": rules[index].name} | word_errors(wanted[index], answered.text, rules[index])._asdict()
        frames = answered.frames
        row |= {"frames": frames.frames, "blanks": frames.blanks, "peaks": frames.peaks}
        return row | {"labels": len(processor.ctc_ids(wanted[index])), "kept": frames.peaks} | _length_of(heard)

    model.eval()
    settings = {"to_the_end": lambda _: True, "whole": whole, "strict": strict, "progress": progress}
    return _scored(samples, wanted, processor, batch_size, read, left, row_of, each, results, settings)


def evaluate(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    max_new_tokens: int | Mapping[str, int] = 256,
    draft: str = "ctc",
    accept: float | None = None,
    language: str | None = None,
    normaliser: str = "auto",
    strict: bool = False,
    each: EachRow | None = None,
    progress: str | None = None,
    results: Results | None = None,
) -> Scores:
    """Score the language model's answers.

    The score is the word error rate of transcriptions, BLEU and chrF of translations (tasks called translate,
    translation, st, …), and for each other task the share of right answers, with macro F1 and a confusion matrix if it
    has classes (`soundwave.evaluation.classes`). Each has a bootstrap interval.

    A sample is left out, and named on stderr and in the scores, if its recording cannot be read, is silent although
    something is said in it, or is too short for what is said; and so are recordings to transcribe in which nothing is
    said, because they have no word error rate.

    Args:
        max_new_tokens: longest answer, in tokens, or the longest answer of each task. Of a recording that is
            transcribed in pieces it is the longest text of a piece.
        draft, accept: how transcripts are written; see `soundwave.inference.answer.answer`.
        language: language of the references: a code such as "en", or "und" for the rules of no language. By default
            that of each sample (`target_lang`, `lang`, `language`, `source_lang`), or else the script decides; see
            `soundwave.evaluation.words`.
        normaliser: what transcripts are normalised with: one of `soundwave.evaluation.words.NORMALISERS`. By default
            the language decides.
        strict: read every recording before the first answer, and raise at the first that cannot be used.
        each: called with each answer as it comes, in the order of the batches: a dict of sample, task, reference,
            answer, normaliser, cut_off; of a transcription its errors and of how many words (or characters) they are,
            of another answer whether it is right, and for multiple choice the option that it names, or None.
        progress: title of a progress bar on stderr, or of lines where there is no terminal. By default there is none.
        results: where answers are kept as they come. What it has already is not asked again.

    Raises:
        ValueError: no sample is left, a sample has neither answer nor text, `max_new_tokens` lacks a task, a batch
            size below 1, an unknown language or normaliser, or translations without sacrebleu.
        AudioError: with `strict`, a recording cannot be used.
    """
    if not samples:
        raise ValueError("samples is empty: there is nothing to evaluate")
    check_batch_size(batch_size)
    check_draft(draft, accept)
    for longest in max_new_tokens.values() if isinstance(max_new_tokens, Mapping) else [max_new_tokens]:
        check_longest(longest)
    if any(is_translation(sample.task) for sample in samples):
        require_sacrebleu()
    wanted = [answer_of(sample) for sample in samples]
    rules = _rules(samples, wanted, language, normaliser, ("target_lang", "lang", "language", "source_lang"))
    left = Omissions(None if results is None else results.leave_out)
    for index, sample in enumerate(samples):
        if sample.task == "transcribe" and not has_words(wanted[index], rules[index]):
            left.add(index, _wordless(sample, wanted[index]))
    if len(left) == len(samples):
        raise ValueError("samples holds only recordings in which nothing is said: there is nothing to evaluate")
    for index, sample in enumerate(samples):
        if index not in left and (fault := chat_fault(processor, sample)):
            if strict or len(left) + 1 == len(samples):
                raise ValueError(f"{sample.id}: {fault}")
            left.add(index, LeftOut(sample.id, str(sample.audio), fault))
    tasks = {sample.task for index, sample in enumerate(samples) if index not in left}
    if isinstance(max_new_tokens, Mapping) and (missing := tasks - max_new_tokens.keys()):
        raise ValueError(f"max_new_tokens has no entry for task {min(missing)!r}, which a sample has; add it")

    def limit_of(task: str) -> int:
        return max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[task]

    def reply(asked: Sequence[Sample], clips: Sequence[Tensor | None]) -> list[_Answered]:
        task, readings = asked[0].task, []
        how: dict[str, Any] = {"draft": draft, "accept": accept} if task == "transcribe" else {"draft": "none"}
        if any(clip is not None for clip in clips):
            how["readings"] = readings
        prompts, cut = [prompt_of(sample) for sample in asked], []
        texts = answer(model, processor, prompts, list(clips), max_new_tokens=limit_of(task), cut_off=cut, **how)
        paths = [None if reading is None else reading.path for reading in readings] or [None] * len(texts)
        return [
            _Answered(text, None if path is None else _Frames.of(path, model), place in cut)
            for place, (text, path) in enumerate(zip(texts, paths, strict=True))
        ]

    def whole(sample: Sample, windows: Iterator[Window]) -> _Answered:
        frames, limit = _Frames(), limit_of(sample.task)
        how: dict[str, Any] = {"draft": draft, "accept": accept, "seen": frames.seen_by(model)}
        reader = Reader(LoadedModel(model, processor), batch_size=batch_size, max_new_tokens=limit, **how)
        text, cut = read_windows(reader, windows)
        return _Answered(text, frames, cut)

    def row_of(heard: Heard[_Answered]) -> dict[str, Any]:
        (answered,), index, sample = heard.results, heard.index, samples[heard.index]
        reference, text, frames = wanted[index], answered.text, answered.frames
        row = {"sample": sample.id, "task": sample.task, "reference": reference, "answer": text}
        counted = {} if frames is None else {"frames": frames.frames, "kept": frames.kept}
        counted |= _length_of(heard)
        if sample.task == "transcribe":
            row |= {"normaliser": rules[index].name, "cut_off": answered.cut_off}
            return row | word_errors(reference, text, rules[index])._asdict() | counted
        if is_translation(sample.task):
            target = language or _language_of(sample, ("target_lang",))
            tokenizer = f"sacrebleu, tokenizer {tokenizer_for(target)}"
            return row | {"normaliser": tokenizer, "cut_off": answered.cut_off, "target_lang": target} | counted
        asked: dict[str, Any] = {"labels": labels_of(sample.extra.get("labels"), reference)}
        asked["options"] = listed_options(sample.extra.get("options"))
        verdict = judge(reference, text, sample.prompt or "", turkish=rules[index].turkish, **asked)
        row |= {"normaliser": ANSWER_RULES, "cut_off": answered.cut_off, "right": verdict.right}
        row |= {"option": verdict.option} if verdict.choice else {}
        if classes := classes_named(reference, text, sample.prompt or "", **asked):
            row |= dict(zip(("class", "answered"), classes, strict=True))
        return row | counted

    model.eval()
    settings = {
        "to_the_end": lambda sample: sample.task == "transcribe",
        "whole": whole,
        "strict": strict,
        "progress": progress,
    }
    scores = _scored(samples, wanted, processor, batch_size, reply, left, row_of, each, results, settings)
    if scores.cut_off:
        say(f"answers cut off at the token limit: {len(scores.cut_off)}, of {named(scores.cut_off)}")
    if scores.first_window:
        ids = named(scores.first_window)
        say(f"recordings of which only the first 30 s were heard: {len(scores.first_window)}, of {ids}")
    return scores


def seconds_to_first_token(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    samples: Sequence[Sample],
    *,
    count: int = 3,
) -> float | None:
    """Median time from the features of a recording to the first token of the answer, one recording at a time.

    It is measured on the first `count` recordings that can be read, after one that is not counted; None without any.
    """
    times: list[float] = []
    for sample in samples:
        if sample.audio is None or (sample.duration or 0.0) > LONGEST_SECONDS:
            continue
        try:
            clip = features(processor, sample)
        except AudioError:
            continue
        for _ in range(1 if times else 2):
            start = time.perf_counter()
            answer(model, processor, [prompt_of(sample)], [clip], max_new_tokens=1)
            seconds = time.perf_counter() - start
        times.append(seconds)
        if len(times) == count:
            break
    return statistics.median(times) if times else None


def _scored(
    samples: Sequence[Sample],
    wanted: Sequence[str],
    processor: SoundwaveProcessor,
    batch_size: int,
    respond: Callable[[Sequence[Sample], Sequence[Tensor | None]], Sequence[_Answered]],
    left: Omissions,
    row_of: Callable[[Heard[_Answered]], dict[str, Any]],
    each: EachRow | None,
    results: Results | None,
    settings: Mapping[str, Any],
) -> Scores:
    """Let the samples that are not in `left` be answered, and score the rows that this gives."""
    rows: dict[int, dict[str, Any]] = {}
    if results is not None:
        for index, sample in enumerate(samples):
            if sample.id in results.rows:
                rows[index] = results.rows[sample.id]
            elif index not in left and sample.id in results.left_out:
                left.add(index, results.left_out[sample.id])
    done = {index: bool(row.get("in_pieces")) for index, row in rows.items()}
    start, seconds = time.perf_counter(), 0.0
    for heard in listen(samples, wanted, processor, batch_size, respond, left, done=done, **settings):
        row = rows[heard.index] = row_of(heard)
        seconds += heard.seconds
        if results is not None:
            results.add(row)
        if each:
            each(row)
    taken = time.perf_counter() - start
    scores = score_rows([rows[index] for index in sorted(rows)])
    scores.left_out = left.in_order()
    if seconds:
        scores.speed = {"audio_seconds": round(seconds, 3), "seconds": round(taken, 3), "rtfx": seconds / taken}
    return scores


def _rules(
    samples: Sequence[Sample], wanted: Sequence[str], language: str | None, normaliser: str, keys: Sequence[str]
) -> list[Rules]:
    """The rules of each reference, by the language that is given for all, or else by the sample's `keys`.

    Where the script decides, transcripts are looked at apart from other answers.
    """
    check_language(language)
    rules: dict[int, Rules] = {}
    for spoken in (True, False):
        places = [i for i, sample in enumerate(samples) if (sample.task == "transcribe") is spoken]
        languages = [language or _language_of(samples[i], keys) for i in places]
        rules |= zip(places, rules_for([wanted[i] for i in places], languages, normaliser), strict=True)
    return [rules[i] for i in range(len(samples))]


def _language_of(sample: Sample, keys: Sequence[str]) -> str | None:
    values = (getattr(sample, key, None) or sample.extra.get(key) for key in keys)
    return next((value for value in values if is_language(value)), None)


def _length_of(heard: Heard[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"seconds": round(heard.seconds, 3)}
    return found | {name: True for name in ("in_pieces", "first_window") if getattr(heard, name)}


def _wordless(sample: Sample, text: str) -> LeftOut:
    found = f"its text {text!r} has no words" if text else "has no text"
    return LeftOut(sample.id, str(sample.audio), f"{found}, so it has no word error rate")
