"""The notebook of examples/ runs from top to bottom, offline and on a CPU, and shows what it promises."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from soundwave import backbones
from soundwave.backbones import wheels

FILE = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"
SENTENCES = (
    "turn on the light in the kitchen",
    "what time is it in Paris",
    "play some quiet music",
    "seven three nine",
)


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> nbformat.NotebookNode:
    """The notebook after every cell was run, in a folder of its own."""
    for name in (backbones.WHISPER, backbones.LANGUAGE_MODEL):
        wheels.resolve(name)
    folder = tmp_path_factory.mktemp("notebook")
    client = NotebookClient(
        nbformat.read(FILE, as_version=4), timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    return client.execute()


def outputs(notebook: nbformat.NotebookNode, tag: str) -> tuple[str, list[str]]:
    """What the cell with `tag` printed, and the pictures that it shows."""
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]
    printed = "".join(output.text for output in cell.outputs if output.output_type == "stream")
    return printed, [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]


def test_the_loss_falls(executed):
    printed, _ = outputs(executed, "training")
    first, last = re.search(r"CTC loss ([\d.]+) at the first step, ([\d.]+) at the last one", printed).groups()
    assert float(last) < 0.05 * float(first)


@pytest.mark.parametrize("tag", ["losses", "peaks"])
def test_there_is_a_picture(tag, executed):
    _, pictures = outputs(executed, tag)
    assert [len(picture) > 5000 for picture in pictures] == [True]


def test_it_reads_what_it_has_learned(executed):
    printed, _ = outputs(executed, "transcripts")
    read = dict(line.strip().split(": ") for line in printed.splitlines() if ".wav" in line)
    assert [read[f"en-us+m1-{number}.wav"] for number in range(4)] == list(SENTENCES)


def test_there_are_fewer_peaks_than_frames(executed):
    printed, _ = outputs(executed, "peaks")
    frames, peaks = map(int, re.search(r"(\d+) frames, (\d+) peaks", printed).groups())
    assert 5 <= peaks <= 10 < frames


def test_no_library_warns(executed):
    """A warning in the first cells would send a beginner off to install what this notebook does not need."""
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


def test_the_losses_of_ones_own_are_numbers(executed):
    printed, _ = outputs(executed, "losses-of-your-own")
    assert re.search(r"CTC \d+\.\d, CTC over 49 152 sub-words \d+\.\d, path \[2, 50\]", printed)


def test_the_file_is_small_has_no_outputs_and_names_no_machine():
    text = FILE.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 200_000
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    assert not re.search(r"/(home|root|tmp|Users|mnt|work|content)/|[A-Z]:\\\\", text)
