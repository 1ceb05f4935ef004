"""Several trainings, one after another, in each of the processes that a launcher has started.

    torchrun --nproc-per-node 2 tests/in_processes.py runs.json

`runs.json` holds a list of objects: `stage` and `settings` of a run, and optionally `poison`, the id of a sample whose
features are NaN, or `stop`, the rank of a process that gets SIGTERM in its second step. Each process writes
`RANK.json` beside it: for each run the samples of its batches by step, and the error, if there was one.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from soundwave.data.collate import CheckedCollator
from soundwave.training.callbacks import Interrupted
from soundwave.training.settings import make_config
from soundwave.training.stages import train_stage
from soundwave.training.trainer import SoundwaveTrainer

CLIP, BATCHES = CheckedCollator.clip, SoundwaveTrainer.get_batch_samples


def poison(sample_id: str | None) -> None:
    """From now on the features of this sample are NaN; None: of none."""

    def clip(collator, sample):
        found = CLIP(collator, sample)
        return found * float("nan") if sample.id == sample_id else found

    CheckedCollator.clip = clip


def run(stage: int, settings: dict[str, Any], poisoned: str | None = None, stop: int | None = None) -> dict[str, Any]:
    """Train -> the ids of the samples in this process's batches by step, and the error."""
    poison(poisoned)
    steps: list[list[str]] = []

    def batches(trainer, *args):
        found = BATCHES(trainer, *args)
        steps.append([name for batch in found[0] for name in batch["samples"]])
        if len(steps) == 2 and os.environ.get("RANK") == str(stop):
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    SoundwaveTrainer.get_batch_samples, error = batches, None
    try:
        train_stage(make_config(stage, **settings))
    except (Interrupted, ValueError, FloatingPointError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    finally:
        CheckedCollator.clip, SoundwaveTrainer.get_batch_samples = CLIP, BATCHES
    return {"steps": steps, "error": error}


if __name__ == "__main__":
    file = Path(sys.argv[1])
    found = [
        run(one["stage"], one["settings"], one.get("poison"), one.get("stop")) for one in json.loads(file.read_text())
    ]
    (file.parent / f"{os.environ['RANK']}.json").write_text(json.dumps(found))
