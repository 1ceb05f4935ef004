"""Kill training with kill -9 at random moments, start it again, and compare its model with that of a run without kills.

    .venv/bin/python bench/kills.py --kills 20            # 20 kills of each stage: half an hour to an hour on two cores
    .venv/bin/python bench/kills.py --stages 1 --kills 4 --workers 1 --accumulation 2

Each stage is trained with every combination of the given numbers of data workers and accumulated batches; its kills are
divided among them. Every second kill waits until a checkpoint is being written. Stages II and III start from the model
of the stage before. The exit status is 1 if a model differs in a single bit.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from soundwave.demo.corpus import build_corpus

SCRIPT = Path(sys.executable).with_name("soundwave")
MANIFESTS = {1: "stage1.jsonl", 2: "stage2.jsonl", 3: "stage3.jsonl"}
PATIENCE = 1800  # After so many seconds of waiting a run counts as hung.


def command(stage: int, out: Path, corpus: Path, start: list[str], arguments: argparse.Namespace, variant: tuple):
    """The command line of a training with a checkpoint after every second step."""
    workers, accumulation = variant
    settings = [f"train={corpus / MANIFESTS[stage]}", f"out={out}", f"steps={arguments.steps}", "warmup_steps=2"]
    settings += [f"batch_size={arguments.batch_size}", f"accumulation={accumulation}", f"workers={workers}"]
    settings += ["learning_rate=1e-3", "save_steps=2", "log_steps=1", "seed=5"]
    return [str(SCRIPT), "train", str(stage), *settings, *start, "--quiet"]


def steps_done(out: Path) -> int:
    """The last step that a run has logged, or 0."""
    log = out / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.is_file() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith(b"\n") else 0


def wait_until(process: subprocess.Popen, condition, pause: float) -> bool:
    """Wait for a condition. False: the process ended before it became true."""
    patience = time.monotonic() + PATIENCE
    while process.poll() is None:
        if condition():
            return True
        if time.monotonic() > patience:
            process.kill()
            raise SystemExit(f"{' '.join(process.args)}: no step in {PATIENCE} s")
        time.sleep(pause)
    return False


def run_and_kill(words: list[str], out: Path, kills: range, steps: int, rng: random.Random, log: Path) -> list[str]:
    """Train to the end and kill on the way, with odd numbers while a checkpoint is written.

    Returns:
        Where each kill hit.
    """
    hits = []
    aside = out / ".writing"
    for number, target in zip(kills, sorted(rng.randrange(1, steps) for _ in kills), strict=True):
        with open(log, "ab") as output:
            process = subprocess.Popen(words, stdout=output, stderr=output)
        alive = wait_until(process, lambda target=target: steps_done(out) >= target, 0.02)
        if alive and number % 2:
            alive = wait_until(process, lambda: any(aside.glob("*/*")), 0.001)
            time.sleep(rng.uniform(0, 0.03))
        elif alive:
            time.sleep(rng.uniform(0, 1))
        process.kill()
        process.wait()
        written = sorted(path.name for path in aside.glob("*/*"))
        where = f"inside the writing of {', '.join(written)}" if written else f"after step {steps_done(out)}"
        hits.append(where if alive else "after the end")
    train(words, log)
    return hits


def train(words: list[str], log: Path) -> None:
    """Run a command to its end, with its output into a file."""
    with open(log, "ab") as output:
        if subprocess.run(words, stdout=output, stderr=output).returncode:
            raise SystemExit(log.read_text())


def main() -> None:
    """Kill, compare and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], help="stages that are killed")
    parser.add_argument("--kills", type=int, default=20, help="number of kills of each stage")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1], help="numbers of data workers")
    parser.add_argument("--accumulation", type=int, nargs="+", default=[1, 2], help="numbers of accumulated batches")
    parser.add_argument("--steps", type=int, default=24, help="steps of each training")
    parser.add_argument("--batch-size", type=int, default=4, help="samples of a batch")
    parser.add_argument("--language-model", help="folder or Hub id of a language model instead of the embedded one")
    parser.add_argument("--corpus", type=Path, help="folder of an embedded corpus that was built before")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    backbone = [f"language_model={arguments.language_model}"] if arguments.language_model else []
    variants = list(product(arguments.workers, arguments.accumulation))
    differ = False
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        corpus = arguments.corpus or build_corpus(work / "corpus", size="tiny")
        start = [*backbone, "lora_rank=4"]
        for stage in range(1, max(arguments.stages) + 1):
            for number, variant in enumerate(variants if stage in arguments.stages else variants[:1]):
                whole, killed = (work / f"{stage}-{name}-{number}" for name in ("whole", "killed"))
                log = work / "output.txt"
                train(command(stage, whole, corpus, start, arguments, variant), log)
                if stage not in arguments.stages:
                    continue
                share = arguments.kills / len(variants)
                kills = range(stage + round(number * share), stage + round((number + 1) * share))
                words = command(stage, killed, corpus, start, arguments, variant)
                hits = run_and_kill(words, killed, kills, arguments.steps, rng, log)
                same = len({(out / "model" / "model.safetensors").read_bytes() for out in (whole, killed)}) == 1
                differ |= not same
                print(f"stage {stage}, {variant[0]} workers, accumulation {variant[1]}: {'same' if same else 'OTHER'}")
                print(*(f"  killed {hit}" for hit in hits), sep="\n", flush=True)
            start = [f"model={work / f'{stage}-whole-0' / 'model'}"]
    sys.exit(differ)


if __name__ == "__main__":
    main()
