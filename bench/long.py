"""Measure whether a long recording is read as well as its pieces, and in memory that does not grow with its length.

    python bench/long.py MODEL [--minutes 10] [--batch 2]

It speaks sentences that the embedded corpus keeps for its test, with pauses of 0.3 to 0.8 s between them, and writes a
file of one minute and one of ten. Each is transcribed in a process of its own. It prints the word error rate of the
file and of its sentences alone, how long that took, and the peak memory of both processes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from soundwave.data.audio import SAMPLING_RATE
from soundwave.demo.corpus import timed_speech
from soundwave.evaluation.scores import word_error_rate

PROGRAM = """
import json, resource, sys, time
from soundwave.hardware import keep_memory_flat
from soundwave.inference.answer import load_model
from soundwave.inference.long import transcribe
keep_memory_flat()  # as the commands do
model, batch, *files = sys.argv[1:]
loaded = load_model(model)
start = time.perf_counter()
found = transcribe(files, loaded, batch_size=int(batch), timestamps="word")
spent = time.perf_counter() - start
print(json.dumps({"text": " ".join(each.text for each in found), "spent": spent,
                  "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def read(model: Path, batch: int, files: list[Path]) -> dict:
    """Text, seconds and peak MiB of a process that transcribes files."""
    command = [sys.executable, "-c", PROGRAM, model, str(batch), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_speech(folder: Path, minutes: float) -> tuple[Path, list[Path], str]:
    """A recording of so many minutes, its sentences as files of their own, and what they say."""
    rng, parts, files, texts, count = np.random.default_rng(0), [], [], [], 0
    for spoken in timed_speech(round(30 * minutes)):
        pause = np.zeros(round(rng.uniform(0.3, 0.8) * SAMPLING_RATE), np.float32)
        files.append(folder / f"{minutes:g}-{len(files):04d}.wav")
        soundfile.write(files[-1], spoken.samples, SAMPLING_RATE)
        parts += [spoken.samples, pause]
        texts.append(spoken.text)
        count += len(spoken.samples) + len(pause)
        if count >= minutes * 60 * SAMPLING_RATE:
            break
    whole = folder / f"{minutes:g}.wav"
    soundfile.write(whole, np.concatenate(parts), SAMPLING_RATE)
    return whole, files, " ".join(texts)


def main(model: Path, minutes: float, batch: int) -> None:
    """Print the table."""
    print("| recording | words | word errors | of its sentences alone | seconds | peak memory, MiB |")
    print("|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for length in (1.0, minutes):
            whole, sentences, text = write_speech(Path(folder), length)
            found, alone = read(model, batch, [whole]), read(model, batch, sentences)
            rates = [word_error_rate([text], [each["text"]]) for each in (found, alone)]
            print(
                f"| {length:g} min | {len(text.split())} | {rates[0]:.2%} | {rates[1]:.2%} | {found['spent']:.0f} | "
                f"{found['peak']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained model")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--batch", type=int, default=2, help="windows that are read together")
    given = parser.parse_args()
    main(given.model, given.minutes, given.batch)
