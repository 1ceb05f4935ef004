"""What the host waits for on a GPU, and how many kernels are launched, counted without one (see `count_waits`)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, list]]:
    """The counts, from a process of their own, because they change torch for all that runs in it."""
    command = [sys.executable, str(ROOT / "tests" / "count_waits.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert not done.returncode, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


WAITS = {
    "ctc_loss": 0,
    "ctc_loss, labels and lengths on the GPU": 0,
    "linear_ctc_loss, exact": 0,
    "linear_ctc_loss, exact, 5 utterances": 0,
    "linear_ctc_loss, exact, trained head": 0,
    "linear_ctc_loss, exact, labels and lengths on the GPU": 1,  # the lengths, for the number of rows
    "linear_ctc_loss, nothing to skip": 1,  # what skipping asks a chunk
    "linear_ctc_loss, columns skipped": 3,
    "linear_cross_entropy": 0,
    "linear_cross_entropy, target on the GPU": 1,  # the number of rows that are not ignored
    "add_layer_norm": 0,
    "shrink_attention": 0,
    "ctc_peaks": 1,  # the number of kept frames
    "splice": 1,  # the length of the result
    "a step of stage I": 1,  # whether losses and gradient are finite
    "a step of stage II": 3,  # the same, peaks, splice
}


@pytest.mark.parametrize(("case", "most"), WAITS.items())
def test_the_host_waits_no_more_than_this(cases, case, most):
    found = cases[case]["waits"]
    assert sum(number for *_, number in found) == most, found
