"""One door to FlashAttention: packed rows in, packed rows out, and it can be said beforehand what will run.

| name         | what                                                                       | where                  |
|--------------|----------------------------------------------------------------------------|------------------------|
| `flash_attn` | `flash_attn.flash_attn_varlen_func`, of the package flash-attn             | CUDA ≥ 8.0, fp16, bf16 |
| `varlen`     | `torch.nn.attention.varlen.varlen_attn`, torch's own FlashAttention        | CUDA ≥ 8.0, fp16, bf16 |
| `sdpa`       | `F.scaled_dot_product_attention` over rows padded to the longest utterance | any device and dtype   |

`impl="auto"` is the first that can run. A name is a demand: where it cannot run, that is an error.
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
MAX_HEAD_SIZE = 256  # of FlashAttention's kernels
MIN_CAPABILITY = (8, 0)


class Attention(NamedTuple):
    """Which attention runs, and why in words."""

    name: str
    reason: str


def choose_attention(
    impl: str = "auto", *, device: torch.device, dtype: torch.dtype, head_size: int = 128
) -> Attention:
    """What `attend` runs for tensors on `device`, of `dtype` and with heads of `head_size`.

    Raises:
        ValueError: `impl` is no name, or what it names cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl = {impl!r}, but it must be one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "sdpa":
        return Attention("sdpa", "it was asked for")
    hindrance = _hindrance(device, dtype, head_size)
    no_package = hindrance or _flash_attn()[1]
    no_function = hindrance or _varlen_attn()[1]
    if not no_function and head_size % 8:  # flash-attn fills up to a multiple of 8 by itself
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
    return Attention("sdpa", hindrance or f"{no_package}, and {no_function}")


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
        max_seqlen_q, max_seqlen_k: the longest utterance's rows, on the host.
        impl: one of `IMPLEMENTATIONS`.

    Returns:
        [N, H, E]. Queries of an utterance without keys get 0.

    With FlashAttention the backward is bitwise deterministic under `torch.use_deterministic_algorithms` only.
    """
    _check(query, key, value, cu_seqlens_q, cu_seqlens_k)
    chosen = choose_attention(impl, device=query.device, dtype=query.dtype, head_size=query.shape[-1]).name
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if chosen == "sdpa" or not max_seqlen_q or not max_seqlen_k:  # FlashAttention refuses to launch for nothing
        return _padded(query, key, value, *bounds)
    if chosen == "flash_attn":
        function, _ = _flash_attn()
        return function(**flash_attn_arguments(query, key, value, *bounds))
    function, _ = _varlen_attn()
    return function(**varlen_attn_arguments(query, key, value, *bounds))


def flash_attn_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> dict[str, Any]:
    """The arguments of `flash_attn.flash_attn_varlen_func`."""
    return {
        "q": query,
        "k": key,
        "v": value,
        "cu_seqlens_q": cu_seqlens_q.to(query.device, torch.int32),
        "cu_seqlens_k": cu_seqlens_k.to(query.device, torch.int32),
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def varlen_attn_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> dict[str, Any]:
    """The arguments of `torch.nn.attention.varlen.varlen_attn`; the ones it has had in every version."""
    return {
        "query": query,
        "key": key,
        "value": value,
        "cu_seq_q": cu_seqlens_q.to(query.device, torch.int32),
        "cu_seq_k": cu_seqlens_k.to(query.device, torch.int32),
        "max_q": max_seqlen_q,
        "max_k": max_seqlen_k,
    }


def _hindrance(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why no FlashAttention can take such tensors; empty where one can."""
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
    """The function of flash-attn; or None, and why not."""
    return _imported("flash_attn", "flash_attn_varlen_func", "flash-attn")


@cache
def _varlen_attn() -> tuple[Callable[..., Tensor] | None, str]:
    """The function of torch; or None, and why not."""
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


def _places(cu_seqlens: Tensor, longest: int, rows: int) -> Tensor:
    """Where each packed row stands among the padded ones: int64 [rows]."""
    row = torch.arange(rows, device=cu_seqlens.device)
    utterance = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    return utterance * longest + row - cu_seqlens[utterance]


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Tensor:
    """`attend` over [B, H, longest, E]; views alone where all utterances are equally long."""
    batch = cu_seqlens_q.numel() - 1
    same = cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    cu_seqlens_q, cu_seqlens_k = (bounds.to(query.device, torch.int64) for bounds in (cu_seqlens_q, cu_seqlens_k))
    place_q = place_k = mask = None
    if query.shape[0] != batch * max_seqlen_q:
        place_q = _places(cu_seqlens_q, max_seqlen_q, query.shape[0])
    if key.shape[0] != batch * max_seqlen_k:
        place_k = place_q if same else _places(cu_seqlens_k, max_seqlen_k, key.shape[0])
        lengths = cu_seqlens_k.diff()[:, None]
        # An utterance without keys attends to one padded row, of zeros: no NaN, and 0 comes out.
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
