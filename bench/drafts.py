"""Measure how many forwards of the language model a transcript takes when CTC drafts it, and how much faster it is.

    python bench/drafts.py MODEL MANIFEST [--clips 250] [--batch 1 16]

For each batch size it transcribes the clips twice, in turns batch by batch: plain greedy decoding, and with drafts. The
two texts must be the same. It prints the share of answers' tokens that drafts gave, the forwards a clip, tokens a
second, the real-time factor (seconds of audio a second, encoder included), and the time of plain decoding over ours.

    python bench/drafts.py MODEL MANIFEST --accept 0.5 0.9 0.99 [--plot FILE.png]

measures what it costs to take CTC's text unread where its least sure token is at least so probable: the share of such
clips, the word error rate and the real-time factor, beside plain decoding and drafts that are always checked.
"""

import argparse
import time
from pathlib import Path

from soundwave.data.audio import SAMPLING_RATE, load_audio
from soundwave.data.collate import TRANSCRIBE_PROMPT
from soundwave.data.manifest import read_manifest
from soundwave.evaluation.scores import word_error_rate
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


def lossy(folder: Path, manifest: Path, clips: int, size: int, thresholds: list[float], plot: Path | None) -> None:
    """Print the table of thresholds, and draw it."""
    loaded = load_model(folder)
    samples = [sample for sample in read_manifest(manifest) if sample.task == "transcribe"][:clips]
    audio = [load_audio(sample.audio) for sample in samples]
    seconds = sum(map(len, audio)) / SAMPLING_RATE
    features = [loaded.processor.features(samples) for samples in audio]
    settings = {"plain": {"draft": "none"}, "every draft checked": {"draft": "ctc"}}
    settings |= {f"{limit:g}": {"draft": "ctc", "accept": limit} for limit in sorted(thresholds, reverse=True)}
    texts: dict[str, list[str]] = {name: [] for name in settings}
    spent, unread = dict.fromkeys(settings, 0.0), dict.fromkeys(settings, 0)
    answer(*loaded, [TRANSCRIBE_PROMPT], features[:1], draft="ctc")
    for start in range(0, len(features), size):
        given = features[start : start + size]
        for name, setting in settings.items():
            counts, began = DraftCounts(), time.perf_counter()
            texts[name] += answer(*loaded, [TRANSCRIBE_PROMPT] * len(given), given, counts=counts, **setting)
            spent[name] += time.perf_counter() - began
            unread[name] += counts.unread
    print(f"{len(samples)} clips in batches of {size}\n")
    print("| CTC's text from a probability of | clips unread | WER | x real time |")
    print("|---|---:|---:|---:|")
    rows = []
    for name in settings:
        wer = word_error_rate([sample.answer for sample in samples], texts[name])
        rows.append((name, unread[name] / len(samples), wer, seconds / spent[name]))
        print(f"| {name} | {rows[-1][1]:.1%} | {wer:.2%} | {rows[-1][3]:.1f} |", flush=True)
    if plot is not None:
        draw(rows, plot)


def draw(rows: list[tuple[str, float, float, float]], file: Path) -> None:
    """Word error rate and speed over the share of clips that the language model has not read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    checked = rows[1:]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axes, column, factor, title in (
        (left, 2, 100, "word error rate [%]"),
        (right, 3, 1, "seconds of audio a second"),
    ):
        axes.plot([100 * row[1] for row in checked], [factor * row[column] for row in checked], marker="o")
        for row in checked:
            label = "all checked" if row is checked[0] else f"≥ {row[0]}"
            axes.annotate(
                label, (100 * row[1], factor * row[column]), textcoords="offset points", xytext=(4, 5), fontsize=8
            )
        axes.axhline(factor * rows[0][column], color="grey", linestyle="--", label="plain greedy decoding")
        axes.set(xlabel="clips whose text CTC wrote alone [%]", title=title)
        axes.set_xlim(-5, 118)  # room for the labels
        axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
    print(f"\npicture {file}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a trained model of stage II or III")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--clips", type=int, default=250)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--accept", type=float, nargs="+", help="thresholds; the last batch size is taken")
    parser.add_argument("--plot", type=Path, help="picture of the thresholds")
    given = parser.parse_args()
    if given.accept:
        lossy(given.model, given.manifest, given.clips, given.batch[-1], given.accept, given.plot)
    else:
        main(given.model, given.manifest, given.clips, given.batch)
