"""Checks of the arguments of the fused operations: each names the argument, what it is and what it must be."""

import math
import numbers
import operator
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from soundwave.kernels.checks import as_integers, as_lengths, refuse_vmap
from soundwave.kernels.ctc_targets import pad_targets
from soundwave.kernels.dispatch import resolve_impl

REDUCTIONS = ("mean", "sum", "none")


class NotScriptable:
    """Base of the modules, which call Triton kernels from Python: `torch.jit.script` says so, also of a whole model."""

    def __prepare_scriptable__(self) -> NoReturn:  # torch.jit.script calls it first, on the parts of a model as well
        raise NotImplementedError(
            f"fused.{type(self).__name__} cannot be scripted: use torch.compile, or script the rest of the model"
        )


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


def check_impl(impl: str) -> None:
    """ValueError for an unknown word. The call checks whether `impl` can run, because that depends on the device."""
    resolve_impl(impl, torch.device("cuda"))  # where every `impl` can run


def check_targets(targets: Tensor, batch: int, name: str, like: Tensor) -> Tensor:
    """`targets` as int32 or int64; ValueError unless they are integers [batch, U] or [S].

    They may be on the CPU or on the device of `like`, which the error calls `name`.
    """
    expect_tensor("targets", targets)
    targets = as_integers(targets)
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets is {targets.dtype}, but it must be of an integer dtype")
    if targets.dim() != 1 and (targets.dim() != 2 or targets.shape[0] != batch):
        raise ValueError(f"targets has shape {list(targets.shape)}, but it must be [{batch}, U], or [S] concatenated")
    if targets.device.type != "cpu" and targets.device != like.device:
        raise ValueError(f"targets is on {targets.device}, but {name} is on {like.device}")
    return targets


def padded_targets(
    targets: Tensor, target_lengths: Tensor, classes: int, blank: int, classes_of: str, validate: bool
) -> Tensor:
    """`targets` [B, U] as they are, and concatenated ones [S] as [B, U].

    Meta tensors hold no lengths, so U is then S, which is enough: no result has a dimension of U.
    """
    if targets.dim() != 1:
        return targets
    refuse_vmap("targets [S], one after the other", target_lengths)
    if targets.is_meta or target_lengths.is_meta:
        return targets.new_empty(target_lengths.shape[0], targets.shape[0], device="meta")
    return pad_targets(targets, target_lengths, classes, blank, classes_of, validate)


def as_integer(name: str, value: int) -> int:
    """`value` as an int; ValueError if it is not an integer, such as 0.0, or is True or False."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} = {value!r}, but it must be an integer") from None


def check_number(name: str, value: float, least: float = -math.inf) -> None:
    """ValueError unless `value` is a finite number of at least `least`."""
    if isinstance(value, torch.SymFloat | torch.SymInt):
        return
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not least <= value < math.inf:
        at_least = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{name} = {value!r}, but it must be a finite number{at_least}")


def check_cross_entropy_options(label_smoothing: float, softcap: float | None, z_loss: float) -> None:
    """ValueError unless each is a number in its range: 0 to 1, above 0 or None, at least 0."""
    check_number("label_smoothing", label_smoothing, 0.0)
    if label_smoothing > 1:
        raise ValueError(f"label_smoothing = {label_smoothing!r}, but it must be at most 1")
    if softcap is not None:
        check_number("softcap", softcap, 0.0)
        if not softcap:
            raise ValueError(f"softcap = {softcap!r}, but it must be above 0, or None for none")
    check_number("z_loss", z_loss, 0.0)


def check_flag(name: str, value: bool) -> None:
    """ValueError unless `value` is True or False, because 0, None or "no" may mean another thing than it does here."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} = {value!r}, but it must be True or False")


def lengths_of(name: str, lengths: Tensor | Sequence[int], batch: int, like: Tensor) -> Tensor:
    """`lengths` as a contiguous integer tensor [B]. For one utterance it may be one number, as for torch's loss."""
    lengths = as_lengths(name, lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {lengths.dtype}, but it must be of an integer dtype")
    if lengths.shape != (batch,) and not (batch == 1 and lengths.dim() == 0):
        raise ValueError(f"{name} has shape {list(lengths.shape)}, but it must be [{batch}], one a row of the batch")
    if lengths.device.type != "cpu" and lengths.device != like.device:
        raise ValueError(f"{name} is on {lengths.device}, but the other tensors are on {like.device}")
    return lengths.reshape(batch).contiguous()


def product_dtype_of(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype in which `hidden @ weight.T` runs: that of autocast, else that of the weight."""
    kind = hidden.device.type
    if not torch.amp.is_autocast_available(kind):  # such as meta
        return weight.dtype
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
