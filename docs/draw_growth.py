"""Draw `pictures/growth-*.svg`: memory and time of linear CTC over the frames of a clip, ours beside eager's.

The figures are those of the newest whole run in bench/results/. Run: python docs/draw_growth.py
"""

import json
from pathlib import Path

import draw_style
from draw_style import Palette
from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parents[1] / "bench/results"
OPERATION, OVER = "linear_ctc", "T"
HEIGHT = 330
NAMES = {"eager": "PyTorch", "ours-torch": "soundwave.fused"}
UNITS = {
    "memory added [MB]": lambda entry: entry["peak_bytes"] / 1e6,
    "time [ms]": lambda entry: entry["seconds"] * 1e3,
}


def entries() -> list[dict]:
    """The points of the curves, from the newest run that was not restricted to some cases."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*/*.json")]
    newest = max((run for run in runs if run.get("whole", True) and not run.get("worse")), key=lambda run: run["date"])
    return [entry for entry in newest["entries"] if (entry["operation"], entry["over"]) == (OPERATION, OVER)]


def panel(axes: Axes, title: str, found: list[dict], colours: Palette) -> None:
    """One quantity over the number of frames."""
    for contender, colour in (("eager", colours.muted), ("ours-torch", colours.trained)):
        points = sorted(
            (entry["shape"][OVER], UNITS[title](entry)) for entry in found if entry["contender"] == contender
        )
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=8, linewidth=3)
        axes.annotate(
            f"{points[-1][1]:.0f}", points[-1], (10, 0), textcoords="offset points", fontsize=20, color=colour,
            va="center", weight="bold",
        )  # fmt: skip
    ticks = sorted({entry["shape"][OVER] for entry in found})
    axes.set(xlim=(0, ticks[-1] * 1.22), ylim=(0, None))
    axes.set_xticks(ticks)
    axes.locator_params(axis="y", nbins=4)
    axes.tick_params(labelsize=19, colors=colours.ink, length=0, pad=6)
    axes.set_title(title, fontsize=20, color=colours.ink, loc="left", pad=12)
    axes.set_xlabel("frames of a clip", fontsize=19.5, color=colours.ink)
    axes.set_facecolor("none")
    axes.grid(True, axis="y", color=colours.faint, linewidth=1)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colours.muted)


def draw(colours: Palette) -> None:
    whole, found = draw_style.canvas(HEIGHT), entries()
    for place, title in enumerate(UNITS):
        panel(whole.figure.add_axes((0.075 + 0.5 * place, 0.225, 0.405, 0.49)), title, found, colours)
    x = 54
    for contender, colour in (("eager", colours.muted), ("ours-torch", colours.trained)):
        whole.plot((x, x + 34), (22, 22), color=colour, linewidth=4, solid_capstyle="butt")
        whole.text(x + 46, 22, NAMES[contender], fontsize=20, color=colour, va="center_baseline", weight="bold")
        x += 220


if __name__ == "__main__":
    draw_style.save("growth", draw)
