"""Accuracy of results: errors against fp64 are compared with the errors of plain PyTorch in the same dtype."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

TWICE, ULPS, RMS_RATIO = 2.0, 4.0, 1.2


class Judged(NamedTuple):
    """Our error and eager's, over the norm of the truth, and the share of what is allowed that ours takes."""

    name: str
    ours: float
    eager: float
    share: float


_records: list[list[Judged]] = []


@contextmanager
def recorded() -> Iterator[list[Judged]]:
    """Yields a list of all that `assert_as_accurate` judges until the end."""
    _records.append([])
    try:
        yield _records[-1]
    finally:
        _records.pop()


def error(value: Tensor, truth: Tensor) -> float:
    """L2 norm of `value - truth`, in fp64; infinities must agree exactly."""
    value, truth = value.detach().double().flatten(), truth.detach().double().flatten()
    same = (value == truth) | (value.isnan() & truth.isnan())
    return float((value - truth).masked_fill(same, 0.0).norm())


def assert_as_accurate(
    ours: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, name: str
) -> tuple[float, float]:
    """At most twice eager's error, plus 4 ulp of `dtype` times the norm of the truth; returns (ours, eager's error).

    `truth` is the fp64 result; `eager` the plain PyTorch result in `dtype`.
    """
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, wanted {tuple(truth.shape)}"
    assert not ours.isnan().any(), f"{name} holds NaN"
    got, theirs = error(ours, truth), error(eager, truth)
    finite = truth.double()[truth.isfinite()]
    norm = float(finite.norm())
    allowed = TWICE * theirs + ULPS * torch.finfo(dtype).eps * norm
    for record in _records:
        record.append(Judged(name, got / (norm or 1.0), theirs / (norm or 1.0), got / allowed if allowed else 0.0))
    assert got <= allowed, f"{name}: error {got:.3e}, allowed {allowed:.3e} (eager {theirs:.3e}) in {dtype}"
    return got, theirs


def relative(pair: tuple[float, float], truth: Tensor) -> tuple[float, float]:
    """Both errors of `assert_as_accurate` relative to the norm of the finite values of `truth`, unless that is 0."""
    norm = float(truth[truth.isfinite()].norm()) or 1.0
    return pair[0] / norm, pair[1] / norm


def assert_rms(pairs: list[tuple[float, float]], floor: float, name: str) -> None:
    """Over many draws, the root mean square of our errors is at most 1.2 times eager's (plus a rounding `floor`)."""
    ours, eager = (torch.tensor(side, dtype=torch.float64).square().mean().sqrt() for side in zip(*pairs, strict=True))
    assert ours <= RMS_RATIO * eager + floor, f"{name}: RMS error {ours:.3e}, eager {eager:.3e} over {len(pairs)} draws"
