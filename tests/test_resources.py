"""Every kernel compiles for six architectures without a GPU, spills nothing and fits into shared memory."""

import json
import sys
from pathlib import Path

import pytest

from tests.compiling import SHARED_KB, kernels, run_compiled

pytest.importorskip("triton")

THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}  # that a multiprocessor holds at once


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


def test_offsets_do_not_overflow(compiled):
    """No address holds a product of two runtime values in 32 bits, such as a row times a stride."""
    assert [(row["kernel"], row["label"], row["narrow_offsets"]) for row in compiled if row["narrow_offsets"]] == []


@pytest.mark.parametrize("arch", SHARED_KB)
def test_the_row_pass_keeps_enough_bytes_in_flight(compiled, arch):
    """In half types: two loads of 16 bytes a thread, in as many blocks as registers allow. An H200 needs 26 KB.

    That is 4.3 TB/s times 0.8 microseconds from a request to its data, over 132 multiprocessors.
    """
    rows = [row for row in compiled if row["arch"] == arch and row["kernel"] == "_vocab_rows_kernel"]
    wide = [row for row in rows if row["num_warps"] == 8 and "16" in row["label"].split()[2]]
    assert len(wide) >= 4
    for row in wide:
        a_thread = -(-row["registers"] // 8) * 8
        threads = min(65536 // (a_thread * 256), THREADS[arch] // 256) * 256
        assert threads * 2 * 16 >= 26 * 1024, row


def test_every_kernel_has_a_case(compiled):
    assert kernels() == {row["kernel"] for row in compiled}
