"""Measure how many forwards of the language model a transcript takes when CTC drafts it, and how much faster it is.

    python bench/drafts.py MODEL MANIFEST [--clips 250] [--batch 1 16]

For each batch size it transcribes the clips twice, in turns batch by batch: plain greedy decoding, and with drafts. The
two texts must be the same. It prints the share of answers' tokens that drafts gave, the forwards a clip, tokens a
second, the real-time factor (seconds of audio a second, encoder included), and the time of plain decoding over ours.
"""

import argparse
import time
from pathlib import Path

from soundwave.data.audio import SAMPLING_RATE, load_audio
from soundwave.data.collate import TRANSCRIBE_PROMPT
from soundwave.data.manifest import read_manifest
from soundwave.inference.answer import answer, load_model
from soundwave.inference.drafts import DraftCounts


def main(folder: Path, manifest: Path, clips: int, batches: list[int]) -> None:
    """Print the table."""
    loaded = load_model(folder)
    samples = [sample for sample in read_manifest(manifest) if sample.task == "transcribe"][:clips]
    audio = [load_audio(sample.audio) for sample in samples]
    seconds = sum(map(len, audio)) / SAMPLING_RATE
    features = [loaded.processor.features(samples) for samples in audio]
    print(
        "| batch | clips | texts that differ | tokens by drafts | forwards a clip | tokens/s, plain | with drafts |",
        end="",
    )
    print(" x real time, plain | with drafts | plain / drafts |")
    print("|" + "---:|" * 10)
    for size in batches:
        counts, spent, texts = DraftCounts(), {"none": 0.0, "ctc": 0.0}, {"none": [], "ctc": []}
        for number, start in enumerate(range(0, len(features), size)):
            given = features[start : start + size]
            turns = ("none", "ctc") if number % 2 else ("ctc", "none")
            for draft in turns:
                began = time.perf_counter()
                texts[draft] += answer(*loaded, [TRANSCRIBE_PROMPT] * len(given), given, draft=draft, counts=counts)
                spent[draft] += time.perf_counter() - began
        differ = sum(a != b for a, b in zip(*texts.values(), strict=True))
        rates = [counts.tokens / spent[draft] for draft in spent] + [seconds / spent[draft] for draft in spent]
        print(
            f"| {size} | {len(features)} | {differ} | {counts.accepted / counts.tokens:.1%} | "
            f"{counts.forwards / counts.clips:.2f} | {rates[0]:.1f} | {rates[1]:.1f} | {rates[2]:.2f} | "
            f"{rates[3]:.2f} | {spent['none'] / spent['ctc']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained model of stage II or III")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--clips", type=int, default=250)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    given = parser.parse_args()
    main(given.model, given.manifest, given.clips, given.batch)
