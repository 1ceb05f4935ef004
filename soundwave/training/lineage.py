"""What a trained model's folder tells of its training: `training.json`, one entry for each stage that it has seen.

It stays with the model where the run's folder does not, and its card is written from it.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soundwave.data.manifest import Sample
from soundwave.data.samples import Samples
from soundwave.model.hub import TRAINING_FILE
from soundwave.training.settings import StageConfig


def write_lineage(
    folder: Path,
    config: StageConfig,
    note: dict[str, Any],
    samples: Sequence[Sample],
    losses: dict[str, float],
    seconds: float,
) -> None:
    """Write `training.json`: the entries of the model that the stage started from, and one of the stage.

    Args:
        note: content of `run.json`.
        losses: those of the last step that was logged.
        seconds: of training.
    """
    earlier = [] if config.model is None else _entries(config.model / TRAINING_FILE)
    entry = {
        "stage": config.stage,
        "steps": config.steps,
        "samples_a_step": _samples_a_step(config, note, losses),
        "learning_rate": config.learning_rate,
        "losses": {name: losses[name] for name in ("ctc_loss", "lm_loss") if losses.get(name) is not None},
        "seconds": round(seconds, 1),
        **{key: note[key] for key in ("device", "commit", "versions")},
        "data": data_of(samples),
    }
    text = json.dumps([*earlier, entry], indent=2, ensure_ascii=False)
    (folder / TRAINING_FILE).write_text(text + "\n", encoding="utf-8")


def _samples_a_step(config: StageConfig, note: dict[str, Any], losses: dict[str, float]) -> int | None:
    """Samples of a step; with a budget the mean of the last steps that were logged."""
    if config.batch_size is not None and not config.budgets:
        return config.batch_size * config.accumulation * note.get("processes", 1)
    return round(losses["batch_samples"]) if "batch_samples" in losses else None


def _entries(file: Path) -> list[Any]:
    """The entries of an earlier record; none if it is missing or damaged, because no weight depends on them."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found if isinstance(found, list) else []


def data_of(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Samples, hours, tasks and licences of each manifest, of which only the name is told.

    Licences are those of the lines' key `license`, with the number of lines that name it.
    """
    samples = Samples.of(samples)
    seconds = np.nan_to_num(samples.seconds()).tolist()
    manifests: dict[str, list[tuple[float, str, str]]] = {}
    for name, *found in zip(samples.manifests(), seconds, samples.tasks(), samples.licences(), strict=True):
        manifests.setdefault(name, []).append(tuple(found))
    return [
        {
            "manifest": name,
            "samples": len(found),
            "hours": round(sum(seconds for seconds, _, _ in found) / 3600, 4),
            "tasks": dict(Counter(task for _, task, _ in found)),
            "licences": dict(Counter(licence for _, _, licence in found if licence)),
        }
        for name, found in manifests.items()
    ]
