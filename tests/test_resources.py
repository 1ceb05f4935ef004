"""Every kernel compiles for six architectures without a GPU, spills nothing and fits into shared memory."""

import json
import sys
from pathlib import Path

import pytest

from tests.compiling import SHARED_KB, kernels, run_compiled

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """The resources of each kernel on each card. A separate process compiles, because interpreted kernels cannot be."""
    safe = "-P" if sys.version_info >= (3, 11) else "-I"
    done = run_compiled(safe, Path(__file__).parent / "compiled" / "run.py")
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_table_of_resources(compiled):
    print(f"\n{'kernel':44} {'case':34} {'sm':>4} {'warps':>5} {'registers':>9} {'shared':>7} {'stack':>5}")
    for row in compiled:
        print(
            f"{row['kernel']:44} {row['label']:34} {row['arch']:4} {row['num_warps']:5} {row['registers']:9}"
            f" {row['shared']:7} {row['stack']:5}"
        )
    assert {row["arch"] for row in compiled} == set(SHARED_KB)


def test_nothing_spills(compiled):
    assert [row for row in compiled if row["stack"] or row["local"]] == []


@pytest.mark.parametrize("arch", SHARED_KB)
def test_shared_memory_fits_the_card(compiled, arch):
    limit = SHARED_KB[arch] * 1024
    assert [row for row in compiled if row["arch"] == arch and row["shared"] > limit] == []


def test_every_kernel_has_a_case(compiled):
    assert kernels() == {row["kernel"] for row in compiled}
