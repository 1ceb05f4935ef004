"""Comparison of several models that answered the same samples: intervals, paired differences, tables.

An interval is a percentile bootstrap over sentences: samples of one sentence in several voices are drawn together. For
a difference of two models the answers of both to the same sentences are drawn together, so that errors which both make
cancel. The p value of a difference is that of a randomisation test, which flips the signs of the sentences'
differences at random. The bootstrap is not used for it: where few answers differ, its intervals are too narrow
(docs/log.md).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from soundwave.evaluation.scores import judge, word_errors
from soundwave.evaluation.words import rules_for

TASKS = ("transcribe", "voice", "rate", "intent", "question")
RESAMPLED, CONFIDENCE, FLIPPED = 2000, 0.95, 10_000
AT_ONCE = 8_000_000  # random numbers that are in memory at once: 64 MB
SURE = 0.01  # A difference with a smaller p is in bold. At 0.05 chance alone would do so to one in twenty.


class Counts(NamedTuple):
    """The answers to one task, sample by sample.

    Attributes:
        count: word errors of a transcription; for other tasks 1 if the answer is right, else 0.
        of: words of the reference transcript, characters in a script without spaces; for other tasks 1.
        sentences: the sentence of the sample.
    """

    count: list[int]
    of: list[int]
    sentences: list[str]


def tally(
    answers: Iterable[dict[str, str]], sentences: dict[str, str], *, language: str | None = None
) -> dict[str, Counts]:
    """Count errors and right answers of each task.

    Args:
        answers: rows with the keys sample, task, reference and answer.
        sentences: sample -> its sentence.
        language: language of the transcripts, as in `evaluate`.
    """
    counts: dict[str, Counts] = defaultdict(lambda: Counts([], [], []))
    rows = list(answers)
    spoken = [row["reference"] for row in rows if row["task"] == "transcribe"]
    rules = iter(rules_for(spoken, language))
    for row in rows:
        texts = row["reference"], row["answer"]
        count, of = word_errors(*texts, next(rules)) if row["task"] == "transcribe" else (int(judge(*texts).right), 1)
        for values, value in zip(counts[row["task"]], (count, of, sentences[row["sample"]]), strict=True):
            values.append(value)
    return dict(counts)


def interval(counts: Sequence[float], of: Sequence[float], sentences: Sequence[str]) -> list[float]:
    """Bootstrap interval [low, high] of sum(counts) / sum(of), drawn by sentence."""
    values = _by_sentence(counts, of, sentences)
    chance = np.random.default_rng(0)
    sums = np.concatenate([values[draw].sum(1) for draw in draws(chance, len(values), RESAMPLED)])
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return [float(low), float(high)]


def p_value(counts: Sequence[float], sentences: Sequence[str]) -> float:
    """Two-sided p value of sum(counts) = 0.

    It is the share of random sign flips, one sign per sentence, whose sum is at least as far from 0.
    """
    values = _by_sentence(counts, counts, sentences)[:, 0]
    values = values[values != 0]
    chance, most = np.random.default_rng(0), abs(values.sum())
    rows = max(1, AT_ONCE // max(len(values), 1))
    as_far = 0
    for start in range(0, FLIPPED, rows):
        signs = chance.choice([-1.0, 1.0], size=(min(rows, FLIPPED - start), len(values)))
        as_far += int((np.abs(signs @ values) >= most).sum())
    return (1 + as_far) / (1 + FLIPPED)


def draws(chance: np.random.Generator, count: int, times: int) -> Iterator[np.ndarray]:
    """`times` samples with replacement of `count` places, int64 [rows, count], so many rows as `AT_ONCE` permits."""
    rows = max(1, AT_ONCE // count)
    for start in range(0, times, rows):
        yield chance.integers(count, size=(min(rows, times - start), count))


def _by_sentence(counts: Sequence[float], of: Sequence[float], sentences: Sequence[str]) -> np.ndarray:
    """Sums of `counts` and of `of` over the samples of each sentence, float64 [sentences, 2]."""
    groups: dict[str, np.ndarray] = {}
    for sentence, pair in zip(sentences, zip(counts, of, strict=True), strict=True):
        groups[sentence] = groups.get(sentence, np.zeros(2)) + np.asarray(pair, float)
    return np.stack(list(groups.values()))


def _estimate(counts: Counts) -> dict[str, Any]:
    return {"value": sum(counts.count) / sum(counts.of), "interval": interval(*counts)}


def estimates(tallies: dict[str, Counts]) -> dict[str, Any]:
    """`wer`, and `accuracy` of each other task; each has a `value` and its `interval`."""
    accuracy = {task: _estimate(counts) for task, counts in tallies.items() if task != "transcribe"}
    return {"wer": _estimate(tallies["transcribe"]), "accuracy": accuracy}


def differences(one: dict[str, Counts], other: dict[str, Counts]) -> dict[str, Any]:
    """Estimates of `one` minus those of `other`; each has a `p`, too.

    Raises:
        ValueError: the two did not answer the same samples in the same order.
    """
    changes, p = {}, {}
    for task, counts in one.items():
        if (counts.of, counts.sentences) != (other[task].of, other[task].sentences):
            raise ValueError(f"the answers to {task!r} belong to other samples than those that they are compared with")
        changes[task] = counts._replace(count=[a - b for a, b in zip(counts.count, other[task].count, strict=True)])
        p[task] = p_value(changes[task].count, counts.sentences)
    found = estimates(changes)
    for task, estimate in ({"transcribe": found["wer"]} | found["accuracy"]).items():
        estimate["p"] = p[task]
    return found


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The tables of the ablations in Markdown, from `ablations.json`'s results.

    They hold what each variant is, its estimates and costs, its differences from the plain variant, the estimates and
    differences of the test in noise, and the losses. The plain variant comes first.
    """
    about = [[name, found["about"]] for name, found in results.items()]
    costs = {
        name: [
            f"{found['kept_per_second']:.1f}",
            f"{found['positions']:.0f}",
            f"{found['seconds_a_step']:.2f}",
            f"{1000 * found['seconds_to_first_token']:.0f}",
        ]
        for name, found in results.items()
    }
    changes = {name: found["differences"] for name, found in list(results.items())[1:] if found["differences"]}
    measured = ["kept a second", "positions", "s a step", "ms to first token"]
    tables = [
        _table(["variant", "what it is"], about),
        _estimates_table("variant", results, _percent, measured, costs),
        _estimates_table("difference", changes, _points),
        _estimates_table("in noise", {name: found["noise"] for name, found in results.items()}, _percent),
        _estimates_table("difference in noise", {name: found["noise"] for name, found in changes.items()}, _points),
        _losses_table(results),
    ]
    return "\n".join(filter(None, tables))


def _estimates_table(
    title: str,
    found: dict[str, dict[str, Any]],
    write: Callable[[dict[str, Any]], str],
    more: Sequence[str] = (),
    cells: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """One row for each variant: its estimates, then the further columns `more`, whose cells `cells` holds."""
    if not found:
        return ""
    tasks = [task for task in TASKS if task in next(iter(found.values()))["accuracy"]]
    rows = [
        [name, write(one["wer"]), *(write(one["accuracy"][task]) for task in tasks), *cells.get(name, ())]
        for name, one in found.items()
    ]
    return _table([title, "WER", *tasks, *more], rows)


def _losses_table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, found in results.items():
        alignment = found["alignment"] or {"wer": None, "jump": None}
        numbers = [alignment["wer"] and 100 * alignment["wer"], alignment["jump"], *found["lm_loss"]]
        drawn = ", ".join(f"{task} {share:.0%}" for task, share in found["drawn"].items())
        rows.append([name, *("–" if number is None else f"{number:.2f}" for number in numbers), drawn])
    titles = ["WER of CTC", "its largest jump", "next token, ¼ of stage II", "½", "end", "tasks drawn in stage II"]
    return _table(["variant", *titles], rows)


def _percent(estimate: dict[str, Any]) -> str:
    low, high = estimate["interval"]
    return f"{100 * estimate['value']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _points(difference: dict[str, Any]) -> str:
    """A difference in percentage points, in bold if its p is below `SURE`."""
    low, high = (100 * end for end in difference["interval"])
    text = f"{100 * difference['value']:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if difference["p"] < SURE else text


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
