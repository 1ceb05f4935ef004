"""Checks of the arguments of the fused operations: each names the argument, what it is and what it must be."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from soundwave.kernels.checks import as_lengths

REDUCTIONS = ("mean", "sum", "none")


def expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int | str, ...],
    like: Tensor | None = None,
    *,
    floating: bool | None = True,
) -> None:
    """ValueError unless `tensor` has this shape (a letter is any size), kind of dtype, and the device of `like`.

    `floating`: True for floating-point dtypes, False for int32 and int64, None for any. TypeError if it is no tensor.
    """
    expect_tensor(name, tensor)
    fits = tensor.dim() == len(shape) and all(
        isinstance(size, str) or size == found for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but it must be [{wanted}]")
    if floating and not tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype}, but it must be floating point")
    if floating is False and tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {tensor.dtype}, but it must be int32 or int64")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, but the other tensors are on {like.device}")


def expect_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, but it must be a tensor")


def check_reduction(reduction: str) -> None:
    """ValueError unless it is "mean", "sum" or "none"."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction = {reduction!r}, but it must be one of {', '.join(REDUCTIONS)}")


def check_targets(targets: Tensor, batch: int, name: str, like: Tensor) -> None:
    """ValueError unless `targets` is int [batch, U] or [S], on the CPU or on the device of `like`, called `name`."""
    expect_tensor("targets", targets)
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets is {targets.dtype}, but it must be int32 or int64")
    if targets.dim() != 1 and (targets.dim() != 2 or targets.shape[0] != batch):
        raise ValueError(f"targets has shape {list(targets.shape)}, but it must be [{batch}, U], or [S] concatenated")
    if targets.device.type != "cpu" and targets.device != like.device:
        raise ValueError(f"targets is on {targets.device}, but {name} is on {like.device}")


def as_integer(name: str, value: int) -> int:
    """`value` as an int; ValueError if it is not an integer, such as 0.0."""
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} = {value!r}, but it must be an integer") from None


def lengths_of(name: str, lengths: Tensor | Sequence[int], batch: int, like: Tensor, single: bool = False) -> Tensor:
    """`lengths` as a contiguous integer tensor [B]. For a `single` utterance it may be one number."""
    lengths = as_lengths(name, lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {lengths.dtype}, but it must be int32 or int64")
    if lengths.shape != (batch,) and not (single and lengths.dim() == 0):
        raise ValueError(f"{name} has shape {list(lengths.shape)}, but it must be [{batch}], one a row of the batch")
    if lengths.device.type != "cpu" and lengths.device != like.device:
        raise ValueError(f"{name} is on {lengths.device}, but the other tensors are on {like.device}")
    return lengths.reshape(batch).contiguous()


def product_dtype_of(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which `hidden @ weight.T` runs: that of autocast, else that of the weight."""
    kind = hidden.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype)
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype


def check_head(
    hidden: Tensor, weight: Tensor, blank: int, blank_weight: Tensor | None, blank_bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    expect("hidden", hidden, ("B", "T", "D"))
    check_weight(weight, hidden)
    rows = weight.shape[0]
    if (blank_weight is None) != (0 <= blank < rows) or not 0 <= blank <= rows:
        raise ValueError(
            f"blank = {blank}, but it must be a row of weight (0 to {rows - 1}), or {rows} together with blank_weight"
        )
    if blank_weight is not None:
        expect("blank_weight", blank_weight, (hidden.shape[2],), hidden)
    elif blank_bias is not None:
        raise ValueError(f"blank_bias is given, but blank = {blank} is a row of weight, which has no bias")
    if blank_bias is not None:
        expect("blank_bias", blank_bias, (), hidden)
    return weight, blank_weight, blank_bias


def check_weight(weight: Tensor, hidden: Tensor) -> None:
    expect("weight", weight, ("V", hidden.shape[-1]), hidden)
    if not weight.numel():
        raise ValueError(f"weight has shape {list(weight.shape)}, but it must hold at least one row and one column")
