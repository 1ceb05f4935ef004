"""Evaluation of a model on samples: its transcripts and answers are compared with the references.

A recording over 30 s is transcribed in pieces, as `soundwave transcribe` does; for another task its first window is
heard. A sample whose recording cannot be used is left out and named, and the others are scored.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soundwave.data.audio import read_blocks
from soundwave.data.collate import LeftOut, answer_of, chat_fault, ctc_text_of, prompt_of
from soundwave.data.manifest import Sample
from soundwave.evaluation.listening import Omissions, check_batch_size, listen
from soundwave.evaluation.listening import alike as alike
from soundwave.evaluation.progress import named, say
from soundwave.evaluation.scores import ANSWER_RULES, Scores, Verdict, has_words, judge, names_of, rate, word_errors
from soundwave.evaluation.words import Rules, check_language, is_language, rules_for
from soundwave.inference.answer import LoadedModel, answer, check_draft, read_ctc
from soundwave.inference.long import read_whole
from soundwave.inference.reading import Reader
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor

EachRow = Callable[[dict[str, Any]], None]


def evaluate_ctc(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    language: str | None = None,
    strict: bool = False,
    each: EachRow | None = None,
    progress: str | None = None,
) -> Scores:
    """Score the CTC reading, without the language model: word error rate and use of the blank.

    The reference is a sample's `ctc_text`, or its `text` if it has none. Samples without audio or reference are left
    out, and those whose recording cannot be used.

    Args:
        language, strict, each, progress: as in `evaluate`.

    Raises:
        ValueError: no sample is left, a batch size below 1, or an unknown language.
        AudioError: with `strict`, a recording cannot be used.
    """
    check_batch_size(batch_size)
    wanted = [ctc_text_of(sample) or "" for sample in samples]
    rules = _rules(samples, wanted, language, ("source_lang", "lang", "language", "target_lang"))
    left = Omissions()
    for index, sample in enumerate(samples):
        if sample.audio is None:
            left.add(index, LeftOut(sample.id, "no recording", "there is nothing that CTC could read"))
        elif not has_words(wanted[index], rules[index]):
            left.add(index, _wordless(sample, wanted[index]))
    if len(left) == len(samples):
        raise ValueError("samples holds no recording with a transcript")

    def read(_: Sequence[Sample], clips: Sequence[Tensor | None]) -> list[_Reading]:
        texts, path = read_ctc(model, processor, [clip for clip in clips if clip is not None])
        return [_Reading(text, *_counts(row, model.blank)) for text, row in zip(texts, path, strict=True)]

    model.eval()
    counts: Counter[str] = Counter()
    scores = Scores()
    texts: dict[int, str] = {}
    in_pieces = []
    settings = {"to_the_end": lambda _: True, "strict": strict, "progress": progress}
    for heard in listen(samples, wanted, processor, batch_size, read, left, **settings):
        index, sample = heard.index, samples[heard.index]
        texts[index] = _joined([reading.text for reading in heard.results])
        for reading in heard.results:
            counts.update(frames=reading.frames, blanks=reading.blanks, peaks=reading.peaks)
        counts["labels"] += len(processor.ctc_ids(wanted[index]))
        if len(heard.results) > 1:
            texts[index], _ = _whole(sample, LoadedModel(model, processor), batch_size, ctc=True)
            in_pieces.append(index)
        if each:
            row = {"sample": sample.id, "task": "transcribe", "reference": wanted[index], "answer": texts[index]}
            errors = word_errors(wanted[index], texts[index], rules[index])
            each(row | {"normaliser": rules[index].name} | errors._asdict())
    scores.answers = [(samples[i].id, "transcribe", wanted[i], texts[i]) for i in sorted(texts)]
    scores.left_out = left.in_order()
    scores.in_pieces = [samples[i].id for i in sorted(in_pieces)]
    _score_words(scores, wanted, texts, rules)
    scores.blank_share = counts["blanks"] / counts["frames"]
    scores.kept_per_label = counts["peaks"] / counts["labels"]
    scores.compression = counts["frames"] / max(counts["peaks"], 1)
    return scores


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
    strict: bool = False,
    each: EachRow | None = None,
    progress: str | None = None,
) -> Scores:
    """Score the language model's answers: word error rate of the transcriptions, accuracy of each other task.

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
        strict: read every recording before the first answer, and raise at the first that cannot be used.
        each: called with each answer as it comes, in the order of the batches: a dict of sample, task, reference,
            answer, normaliser, cut_off; of a transcription its errors and of how many words (or characters) they are,
            else whether the answer is right, and for multiple choice the option that it names, or None.
        progress: title of a progress bar on stderr, or of lines where there is no terminal. By default there is none.

    Raises:
        ValueError: no sample is left, a sample has neither answer nor text, `max_new_tokens` lacks a task, a batch
            size below 1, or an unknown language.
        AudioError: with `strict`, a recording cannot be used.
    """
    if not samples:
        raise ValueError("samples is empty: there is nothing to evaluate")
    check_batch_size(batch_size)
    check_draft(draft, accept)
    wanted = [answer_of(sample) for sample in samples]
    rules = _rules(samples, wanted, language, ("target_lang", "lang", "language", "source_lang"))
    left = Omissions()
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

    def reply(asked: Sequence[Sample], clips: Sequence[Tensor | None]) -> list[tuple[str, bool]]:
        limit = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[asked[0].task]
        prompts, cut = [prompt_of(sample) for sample in asked], []
        how = {"draft": draft, "accept": accept} if asked[0].task == "transcribe" else {"draft": "none"}
        texts = answer(model, processor, prompts, list(clips), max_new_tokens=limit, cut_off=cut, **how)
        return [(text, place in cut) for place, text in enumerate(texts)]

    model.eval()
    scores = Scores()
    texts: dict[int, str] = {}
    in_pieces, first_window, cut_off = [], [], []
    verdicts: dict[str, list[Verdict]] = {task: [] for task in tasks if task != "transcribe"}
    settings = {"to_the_end": lambda sample: sample.task == "transcribe", "strict": strict, "progress": progress}
    for heard in listen(samples, wanted, processor, batch_size, reply, left, **settings):
        index, sample = heard.index, samples[heard.index]
        texts[index], cut = heard.results[0]
        if len(heard.results) > 1:  # its windows may overlap, and be read again in smaller ones
            limit = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[sample.task]
            texts[index], cut = _whole(
                sample, LoadedModel(model, processor), batch_size, max_new_tokens=limit, draft=draft, accept=accept
            )
            in_pieces.append(index)
        if heard.more:
            first_window.append(index)
        if cut:
            cut_off.append(index)
        row = {"sample": sample.id, "task": sample.task, "reference": wanted[index], "answer": texts[index]}
        row |= {"normaliser": rules[index].name if sample.task == "transcribe" else ANSWER_RULES, "cut_off": cut}
        if sample.task != "transcribe":
            verdict = judge(wanted[index], texts[index], sample.prompt or "", turkish=rules[index].turkish)
            verdicts[sample.task].append(verdict)
            row |= {"right": verdict.right} | ({"option": verdict.option} if verdict.choice else {})
        elif each:
            row |= word_errors(wanted[index], texts[index], rules[index])._asdict()
        if each:
            each(row)
    scores.answers = [(samples[i].id, samples[i].task, wanted[i], texts[i]) for i in sorted(texts)]
    scores.left_out = left.in_order()
    scores.in_pieces, scores.first_window, scores.cut_off = (
        [samples[i].id for i in sorted(places)] for places in (in_pieces, first_window, cut_off)
    )
    _score_words(scores, wanted, {i: texts[i] for i in texts if samples[i].task == "transcribe"}, rules)
    for task, found in verdicts.items():
        if found:
            scores.samples[task] = len(found)
            scores.accuracy[task] = sum(verdict.right for verdict in found) / len(found)
            scores.normaliser[task] = ANSWER_RULES
        if any(verdict.choice for verdict in found):
            scores.unparsed[task] = sum(verdict.choice and verdict.option is None for verdict in found)
    if scores.cut_off:
        say(f"answers cut off at the token limit: {len(scores.cut_off)}, of {named(scores.cut_off)}")
    if scores.first_window:
        ids = named(scores.first_window)
        say(f"recordings of which only the first 30 s were heard: {len(scores.first_window)}, of {ids}")
    return scores


def _rules(samples: Sequence[Sample], wanted: Sequence[str], language: str | None, keys: Sequence[str]) -> list[Rules]:
    """The rules of each reference, by the language that is given for all, or else by the sample's `keys`.

    Where the script decides, transcripts are looked at apart from other answers.
    """
    check_language(language)
    rules: dict[int, Rules] = {}
    for spoken in (True, False):
        places = [i for i, sample in enumerate(samples) if (sample.task == "transcribe") is spoken]
        languages = [language or _language_of(samples[i], keys) for i in places]
        rules |= zip(places, rules_for([wanted[i] for i in places], languages), strict=True)
    return [rules[i] for i in range(len(samples))]


def _language_of(sample: Sample, keys: Sequence[str]) -> str | None:
    values = (getattr(sample, key, None) or sample.extra.get(key) for key in keys)
    return next((value for value in values if is_language(value)), None)


def _score_words(scores: Scores, wanted: Sequence[str], texts: Mapping[int, str], rules: Sequence[Rules]) -> None:
    """Fill in the word error rate, the character error rate, the normalisers and the number of transcriptions."""
    if not texts:
        return
    counted = {index: word_errors(wanted[index], text, rules[index]) for index, text in texts.items()}
    words = [found for index, found in counted.items() if rules[index].kind != "characters"]
    characters = [found for index, found in counted.items() if rules[index].kind == "characters"]
    scores.wer = rate(words) if words else None
    scores.cer = rate(characters) if characters else None
    scores.samples["transcribe"] = len(texts)
    scores.normaliser["transcribe"] = names_of([rules[index] for index in sorted(texts)])


def _whole(sample: Sample, loaded: LoadedModel, batch_size: int, **settings: Any) -> tuple[str, bool]:
    """The text of a recording over 30 s, as `transcribe` gives it, and whether a part of it was cut off."""
    assert sample.audio is not None
    blocks = read_blocks(sample.audio, offset=sample.offset, duration=sample.duration)
    return read_whole(Reader(loaded, batch_size=batch_size, **settings), blocks)


def _joined(texts: Sequence[str]) -> str:
    return texts[0] if len(texts) == 1 else " ".join(" ".join(texts).split())


class _Reading(NamedTuple):
    """What CTC reads in a clip, and how many of its frames have a label, hold the blank, and are peaks."""

    text: str
    frames: int
    blanks: int
    peaks: int


def _counts(row: Tensor, blank: int) -> tuple[int, int, int]:
    runs = torch.unique_consecutive(row)
    return int((row >= 0).sum()), int((row == blank).sum()), int(((runs != blank) & (runs >= 0)).sum())


def _wordless(sample: Sample, text: str) -> LeftOut:
    found = f"its text {text!r} has no words" if text else "has no text"
    return LeftOut(sample.id, str(sample.audio), f"{found}, so it has no word error rate")
