"""The report of a run: one HTML file with its curves, its scores and a few recordings as the model hears them.

The page needs neither a network nor another file. `runs.py` and `utterances.py` collect the data, which become one JSON
block in the page. The page's scripts (`SCRIPTS`) draw them. They insert every word of the data as text, never as
markup, and the page's content security policy permits only its own script and style, by their hashes.
"""

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from soundwave.report.page import page_of
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
    score_rows,
)
from soundwave.report.utterances import describe

__all__ = ["RunError", "write_report"]

SCRIPTS = ("charts.js", "frame.js", "recordings.js", "page.js")  # joined to one script, in this order
NAMED = 5  # most samples that are named for a skipped step
POINTS = 1000  # most points of a curve
ALL_POINTS = 20_000  # most points of all curves of one kind together, so that a page stays below 5 MB
# Settings that say where the files of a training are, not what it did. They are not shown.
PLACES = ("train", "out", "model", "features", "resume")


def write_report(
    runs: list[Path], out: Path, *, utterances: int = 6, test: Path | None = None, allow_outside: bool = False
) -> Path:
    """Write the page of one run, or of several runs side by side, and return `out`.

    Args:
        runs: folders of runs: the `out` of a training, or a folder of several such, like a demonstration's. The
            recordings are shown as the model of the last stage hears them; of several such models as the first does.
        out: the HTML file. Its folder is made if it does not exist.
        utterances: number of recordings to show. They are taken from `test`; without it from the run's scored answers;
            if it was not scored, from its training data. Unless there are scored answers, the model is asked now.
        test: a manifest of recordings that were held out from training, with their lines.
        allow_outside: also show recordings that lie outside their manifest's folder. It is off by default, because the
            folder of a run may come from somebody else, and its manifests must not put other files of yours into a
            page.

    Raises:
        RunError: `runs` is empty or names a folder twice, or a run holds no log or a damaged file.
        ManifestError: `test` cannot be read.
    """
    if not runs:
        raise RunError("no run was given; name the folder of at least one")
    places = [Path(run).resolve() for run in runs]
    if twice := [run for number, run in enumerate(runs) if places[number] in places[:number]]:
        raise RunError(f"{twice[0]} is given twice; name each run once")
    names = run_names(runs)
    found = dict(zip(names, map(read_run, runs), strict=True))
    heard = max(names, key=lambda name: found[name].stage)  # the first of equal ones
    others = {name: found[name] for name in names if name != heard}
    about = describe(found[heard], others, utterances, allow_outside, test)
    page = make_page(found, about | {"by": heard})
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def make_page(runs: dict[str, Run], utterances: dict[str, Any]) -> str:
    """The HTML of the page.

    Args:
        runs: name -> run.
        utterances: what `utterances.describe` returned.
    """
    points = min(POINTS, max(2, ALL_POINTS // sum(len(run.passes) for run in runs.values())))
    data = {
        "made": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "runs": [
            {
                "name": name,
                "passes": [_pass(one, points) for one in run.passes],
                "scores": score_rows(run.summary),
                "normaliser": run.summary.get("normaliser", {}),
                "seconds": run.summary.get("seconds", {}).get("total"),
                "begun": run.begun,
                "command": run.command,
            }
            for name, run in runs.items()
        ],
        "utterances": utterances,
    }
    return page_of(" · ".join(runs), data, SCRIPTS)


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
        "unfinished": one.unfinished,
        "last": {name: _last(log, name) for name in ("step", "epoch", "seconds", *CURVES)},
        "settings": {name: value for name, value in one.config.items() if name not in PLACES},
        "about": one.about,
    }


def _last(log: list[dict[str, Any]], name: str) -> Any:
    return next((entry[name] for entry in reversed(log) if entry.get(name) is not None), None)
