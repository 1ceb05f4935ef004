"""Scores of several models that answered the same samples: intervals, paired differences, tables.

Intervals are percentile bootstraps over sentences: samples that say the same, in other voices, are drawn together. A
difference is drawn with both models' answers to the same sentences, so that what is hard for both cancels. Its p value
is that of a randomisation test, which turns round the signs of sentences' differences: a bootstrap of the few answers
that differ is too sure of itself.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jiwer
import numpy as np

from soundwave.evaluation.scores import normalise

TASKS = ("transcribe", "voice", "rate", "intent", "question")
RESAMPLED, CONFIDENCE, FLIPPED = 2000, 0.95, 10_000
SURE = 0.01  # p below which a difference stands out; tables have dozens of them


class Counts(NamedTuple):
    """Of one task, sample by sample: word errors or right answers, words or 1, and what was said."""

    count: list[int]
    of: list[int]
    sentences: list[str]


def tally(answers: Iterable[dict[str, str]], said: dict[str, str]) -> dict[str, Counts]:
    """By task; `answers` have sample, task, reference and answer, `said` the sentence of each sample."""
    counts: dict[str, Counts] = defaultdict(lambda: Counts([], [], []))
    for row in answers:
        reference, given = normalise(row["reference"]), normalise(row["answer"])
        count, of = int(reference == given), 1
        if row["task"] == "transcribe":
            words = jiwer.process_words(reference, given)
            count, of = words.substitutions + words.deletions + words.insertions, len(reference.split())
        for values, value in zip(counts[row["task"]], (count, of, said[row["sample"]]), strict=True):
            values.append(value)
    return dict(counts)


def interval(counts: Sequence[float], of: Sequence[float], sentences: Sequence[str]) -> list[float]:
    """Bootstrap interval of sum(counts) / sum(of), by sentence."""
    values = _by_sentence(counts, of, sentences)
    sums = values[np.random.default_rng(0).integers(len(values), size=(RESAMPLED, len(values)))].sum(1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return [float(low), float(high)]


def p_value(counts: Sequence[float], sentences: Sequence[str]) -> float:
    """Of sum(counts) = 0, against either side: how often it is as far from 0 with random signs by sentence."""
    values = _by_sentence(counts, counts, sentences)[:, 0]
    values = values[values != 0]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size=(FLIPPED, len(values)))
    return float((1 + (np.abs(signs @ values) >= abs(values.sum())).sum()) / (1 + FLIPPED))


def _by_sentence(counts: Sequence[float], of: Sequence[float], sentences: Sequence[str]) -> np.ndarray:
    """Sums of both [sentences, 2]."""
    groups: dict[str, np.ndarray] = {}
    for sentence, pair in zip(sentences, zip(counts, of, strict=True), strict=True):
        groups[sentence] = groups.get(sentence, np.zeros(2)) + np.asarray(pair, float)
    return np.stack(list(groups.values()))


def _score(counts: Counts) -> dict[str, Any]:
    return {"value": sum(counts.count) / sum(counts.of), "interval": interval(*counts)}


def scores(tallies: dict[str, Counts]) -> dict[str, Any]:
    """`wer` and `accuracy` by task, each a value and its interval."""
    accuracy = {task: _score(counts) for task, counts in tallies.items() if task != "transcribe"}
    return {"wer": _score(tallies["transcribe"]), "accuracy": accuracy}


def differences(one: dict[str, Counts], other: dict[str, Counts]) -> dict[str, Any]:
    """`scores` of `one` less those of `other`, whose samples are the same in the same order; each has a `p`, too."""
    less, p = {}, {}
    for task, counts in one.items():
        if (counts.of, counts.sentences) != (other[task].of, other[task].sentences):
            raise ValueError(f"the answers to {task!r} belong to other samples than those that they are compared with")
        less[task] = counts._replace(count=[a - b for a, b in zip(counts.count, other[task].count, strict=True)])
        p[task] = p_value(less[task].count, counts.sentences)
    found = scores(less)
    for task, score in ({"transcribe": found["wer"]} | found["accuracy"]).items():
        score["p"] = p[task]
    return found


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """What each variant is, how good, how much better or worse than the plain one, both in noise, and its losses."""
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
    less = {name: found["differences"] for name, found in list(results.items())[1:] if found["differences"]}
    measured = ["kept a second", "positions", "s a step", "ms to first token"]
    tables = [
        _table(["variant", "what it is"], about),
        _scores_table("variant", results, _percent, measured, costs),
        _scores_table("difference", less, _points),
        _scores_table("in noise", {name: found["noise"] for name, found in results.items()}, _percent),
        _scores_table("difference in noise", {name: found["noise"] for name, found in less.items()}, _points),
        _losses_table(results),
    ]
    return "\n".join(filter(None, tables))


def _scores_table(
    title: str,
    found: dict[str, dict[str, Any]],
    write: Callable[[dict[str, Any]], str],
    more: Sequence[str] = (),
    cells: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """`scores` by variant, then the columns `more`, which `cells` holds."""
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


def _percent(score: dict[str, Any]) -> str:
    low, high = score["interval"]
    return f"{100 * score['value']:.1f} ({100 * low:.1f}–{100 * high:.1f})"


def _points(score: dict[str, Any]) -> str:
    """In percentage points; bold where it surely is one."""
    low, high = (100 * end for end in score["interval"])
    text = f"{100 * score['value']:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if score["p"] < SURE else text


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
