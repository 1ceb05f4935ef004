"""Draw `pictures/rooms-*.svg`: the rooms of the code in their order. Run: python docs/draw_rooms.py

The order is the list `ROOMS` of tests/test_imports.py, which the tests hold the code to. A room that does not exist yet
is left out.
"""

import ast
from pathlib import Path

import draw_style
from draw_style import Palette

ROOT = Path(__file__).resolve().parents[1]
ABOUT = {
    "eager": "the definitions, in plain PyTorch",
    "kernels": "the operations, in Triton and torch",
    "hardware": "device and dtype of this machine",
    "provenance": "versions and commit of a result",
    "attention": "one door to FlashAttention",
    "fused": "modules and losses for any model",
    "backbones": "fetch and load Whisper and LLM",
    "model": "network, configuration, processor",
    "memory": "memory of a step, by arithmetic",
    "data": "manifests, audio, batches",
    "training": "the three stages",
    "inference": "transcribe and ask",
    "evaluation": "scores and their intervals",
    "serve": "the model behind a web address",
    "curation": "check and clean recordings",
    "report": "one page about a run",
    "demo": "synthetic speech, the demonstration",
    "doctor": "what runs here, and why",
    "cli": "the command soundwave",
}
FLOORS = ("backbones", "training", "report")  # the lowest room of each floor but the first; a gap stands below it
NAME, TEXT, LINE, GAP = 62, 232, 37, 12  # columns, and heights


def rooms() -> list[str]:
    """The existing rooms from the bottom to the top."""
    tree = ast.parse((ROOT / "tests/test_imports.py").read_text(encoding="utf-8"))
    listed = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS"
    )
    folder = ROOT / "soundwave"
    modules = {path.stem for path in folder.glob("*.py")}
    there = {path.parent.name for path in folder.glob("*/__init__.py")} | modules | {"kernels"}
    return [name for name in listed if name in there and not name.startswith("_")]


def draw(colours: Palette) -> None:
    names = rooms()
    places: list[float] = []  # upper edges, from the bottom room to the top one
    y = 0.0
    for name in reversed(names):
        places.insert(0, y)
        y += LINE + (GAP if name in FLOORS else 0)
    axes = draw_style.canvas(y)
    for name, top in zip(names, places, strict=True):
        public = name in ("eager", "fused")
        line, fill = (colours.trained, colours.trained_fill) if public else (colours.frozen, colours.frozen_fill)
        draw_style.box(axes, NAME, top + 2, draw_style.WIDTH - NAME - 4, LINE - 5, fill, line, radius=5)
        middle = top + LINE / 2
        axes.text(NAME + 14, middle, name, fontsize=20.5, weight="bold", color=colours.ink, va="center_baseline")
        axes.text(TEXT, middle, ABOUT[name], fontsize=19.5, color=colours.ink, va="center_baseline")
    draw_style.arrow(axes, (42, 6), (42, y - 6), colours.muted)
    text = {"fontsize": 20, "color": colours.muted, "rotation": 90, "ha": "center", "va": "center"}
    axes.text(18, y / 2, "imports go down only", **text)


if __name__ == "__main__":
    draw_style.save("rooms", draw)
