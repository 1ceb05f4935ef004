"""Evaluation of a model on samples: what it writes and answers, held to the references."""

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
    """Indices in batches of one task and similar duration, longest first.

    A batch generates until its last answer ends: one-word answers are not kept waiting by a transcript.
    """
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
    """Word error rate of the CTC reading (no language model), and how the blank is used.

    What CTC should write is a sample's `ctc_text`, else its `text`. Samples without audio or text are left out.
    """
    samples = [sample for sample in samples if sample.audio is not None and normalise(ctc_text_of(sample) or "")]
    if not samples:
        raise ValueError("samples holds no recording with a transcript")
    samples = [with_duration(sample) for sample in samples]
    wanted = [ctc_text_of(sample) for sample in samples]
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
    """Word error rate and accuracies of what the language model answers, `max_new_tokens` long at most, or by task."""
    if not samples:
        raise ValueError("samples is empty: there is nothing to evaluate")
    # A recording in which nothing is said has no word error rate.
    samples = [s for s in map(with_duration, samples) if s.task != "transcribe" or normalise(answer_of(s))]
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
    report = Scores(answers=[(s.id, s.task, answer_of(s), answers[i]) for i, s in enumerate(samples)])
    tasks: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for _, task, reference, given in report.answers:
        tasks[task].append((reference, given))
    for task, pairs in tasks.items():
        report.samples[task] = len(pairs)
        if task == "transcribe":
            report.wer = word_error_rate(*zip(*pairs, strict=True))
        else:
            report.accuracy[task] = sum(normalise(a) == normalise(b) for a, b in pairs) / len(pairs)
    return report
