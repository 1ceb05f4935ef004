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
    "linear_ctc_loss, exact": 1,
    "linear_ctc_loss, exact, 5 utterances": 1,
    "linear_ctc_loss, exact, trained head": 2,
    "linear_ctc_loss, exact, labels and lengths on the GPU": 2,
    "linear_ctc_loss, nothing to skip": 2,
    "linear_ctc_loss, columns skipped": 5,
    "linear_cross_entropy, target on the GPU": 1,
    "add_layer_norm": 0,
    "shrink_attention": 0,
    "ctc_peaks": 1,
    "splice": 1,
    "a step of stage I": 2,
    "a step of stage II": 5,
}


@pytest.mark.parametrize(("case", "most"), WAITS.items())
def test_the_host_waits_no_more_than_this(cases, case, most):
    found = cases[case]["waits"]
    assert sum(number for *_, number in found) == most, found
