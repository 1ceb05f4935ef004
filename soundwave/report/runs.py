"""Reads a run's folder: settings, log, tasks, samples that were left out, scores and answers."""

import json
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from soundwave.data.sampling import paper_temperature, temperature_weights
from soundwave.training.checkpoints import newest_checkpoint, step_of
from soundwave.training.settings import PAPER, StageConfig

LOG, ABOUT, LEFT_OUT, SKIPPED = "log.jsonl", "run.json", "left_out.jsonl", "skipped_steps.jsonl"
SUMMARY, ANSWERS = "summary.json", "answers.jsonl"
# Values of a log entry that are drawn over the steps. Its other keys are step, epoch, seconds and counts.
CURVES = (
    *("loss", "ctc_loss", "lm_loss", "learning_rate", "grad_norm"),
    *("blank_share", "compression", "kept_per_label", "audio_per_second"),
)
EXAMPLES = 3  # samples that are named for each reason to leave samples out
_NO_NAME = re.compile(r"(stage|run|out|train|model)?[-_. ]?[\dI]*", re.IGNORECASE)  # names that many runs have
REASONS = 30  # reasons that are shown, the most frequent ones; also skipped steps that are shown, the first ones


class RunError(ValueError):
    """A folder from which no report can be made. One line: the file, what was found and what to do."""


@dataclass(frozen=True)
class Pass:
    """One training of one stage.

    Attributes:
        folder: the `out` of the training.
        stage: 1, 2 or 3.
        number: the place of the training among those of its stage in the run, from 1.
        config: the settings.
        tasks: number of samples of each task in the manifests.
        about: versions, device and commit of the training.
        log: one entry for each logging step, in order.
        left_out: samples that were not trained on, each with `sample`, `reason` and `file`.
        skipped: steps that changed nothing, each with `step`, `reason` and `samples`.
    """

    folder: Path
    stage: int
    number: int
    config: dict[str, Any]
    tasks: dict[str, int]
    about: dict[str, Any]
    log: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    skipped: list[dict[str, Any]]

    @property
    def has_model(self) -> bool:
        """Whether the training has written its model, which it does at its end."""
        return (self.folder / "model" / "config.json").is_file()

    @property
    def unfinished(self) -> dict[str, Any] | None:
        """How far a training came that did not reach its end: it was stopped, or still runs. None if it has ended.

        Returns:
            `step`, the last one that is known, `steps`, the number wanted, and `checkpoint`, the step from which the
            same command goes on (None: from the beginning).
        """
        steps, last = self.config.get("steps"), int(self.log[-1]["step"]) if self.log else 0
        if self.has_model or not isinstance(steps, int) or last >= steps:
            return None
        checkpoint = newest_checkpoint(self.folder)
        saved = step_of(checkpoint) if checkpoint is not None else None
        return {"step": max(last, saved or 0), "steps": steps, "checkpoint": saved}

    @property
    def command(self) -> str:
        """The command of the training: settings that are not the paper's."""
        usual = {name: one.default for name, one in StageConfig.model_fields.items()} | PAPER.get(self.stage, {})
        words = []
        for name, value in self.config.items():
            if name in ("stage", "resume") or name in usual and usual[name] == value:
                continue
            text = value if isinstance(value, str) else json.dumps(value)
            if name == "train" and isinstance(value, list) and len(value) == 1:
                text = str(value[0])
            words.append(shlex.quote(f"{name}={text}"))
        return " ".join(["soundwave train", str(self.stage), *words])


@dataclass(frozen=True)
class Run:
    """The trainings of a folder, in order. `summary` and `answers` are empty if the run was not scored.

    Attributes:
        begun: names of the folders of trainings that have begun, but have logged nothing yet.
    """

    folder: Path
    passes: list[Pass]
    summary: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, str]] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)

    @property
    def model(self) -> Path | None:
        """Folder of the newest model: the run's own, or else that of the last training that has one; None without."""
        candidates = [self.folder / "model", *(one.folder / "model" for one in reversed(self.passes))]
        return next((folder for folder in candidates if (folder / "config.json").is_file()), None)

    @property
    def stage(self) -> int:
        """The stage of that model, 0 without one."""
        if self.model is None:
            return 0
        trained = [one.stage for one in self.passes if one.has_model]
        return max(trained) if trained else self.passes[-1].stage

    @property
    def command(self) -> str | None:
        """The command that goes on with the run where it stopped; None if nothing is unfinished."""
        for name, option in (("full", ""), ("quick", " --quick")):
            if (self.folder / f"corpus-{name}").is_dir():  # a demonstration, which trains all stages
                open_end = self.begun or any(one.unfinished for one in self.passes) or not self.summary
                return f"soundwave demo{option} --out {shlex.quote(str(self.folder))}" if open_end else None
        return next((one.command for one in self.passes if one.unfinished), None)


def read_run(folder: Path) -> Run:
    """Read the `out` of a training, or a folder of several of them, like a demonstration's.

    The last line of a log may be incomplete, if training was killed or still runs. It is left out.

    Raises:
        RunError: the folder holds no log, or a file in it is damaged.
    """
    folder = Path(folder)
    outs = [folder] if (folder / LOG).is_file() else sorted(path.parent for path in folder.glob(f"*/{LOG}"))
    if not outs:
        raise RunError(f"{folder} holds no {LOG}, nor a folder with one; give the `out` of a training or a demo")
    summary = folder / SUMMARY
    begun = [out for out in outs if (out / LOG).read_bytes().strip()]
    if not begun:
        raise RunError(
            f"{outs[0] / LOG} holds no entry yet; wait until training has logged a step, or repeat its command"
        )
    return Run(
        folder,
        _ordered([_read_pass(out) for out in begun]),
        _read_object(summary, _Summary) if summary.is_file() else {},
        _read_lines(folder / ANSWERS, _Answer),
        [out.name for out in outs if out not in begun],
    )


def run_names(folders: list[Path]) -> list[str]:
    """Names for the folders: the shortest ends of their paths that differ from each other and say something.

    A folder called 1 or stage2 says nothing alone, so its parent stands before it, as in `mine/1`.
    """
    parts = [Path(folder).resolve().parts for folder in folders]
    names = [""] * len(parts)
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names) and not any(map(_NO_NAME.fullmatch, names)):
            break
    return names


def curves(log: list[dict[str, Any]], points: int) -> dict[str, list[float | None]]:
    """The columns of a log, `step` and `CURVES`. Neighbouring entries are averaged, so that at most `points` remain.

    The step of a mean is that of its last entry. Columns without any value are left out.
    """
    width = max(1, -(-len(log) // points))
    groups = [log[start : start + width] for start in range(0, len(log), width)]
    columns: dict[str, list[float | None]] = {"step": [group[-1]["step"] for group in groups]}
    for name in CURVES:
        column = [_mean([entry.get(name) for entry in group]) for group in groups]
        if any(value is not None for value in column):
            columns[name] = column
    return columns


def mixture(one: Pass) -> list[dict[str, Any]]:
    """The tasks of each epoch.

    A log entry that spans several epochs is divided among them in proportion.

    Returns:
        For each epoch `epoch` (from 0), `temperature`, `planned` (the intended share of each task) and `drawn` (the
        number of samples of each task that were trained on).
    """
    drawn: dict[int, Counter[str]] = {}
    last = 0.0
    for entry in one.log:
        end = float(entry.get("epoch") or 0.0)
        for epoch, part in _epochs(last, end):
            counts = drawn.setdefault(epoch, Counter())
            for task, count in (entry.get("tasks") or {}).items():
                counts[task] += count * part
        last = end
    heated = one.stage == 2 and one.config.get("temperature", True)
    return [
        {
            "epoch": epoch,
            "temperature": paper_temperature(epoch) if heated else 1.0,
            "planned": temperature_weights(one.tasks, paper_temperature(epoch) if heated else 1.0),
            "drawn": {task: round(count) for task, count in counts.items()},
        }
        for epoch, counts in sorted(drawn.items())
        if sum(counts.values()) >= 0.5
    ]


def reasons(one: Pass) -> list[dict[str, Any]]:
    """Why samples were left out, the most frequent reason first: `reason`, `count` and a few `samples`.

    Reasons that differ only in their numbers are counted as one, in the words of its first sample.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for row in one.left_out:
        reason = str(row.get("reason"))
        name = " ".join(str(row[part]) for part in ("sample", "file") if row.get(part))
        groups.setdefault(re.sub(r"\d[\d.]*", "…", reason), []).append((reason, name))
    ranked = sorted(groups.values(), key=lambda group: -len(group))
    rows = [
        {"reason": group[0][0], "count": len(group), "samples": [name for _, name in group[:EXAMPLES]]}
        for group in ranked[:REASONS]
    ]
    if rest := ranked[REASONS:]:
        count = sum(map(len, rest))
        rows.append({"reason": f"{len(rest)} more reasons, in {LEFT_OUT}", "count": count, "samples": []})
    return rows


def score_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of scores from a demonstration's summary: `name`, `value`, `samples`, `better`, `final`.

    `better` is "lower" or "higher": which values are the better ones. `final` marks the scores of the last stage.
    """
    counts = summary.get("samples", {})
    rows = []

    def add(name: str, value: float | None, samples: int | None, better: str, final: bool = True) -> None:
        if value is not None:
            rows.append({"name": name, "value": value, "samples": samples, "better": better, "final": final})

    for stage, what in ((1, "stage 1, CTC alone"), (2, "stage 2"), (3, "stage 3")):
        found = summary.get(f"stage{stage}", {})
        add(f"word error rate, {what}", found.get("wer"), counts.get("transcribe"), "lower", stage == 3)
    final = summary.get("stage3", {})
    unseen = counts.get("transcribe_unseen_voices")
    add("word error rate, voices never heard", final.get("wer_unseen_voices"), unseen, "lower")
    for task, value in final.get("accuracy", {}).items():
        add(f"{task}: right answers", value, counts.get(task), "higher")
    return rows


def _read_pass(folder: Path) -> Pass:
    about = folder / ABOUT
    if not about.is_file():
        raise RunError(f"{about} is missing beside {LOG}; copy the whole folder, or train anew")
    found = _read_object(about, _About)
    log = _read_lines(folder / LOG, _Entry)
    if not log:
        raise RunError(f"{folder / LOG} holds no whole entry yet; wait until training has logged a step")
    return Pass(
        folder,
        found["stage"],
        1,
        found.get("config", {}),
        found.get("tasks", {}),
        {name: found.get(name) for name in ("device", "commit", "versions")},
        log,
        _read_lines(folder / LEFT_OUT, _LeftOut),
        _read_lines(folder / SKIPPED, _Skipped),
    )


def _ordered(passes: list[Pass]) -> list[Pass]:
    """Sort trainings by stage; within a stage each stands after the training whose model it started from."""
    by_name = {one.folder.name: one for one in passes}

    def depth(one: Pass | None) -> int:
        count, seen = 0, set()
        while one is not None and one.folder not in seen:
            seen.add(one.folder)
            before = one.config.get("model")
            one, count = by_name.get(Path(before).parent.name) if before else None, count + 1
        return count

    ordered, numbers = [], Counter()
    for one in sorted(passes, key=lambda one: (one.stage, depth(one), one.folder.name)):
        numbers[one.stage] += 1
        ordered.append(Pass(**{**vars(one), "number": numbers[one.stage]}))
    return ordered


def _epochs(start: float, end: float) -> list[tuple[int, float]]:
    """The epochs from `start` to `end`, each with its part of the stretch; the parts sum to 1."""
    if end <= start:
        return [(int(end), 1.0)]
    bounds = [start, *range(int(start) + 1, -int(-end // 1)), end]
    return [(int(low), (high - low) / (end - start)) for low, high in zip(bounds, bounds[1:], strict=False)]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


class _File(BaseModel):
    """The keys of a file of a run that the page reads."""

    model_config = ConfigDict(strict=True)


class _About(_File):
    stage: Literal[1, 2, 3]
    config: dict[str, Any] = {}
    tasks: dict[str, int] = {}


_Entry = create_model(
    "_Entry",
    __base__=_File,
    step=(int, ...),
    tasks=(dict[str, int] | None, None),
    **dict.fromkeys(("epoch", "seconds", "skipped_steps", *CURVES), (float | None, None)),
)


class _LeftOut(_File):
    sample: str | None = None
    file: str | None = None


class _Skipped(_File):
    step: int
    samples: list[str] = []


class _Stage(_File):
    wer: float | None = None
    wer_unseen_voices: float | None = None
    accuracy: dict[str, float] = {}


class _Summary(_File):
    stage1: _Stage = _Stage()
    stage2: _Stage = _Stage()
    stage3: _Stage = _Stage()
    samples: dict[str, int] = {}
    seconds: dict[str, float] = {}
    normaliser: dict[str, str] = {}
    language: str | None = None


class _Answer(_File):
    sample: str
    reference: str
    answer: str


def _read_object(path: Path, kind: type[_File]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); copy it again") from None
    return _checked(found, kind, str(path))


def _checked(found: Any, kind: type[_File], where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise RunError(f"{where} holds a {type(found).__name__}, but it must be a JSON object; copy it again")
    try:
        kind.model_validate(found)
    except ValidationError as error:
        fault = error.errors()[0]
        key, value = ".".join(map(str, fault["loc"])), repr(fault["input"])
        what = "is missing" if fault["type"] == "missing" else f"= {value[:60]}: {fault['msg'].lower()}"
        raise RunError(f"{where}: {key} {what}; copy it again") from None
    return found


def _read_lines(path: Path, kind: type[_File]) -> list[dict[str, Any]]:
    """The JSON objects of a file with one on each line; none if there is no such file."""
    if not path.is_file():
        return []
    rows = []
    # Not splitlines(): JSON may hold other characters that end a line.
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise RunError(f"{path}:{number}: is not JSON; copy the file again") from None
        rows.append(_checked(row, kind, f"{path}:{number}"))
    return rows
