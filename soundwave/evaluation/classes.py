"""Answers that are one of a few classes: which class an answer names, macro F1, confusion matrix and its picture.

A sample's classes are what its manifest lists as `labels` (`"labels": ["anger", "joy", "neutral"]`); else the options
of its question; else, where the references of a task are few different texts, those texts.

An answer names a label of a list if it is that label, or if one label alone stands in it as whole words and nothing
denies it: the rule for the texts of options (`soundwave.evaluation.choices`). Else it names none, which is counted, and
is wrong.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from soundwave.evaluation.choices import named_option
from soundwave.evaluation.words import fold

MOST = 50  # classes of a task whose manifest lists none
NONE = "none of them"  # the column of answers that name no class
CELL = 0.55  # inches of a class in the picture


class Confusion(NamedTuple):
    """What was answered.

    Attributes:
        classes: the classes of the references and answers, sorted.
        counts: for each class of a reference how often each class was answered, and at the end how often none of them.
    """

    classes: list[str]
    counts: list[list[int]]


def labels_of(value: Any, reference: str) -> list[str] | None:
    """The labels that a manifest lists for a sample, of which the reference is one; None if it lists none."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(label, str) and label.strip() for label in value):
        return None
    labels = [label.strip() for label in value]
    return labels if len({_key(label) for label in labels}) > 1 and label_of(reference, labels) is not None else None


def label_of(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text is, case aside."""
    return next((label for label in labels if _key(label) == _key(text)), None)


def named_label(answer: str, labels: Sequence[str]) -> str | None:
    """The one label that an answer names by the module's rule, or None."""
    return label_of(answer, labels) or named_option(answer, {label: _key(label) for label in labels})


def _key(text: str) -> str:
    return " ".join(fold(text).lower().split()).strip(" .,!?'\"")


def classes_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str | None]] | None:
    """The class of the reference and that of the answer of each row; None if the task has no classes.

    Args:
        rows: of one task, as an evaluation gives them.
    """
    if all("class" in row for row in rows):
        return [(row["class"], row["answered"]) for row in rows]
    found = {_key(row["reference"]): row["reference"] for row in reversed(rows)}
    if not 1 < len(found) <= min(MOST, len(rows) // 2):
        return None
    return [(found[_key(row["reference"])], found.get(_key(row["answer"]))) for row in rows]


def confusion_of(pairs: Sequence[tuple[str, str | None]]) -> Confusion:
    """Count which class was answered to which."""
    classes = sorted({one for pair in pairs for one in pair if one is not None})
    counts = Counter(pairs)
    return Confusion(classes, [[counts[wanted, given] for given in (*classes, None)] for wanted in classes])


def macro_f1(confusion: Confusion) -> float:
    """The mean over the classes of 2 TP / (2 TP + FP + FN). An answer that names no class is a miss of its class."""
    scores = []
    for place, row in enumerate(confusion.counts):
        answered = sum(other[place] for other in confusion.counts)
        scores.append(2 * row[place] / (sum(row) + answered))
    return sum(scores) / len(scores)


def draw(confusion: Confusion, title: str, file: Path) -> None:
    """Write a picture of a confusion matrix (PNG): a row for each class of the references, in shares of the row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = [*confusion.classes, NONE]
    shares = [[count / max(sum(row), 1) for count in row] for row in confusion.counts]
    size = CELL * len(columns)
    figure = Figure(figsize=(max(4.0, size + 2.2), max(3.2, CELL * len(shares) + 2.0)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), [_short(text) for text in columns], rotation=45, ha="right")
    axes.set_yticks(range(len(shares)), [_short(text) for text in confusion.classes])
    axes.set_xlabel("answered")
    axes.set_ylabel("reference")
    axes.set_title(title)
    if len(columns) <= 25:
        for y, row in enumerate(confusion.counts):
            for x, count in enumerate(row):
                if count:
                    colour = "white" if shares[y][x] > 0.5 else "black"
                    axes.text(x, y, str(count), ha="center", va="center", color=colour, fontsize=8)
    figure.savefig(file, format="png", metadata={"Software": None})


def _short(text: str) -> str:
    """A text for an axis; a dollar sign would begin a formula."""
    return (text if len(text) <= 24 else text[:23] + "…").replace("$", r"\$")
