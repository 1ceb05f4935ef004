"""Where an operation runs: each of its implementations on each device that can run it."""

import pytest
import torch

from soundwave.kernels.dispatch import interpreted, runs_on_cpu

WHERE = [
    pytest.param("cpu", "torch", id="cpu-torch"),
    pytest.param("cpu", "triton", id="interpreter"),
    pytest.param("cuda", "torch", id="cuda-torch", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", id="cuda-triton", marks=pytest.mark.gpu),
]
BOTH = [pytest.param("torch", id="torch"), pytest.param("triton", id="interpreter")]  # on the CPU
everywhere = pytest.mark.parametrize(("device", "impl"), WHERE)
# Without the interpreter, which truncates to bfloat16 where hardware rounds.
not_interpreted = pytest.mark.parametrize(("device", "impl"), [WHERE[0], *WHERE[2:]])


def skip_unless_runnable(device: str, impl: str, *dtypes: torch.dtype, fp64: bool = True) -> None:
    """Skip what cannot run here: Triton on the CPU unless it takes CPU tensors, bfloat16 in its interpreter, and
    float64 without `fp64`.
    """
    if impl == "triton" and not fp64 and torch.float64 in dtypes:
        pytest.skip("this operation's kernels take float32, bfloat16 and float16")
    if device == "cpu" and impl == "triton":
        if not runs_on_cpu():
            pytest.skip("Triton runs on the GPU here, not in its interpreter")
        if torch.bfloat16 in dtypes and interpreted():
            pytest.skip("the interpreter truncates to bfloat16 where hardware rounds")
