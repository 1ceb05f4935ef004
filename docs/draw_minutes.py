"""Draw `pictures/minutes-*.svg`: word errors over minutes of training speech, of CTC and of the language model.

The figures are those that `python bench/minutes.py` has written; they lie in bench/results/minutes.json, with the word
error rate of Whisper's own decoder on the same clips. Run: python docs/draw_minutes.py
"""

import json
from pathlib import Path

import draw_style
from draw_style import Palette

RESULTS = Path(__file__).resolve().parents[1] / "bench/results/minutes.json"
HEIGHT = 400
NAMES = {"ctc": "CTC alone (stage 1)", "llm": "language model (stage 3)"}


def draw(colours: Palette) -> None:
    whole, found = draw_style.canvas(HEIGHT), json.loads(RESULTS.read_text(encoding="utf-8"))
    axes = whole.figure.add_axes((0.09, 0.18, 0.87, 0.60))
    sizes = sorted(found["sizes"], key=float)
    for name, colour in zip(NAMES, (colours.frozen, colours.trained), strict=True):
        values = [100 * found["sizes"][size][name]["wer"] for size in sizes]
        bounds = zip(*(found["sizes"][size][name]["interval"] for size in sizes), strict=True)
        low, high = ([100 * each for each in bound] for bound in bounds)
        axes.fill_between(range(len(sizes)), low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(values, color=colour, marker="o", markersize=8, linewidth=3)
        for place, value in enumerate(values):
            axes.annotate(
                f"{value:.0f}", (place, value), (0, 10 if name == "ctc" else -24), textcoords="offset points",
                fontsize=19, color=colour, ha="center", weight="bold",
            )  # fmt: skip
    whisper = 100 * found["whisper"]
    axes.axhline(whisper, color=colours.muted, linewidth=2, linestyle=(0, (4, 4)))
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set(xlim=(-0.3, len(sizes) - 0.7), ylim=(0, None))
    axes.locator_params(axis="y", nbins=5)
    axes.tick_params(labelsize=19, colors=colours.ink, length=0, pad=6)
    axes.set_xlabel("minutes of speech to train on", fontsize=19.5, color=colours.ink)
    axes.set_facecolor("none")
    axes.grid(True, axis="y", color=colours.faint, linewidth=1)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colours.muted)
    whole.text(54, 22, "word errors [%]", fontsize=20, color=colours.ink, va="center_baseline")
    legend = ((NAMES["ctc"], colours.frozen, "-"), (NAMES["llm"], colours.trained, "-"))
    for x, (text, colour, line) in zip((54, 320), legend, strict=True):
        whole.plot((x, x + 30), (54, 54), color=colour, linewidth=4, linestyle=line, solid_capstyle="butt")
        whole.text(x + 40, 54, text, fontsize=19, color=colour, va="center_baseline", weight="bold")
    whole.plot((290, 320), (22, 22), color=colours.muted, linewidth=2, linestyle=(0, (3, 2)))
    whole.text(330, 22, f"Whisper tiny.en's own decoder: {whisper:.0f}", fontsize=19, color=colours.muted,
               va="center_baseline")  # fmt: skip


if __name__ == "__main__":
    draw_style.save("minutes", draw)
