"""Scores: text normalisation, word error rate, and what an evaluation returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jiwer
from whisper_normalizer.basic import BasicTextNormalizer

_normaliser = BasicTextNormalizer()


def normalise(text: str) -> str:
    """Lower case, no punctuation, one space between words; numbers stay as they are written."""
    return _normaliser(text).strip()  # a full stop at the end would become a space


@dataclass
class Scores:
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


def word_error_rate(references: Sequence[str], answers: Sequence[str]) -> float:
    """Word error rate after normalisation; a reference without words is an error."""
    references = [normalise(text) for text in references]
    for text in references:
        if not text:
            raise ValueError("a reference has no words: leave samples without a transcript out of the word error rate")
    return jiwer.wer(references, [normalise(text) for text in answers])
