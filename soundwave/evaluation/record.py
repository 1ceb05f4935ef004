"""Scores that stay with a model: `scores.json` in its folder, which its card shows."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soundwave.evaluation.intervals import interval
from soundwave.evaluation.results import read_answers
from soundwave.evaluation.scores import judge, word_errors
from soundwave.evaluation.summary import is_in_characters
from soundwave.evaluation.translation import is_translation, require_sacrebleu, score_translations
from soundwave.evaluation.words import rules_for
from soundwave.model.hub import SCORES_FILE


def record_scores(folder: str | Path, files: Sequence[Path]) -> list[dict[str, Any]]:
    """Score answers and write the scores to a model's folder, in place of those that are there.

    Args:
        files: JSON lines with `sample`, `task`, `reference` and `answer`, as `soundwave evaluate --answers` writes.

    Returns:
        One entry for each task of each file, and two where only some transcripts are counted in characters: test,
        task, score, value, interval, samples, normaliser.

    Raises:
        FileNotFoundError: there is no such file. ValueError: a line has another form; the message names it.
    """
    found = [entry for file in files for entry in _scores_of(Path(file))]
    (Path(folder) / SCORES_FILE).write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return found


def _scores_of(file: Path) -> list[dict[str, Any]]:
    tasks: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_answers(file):
        language = row.get("target_lang") if is_translation(row["task"]) else None
        tasks[row["task"] if language is None else f"{row['task']} ({language})"].append(row)
    return [
        _score(file.name, task, part)
        for task, rows in tasks.items()
        for part in (_by_unit(rows) if task == "transcribe" else [rows])
    ]


def _by_unit(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Transcriptions that are counted in words, and those that are counted in characters.

    Which normaliser scored them stands in each row; where it does not, the script of the references decides.
    """
    units: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for row, rule in zip(rows, rules_for([row["reference"] for row in rows]), strict=True):
        if not (isinstance(row.get("normaliser"), str) and "errors" in row and "of" in row):
            counted = word_errors(row["reference"], row["answer"], rule)
            row = row | {"normaliser": rule.name} | counted._asdict()
        units[is_in_characters(row)].append(row)
    return [part for part in units.values() if part]


def _score(test: str, task: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    texts = [(row["reference"], row["answer"]) for row in rows]
    normalisers = ", ".join(dict.fromkeys(str(row.get("normaliser", "not stated")) for row in rows))
    found = {"test": test, "task": task, "samples": len(rows), "normaliser": normalisers}
    if is_translation(rows[0]["task"]):
        require_sacrebleu()
        scored = score_translations(*map(list, zip(*texts, strict=True)), rows[0].get("target_lang"))
        signature = {"normaliser": "; ".join(scored.signatures)}
        return found | {"score": "BLEU", "value": scored.bleu, "interval": scored.interval} | signature
    if task == "transcribe":
        pairs = [(row["errors"], row["of"]) for row in rows]
        score = "CER" if is_in_characters(rows[0]) else "WER"
        sentences = [reference for reference, _ in texts]  # one sentence in several voices is drawn together
    else:
        pairs = [
            (int(row["right"] if "right" in row else judge(*text).right), 1)
            for row, text in zip(rows, texts, strict=True)
        ]
        score, sentences = "accuracy", [row["sample"] for row in rows]
    counts, of = zip(*pairs, strict=True)
    return found | {"score": score, "value": sum(counts) / sum(of), "interval": interval(counts, of, sentences)}
