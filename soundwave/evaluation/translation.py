"""Scores of translations: BLEU and chrF of sacrebleu, with its signatures, and intervals of BLEU.

The tokenizer follows the target language: sacrebleu's "zh" for Chinese, "char" for other scripts without spaces, and
"13a", its default, for all else. Case and punctuation count. sacrebleu comes with the extra `scores`.
"""

import logging
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from soundwave.data.forms import TRANSLATE
from soundwave.evaluation.intervals import AT_ONCE, CONFIDENCE, FLIPPED, RESAMPLED
from soundwave.evaluation.words import WITHOUT_SPACES, is_language

TASKS = frozenset(TRANSLATE)  # names of tasks whose answers are translations
CHINESE = {"zh", "zho", "chi", "cmn", "yue", "wuu", "lzh", "chinese", "mandarin", "cantonese"}
ORDERS = 4  # of n-grams


class Translation(NamedTuple):
    """Scores of translations into one language.

    Attributes:
        bleu, chrf: 0 to 100.
        interval: bootstrap interval of BLEU.
        signatures: sacrebleu's, of BLEU and of chrF.
    """

    bleu: float
    chrf: float
    interval: list[float]
    signatures: list[str]


def is_translation(task: str) -> bool:
    """Whether a task of this name is a translation."""
    return task.lower() in TASKS


def require_sacrebleu() -> None:
    """Raise ValueError if sacrebleu is not installed."""
    if find_spec("sacrebleu") is None:
        raise ValueError("BLEU and chrF need sacrebleu, which is not installed: pip install 'soundwave-fused[scores]'")


def tokenizer_for(language: str | None) -> str:
    """sacrebleu's tokenizer for a target language."""
    code = language.strip().lower().replace("_", "-").split("-")[0] if is_language(language) and language else ""
    return "zh" if code in CHINESE else "char" if code in WITHOUT_SPACES else "13a"


def score_translations(references: Sequence[str], answers: Sequence[str], language: str | None) -> Translation:
    """Score translations into one language."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu, chrf = BLEU(tokenize=tokenizer_for(language)), CHRF()
    scores = [metric.corpus_score(list(answers), [list(references)]).score for metric in (bleu, chrf)]
    signatures = [f"BLEU|{bleu.get_signature()}", f"chrF2|{chrf.get_signature()}"]
    return Translation(*scores, interval(statistics(references, answers, language)), signatures)


def statistics(references: Sequence[str], answers: Sequence[str], language: str | None) -> np.ndarray:
    """What BLEU sums over the sentences, float64 [sentences, 10].

    That is for each order the n-grams that are right and all that were answered, and the two lengths.
    """
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=tokenizer_for(language), effective_order=True)  # else it warns; it changes no statistics
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    rows = []
    for reference, answer in zip(references, answers, strict=True):
        found: Any = metric.sentence_score(answer, [reference])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return np.array(rows, float)


def bleu_of(sums: np.ndarray) -> np.ndarray:
    """BLEU, 0 to 100, float64 [...], of sums of `statistics` [..., 10]; smoothed exponentially, sacrebleu's default."""
    right, of = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    answered, wanted = sums[..., -2], sums[..., -1]
    missing = (right == 0) & (of > 0)
    smoothed = np.where(missing, 0.5 ** missing.cumsum(-1), right)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.log(smoothed / of)
        score = 100 * np.exp(np.minimum(0, 1 - wanted / answered) + precision.mean(-1))
    return np.where((of > 0).all(-1) & (right.sum(-1) > 0), score, 0.0)


def interval(sentences: np.ndarray) -> list[float]:
    """Bootstrap interval [low, high] of BLEU, drawn by sentence."""
    chance = np.random.default_rng(0)
    return _quantiles(np.concatenate([bleu_of(weights @ sentences) for weights in _draws(chance, len(sentences))]))


def compare(one: np.ndarray, other: np.ndarray) -> tuple[list[float], float]:
    """Of the BLEU of `one` minus that of `other`: its paired bootstrap interval, and its two-sided p value.

    The p value is that of approximate randomisation (Riezler and Maxwell 2005): the share of random exchanges of the
    two answers to each sentence that leave a difference at least as large.
    """
    chance = np.random.default_rng(0)
    low_high = _quantiles(
        np.concatenate([bleu_of(weights @ one) - bleu_of(weights @ other) for weights in _draws(chance, len(one))])
    )
    found = abs(float(bleu_of(one.sum(0)) - bleu_of(other.sum(0))))
    change, as_far, rows = other - one, 0, max(1, AT_ONCE // len(one))
    for start in range(0, FLIPPED, rows):
        moved = chance.integers(2, size=(min(rows, FLIPPED - start), len(one))).astype(float) @ change
        as_far += int((np.abs(bleu_of(one.sum(0) + moved) - bleu_of(other.sum(0) - moved)) >= found - 1e-9).sum())
    return low_high, (1 + as_far) / (1 + FLIPPED)


def _draws(chance: np.random.Generator, count: int) -> Iterator[np.ndarray]:
    """How often each of `count` sentences is drawn, float64 [rows, count], for `RESAMPLED` rows in all."""
    rows, shares = max(1, AT_ONCE // count), np.full(count, 1 / count)
    for start in range(0, RESAMPLED, rows):
        yield chance.multinomial(count, shares, size=min(rows, RESAMPLED - start)).astype(float)


def _quantiles(values: np.ndarray) -> list[float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return [float(low), float(high)]
