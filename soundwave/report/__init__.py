"""A run to look at: one HTML file with its curves, scores and a few recordings as the model hears them.

The page needs no network and no other file. Python collects (`runs.py`, `utterances.py`) and writes everything as one
JSON block; `SCRIPTS` draw it and put every word of the data into the page as text, never as markup. The page's
content security policy permits its own script and style alone, by their hashes.
"""

import base64
import hashlib
import html
import json
import math
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from soundwave.report.runs import (
    CURVES,
    REASONS,
    Pass,
    Run,
    RunError,
    curves,
    mixture,
    read_run,
    reasons,
    run_names,
    scores,
)
from soundwave.report.utterances import describe

__all__ = ["RunError", "write_report"]

SCRIPTS = ("charts.js", "recordings.js", "page.js")  # one script, in this order
DIGITS = 6  # significant ones kept of a figure
NAMED = 5  # samples of a skipped step
POINTS = 1000  # at most of a curve
ALL_POINTS = 20_000  # at most of all curves of one kind together: a page stays below 5 MB
# Settings that say where a training lay, not what it did.
PLACES = ("train", "out", "model", "resume")


def write_report(runs: list[Path], out: Path, *, utterances: int = 6, allow_outside: bool = False) -> Path:
    """Write the page of one run, or of several side by side, and return `out`.

    Args:
        runs: a training's `out` or a folder of several, e.g. a demonstration's. The first one's model is looked into.
        out: the HTML file; its folder is made if need be.
        utterances: recordings to show. Where a run was not scored, its model answers about those of its training.
        allow_outside: show recordings outside their manifest's folder, too, as training may have been permitted to use.
            A run's folder from somebody else shall put no other recordings of yours into a page.

    Raises:
        RunError: `runs` is empty, or one of them holds no log or a damaged one.
    """
    if not runs:
        raise RunError("no run was given; name the folder of at least one")
    names = run_names(runs)
    found = dict(zip(names, map(read_run, runs), strict=True))
    others = {name: found[name] for name in names[1:]}
    page = render(found, describe(found[names[0]], others, utterances, allow_outside))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def render(runs: dict[str, Run], utterances: dict[str, Any]) -> str:
    """The page as text."""
    points = min(POINTS, max(2, ALL_POINTS // sum(len(run.passes) for run in runs.values())))
    data = {
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": [
            {
                "name": name,
                "passes": [_pass(one, points) for one in run.passes],
                "scores": scores(run.summary),
                "seconds": run.summary.get("seconds", {}).get("total"),
            }
            for name, run in runs.items()
        ],
        "utterances": utterances,
    }
    style, script = _file("page.css"), "\n".join(map(_file, SCRIPTS))
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; script-src '{_hash(script)}'; style-src '{_hash(style)}'"
    )
    return Template(_file("page.html")).substitute(
        policy=policy,
        title=html.escape(" · ".join(runs)),
        style=style,
        script=script,
        # No `<` of the data reaches the HTML parser, so nothing in it can end the block.
        data=json.dumps(_plain(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _pass(one: Pass, points: int) -> dict[str, Any]:
    log = one.log
    return {
        "stage": one.stage,
        "number": one.number,
        "folder": one.folder.name,
        "curves": curves(log, points),
        "averaged": max(1, -(-len(log) // points)),
        "mixture": mixture(one) if len(one.tasks) > 1 else [],
        "tasks": one.tasks,
        "left_out": reasons(one),
        "skipped": max(len(one.skipped), *(entry.get("skipped_steps") or 0 for entry in log)),
        "skipped_steps": [step | {"samples": step.get("samples", [])[:NAMED]} for step in one.skipped[:REASONS]],
        "last": {name: _last(log, name) for name in ("step", "epoch", "seconds", *CURVES)},
        "settings": {name: value for name, value in one.config.items() if name not in PLACES},
        "about": one.about,
    }


def _last(log: list[dict[str, Any]], name: str) -> Any:
    return next((entry[name] for entry in reversed(log) if entry.get(name) is not None), None)


def _plain(value: Any) -> Any:
    """What JSON can hold: a figure that is not finite is null, others are rounded."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
