"""Where an operation runs: each of its implementations on each device that can run it."""

import pytest

WHERE = [
    pytest.param("cpu", "torch", id="cpu-torch"),
    pytest.param("cpu", "triton", id="interpreter"),
    pytest.param("cuda", "torch", id="cuda-torch", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", id="cuda-triton", marks=pytest.mark.gpu),
]
everywhere = pytest.mark.parametrize(("device", "impl"), WHERE)
not_interpreted = pytest.mark.parametrize(("device", "impl"), [WHERE[0], *WHERE[2:]])  # which truncates to bfloat16
