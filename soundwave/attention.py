"""Attention over packed rows, by FlashAttention where it can run. `choose_attention` tells beforehand what will run.

| name         | what                                                                       | where                  |
|--------------|----------------------------------------------------------------------------|------------------------|
| `flash_attn` | `flash_attn.flash_attn_varlen_func` of the package flash-attn              | CUDA ≥ 8.0, fp16, bf16 |
| `varlen`     | `torch.nn.attention.varlen.varlen_attn`, torch's own FlashAttention        | CUDA ≥ 8.0, fp16, bf16 |
| `sdpa`       | `F.scaled_dot_product_attention` over rows padded to the longest utterance | any device and dtype   |

`impl="auto"` takes the first of them that can run. It is an error to name one that cannot run.
Attention is full and scaled by 1/sqrt(E), without dropout. Dimension letters: N and M rows, B utterances, H heads,
E head size.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IMPLEMENTATIONS = ("auto", "flash_attn", "varlen", "sdpa")
MAX_HEAD_SIZE = 256  # limit of FlashAttention's kernels
MIN_CAPABILITY = (8, 0)


class Attention(NamedTuple):
    """The attention that runs, and the reason in words."""

    name: str
    reason: str


def choose_attention(
    impl: str = "auto", *, device: torch.device, dtype: torch.dtype, head_size: int = 128
) -> Attention:
    """The attention that `attend` runs for tensors of this device, dtype and head size.

    Raises:
        ValueError: `impl` is unknown, or the implementation that it names cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r}, but it must be one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "sdpa":
        return Attention("sdpa", "it was asked for")
    reason = _reason_against_flash(device, dtype, head_size)
    no_package = reason or _flash_attn()[1]
    no_function = reason or _varlen_attn()[1]
    if not no_function and head_size % 8:  # flash-attn itself pads heads to a multiple of 8
        no_function = f"torch's own FlashAttention takes multiples of 8, and the head size is {head_size}"
    if impl != "auto":
        missing = {"flash_attn": no_package, "varlen": no_function}[impl]
        if missing:
            raise ValueError(f"impl = {impl!r}, but {missing}")
        return Attention(impl, "it was asked for")
    if not no_package:
        return Attention("flash_attn", "flash-attn is installed and takes such tensors")
    if not no_function:
        return Attention("varlen", f"torch's own FlashAttention, as {no_package}")
    return Attention("sdpa", reason or f"{no_package}, and {no_function}")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention within each utterance.

    Args:
        query: [N, H, E]; key, value: [M, H, E], packed.
        cu_seqlens_q, cu_seqlens_k: int [B + 1], the bounds of each utterance in N and M rows, from 0.
        max_seqlen_q, max_seqlen_k: at least the number of rows of the longest utterance.
        impl: one of `IMPLEMENTATIONS`.

    Returns:
        [N, H, E]. Queries of an utterance without keys get 0.

    Raises:
        ValueError: tensors do not fit each other, or `impl` cannot run. Bounds on CUDA are not checked, because the CPU
            would have to wait for the GPU.

    With FlashAttention the backward is bitwise deterministic only under `torch.use_deterministic_algorithms`.
    """
    _check(query, key, value, cu_seqlens_q, cu_seqlens_k)
    _check_bounds("q", cu_seqlens_q, max_seqlen_q, query.shape[0])
    _check_bounds("k", cu_seqlens_k, max_seqlen_k, key.shape[0])
    chosen = choose_attention(impl, device=query.device, dtype=query.dtype, head_size=query.shape[-1]).name
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if chosen == "sdpa" or not max_seqlen_q or not max_seqlen_k:  # FlashAttention does not run without rows
        return _padded(query, key, value, bounds)
    if chosen == "flash_attn":
        function, arguments = _flash_attn()[0], flash_attn_arguments(query, key, value, *bounds)
    else:
        function, arguments = _varlen_attn()[0], varlen_attn_arguments(query, key, value, *bounds)
    assert function is not None  # `choose_attention` has found it
    return function(**arguments)


def flash_attn_arguments(*arguments: Any) -> dict[str, Any]:
    """The arguments of `attend`, in its order, as those of `flash_attn.flash_attn_varlen_func`."""
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return _renamed(names, *arguments) | {"deterministic": torch.are_deterministic_algorithms_enabled()}


def varlen_attn_arguments(*arguments: Any) -> dict[str, Any]:
    """The arguments of `attend`, in its order, as those that `varlen_attn` has had in every version of torch."""
    return _renamed(("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"), *arguments)


def _renamed(
    names: tuple[str, ...],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *longest: int,
) -> dict[str, Any]:
    """The arguments of `attend` under other names, with the bounds as int32 on the query's device."""
    bounds = (cu_seqlens.to(query.device, torch.int32) for cu_seqlens in (cu_seqlens_q, cu_seqlens_k))
    return dict(zip(names, (query, key, value, *bounds, *longest), strict=True))


def _reason_against_flash(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The reason why FlashAttention cannot take such tensors; empty if it can."""
    if device.type != "cuda":
        return f"FlashAttention needs CUDA, and the tensors are on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"FlashAttention needs compute capability 8.0, and {device} has {capability[0]}.{capability[1]}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"FlashAttention takes float16 and bfloat16, and the tensors are {str(dtype).removeprefix('torch.')}"
    if head_size > MAX_HEAD_SIZE:
        return f"FlashAttention takes heads of up to {MAX_HEAD_SIZE}, and these have {head_size}"
    return ""


@cache
def _flash_attn() -> tuple[Callable[..., Tensor] | None, str]:
    """The function of flash-attn, or None and the reason."""
    return _imported("flash_attn", "flash_attn_varlen_func", "flash-attn")


@cache
def _varlen_attn() -> tuple[Callable[..., Tensor] | None, str]:
    """The function of torch, or None and the reason."""
    return _imported("torch.nn.attention.varlen", "varlen_attn", "torch.nn.attention.varlen")


def _imported(module: str, name: str, known_as: str) -> tuple[Callable[..., Any] | None, str]:
    try:
        return getattr(import_module(module), name), ""
    except ModuleNotFoundError as error:
        if error.name == module:
            return None, f"{known_as} is not installed"
        return None, f"{known_as} is installed, but cannot be imported ({error})"
    except (ImportError, AttributeError, OSError) as error:  # e.g. built for another torch
        return None, f"{known_as} is installed, but cannot be imported ({error})"


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but it must be [rows, heads, head size]")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but query is {query.dtype} on {query.device}"
            )
        if tensor.shape[1:] != query.shape[1:]:
            raise ValueError(
                f"{name} has {list(tensor.shape[1:])} heads and head size, but query has {list(query.shape[1:])}"
            )
    if key.shape[0] != value.shape[0]:
        raise ValueError(f"value has {value.shape[0]} rows, but key has {key.shape[0]}")
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds.shape != cu_seqlens_q.shape or bounds.dim() != 1 or not bounds.numel():
            raise ValueError(f"{name} has shape {list(bounds.shape)}, but both bounds must be [utterances + 1]")


def _check_bounds(name: str, cu_seqlens: Tensor, longest: int, rows: int) -> None:
    """ValueError for bounds on the CPU that do not fit `rows` packed rows or the `longest` utterance."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds, sizes = cu_seqlens.tolist(), cu_seqlens.diff()
    if bounds[0] != 0 or bounds[-1] != rows or (sizes < 0).any():
        raise ValueError(f"cu_seqlens_{name} = {bounds}, but it must rise from 0 to {rows}, the packed rows")
    if len(sizes) and int(sizes.max()) > longest:
        raise ValueError(f"max_seqlen_{name} = {longest}, but an utterance has {int(sizes.max())} rows")


def _padded_index(cu_seqlens: Tensor, longest: int, rows: int) -> Tensor:
    """Index of each packed row among the padded rows, int64 [rows]."""
    row = torch.arange(rows, device=cu_seqlens.device)
    utterance = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    return utterance * longest + row - cu_seqlens[utterance]


def _padded(query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, Tensor, int, int]) -> Tensor:
    """`attend` over padded rows [B, H, longest, E]; nothing is copied if all utterances are equally long."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = bounds
    batch = cu_seqlens_q.numel() - 1
    same = cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    cu_seqlens_q, cu_seqlens_k = (bounds.to(query.device, torch.int64) for bounds in (cu_seqlens_q, cu_seqlens_k))
    place_q = place_k = mask = None
    if query.shape[0] != batch * max_seqlen_q:
        place_q = _padded_index(cu_seqlens_q, max_seqlen_q, query.shape[0])
    if key.shape[0] != batch * max_seqlen_k:
        place_k = place_q if same else _padded_index(cu_seqlens_k, max_seqlen_k, key.shape[0])
        lengths = cu_seqlens_k.diff()[:, None]
        # An utterance without keys attends to one padded row of zeros, which gives 0 and not NaN.
        mask = torch.arange(max_seqlen_k, device=query.device) < lengths.clamp(min=1)

    def pad(rows: Tensor, longest: int, place: Tensor | None) -> Tensor:
        if place is not None:
            rows = rows.new_zeros(batch * longest, *rows.shape[1:]).index_copy(0, place, rows)
        return rows.unflatten(0, (batch, longest)).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        pad(query, max_seqlen_q, place_q),
        pad(key, max_seqlen_k, place_k),
        pad(value, max_seqlen_k, place_k),
        attn_mask=None if mask is None else mask[:, None, None, :],
    )
    out = out.transpose(1, 2).flatten(0, 1)
    return out if place_q is None else out.index_select(0, place_q)
