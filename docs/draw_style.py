"""What the pictures of the documentation have in common: colours for light and dark pages, a canvas, saving.

A picture is drawn twice, as `pictures/NAME-light.svg` and `pictures/NAME-dark.svg`, on a transparent ground. Text is at
least 19 units high on a canvas of 720, so that it can be read on a screen of 400 pixels.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

PICTURES = Path(__file__).resolve().parent / "pictures"
WIDTH = 720  # units; one unit is one point of the SVG


class Palette(NamedTuple):
    """Colours of one scheme. Each has a contrast of at least 4.5 with the page, except `faint` and the fills."""

    ink: str  # text
    muted: str  # secondary text, arrows
    faint: str  # hairlines
    frozen: str  # outline of what is never trained
    frozen_fill: str
    trained: str  # outline of what is trained, and the kept frames
    trained_fill: str


PALETTES = {
    "light": Palette(
        "#1d2026", "#5b616b", "#c9ccd2", "#1b5aa6", "#e8f0fa", "#ab4a06", "#fbeee2",
    ),
    "dark": Palette(
        "#e9e6e0", "#a3a9b4", "#454c57", "#82b6f2", "#182637", "#f3a765", "#33241a",
    ),
}  # fmt: skip

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "svg.fonttype": "path",  # the same on every machine
    "svg.hashsalt": "soundwave",  # the same file each time
    "savefig.transparent": True,
}


def canvas(height: float) -> Axes:
    """Axes of WIDTH x `height` units that fill the figure; y points down."""
    figure = plt.figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    return axes


def box(
    axes: Axes, x: float, y: float, width: float, height: float, fill: str, line: str, *, radius: float = 7
) -> None:
    """A box with round corners; x, y is its upper left corner."""
    shape = f"round,pad=0,rounding_size={radius}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=fill, edgecolor=line, linewidth=1.6))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """An arrow from `start` to `end`."""
    style = {
        "arrowstyle": "-|>,head_width=0.4,head_length=0.7",
        "color": colour,
        "linewidth": 2,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def save(name: str, draw: Callable[[Palette], None]) -> None:
    """Draw a picture once for each scheme, as a program without arguments; `draw` makes the figure."""
    argparse.ArgumentParser(description=f"Draw pictures/{name}-light.svg and pictures/{name}-dark.svg.").parse_args()
    PICTURES.mkdir(exist_ok=True)
    for scheme, palette in PALETTES.items():
        with plt.rc_context(STYLE):
            draw(palette)
            path = PICTURES / f"{name}-{scheme}.svg"
            plt.savefig(path, metadata={"Date": None, "Creator": None})
            plt.close()
        print(path)
