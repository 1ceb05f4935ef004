"""Draw `pictures/system-*.svg`: one sentence on its way through Soundwave. Run: python docs/draw_system.py"""

import draw_style
import numpy as np
from draw_style import Palette
from matplotlib.axes import Axes

HEIGHT = 480
LEFT, BOX = 6, 262  # the column of the four parts
RIGHT = 296  # where the column begins that shows what each part gives
FRAMES, STEP = 24, 17.5  # a second of frames, and their width
WORDS = {
    "turn": (4, 5),
    "on": (9,),
    "the": (12, 13),
    "light": (17, 18),
}  # frames in which CTC reads each; others: blank
PEAKS = (4, 9, 13, 17)  # the most probable frame of each
QUESTION, ANSWER = "What is the command about?", "light"


def centre(frame: float) -> float:
    """x of the middle of a frame."""
    return RIGHT + (frame + 0.5) * STEP


def part(axes: Axes, y: float, name: str, state: str, colours: Palette, *, frozen: bool = False) -> None:
    """One of the boxes on the left: the part's name, and whether it is trained."""
    line, fill = (colours.frozen, colours.frozen_fill) if frozen else (colours.trained, colours.trained_fill)
    draw_style.box(axes, LEFT, y, BOX, 76, fill, line)
    axes.text(LEFT + BOX / 2, y + 27, name, fontsize=21, weight="bold", color=colours.ink, ha="center", va="center")
    axes.text(LEFT + BOX / 2, y + 55, state, fontsize=19.5, color=line, ha="center", va="center")


def low_part(axes: Axes, y: float, name: str, state: str, colours: Palette, *, frozen: bool = False) -> None:
    """The same on one line."""
    line, fill = (colours.frozen, colours.frozen_fill) if frozen else (colours.trained, colours.trained_fill)
    draw_style.box(axes, LEFT, y, BOX, 46, fill, line)
    axes.text(LEFT + 16, y + 22, name, fontsize=21, weight="bold", color=colours.ink, va="center")
    axes.text(LEFT + BOX - 14, y + 23, state, fontsize=19.5, color=line, ha="right", va="center")


def note(axes: Axes, y: float, text: str, colours: Palette) -> None:
    axes.text(RIGHT, y, text, fontsize=19.5, color=colours.ink, va="center")


def recording(axes: Axes, y: float, colours: Palette) -> None:
    """A waveform that is loud where a word is spoken."""
    time = np.linspace(0, FRAMES, 150)
    loudness = sum(
        height * np.exp(-(((time - middle) / width) ** 2))
        for middle, width, height in ((3.9, 1.3, 1.0), (8.6, 0.9, 0.75), (12.2, 0.8, 0.6), (16.8, 1.5, 1.0))
    )
    size = 24 * (0.06 + loudness * (0.6 + 0.4 * np.abs(np.sin(5.1 * time))))
    axes.vlines(RIGHT + time * STEP, y - size, y + size, color=colours.frozen, linewidth=1.6)


def cell(axes: Axes, x: float, y: float, fill: str, line: str) -> None:
    draw_style.box(axes, x - 7, y, 14, 26, fill, line, radius=3)


def draw(colours: Palette) -> None:
    axes = draw_style.canvas(HEIGHT)
    rows = (6, 122, 252, 376)
    for upper, lower in zip(rows[:-1], rows[1:], strict=True):
        draw_style.arrow(axes, (LEFT + BOX / 2, upper + 80), (LEFT + BOX / 2, lower - 3), colours.muted)
    part(axes, rows[0], "Whisper encoder", "frozen", colours, frozen=True)
    part(axes, rows[1], "Alignment adapter", "trained in stages 1, 2", colours)
    part(axes, rows[2], "Shrinking adapter", "trained in stage 2", colours)
    low_part(axes, rows[3], "LLM", "frozen, 4 bits", colours, frozen=True)
    low_part(axes, rows[3] + 51, "LoRA", "in stages 2, 3", colours)

    note(axes, 20, "a recording", colours)
    recording(axes, 62, colours)

    note(axes, 114, "CTC reads the sub-words of the LLM", colours)
    cells, kept = 172, 248
    for frame in range(FRAMES):
        cell(axes, centre(frame), cells, "none", colours.muted)
    for word, frames in WORDS.items():
        for frame in frames:
            cell(axes, centre(frame), cells, colours.frozen, colours.frozen)
        middle = centre(sum(frames) / len(frames))
        axes.text(middle, cells - 18, word, fontsize=19.5, color=colours.frozen, ha="center", va="center")
    for peak in PEAKS:
        for frame in range(peak - 3, peak + 4):
            ends = [centre(frame), centre(peak)], [cells + 29, kept - 3]
            axes.plot(*ends, color=colours.trained, linewidth=1.3, alpha=0.75 - 0.15 * abs(frame - peak))
        cell(axes, centre(peak), cells, colours.trained, colours.trained)
        cell(axes, centre(peak), kept, colours.trained, colours.trained)
    note(axes, kept + 47, "the peaks are kept, 4 of 25 frames;", colours)
    note(axes, kept + 72, "they gather what is around them", colours)

    prompt = 380
    for place in range(len(PEAKS)):
        cell(axes, RIGHT + 8 + place * 18, prompt, colours.trained, colours.trained)
    axes.text(RIGHT + 84, prompt + 13, QUESTION, fontsize=19.5, color=colours.ink, va="center")
    draw_style.arrow(axes, (RIGHT + 4, prompt + 66), (RIGHT + 68, prompt + 66), colours.muted)
    axes.text(RIGHT + 84, prompt + 66, ANSWER, fontsize=22, weight="bold", color=colours.ink, va="center")


if __name__ == "__main__":
    draw_style.save("system", draw)
