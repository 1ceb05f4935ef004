"""Several trainings, one after another, in each of the processes that a launcher has started.

    torchrun --nproc-per-node 2 tests/sharded_processes.py runs.json

`runs.json` holds a list of objects: `stage` and `settings` of a run, and optionally `stop`, the rank of a process that
gets SIGTERM in its second step, or `kill`, of one that is killed in its third. After each run a process writes
`RANK.json` beside it: for each run the error, if there was one, and the bytes that it keeps of the sharded weights, and
that they have together.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from soundwave.training.callbacks import Interrupted
from soundwave.training.settings import make_config
from soundwave.training.sharding import shares_of
from soundwave.training.stages import train_stage
from soundwave.training.trainer import SoundwaveTrainer

BATCHES = SoundwaveTrainer.get_batch_samples


def run(stage: int, settings: dict[str, Any], stop: int | None = None, kill: int | None = None) -> dict[str, Any]:
    """Train -> the error, and the bytes of this process's shares and of all."""
    found: dict[str, Any] = {"error": None}

    def batches(trainer, *args):
        found["bytes"] = shares_of(trainer.model.language_model)
        ends = {(1, str(stop)): signal.SIGTERM, (2, str(kill)): signal.SIGKILL}
        if number := ends.get((trainer.state.global_step, os.environ["RANK"])):
            os.kill(os.getpid(), number)
        return BATCHES(trainer, *args)

    SoundwaveTrainer.get_batch_samples = batches
    try:
        train_stage(make_config(stage, **settings))
    except (Interrupted, ValueError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    file, results = Path(sys.argv[1]), []
    for one in json.loads(file.read_text()):
        results.append(run(**one))
        (file.parent / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
