"""Attention over packed rows, by FlashAttention where it can run. `choose_attention` tells beforehand what will run.

| name           | what                                                                 | where                        |
|----------------|----------------------------------------------------------------------|------------------------------|
| `flash_attn_4` | `flash_attn.cute.flash_attn_varlen_func` of the package flash-attn-4 | CUDA 9.0 to 12.x, half types |
| `flash_attn`   | `flash_attn.flash_attn_varlen_func` of the package flash-attn        | CUDA ≥ 8.0, half types       |
| `varlen`       | `torch.nn.attention.varlen.varlen_attn`, torch's own FlashAttention  | CUDA ≥ 8.0, half types       |
| `sdpa`         | torch: on the CPU one sequence after another, on other devices       | any device and dtype         |
|                | `F.scaled_dot_product_attention` over rows padded to the longest one |                              |

`impl="auto"` takes the first of them that can run. It is an error to name one that cannot run.
Dimension letters: N and M rows, B sequences, H heads, G heads of keys and values (they divide H), E head size.
"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

IMPLEMENTATIONS = ("auto", "flash_attn_4", "flash_attn", "varlen", "sdpa")
MAX_HEAD_SIZE = 256  # limit of FlashAttention's kernels
MIN_CAPABILITY = (8, 0)
# flash-attn-4 also runs on 8.x, but only forward. Head sizes from 8 on in steps of 8, up to:
FLASH_4_HEAD_SIZES = {9: 256, 10: 128, 11: 128, 12: 128}
SHORT = 384  # keys of a sequence up to which the CPU keeps its probabilities instead of taking torch's flash attention


class Attention(NamedTuple):
    """The attention that runs, and the reason in words."""

    name: str
    reason: str


class Shape(NamedTuple):
    """What attention computes beyond the bounds of the sequences."""

    causal: bool = False
    window: int | None = None
    scale: float | None = None


FULL = Shape()


def choose_attention(
    impl: str = "auto",
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int = 128,
    causal: bool = False,
    window: int | None = None,
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
    missing = {
        "flash_attn_4": reason or _flash_attn_4()[1] or _reason_against_flash_4(device, head_size),
        "flash_attn": reason or _flash_attn()[1],
        "varlen": reason or _varlen_attn()[1] or _reason_against_varlen(head_size, causal, window),
    }
    if impl != "auto":
        if missing[impl]:
            raise ValueError(f"impl = {impl!r}, but {missing[impl]}")
        return Attention(impl, "it was asked for")
    if not missing["flash_attn_4"]:
        return Attention("flash_attn_4", "flash-attn-4 is installed and takes such tensors")
    if not missing["flash_attn"]:
        return Attention("flash_attn", f"flash-attn is installed and takes such tensors; {missing['flash_attn_4']}")
    without = f"{missing['flash_attn_4']}, and {missing['flash_attn']}"
    if not missing["varlen"]:
        return Attention("varlen", f"torch's own FlashAttention, as {without}")
    return Attention("sdpa", reason or f"{without}, and {missing['varlen']}")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention within each sequence, without dropout.

    Args:
        query: [N, H, E]; key, value: [M, G, E], packed. H / G heads of queries share one of keys and values.
        cu_seqlens_q, cu_seqlens_k: int [B + 1], the bounds of each sequence in N and M rows, from 0.
        max_seqlen_q, max_seqlen_k: at least the number of rows of the longest sequence.
        causal: a row attends to itself and the rows before it; queries and keys then have the same bounds.
        window: with `causal`, the number of rows that a row attends to, itself included; None for all.
        scale: factor of the products before the softmax; None is 1 / sqrt(E).
        impl: one of `IMPLEMENTATIONS`.

    Returns:
        [N, H, E]. Queries of a sequence without keys get 0.

    Raises:
        ValueError: tensors do not fit each other, or `impl` cannot run. Bounds on CUDA are not checked, because the CPU
            would have to wait for the GPU.

    With FlashAttention the backward is bitwise deterministic only under `torch.use_deterministic_algorithms`.
    """
    _check(query, key, value, cu_seqlens_q, cu_seqlens_k)
    _check_bounds("q", cu_seqlens_q, max_seqlen_q, query.shape[0])
    if cu_seqlens_k is not cu_seqlens_q or max_seqlen_k != max_seqlen_q or key.shape[0] != query.shape[0]:
        _check_bounds("k", cu_seqlens_k, max_seqlen_k, key.shape[0])
    if causal and not _same_bounds(cu_seqlens_q, cu_seqlens_k, query.shape[0] == key.shape[0]):
        raise ValueError("causal = True, but queries and keys have bounds of their own: give both the same ones")
    if window is not None and (not causal or window < 1):
        raise ValueError(f"window = {window}, but it must be at least 1, and needs causal = True")
    shape = Shape(causal, window if window is not None and window < max_seqlen_k else None, scale)
    chosen = choose_attention(
        impl, device=query.device, dtype=query.dtype, head_size=query.shape[-1], causal=causal, window=shape.window
    ).name
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if chosen == "sdpa" or not max_seqlen_q or not max_seqlen_k:  # FlashAttention does not run without rows
        if query.device.type == "cpu" and not query.is_meta and not torch.compiler.is_compiling():
            return _each_sequence(query, key, value, bounds, shape)
        return _padded(query, key, value, bounds, shape)
    if chosen == "flash_attn_4":
        function, arguments = _flash_attn_4()[0], flash_attn_4_arguments(query, key, value, *bounds, shape)
    elif chosen == "flash_attn":
        function, arguments = _flash_attn()[0], flash_attn_arguments(query, key, value, *bounds, shape)
    else:
        function, arguments = _varlen_attn()[0], varlen_attn_arguments(query, key, value, *bounds, shape)
    assert function is not None  # `choose_attention` has found it
    out = function(**arguments)
    return out[0] if isinstance(out, tuple) else out  # flash-attn-4 returns the log-sum-exp as well


# ---------------------------------------------------------------- calls of FlashAttention


def flash_attn_4_arguments(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    shape: Shape = FULL,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of `attend`, in its order, as those of `flash_attn.cute.flash_attn_varlen_func`."""
    window = (None if shape.window is None else shape.window - 1, 0 if shape.causal else None)
    return _renamed(FLASH_NAMES, query, key, value, cu_q, cu_k, max_q, max_k) | {
        "softmax_scale": shape.scale,
        "causal": shape.causal,
        "window_size": window,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def flash_attn_arguments(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    shape: Shape = FULL,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of `attend`, in its order, as those of `flash_attn.flash_attn_varlen_func`."""
    return _renamed(FLASH_NAMES, query, key, value, cu_q, cu_k, max_q, max_k) | {
        "softmax_scale": shape.scale,
        "causal": shape.causal,
        "window_size": (-1 if shape.window is None else shape.window - 1, 0 if shape.causal else -1),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def varlen_attn_arguments(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
    shape: Shape = FULL, known: frozenset[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The arguments of `attend`, in its order, as those of `varlen_attn`; `known` are the names that it has.

    Without `known` they are those of the installed torch. Versions differ in how attention is made causal and scaled,
    and older ones take as many heads of keys as of queries: what a version lacks is done here.
    """
    known = _varlen_names() if known is None else known
    extra: dict[str, Any] = {}
    if "window_size" in known:
        if shape.causal:
            extra["window_size"] = (-1 if shape.window is None else shape.window - 1, 0)
    elif shape.causal:
        extra["is_causal"] = True
    if shape.scale is not None:
        if "scale" in known:
            extra["scale"] = shape.scale
        else:
            query = query * (shape.scale * query.shape[-1] ** 0.5)
    shared = query.shape[1] // max(key.shape[1], 1)
    if shared > 1:
        if "enable_gqa" in known:
            extra["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    return _renamed(names, query, key, value, cu_q, cu_k, max_q, max_k) | extra


FLASH_NAMES = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


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


# ---------------------------------------------------------------- what can run


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


def _reason_against_flash_4(device: torch.device, head_size: int) -> str:
    """The reason why flash-attn-4 cannot train on such tensors, which FlashAttention takes; empty if it can."""
    major, minor = torch.cuda.get_device_capability(device)
    if major not in FLASH_4_HEAD_SIZES:
        return f"flash-attn-4 has a backward pass for compute capability 9.0 to 12.x, and {device} has {major}.{minor}"
    most = FLASH_4_HEAD_SIZES[major]
    if head_size % 8 or head_size > most:
        return f"flash-attn-4 takes heads of up to {most} in steps of 8 here, and these have {head_size}"
    if major == 12 and torch.are_deterministic_algorithms_enabled():
        return f"flash-attn-4 has no deterministic backward pass for compute capability {major}.{minor}"
    return ""


def _reason_against_varlen(head_size: int, causal: bool, window: int | None) -> str:
    """The reason why torch's own FlashAttention, which is there, cannot compute this; empty if it can."""
    if head_size % 8:  # flash-attn itself pads heads to a multiple of 8
        return f"torch's own FlashAttention takes multiples of 8, and the head size is {head_size}"
    if window is not None and "window_size" not in _varlen_names():
        return "torch's own FlashAttention has no sliding window in this version of torch"
    if causal and not {"window_size", "is_causal"} & _varlen_names():
        return "torch's own FlashAttention is not causal in this version of torch"
    return ""


@cache
def _flash_attn_4() -> tuple[Callable[..., Any] | None, str]:
    """The function of flash-attn-4, or None and the reason."""
    return _imported("flash_attn.cute", "flash_attn_varlen_func", "flash-attn-4")


@cache
def _flash_attn() -> tuple[Callable[..., Tensor] | None, str]:
    """The function of flash-attn, or None and the reason."""
    return _imported("flash_attn", "flash_attn_varlen_func", "flash-attn")


@cache
def _varlen_attn() -> tuple[Callable[..., Tensor] | None, str]:
    """The function of torch, or None and the reason."""
    return _imported("torch.nn.attention.varlen", "varlen_attn", "torch.nn.attention.varlen")


@cache
def _varlen_names() -> frozenset[str]:
    """The names of the arguments of torch's function."""
    function = _varlen_attn()[0]
    return frozenset() if function is None else frozenset(inspect.signature(function).parameters)


def _imported(module: str, name: str, known_as: str) -> tuple[Callable[..., Any] | None, str]:
    try:
        found = import_module(module)
        if getattr(found, "__file__", None) is None:  # a folder that only holds flash-attn-4's `cute`
            return None, f"{known_as} is not installed"
        return getattr(found, name), ""
    except ModuleNotFoundError as error:
        if error.name in (module, module.partition(".")[0]):
            return None, f"{known_as} is not installed"
        return None, f"{known_as} is installed, but cannot be imported ({error})"
    except (ImportError, AttributeError, OSError) as error:  # e.g. built for another torch
        return None, f"{known_as} is installed, but cannot be imported ({error})"


# ---------------------------------------------------------------- checks


def _check(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but it must be [rows, heads, head size]")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but query is {query.dtype} on {query.device}"
            )
        heads, size = tensor.shape[1:]
        if size != query.shape[2] or heads != key.shape[1] and name == "value" or not heads or query.shape[1] % heads:
            raise ValueError(
                f"{name} has {list(tensor.shape[1:])} heads and head size, but query has {list(query.shape[1:])}"
            )
    if key.shape[0] != value.shape[0]:
        raise ValueError(f"value has {value.shape[0]} rows, but key has {key.shape[0]}")
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds.shape != cu_seqlens_q.shape or bounds.dim() != 1 or not bounds.numel():
            raise ValueError(f"{name} has shape {list(bounds.shape)}, but both bounds must be [utterances + 1]")


def _check_bounds(name: str, cu_seqlens: Tensor, longest: int, rows: int) -> None:
    """ValueError for bounds on the CPU that do not fit `rows` packed rows or the `longest` sequence."""
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    most = max((stop - start for start, stop in pairwise(bounds)), default=0)
    if bounds[0] != 0 or bounds[-1] != rows or any(stop < start for start, stop in pairwise(bounds)):
        raise ValueError(f"cu_seqlens_{name} = {bounds}, but it must rise from 0 to {rows}, the packed rows")
    if most > longest:
        raise ValueError(f"max_seqlen_{name} = {longest}, but an utterance has {most} rows")


def _same_bounds(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, as_many: bool) -> bool:
    """Whether queries and keys have the same bounds; those on CUDA are not read, only whether there are `as_many`."""
    if cu_seqlens_q is cu_seqlens_k or cu_seqlens_q.device.type != "cpu" or torch.compiler.is_compiling():
        return as_many
    return cu_seqlens_q.tolist() == cu_seqlens_k.tolist()


# ---------------------------------------------------------------- torch


def _hidden(queries: int, keys: int, shape: Shape, like: Tensor) -> Tensor | None:
    """bool [queries, keys], true where a row does not attend to a key; None if it attends to all."""
    if not shape.causal or queries == 1:
        return None
    row = torch.arange(queries, device=like.device)[:, None]
    key = torch.arange(keys, device=like.device)
    hidden = key > row
    return hidden if shape.window is None else hidden | (key <= row - shape.window)


def _each_sequence(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, Tensor, int, int], shape: Shape
) -> Tensor:
    """`attend` for one sequence after another, which on the CPU is faster than padding or a mask over all of them."""
    cu_seqlens_q, cu_seqlens_k = bounds[0].tolist(), bounds[1].tolist()
    sequences = [
        (slice(*rows), slice(*keys)) for rows, keys in zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
    ]
    out: Tensor = _EachSequence.apply(query, key, value, sequences, shape)
    return out


class _EachSequence(torch.autograd.Function):
    """Attention of one sequence after another on the CPU.

        S = scale · Q Kᵀ, P = softmax(S), O = P V
        dV = Pᵀ dO, dP = dO Vᵀ, dS = P · (dP - rowsum(dP · P)), dQ = scale · dS K, dK = scale · dSᵀ Q

    P is kept for backward where it has at most SHORT keys, because torch's flash attention for the CPU takes several
    times as long in backward over a few dozen rows; longer sequences take it. Softmax runs in float32. In the products
    the heads of queries that share one of keys follow one another.
    """

    @staticmethod
    def forward(ctx, query, key, value, sequences, shape):
        groups, scale = key.shape[1], query.shape[2] ** -0.5 if shape.scale is None else shape.scale
        out, kept = torch.zeros_like(query, memory_format=torch.contiguous_format), []
        for rows, keys in sequences:
            q, k, v = query[rows], key[keys], value[keys]
            if not len(q) or not len(k):
                kept.append(())
            elif len(k) <= SHORT:
                scores = _product(_heads_first(q, groups), k.permute(1, 2, 0), scale)
                p = _softmax(scores, _hidden(len(q), len(k), shape, q)).to(q.dtype)
                out[rows] = _heads_last(torch.bmm(p, v.transpose(0, 1)), query.shape[1])
                kept.append((p,))
            else:
                o, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    *_for_flash(q, k, v), **_of_flash(q, k, shape, scale)
                )
                out[rows] = o[0].transpose(0, 1)
                kept.append((o, sums))
        ctx.save_for_backward(query, key, value, *(x for tensors in kept for x in tensors))
        ctx.sequences, ctx.shape, ctx.scale, ctx.kept = sequences, shape, scale, [len(tensors) for tensors in kept]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        query, key, value, *kept = ctx.saved_tensors
        heads, groups = query.shape[1], key.shape[1]
        like = {"memory_format": torch.contiguous_format}
        dquery, dkey, dvalue = (torch.zeros_like(x, **like) for x in (query, key, value))
        for (rows, keys), count in zip(ctx.sequences, ctx.kept, strict=True):
            tensors, kept = kept[:count], kept[count:]
            if count == 1:
                (p,), k, v = tensors, key[keys].transpose(0, 1), value[keys].transpose(0, 1)
                q, do = (_heads_first(x[rows], groups) for x in (query, dout))
                dvalue[keys] = torch.bmm(p.mT, do).transpose(0, 1)
                ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v.mT), p, -1, p.dtype)
                dquery[rows] = _heads_last(_product(ds, k, ctx.scale), heads)
                dkey[keys] = _product(ds.mT, q, ctx.scale).transpose(0, 1)
            elif count:
                q, k, v = query[rows], key[keys], value[keys]
                do = dout[rows].transpose(0, 1)[None]
                dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    do, *_for_flash(q, k, v), *tensors, 0.0, **_of_flash(q, k, ctx.shape, ctx.scale)
                )
                dquery[rows] = dq[0].transpose(0, 1)
                for gradient, found in ((dkey, dk), (dvalue, dv)):
                    gradient[keys] = found[0].unflatten(0, (groups, -1)).sum(1).transpose(0, 1)
        return dquery, dkey, dvalue, None, None


def _product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """`scale · x @ y` for [G, L, K] and [G, K, M]."""
    return torch.baddbmm(x.new_empty(1), x, y, beta=0, alpha=scale)


def _softmax(scores: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax of [G, H / G · L, M], in float32 at least, without the keys that are `hidden` bool [L, M]."""
    if hidden is not None:
        scores.unflatten(1, (-1, len(hidden))).masked_fill_(hidden, -torch.inf)
    return torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))


def _for_flash(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Packed rows of one sequence as [1, H, L, E], each head of queries with keys and values of its own."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x if shared == 1 else x.repeat_interleave(shared, 1) for x in (key, value))
    return [x.transpose(0, 1)[None] for x in (query, key, value)]


def _of_flash(query: Tensor, key: Tensor, shape: Shape, scale: float) -> dict[str, Any]:
    """The settings of torch's flash attention for the CPU."""
    if shape.window is None:
        return {"is_causal": shape.causal, "scale": scale}
    mask = query.new_zeros(len(query), len(key)).masked_fill_(_hidden(len(query), len(key), shape, query), -torch.inf)
    return {"is_causal": False, "attn_mask": mask[None, None], "scale": scale}


def _heads_first(x: Tensor, groups: int) -> Tensor:
    """[L, H, E] -> [groups, H / groups · L, E]: the heads that share one of keys follow one another."""
    rows, heads, size = x.shape
    return x.unflatten(1, (groups, heads // groups)).permute(1, 2, 0, 3).reshape(groups, -1, size)


def _heads_last(x: Tensor, heads: int) -> Tensor:
    """The inverse of `_heads_first`: [groups, H / groups · L, E] -> [L, H, E]."""
    return x.reshape(heads, -1, x.shape[2]).transpose(0, 1)


def _padded_index(cu_seqlens: Tensor, longest: int, rows: int) -> Tensor:
    """Index of each packed row among the padded rows, int64 [rows]."""
    row = torch.arange(rows, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    return sequence * longest + row - cu_seqlens[sequence]


def _padded(query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, Tensor, int, int], shape: Shape) -> Tensor:
    """`attend` over padded rows [B, H, longest, E]; nothing is copied if all sequences are equally long."""
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = bounds
    batch = cu_seqlens_q.numel() - 1
    same = cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    cu_seqlens_q, cu_seqlens_k = (bounds.to(query.device, torch.int64) for bounds in (cu_seqlens_q, cu_seqlens_k))
    place_q = place_k = mask = None
    if query.shape[0] != batch * max_seqlen_q:
        place_q = _padded_index(cu_seqlens_q, max_seqlen_q, query.shape[0])
    if key.shape[0] != batch * max_seqlen_k:
        place_k = place_q if same else _padded_index(cu_seqlens_k, max_seqlen_k, key.shape[0])
    if shape.window is not None:
        mask = ~_hidden(max_seqlen_q, max_seqlen_k, shape, query)
    elif place_k is not None and not shape.causal:  # causal rows see no padding, which is behind them
        lengths = cu_seqlens_k.diff()[:, None]
        # A sequence without keys attends to one padded row of zeros, which gives 0 and not NaN.
        mask = (torch.arange(max_seqlen_k, device=query.device) < lengths.clamp(min=1))[:, None, None, :]

    def pad(rows: Tensor, longest: int, place: Tensor | None) -> Tensor:
        if place is not None:
            rows = rows.new_zeros(batch * longest, *rows.shape[1:]).index_copy(0, place, rows)
        return rows.unflatten(0, (batch, longest)).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        pad(query, max_seqlen_q, place_q),
        pad(key, max_seqlen_k, place_k),
        pad(value, max_seqlen_k, place_k),
        attn_mask=mask,
        is_causal=shape.causal and mask is None,
        scale=shape.scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    out = out.transpose(1, 2).flatten(0, 1)
    return out if place_q is None else out.index_select(0, place_q)
