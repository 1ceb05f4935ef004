"""How many kernels Triton compiles in a training of batches of varying lengths. Nothing runs; no GPU is needed."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.compiling import run_compiled

pytest.importorskip("triton")

BATCHES = 100
MOST = {"I": 20, "II": 30}  # stage II: beyond those of stage I
WARM = 50  # batches after which nothing new is compiled: a pause of seconds in the middle of a training


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[tuple[str, int]]]:
    """For each stage (kernel, number of the batch that asks for it first)."""
    done = run_compiled(Path(__file__).parent / "compiled" / "specialisations.py", BATCHES)
    assert done.returncode == 0, done.stderr[-3000:]
    stages = [json.loads(line) for line in done.stdout.splitlines()]
    # Every operation was called.
    assert all(stage["launches"] > (1 if stage["stage"] == "cross-entropy" else 9) * BATCHES for stage in stages)
    return {stage["stage"]: [tuple(kernel) for kernel in stage["kernels"]] for stage in stages}


def test_the_options_of_the_cross_entropy_need_one_kernel_for_each_set(compiled):
    names = {name for name, _ in compiled["cross-entropy"]}
    assert names == {"_cross_entropy_rows_kernel"} and len(compiled["cross-entropy"]) == 1


@pytest.mark.parametrize("stage", MOST)
def test_few_kernels_are_compiled(compiled, stage):
    assert 5 < len(compiled[stage]) <= MOST[stage], Counter(name for name, _ in compiled[stage])


@pytest.mark.parametrize("stage", MOST)
def test_none_is_compiled_late(compiled, stage):
    assert [found for found in compiled[stage] if found[1] > WARM] == []
