"""Measure how many minutes of one's own speech it takes: word errors after training on 5, 10, 20 and 45 minutes.

    python bench/minutes.py DATA --work FOLDER [--minutes 5 10 20 45] [--threads 1]

DATA holds `train.jsonl` and `test.jsonl` of other speakers and sentences. It runs the commands of
docs/train-your-own.md, "Little speech?": synthetic speech first, once for all sizes, then the recordings, each at five
speeds, through all three stages. Each size is the beginning of one shuffled list, so that the smaller ones lie in the
larger ones. It prints each command, and for each size the word errors of CTC and of the language model with their 95 %
intervals; they go to `FOLDER/minutes.json` with date, commit, versions, and the word errors of Whisper's own decoder.
What is done already is not done again.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml
from transformers.utils import logging

from soundwave import backbones
from soundwave.curation.hearing import Clip, Whisper
from soundwave.data.manifest import read_manifest
from soundwave.evaluation.scores import word_error_rate
from soundwave.provenance import commit, device_name, versions

RECIPES = Path(__file__).resolve().parents[1] / "configs/data"
SOUNDWAVE = str(Path(sys.executable).with_name("soundwave"))
BATCH = "batch_size=16 accumulation=1 warmup_steps=20"
SPEAK = ("data speak speech", "features speech/manifest.jsonl frames")
FIRST = (
    "train 1 train=speech/manifest.jsonl features=frames spec_augment=false out=runs/speech/1 "
    "steps=1000 batch_size=32 accumulation=1 learning_rate=1e-3 warmup_steps=20"
)
BUILD = "data build {recipe} {folder}"
STAGES = (
    f"train 1 train={{train}} model=runs/speech/1/model out={{out}}/1 steps=450 {BATCH} learning_rate=1e-3 "
    "adapter_dropout=0.2",
    f"train 2 train={{train}} model={{out}}/1/model out={{out}}/2 steps=200 {BATCH} learning_rate=5e-4 ctc_weight=1 "
    "adapter_dropout=0.2 lora_alpha=128",
    f"train 3 train={{train}} model={{out}}/2/model out={{out}}/3 steps=100 {BATCH} learning_rate=1e-4 lora_alpha=128",
)
SCORES = (
    "evaluate data/test.jsonl --model {out}/1/model --ctc --out {out}/ctc",
    "evaluate data/test.jsonl --model {out}/3/model --out {out}/llm",
)


def run(work: Path, line: str, made: Path, threads: int) -> float:
    """Run a command in the folder unless it has made its result already; minutes that it took."""
    if (work / made).exists():
        return 0.0
    print(f"$ soundwave {line}", flush=True)
    begun = time.monotonic()
    subprocess.run([SOUNDWAVE, *line.split()], cwd=work, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True)
    return (time.monotonic() - begun) / 60


def write_parts(work: Path, minutes: list[float]) -> None:
    """`data/train-M.jsonl`: the first M minutes of the shuffled sentences; `data/speeds-M.yaml`: at many speeds."""
    lines = (work / "data/train.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    for size in minutes:
        left, part = 60 * size, []
        for line in lines:
            left -= json.loads(line)["duration"]
            if left < 0 and part:
                break
            part.append(line + "\n")
        (work / f"data/train-{size:g}.jsonl").write_text("".join(part), encoding="utf-8")
        recipe = yaml.safe_load((RECIPES / "speeds.yaml").read_text(encoding="utf-8"))
        recipe["phrasings"] = str(RECIPES / recipe["phrasings"])
        recipe["sources"]["mine"]["manifest"] = f"train-{size:g}.jsonl"
        (work / f"data/speeds-{size:g}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def wer(scores: Path) -> dict:
    """Word error rate of transcripts and its interval."""
    found = json.loads(scores.read_text(encoding="utf-8"))
    return {"wer": found["wer"], "interval": found["intervals"]["transcribe"]["WER"]}


def whisper_wer(work: Path) -> float:
    """Word error rate of the embedded Whisper's own decoder on the test."""
    kept = work / "whisper.json"
    if kept.exists():
        return json.loads(kept.read_text())
    samples = read_manifest(work / "data/test.jsonl")
    logging.set_verbosity_error()  # it would say for each clip which of two limits it takes
    whisper = Whisper(backbones.WHISPER)
    clips = [Clip(place, sample.audio, sample.offset, sample.duration) for place, sample in enumerate(samples)]
    heard = [found for clip in clips for found in whisper([clip])]
    if faults := [f"{samples[each['line']].id}: {each['fault']}" for each in heard if "fault" in each]:
        raise SystemExit(f"error: {faults[0]}; take it out of the test")
    found = word_error_rate([sample.text for sample in samples], [each["pred_text"] for each in heard])
    kept.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that is made")
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 10, 20, 45])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of a training")
    given = parser.parse_args()
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "data").exists():
        shutil.copytree(given.data, work / "data")
    write_parts(work, sorted(given.minutes))
    for line, made in zip((*SPEAK, FIRST), ("speech", "frames/features.json", "runs/speech/1/model"), strict=True):
        run(work, line, Path(made), given.threads)
    about = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "versions": versions(("torch", "transformers"))}
    about |= {"device": device_name(), "threads": given.threads, "data": given.data.name}
    about |= {"whisper": whisper_wer(work), "sizes": {}}
    for size in sorted(given.minutes):
        out = Path(f"runs/{size:g}")
        names = {"recipe": f"data/speeds-{size:g}.yaml", "folder": f"speeds-{size:g}", "out": str(out)}
        names["train"] = f"{names['folder']}/manifest.jsonl"
        run(work, BUILD.format(**names), Path(names["folder"]), given.threads)
        took = sum(
            run(work, line.format(**names), out / str(stage) / "model", given.threads)
            for stage, line in enumerate(STAGES, 1)
        )
        for line, name in zip(SCORES, ("ctc", "llm"), strict=True):
            run(work, line.format(**names), out / name / "scores.json", given.threads)
        found = {name: wer(work / out / name / "scores.json") for name in ("ctc", "llm")}
        print(
            f"{size:g} minutes ({took:.0f} minutes of training): "
            + ", ".join(
                f"{name} {each['wer']:.1%} ({each['interval'][0]:.1%} to {each['interval'][1]:.1%})"
                for name, each in found.items()
            ),
            flush=True,
        )
        about["sizes"][f"{size:g}"] = found
        (work / "minutes.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
