"""Measure how fast recordings become a model's input, and what of a step's time is spent waiting for them.

    python bench/loading.py                       # clips a second a core, by format and length
    python bench/loading.py --demo CORPUS         # share of a step, in the demonstration's four trainings
    python bench/loading.py --demo CORPUS --workers 1 --features

The first table counts CPU seconds of one thread, which other programs on the machine do not change much. CORPUS is a
corpus of the demonstration (`runs/demo/corpus-full`); each training runs for `--steps` steps from an untrained model
of its stage, and the share is what the log calls `loading_share`. `--features` also trains from encoder frames.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from soundwave.data.audio import SAMPLING_RATE, load_audio
from soundwave.demo.corpus import timed_speech
from soundwave.model.processing import log_mel

SECONDS = (3, 10, 30)
FORMATS = {  # name: rate, channels, ending, format and subtype of soundfile
    "WAV, 16 kHz": (16_000, 1, "wav", "WAV", "PCM_16"),
    "WAV, 44.1 kHz, stereo": (44_100, 2, "wav", "WAV", "PCM_16"),
    "FLAC, 16 kHz": (16_000, 1, "flac", "FLAC", "PCM_16"),
    "MP3, 44.1 kHz": (44_100, 1, "mp3", "MP3", "MPEG_LAYER_III"),
    "Opus, 48 kHz": (48_000, 1, "opus", "OGG", "OPUS"),
}
PATIENCE = 0.2  # CPU seconds of a measurement


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of one call: the fastest of those that `PATIENCE` has room for, three at least."""
    best, start, calls = float("inf"), time.process_time(), 0
    while calls < 3 or time.process_time() - start < PATIENCE:
        begun = time.process_time()
        work()
        best, calls = min(best, time.process_time() - begun), calls + 1
    return best


def speech(seconds: float, rate: int) -> np.ndarray:
    """Sentences of the embedded corpus, one after another, float32 [samples]."""
    import soxr

    parts: list[np.ndarray] = []
    for spoken in timed_speech(round(seconds) + 5):
        parts.append(spoken.samples)
        if sum(map(len, parts)) >= seconds * SAMPLING_RATE:
            break
    found = np.concatenate(parts)[: round(seconds * SAMPLING_RATE)]
    return found if rate == SAMPLING_RATE else soxr.resample(found, SAMPLING_RATE, rate)


def measure_clips() -> None:
    """Print clips a second of one core."""
    torch.set_num_threads(1)
    extractors = {mels: WhisperFeatureExtractor(feature_size=mels) for mels in (80, 128)}
    print("| recording | seconds | decoding, resampling | log-mel of 80 | of 128 | clips a second, 80 | 128 |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, (rate, channels, ending, kind, subtype) in FORMATS.items():
            for seconds in SECONDS:
                file = Path(folder) / f"{seconds}.{ending}"
                samples = np.repeat(speech(seconds, rate)[:, None], channels, axis=1)
                soundfile.write(file, samples, rate, format=kind, subtype=subtype)
                decoded = cpu_seconds(partial(load_audio, file))
                audio = load_audio(file)
                mel = {
                    mels: cpu_seconds(partial(log_mel, extractor, audio, whole_window=False))
                    for mels, extractor in extractors.items()
                }
                rates = " | ".join(f"{1 / (decoded + mel[mels]):.0f}" for mels in mel)
                print(
                    f"| {name} | {seconds} | {1e3 * decoded:.1f} ms | {1e3 * mel[80]:.1f} ms | {1e3 * mel[128]:.1f} ms "
                    f"| {rates} |",
                    flush=True,
                )


def measure_demo(corpus: Path, steps: int, workers: int, features: bool) -> None:
    """Print the share of time that is spent waiting for data in the demonstration's trainings."""
    from soundwave.demo.run import FULL, stage_config
    from soundwave.training.stages import train_stage

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        variants = ["recordings"]
        if features:
            names = [str(corpus / f"{name}.jsonl") for name in FULL.passes]
            command = [
                str(Path(sys.executable).with_name("soundwave")),
                "features",
                *names,
                str(corpus.parent / "frames"),
            ]
            start = time.perf_counter()
            subprocess.run([*command, "--quiet"], check=True)
            print(f"soundwave features: {time.perf_counter() - start:.0f} s")
            variants.append("frames")
        print("| training | from | seconds a step | waiting for data |")
        print("|---|---|---|---|")
        for name in FULL.passes:
            for variant in variants:
                config = stage_config(FULL, name, corpus, out / variant, 0)
                changed = {"steps": steps, "log_steps": steps, "workers": workers, "quiet": True, "save_steps": 10**6}
                if variant == "frames":
                    changed["features"] = corpus.parent / "frames"
                folder_of_model, _, _ = train_stage(config.model_copy(update=changed))
                lines = (folder_of_model.parent / "log.jsonl").read_text(encoding="utf-8").splitlines()
                first, *_, last = (json.loads(line) for line in lines)
                taken = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
                print(f"| {name} | {variant} | {taken:.2f} | {last['loading_share']:.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, metavar="CORPUS", help="measure the demonstration's trainings")
    parser.add_argument("--steps", type=int, default=10, help="steps of each training")
    parser.add_argument("--workers", type=int, default=0, help="processes that load data")
    parser.add_argument("--features", action="store_true", help="also train from encoder frames")
    arguments = parser.parse_args()
    if arguments.demo is None:
        measure_clips()
    else:
        measure_demo(arguments.demo, arguments.steps, arguments.workers, arguments.features)


if __name__ == "__main__":
    main()
