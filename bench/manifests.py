"""Measure how long a manifest of a million lines takes to start from, and what a batch costs then.

    python bench/manifests.py [--lines 1000000] [--no-durations] [--work FOLDER]

It writes recordings of two seconds (hard links to a few files, under 10 000 paths in 100 folders), a manifest of so
many lines, and one of its first 1 000. In a process of its own each, `select_samples` and the sampler run up to the
first batch: the first start, which makes the index, and the second, which finds it. Then batches of 16 are made of both
manifests in turns. Memory is the growth of the process over what its imports take, which is told, too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

PATHS, FOLDERS, FILES = 10_000, 100, 20
RATE, SECONDS = 16_000, 2.0
FEW = 1_000
BATCH, BATCHES = 16, 40
WORDS = ("turn", "the", "light", "on", "in", "kitchen", "and", "play", "some", "music", "for", "me", "please", "now")


def write(folder: Path, lines: int, durations: bool) -> list[Path]:
    """The recordings, a manifest of so many lines, and one of its first FEW."""
    rng = np.random.default_rng(0)
    for number in range(PATHS):
        path = folder / f"speaker{number % FOLDERS:03d}" / f"{number:05d}.wav"
        path.parent.mkdir(exist_ok=True)
        if number < FILES:
            soundfile.write(path, rng.normal(0, 0.1, round(SECONDS * RATE)), RATE)
        else:
            os.link(folder / f"speaker{number % FILES:03d}" / f"{number % FILES:05d}.wav", path)
    paths = [folder / "many.jsonl", folder / "few.jsonl"]
    for path, count in zip(paths, (lines, FEW), strict=True):
        with open(path, "w", encoding="utf-8") as file:
            for number in range(count):
                clip = number * 7919 % PATHS
                row = {"audio_filepath": f"speaker{clip % FOLDERS:03d}/{clip:05d}.wav"}
                row |= {"duration": SECONDS} if durations else {}
                text = " ".join(WORDS[(number * k) % len(WORDS)] for k in range(1, 9))
                row |= {"text": text, "speaker": f"s{clip % FOLDERS}", "license": "CC-BY-4.0"}
                if number % 5 == 4:
                    row |= {"task": f"question{number % 3}", "prompt": "What is wanted?", "answer": text[:20]}
                file.write(json.dumps(row) + "\n")
    return paths


def memory(name: str) -> float:
    """Megabytes of this process: VmRSS, or VmHWM for the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1e3


def start(path: Path, stage: int) -> None:
    """Print what a start takes up to its first batch: seconds, CPU seconds, and memory."""
    from soundwave.data.sampling import BucketBatchSampler, paper_temperature
    from soundwave.data.selection import select_samples

    before, wall, cpu = memory("VmRSS"), time.perf_counter(), sum(os.times()[:4])
    samples = select_samples([path], [], stage=stage).samples
    selected = time.perf_counter() - wall
    lengths = samples.seconds() if stage == 1 else samples.tokens()
    sampler = BucketBatchSampler(lengths, samples.tasks(), BATCH, temperature=paper_temperature if stage == 2 else None)
    first = [samples[i] for i in next(iter(sampler))]
    wall, cpu = time.perf_counter() - wall, sum(os.times()[:4]) - cpu
    assert len(first) == BATCH
    found = {"samples": len(samples), "seconds": wall, "selecting": selected, "cpu": cpu, "imports_mb": before}
    print(json.dumps(found | {"grown_mb": memory("VmRSS") - before, "peak_mb": memory("VmHWM")}))


def batches(many: Path, few: Path) -> None:
    """Print the CPU milliseconds of batches of both manifests, made in turns."""
    from soundwave.backbones import LANGUAGE_MODEL, WHISPER
    from soundwave.data.collate import CheckedCollator
    from soundwave.data.sampling import BucketBatchSampler
    from soundwave.data.selection import select_samples
    from soundwave.model.processing import SoundwaveProcessor

    collator = CheckedCollator(SoundwaveProcessor.from_backbones(WHISPER, LANGUAGE_MODEL), 1)
    loaders = {}
    for path in (many, few):
        samples = select_samples([path], [], stage=1).samples
        loaders[path.stem] = samples, iter(BucketBatchSampler(samples.seconds(), samples.tasks(), BATCH))
    spent: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(BATCHES):
        for name, (samples, sampler) in loaders.items():
            begun = time.process_time()
            collator([samples[i] for i in next(sampler)])
            spent[name].append(1e3 * (time.process_time() - begun))
    print(json.dumps({name: float(np.median(found)) for name, found in spent.items()}))


def step(*arguments: object) -> dict[str, float]:
    """What this program prints in a process of its own."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--no-durations", action="store_true", help="the recordings' headers are read")
    parser.add_argument("--work", type=Path, help="folder for the recordings and manifests; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        many, few = write(Path(folder), options.lines, not options.no_durations)
        load = os.getloadavg()[0]
        print(f"{options.lines} lines, {many.stat().st_size / 1e6:.0f} MB, {os.cpu_count()} cores, load {load:.1f}")
        for name in ("first start", "second start", "third start"):
            found = step("start", many, 2)
            print(
                f"{name:13} {found['seconds']:7.1f} s ({found['cpu']:.1f} s of CPU), memory grows by "
                f"{found['grown_mb']:.0f} MB to {found['imports_mb'] + found['grown_mb']:.0f} MB",
                flush=True,
            )
        size = (many.parent / f".{many.name}.index").stat().st_size if options.lines > 10_000 else 0
        print(f"index         {size / 1e6:7.1f} MB")
        found = step("batches", many, few)
        many, few = found["many"], found["few"]
        print(f"a batch       {many:7.1f} ms at {options.lines} lines, {few:.1f} ms at {FEW} ({many / few:.3f})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["start"]:
        start(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["batches"]:
        batches(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
