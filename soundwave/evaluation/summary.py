"""Scores of answers, from the rows that an evaluation gives and keeps."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from soundwave.evaluation.classes import classes_of, confusion_of, macro_f1
from soundwave.evaluation.intervals import interval
from soundwave.evaluation.scores import Scores
from soundwave.evaluation.translation import is_translation, score_translations

Row = Mapping[str, Any]


def score_rows(rows: Sequence[Row]) -> Scores:
    """The scores of rows, in the order of the samples: all that `Scores` has but `left_out` and `speed`."""
    scores = Scores()
    scores.answers = [(row["sample"], row["task"], row["reference"], row["answer"]) for row in rows]
    scores.cut_off, scores.first_window, scores.in_pieces = (
        [row["sample"] for row in rows if row.get(name)] for name in ("cut_off", "first_window", "in_pieces")
    )
    tasks: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        tasks[row["task"]].append(row)
    for task, found in tasks.items():
        if task == "transcribe":
            _score_words(scores, found)
        elif is_translation(task):
            _score_translations(scores, task, found)
        else:
            _score_answers(scores, task, found)
    _count_frames(scores, rows)
    return scores


def is_in_characters(row: Row) -> bool:
    """Whether a transcription was counted in characters."""
    return row["normaliser"].endswith("characters")


def sentence_of(row: Row) -> str:
    """What is drawn together in a bootstrap: the sentence of a transcription, else the sample."""
    return row["reference"] if row["task"] == "transcribe" else row["sample"]


def _score_words(scores: Scores, rows: Sequence[Row]) -> None:
    scores.samples["transcribe"] = len(rows)
    names = [row["normaliser"] for row in rows]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    scores.normaliser["transcribe"] = "; ".join(
        name if len(counts) == 1 else f"{name} ({count} samples)" for name, count in counts.items()
    )
    for score, characters in (("WER", False), ("CER", True)):
        found = [row for row in rows if is_in_characters(row) is characters]
        if found:
            errors, of = [row["errors"] for row in found], [row["of"] for row in found]
            setattr(scores, score.lower(), sum(errors) / sum(of))
            sentences = [sentence_of(row) for row in found]
            scores.intervals.setdefault("transcribe", {})[score] = interval(errors, of, sentences)


def _score_translations(scores: Scores, task: str, rows: Sequence[Row]) -> None:
    languages: dict[str | None, list[Row]] = defaultdict(list)
    for row in rows:
        languages[row.get("target_lang")].append(row)
    for language, found in languages.items():
        name = task if len(languages) == 1 else f"{task} ({language})"
        pairs = [row["reference"] for row in found], [row["answer"] for row in found]
        scored = score_translations(*pairs, language)
        scores.samples[name] = len(found)
        scores.bleu[name], scores.chrf[name] = scored.bleu, scored.chrf
        scores.intervals[name] = {"BLEU": scored.interval}
        scores.normaliser[name] = "; ".join(scored.signatures)


def _score_answers(scores: Scores, task: str, rows: Sequence[Row]) -> None:
    right = [int(row["right"]) for row in rows]
    scores.samples[task] = len(rows)
    scores.accuracy[task] = sum(right) / len(right)
    scores.normaliser[task] = ", ".join(dict.fromkeys(row["normaliser"] for row in rows))
    scores.intervals[task] = {"accuracy": interval(right, [1] * len(right), [sentence_of(row) for row in rows])}
    if any("option" in row or "class" in row for row in rows):
        scores.unparsed[task] = sum(
            row["option"] is None if "option" in row else row.get("answered", "") is None for row in rows
        )
    if pairs := classes_of(rows):
        scores.confusion[task] = confusion_of(pairs)
        scores.macro_f1[task] = macro_f1(scores.confusion[task])


def _count_frames(scores: Scores, rows: Sequence[Row]) -> None:
    heard = [row for row in rows if row.get("frames")]
    if not heard:
        return
    frames, kept = sum(row["frames"] for row in heard), sum(row["kept"] for row in heard)
    scores.compression = frames / max(kept, 1)
    seconds = sum(row["seconds"] for row in heard)
    scores.kept_per_second = kept / seconds if seconds else None
    read = [row for row in heard if "blanks" in row]
    if read:
        scores.blank_share = sum(row["blanks"] for row in read) / sum(row["frames"] for row in read)
        scores.kept_per_label = sum(row["peaks"] for row in read) / sum(row["labels"] for row in read)
