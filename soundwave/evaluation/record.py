"""Scores that stay with a model: `scores.json` in its folder, which its card shows."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soundwave.data.audio import shown
from soundwave.evaluation.intervals import interval
from soundwave.evaluation.scores import judge, word_errors
from soundwave.evaluation.words import rules_for
from soundwave.model.hub import SCORES_FILE

KEYS = ("sample", "task", "reference", "answer")


def record_scores(folder: str | Path, files: Sequence[Path]) -> list[dict[str, Any]]:
    """Score answers and write the scores to a model's folder, in place of those that are there.

    Args:
        files: JSON lines with `sample`, `task`, `reference` and `answer`, as `soundwave evaluate --answers` writes.

    Returns:
        One entry for each task of each file: test, task, score, value, interval, samples, normaliser.

    Raises:
        FileNotFoundError: there is no such file. ValueError: a line has another form; the message names it.
    """
    found = [entry for file in files for entry in _scores_of(Path(file))]
    (Path(folder) / SCORES_FILE).write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def _scores_of(file: Path) -> list[dict[str, Any]]:
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in KEYS):
            wanted = ", ".join(KEYS)
            raise ValueError(
                f"{shown(file)}:{number}: is no answer with the keys {wanted}; give what evaluate --answers wrote"
            )
        tasks[row["task"]].append(row)
    if not tasks:
        raise ValueError(f"{shown(file)}: holds no answers")
    return [_score(file.name, task, rows) for task, rows in tasks.items()]


def _score(test: str, task: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    texts = [(row["reference"], row["answer"]) for row in rows]
    if task == "transcribe":
        # Which normaliser scored them stands in each row; where it does not, the script of the references decides.
        rules = rules_for([reference for reference, _ in texts])
        pairs = [
            (row["errors"], row["of"]) if "errors" in row and "of" in row else word_errors(*text, rule)
            for row, text, rule in zip(rows, texts, rules, strict=True)
        ]
        units = {"characters" if rule.kind == "characters" else "words" for rule in rules}
        score = "CER" if units == {"characters"} else "WER"
        sentences = [reference for reference, _ in texts]  # one sentence in several voices is drawn together
    else:
        pairs = [
            (int(row["right"] if "right" in row else judge(*text).right), 1)
            for row, text in zip(rows, texts, strict=True)
        ]
        score, sentences = "accuracy", [row["sample"] for row in rows]
    counts, of = zip(*pairs, strict=True)
    return {
        "test": test,
        "task": task,
        "score": score,
        "value": sum(counts) / sum(of),
        "interval": interval(counts, of, sentences),
        "samples": len(rows),
        "normaliser": ", ".join(dict.fromkeys(str(row.get("normaliser", "not stated")) for row in rows)),
    }
