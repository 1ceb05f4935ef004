"""Comparison of two models that answered the same samples: paired intervals and a randomisation test for each score.

Only samples that both have answered are compared. The difference is that of the second model minus the first. Its
interval is a paired bootstrap, and its p value that of a randomisation test (`soundwave.evaluation.intervals`; for BLEU
`soundwave.evaluation.translation`): how often a difference as large comes about if it is chance which of the two models
gave which answer. Of each kind of score one test is made for each task, so that with twenty tasks one of them has a
p below 0.05 by chance alone.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from soundwave.evaluation.intervals import interval, p_value
from soundwave.evaluation.scores import judge, word_errors
from soundwave.evaluation.summary import is_in_characters, sentence_of
from soundwave.evaluation.translation import bleu_of, compare, is_translation, require_sacrebleu, statistics
from soundwave.evaluation.translation import interval as interval_of_bleu
from soundwave.evaluation.words import rules_for

Row = Mapping[str, Any]


class Compared(NamedTuple):
    """A score of two models.

    Attributes:
        task, score: which one: WER, CER, BLEU or accuracy.
        samples: how many both have answered.
        values, intervals: of the first and of the second model; shares, of BLEU 0 to 100.
        difference, interval, p: of the second minus the first.
        better: samples on which the first, and on which the second model is the better one.
        lower: whether the lower value is the better one.
    """

    task: str
    score: str
    samples: int
    values: tuple[float, float]
    intervals: tuple[list[float], list[float]]
    difference: float
    interval: list[float]
    p: float
    better: tuple[int, int]
    lower: bool


class Comparison(NamedTuple):
    """The scores of two models, and how many samples only one of them has answered.

    Attributes:
        pairs: the rows of both, for each sample that both have answered.
        gains: for each pair how much better the second model is: word errors less, or 1, 0 or -1.
    """

    scores: list[Compared]
    alone: tuple[int, int]
    pairs: list[tuple[Row, Row]]
    gains: list[float]


def compare_rows(one: Sequence[Row], other: Sequence[Row]) -> Comparison:
    """Compare the answers of two models.

    Args:
        one, other: rows, as `soundwave evaluate` writes them, those of earlier versions too.

    Raises:
        ValueError: they have no sample in common, another reference for the same sample, a sample twice, or were
            normalised otherwise.
    """
    first, second = _by_sample(one, "first"), _by_sample(other, "second")
    common = [key for key in first if key in second]
    if not common:
        raise ValueError("the two have answered no sample in common; evaluate both on the same test")
    for key in common:
        if first[key]["reference"] != second[key]["reference"]:
            raise ValueError(f"{key[0]}: the two have other references; evaluate both on the same test")
    pairs = [(first[key], second[key]) for key in common]
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    counted = _counted(pairs)
    for place, (row, _) in enumerate(pairs):
        groups[row["task"], _score_of(row, counted[place])].append(place)
    scores, gains = [], [0.0] * len(pairs)
    for (task, score), places in groups.items():
        chosen = [pairs[place] for place in places]
        if score == "BLEU":
            scores.append(_compare_translations(task, chosen, places, gains))
        else:
            scores.append(_compare_counts(task, score, chosen, [counted[place] for place in places], places, gains))
    return Comparison(scores, (len(first) - len(common), len(second) - len(common)), pairs, gains)


def _by_sample(rows: Sequence[Row], which: str) -> dict[tuple[str, str], Row]:
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row["sample"], row["task"]
        if key in found and found[key] != row:
            raise ValueError(f"the {which} file has several answers to {key[0]}; give the answers of one evaluation")
        found[key] = row
    return found


def _counted(pairs: Sequence[tuple[Row, Row]]) -> list[tuple[int, int, int, bool]]:
    """For each pair errors (or right answers) of both, of how many words, and whether these are characters."""
    spoken = [place for place, (row, _) in enumerate(pairs) if row["task"] == "transcribe"]
    rules = dict(zip(spoken, rules_for([pairs[place][0]["reference"] for place in spoken]), strict=True))
    found = []
    for place, pair in enumerate(pairs):
        if is_translation(pair[0]["task"]):
            found.append((0, 0, 1, False))
        elif pair[0]["task"] != "transcribe":
            right = [row["right"] if "right" in row else judge(row["reference"], row["answer"]).right for row in pair]
            found.append((int(right[0]), int(right[1]), 1, False))
        elif all("errors" in row and "of" in row for row in pair):
            one, other = pair
            if one.get("normaliser") != other.get("normaliser") or one["of"] != other["of"]:
                raise ValueError(
                    f"{one['sample']}: was normalised with {one.get('normaliser')!r} and with "
                    f"{other.get('normaliser')!r}; evaluate both with the same --normaliser and --language"
                )
            found.append((one["errors"], other["errors"], one["of"], is_in_characters(one)))
        else:  # answers of 0.1.0
            errors = [word_errors(row["reference"], row["answer"], rules[place]) for row in pair]
            found.append((errors[0].errors, errors[1].errors, errors[0].of, rules[place].kind == "characters"))
    return found


def _score_of(row: Row, counted: tuple[int, int, int, bool]) -> str:
    if row["task"] == "transcribe":
        return "CER" if counted[3] else "WER"
    return "BLEU" if is_translation(row["task"]) else "accuracy"


def _compare_counts(
    task: str,
    score: str,
    pairs: Sequence[tuple[Row, Row]],
    counted: Sequence[tuple[int, int, int, bool]],
    places: Sequence[int],
    gains: list[float],
) -> Compared:
    lower = score != "accuracy"
    first, second, of = ([one[column] for one in counted] for column in range(3))
    sentences = [sentence_of(row) for row, _ in pairs]
    change = [b - a for a, b in zip(first, second, strict=True)]
    for place, step in zip(places, change, strict=True):
        gains[place] = -step if lower else step
    values = sum(first) / sum(of), sum(second) / sum(of)
    return Compared(
        task,
        score,
        len(pairs),
        values,
        (interval(first, of, sentences), interval(second, of, sentences)),
        sum(change) / sum(of),
        interval(change, of, sentences),
        p_value(change, sentences),
        (sum(gains[place] < 0 for place in places), sum(gains[place] > 0 for place in places)),
        lower,
    )


def _compare_translations(
    task: str, pairs: Sequence[tuple[Row, Row]], places: Sequence[int], gains: list[float]
) -> Compared:
    require_sacrebleu()
    languages = {row.get("target_lang") for row, _ in pairs}
    if len(languages) > 1:
        raise ValueError(f"{task}: has several target languages, whose BLEU are not one score; compare them one by one")
    (language,) = languages
    references = [row["reference"] for row, _ in pairs]
    sums = [statistics(references, [pair[which]["answer"] for pair in pairs], language) for which in (0, 1)]
    for place, one, other in zip(places, *sums, strict=True):
        gains[place] = float(_overlap(other) - _overlap(one))
    values = float(bleu_of(sums[0].sum(0))), float(bleu_of(sums[1].sum(0)))
    between, p = compare(*sums[::-1])
    return Compared(
        task,
        "BLEU",
        len(pairs),
        values,
        (interval_of_bleu(sums[0]), interval_of_bleu(sums[1])),
        values[1] - values[0],
        between,
        p,
        (sum(gains[place] < 0 for place in places), sum(gains[place] > 0 for place in places)),
        lower=False,
    )


def _overlap(sums: Any) -> float:
    """F1 of the single words of a sentence, for the order of examples alone."""
    right, answered, wanted = sums[0], sums[-2], sums[-1]
    return 2 * right / (answered + wanted) if answered + wanted else 0.0
