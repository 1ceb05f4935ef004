"""Using a trained model: what it writes and answers, and how often it is right."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jiwer
import torch
from torch import Tensor
from whisper_normalizer.basic import BasicTextNormalizer

from soundwave.data.collate import answer_of, ctc_text_of, features, prompt_of, with_duration
from soundwave.data.manifest import Sample
from soundwave.hardware import pick_device, pick_dtype
from soundwave.model.configuration import SoundwaveConfig
from soundwave.model.modeling import SoundwaveForConditionalGeneration, batch_to
from soundwave.model.processing import SoundwaveProcessor

_normaliser = BasicTextNormalizer()


def normalise(text: str) -> str:
    """Lower case, no punctuation, one space between words; numbers stay as they are written."""
    return _normaliser(text).strip()  # a full stop at the end would become a space


@dataclass
class Report:
    """Scores over a list of samples.

    Attributes:
        wer: word error rate of the transcriptions (0.02 is 2 %), None without any. Errors over reference words, all
            samples together; case and punctuation do not count.
        accuracy: for each other task, the share of answers that equal the reference, case and punctuation aside.
        samples: number of samples of each task.
        blank_share: blank frames of all frames. kept_per_label: CTC peaks over transcript tokens.
        compression: frames of the alignment adapter over kept frames.
        answers: (sample id, task, reference, answer) in the samples' order.
    """

    wer: float | None = None
    accuracy: dict[str, float] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    blank_share: float | None = None
    kept_per_label: float | None = None
    compression: float | None = None
    answers: list[tuple[str, str, str, str]] = field(default_factory=list)


def load_model(folder: Path) -> tuple[SoundwaveForConditionalGeneration, SoundwaveProcessor]:
    """A saved model on this machine's device, in its best dtype, and its processor.

    A model of stage I comes without the language model's layers; one that was trained on 4-bit weights runs on a CPU
    unquantised.
    """
    device, _ = pick_device()
    config = SoundwaveConfig.from_pretrained(folder)
    model = SoundwaveForConditionalGeneration.from_pretrained(
        folder,
        dtype=pick_dtype(device.type)[0],
        language_model=config.stage > 1,
        quantization=config.quantization if device.type == "cuda" else None,
    )
    return model.to(device).eval(), SoundwaveProcessor.from_pretrained(folder)


def word_error_rate(references: Sequence[str], answers: Sequence[str]) -> float:
    """Word error rate after normalisation; a reference without words is an error."""
    references = [normalise(text) for text in references]
    for text in references:
        if not text:
            raise ValueError("a reference has no words: leave samples without a transcript out of the word error rate")
    return jiwer.wer(references, [normalise(text) for text in answers])


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


@torch.no_grad()
def read_ctc(
    model: SoundwaveForConditionalGeneration, processor: SoundwaveProcessor, clips: Sequence[Tensor]
) -> tuple[list[str], Tensor]:
    """Greedy CTC readings of clips' features ([n_mels, T_mel] each) and the path int64 [A, T] that they come from."""
    batch = batch_to(processor.pad_features(list(clips)), model.device)
    path = model(**batch).path.cpu()
    return [processor.ctc_text(row, model.blank) for row in path], path


@torch.no_grad()
def answer(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    prompts: Sequence[str],
    audio: Sequence[Tensor | None],
    *,
    max_new_tokens: int = 256,
) -> list[str]:
    """The model's greedy answers to prompts, each about one recording's features [n_mels, T_mel] or none."""
    batch = batch_to(dict(processor(list(prompts), list(audio))), model.device)
    tokens = model.generate(
        **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=processor.pad_token_id
    )
    return [text.strip() for text in processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def evaluate_ctc(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    samples: Sequence[Sample],
    *,
    batch_size: int = 16,
) -> Report:
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
    return Report(
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
) -> Report:
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
    report = Report(answers=[(s.id, s.task, answer_of(s), answers[i]) for i, s in enumerate(samples)])
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
