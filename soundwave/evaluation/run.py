"""Evaluation of a model on samples: its transcripts and answers are compared with the references."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from soundwave.data.collate import answer_of, ctc_text_of, features, prompt_of, with_duration
from soundwave.data.manifest import Sample
from soundwave.evaluation.scores import Scores, normalise, word_error_rate
from soundwave.inference.answer import answer, read_ctc
from soundwave.model.modeling import SoundwaveForConditionalGeneration
from soundwave.model.processing import SoundwaveProcessor


def alike(samples: Sequence[Sample], batch_size: int) -> Iterator[list[int]]:
    """Give the indices of the samples in batches of one task and similar duration, the longest samples first.

    A batch generates until its longest answer ends. In batches of one task no one-word answer waits for a transcript.

    Raises:
        ValueError: a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size}, but it must be 1 or more")
    tasks: dict[str, list[int]] = defaultdict(list)
    for index in sorted(range(len(samples)), key=lambda i: -(samples[i].duration or 0.0)):
        tasks[samples[index].task].append(index)
    for order in tasks.values():
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]


def evaluate_ctc(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
) -> Scores:
    """Score the CTC reading, without the language model: word error rate and use of the blank.

    The reference is a sample's `ctc_text`, or its `text` if it has none. Samples without audio or reference are left
    out.

    Raises:
        ValueError: no sample is left, or a batch size below 1.
        AudioError: a recording cannot be used.
    """
    samples = [sample for sample in samples if sample.audio is not None and normalise(ctc_text_of(sample) or "")]
    if not samples:
        raise ValueError("samples holds no recording with a transcript")
    samples = [with_duration(sample) for sample in samples]
    wanted = [ctc_text_of(sample) or "" for sample in samples]
    model.eval()
    readings: dict[int, str] = {}
    frames = blanks = peaks = labels = 0
    for indices in alike(samples, batch_size):
        texts, path = read_ctc(model, processor, [features(processor, samples[i]) for i in indices])
        readings.update(zip(indices, texts, strict=True))
        frames += int((path >= 0).sum())
        blanks += int((path == model.blank).sum())
        for row in path:
            runs = torch.unique_consecutive(row)
            peaks += int(((runs != model.blank) & (runs >= 0)).sum())
        labels += sum(len(processor.ctc_ids(wanted[i])) for i in indices)
    return Scores(
        wer=word_error_rate(wanted, [readings[i] for i in range(len(samples))]),
        samples={"transcribe": len(samples)},
        blank_share=blanks / frames,
        kept_per_label=peaks / labels,
        compression=frames / max(peaks, 1),
        answers=[(sample.id, "transcribe", wanted[i], readings[i]) for i, sample in enumerate(samples)],
    )


def evaluate(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
    max_new_tokens: int | Mapping[str, int] = 256,
) -> Scores:
    """Score the language model's answers: word error rate of the transcriptions, accuracy of each other task.

    Recordings to transcribe in which nothing is said are left out, because they have no word error rate.

    Args:
        max_new_tokens: longest answer, in tokens, or the longest answer of each task.

    Raises:
        ValueError: no sample is left, a sample has neither answer nor text, `max_new_tokens` lacks a task, or a batch
            size below 1.
        AudioError: a recording cannot be used.
    """
    if not samples:
        raise ValueError("samples is empty: there is nothing to evaluate")
    samples = [s for s in map(with_duration, samples) if s.task != "transcribe" or normalise(answer_of(s))]
    if not samples:
        raise ValueError("samples holds only recordings in which nothing is said: there is nothing to evaluate")
    if isinstance(max_new_tokens, Mapping) and (missing := {s.task for s in samples} - max_new_tokens.keys()):
        raise ValueError(f"max_new_tokens has no entry for task {min(missing)!r}, which a sample has; add it")
    model.eval()
    answers: dict[int, str] = {}
    for indices in alike(samples, batch_size):
        limit = max_new_tokens if isinstance(max_new_tokens, int) else max_new_tokens[samples[indices[0]].task]
        texts = answer(
            model,
            processor,
            [prompt_of(samples[i]) for i in indices],
            [features(processor, samples[i]) for i in indices],
            max_new_tokens=limit,
        )
        answers.update(zip(indices, texts, strict=True))
    scores = Scores(answers=[(s.id, s.task, answer_of(s), answers[i]) for i, s in enumerate(samples)])
    tasks: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for _, task, reference, given in scores.answers:
        tasks[task].append((reference, given))
    for task, pairs in tasks.items():
        scores.samples[task] = len(pairs)
        if task == "transcribe":
            scores.wer = word_error_rate(*zip(*pairs, strict=True))
        else:
            scores.accuracy[task] = sum(normalise(a) == normalise(b) for a, b in pairs) / len(pairs)
    return scores
