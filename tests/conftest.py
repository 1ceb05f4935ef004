"""Keeps the checkout's root off `sys.path`, and skips the tests marked `gpu` where there is no CUDA GPU.

On `sys.path` the root would offer its folder `kernels/` to every `import kernels` of transformers and
bitsandbytes. `python -m pytest` and PYTHONPATH put it there; soundwave is found through its installation.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
