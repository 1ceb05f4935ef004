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
from functools import cache, lru_cache
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
SHORT = 256  # keys of a sequence up to which the CPU keeps its probabilities instead of taking torch's flash attention
# On the CPU a sequence is computed together with longer ones if that pads fewer numbers than this: a group of its own
# costs some 25 operations, as long as they take.
GROUP_PADDING = 60_000


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
    """`attend` on the CPU, for long sequences one after another, and for short ones of similar length together."""
    out: Tensor = _OnCPU.apply(query, key, value, tuple(bounds[0].tolist()), tuple(bounds[1].tolist()), shape)
    return out


class _Group(NamedTuple):
    """Short sequences that are computed together, padded to the longest of them.

    Their padded rows are [b, G, H / G, L], and those of keys [b, G, M]; a row holds E numbers. So the heads of queries
    that share one of keys are rows of one product.
    """

    queries: int  # L
    keys: int  # M
    from_query: Tensor  # int64 [b·H·L], for each padded row its row of [N·H, E]; for padding any row
    from_key: Tensor  # int64 [b·G·M], of [M·G, E]
    to_query: tuple[Tensor, Tensor]  # int64 [n] twice: rows of [N·H, E], rising, and for each of them its padded row
    to_key: tuple[Tensor, Tensor]
    padding: Tensor | None  # int64, padded rows of queries that are padding; None if there are none
    past: Tensor | None  # bool [b, 1, 1, M], keys that are padding; None if there are none


@lru_cache(maxsize=16)  # every layer has the same sequences
def _plan(
    cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...], heads: int, groups: int, size: int
) -> tuple[list[_Group], list[tuple[slice, slice]]]:
    """Short sequences in groups, and the rows of queries and keys of each long one. Those without rows are left out."""
    found = zip(pairwise(cu_seqlens_q), pairwise(cu_seqlens_k), strict=True)
    spans = [(slice(*q), slice(*k)) for q, k in found if q[0] < q[1] and k[0] < k[1]]
    long = [span for span in spans if _lengths(span)[1] > SHORT]
    short = sorted((span for span in spans if _lengths(span)[1] <= SHORT), key=lambda span: _lengths(span)[::-1])
    together: list[list[tuple[slice, slice]]] = []
    most = (0, 0)
    for span in reversed(short):
        n, m = _lengths(span)
        padding = heads * (size * (most[0] - n + most[1] - m) + most[0] * most[1] - n * m)
        if together and n <= most[0] and padding < GROUP_PADDING:
            together[-1].append(span)
        else:
            together.append([span])
            most = (n, m)
    return [_group(members, heads, groups) for members in together], long


def _lengths(span: tuple[slice, slice]) -> tuple[int, int]:
    return span[0].stop - span[0].start, span[1].stop - span[1].start


def _group(members: list[tuple[slice, slice]], heads: int, groups: int) -> _Group:
    def places(which: int, shared: int) -> tuple[int, Tensor, tuple[Tensor, Tensor], Tensor]:
        starts = torch.tensor([span[which].start for span in members], device="cpu")[:, None]
        counts = torch.tensor([_lengths(span)[which] for span in members], device="cpu")[:, None]
        row = torch.arange(int(counts.max()), device="cpu")
        place = (starts + torch.minimum(row, counts - 1))[:, None, None]
        head = torch.arange(groups * shared, device="cpu").view(groups, shared, 1)
        rows = (place * (groups * shared) + head).flatten()
        real = (row < counts)[:, None, None].expand(-1, groups, shared, -1).flatten()
        padded = real.nonzero()[:, 0]
        order = rows[padded].argsort()
        return len(row), rows, (rows[padded][order], padded[order]), real

    queries, from_query, to_query, real_query = places(0, heads // groups)
    keys, from_key, to_key, real_key = places(1, 1)
    padding = (~real_query).nonzero()[:, 0]
    past = None if real_key.all() else ~real_key.view(len(members), groups, 1, 1, keys)[:, :1, 0]
    return _Group(
        queries, keys, from_query, from_key, to_query, to_key, padding if len(padding) else None, past,
    )  # fmt: skip


class _OnCPU(torch.autograd.Function):
    """Attention of packed sequences on the CPU.

        S = scale · Q Kᵀ, P = softmax(S), O = P V
        dV = Pᵀ dO, dP = dO Vᵀ, dS = P · (dP - rowsum(dP · P)), dQ = scale · dS K, dK = scale · dSᵀ Q

    P of short sequences is kept for backward, where torch's flash attention for the CPU takes up to twice as long over
    a few dozen rows; long sequences take it. Softmax computes in float32.
    """

    @staticmethod
    def forward(ctx, query, key, value, cu_seqlens_q, cu_seqlens_k, shape):
        (rows, heads, size), groups = query.shape, key.shape[1]
        scale = size**-0.5 if shape.scale is None else shape.scale
        plan, long = _plan(cu_seqlens_q, cu_seqlens_k, heads, groups, size)
        flat = [x.reshape(-1, size) for x in (query, key, value)]
        out, kept = None, []
        for group in plan:
            q, k, v = (
                x.index_select(0, places).view(-1, count, size)
                for x, places, count in zip(
                    flat,
                    (group.from_query, group.from_key, group.from_key),
                    (heads // groups * group.queries, group.keys, group.keys),
                    strict=True,
                )
            )
            p = _probabilities(_product(q, k.mT, scale), group, groups, shape)
            out = _spread(torch.bmm(p, v), group.to_query, out, rows * heads)
            kept += [q, k, v, p]
        out = query.new_zeros(rows * heads, size) if out is None else out
        out = out.view(query.shape)
        for q, k in long:
            arguments = _for_flash(query[q], key[k], value[k])
            settings = _of_flash(arguments[0], arguments[1], shape, scale)
            o, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*arguments, **settings)
            out[q] = o[0].transpose(0, 1)
            kept += [o, sums]
        # The gradient of short sequences needs none of the rows themselves.
        ctx.save_for_backward(*kept, *((query, key, value) if long else ()))
        ctx.plan, ctx.long, ctx.shape, ctx.scale = plan, long, shape, scale
        ctx.sizes = query.shape, key.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        (rows, heads, size), (keys, groups, _) = ctx.sizes
        kept, flat = list(ctx.saved_tensors), dout.reshape(-1, size)
        dquery = dkey = dvalue = None
        for group in ctx.plan:
            (q, k, v, p), kept = kept[:4], kept[4:]
            do = flat.index_select(0, group.from_query).view(q.shape)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(do, v.mT), p, -1, p.dtype)
            dvalue = _spread(torch.bmm(p.mT, do), group.to_key, dvalue, keys * groups)
            dquery = _spread(_product(ds, k, ctx.scale), group.to_query, dquery, rows * heads)
            dkey = _spread(_product(ds.mT, q, ctx.scale), group.to_key, dkey, keys * groups)
        shapes = zip((dquery, dkey, dvalue), (ctx.sizes[0], *[ctx.sizes[1]] * 2), strict=True)
        found = [dout.new_zeros(shape) if x is None else x.view(shape) for x, shape in shapes]
        for q, k in ctx.long:
            (o, sums), kept = kept[:2], kept[2:]
            arguments = _for_flash(*(x[part] for x, part in zip(ctx.saved_tensors[-3:], (q, k, k), strict=True)))
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dout[q].transpose(0, 1)[None], *arguments, o, sums, 0.0,
                **_of_flash(arguments[0], arguments[1], ctx.shape, ctx.scale),
            )  # fmt: skip
            for x, part, gradient in zip(found, (q, k, k), gradients, strict=True):
                x[part] = gradient[0].unflatten(0, (x.shape[1], -1)).sum(1).transpose(0, 1)
        return *found, None, None, None


def _product(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """`scale · x @ y` for [G, L, K] and [G, K, M]."""
    return torch.baddbmm(x.new_empty(1), x, y, beta=0, alpha=scale)


def _probabilities(scores: Tensor, group: _Group, groups: int, shape: Shape) -> Tensor:
    """Softmax of [b·G, H / G · L, M] without the keys that a row does not attend to; 0 in rows of padding."""
    each = scores.view(-1, groups, scores.shape[1] // group.queries, group.queries, group.keys)
    hidden = _hidden(group.queries, group.keys, shape, scores)
    if hidden is not None:  # padding stands behind all rows that there are
        each.masked_fill_(hidden, -torch.inf)
    elif group.past is not None:
        each.masked_fill_(group.past[:, :, None], -torch.inf)
    p = torch.ops.aten._softmax(scores, -1, False)
    if group.padding is not None:
        p.view(-1, group.keys).index_fill_(0, group.padding, 0.0)
    return p


def _spread(padded: Tensor, places: tuple[Tensor, Tensor], out: Tensor | None, rows: int) -> Tensor:
    """`out` [rows, E], 0 if it is None, with the rows of a group, which are `padded` [b·G, ., E]."""
    target, source = places
    padded = padded.view(-1, padded.shape[-1]).index_select(0, source)
    if len(target) == rows:  # all of them, in order
        return padded
    out = padded.new_zeros(rows, padded.shape[1]) if out is None else out
    return out.index_copy_(0, target, padded)


def _for_flash(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Packed rows of one sequence as [1, H, L, E], each head of queries with keys and values of its own."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x if shared == 1 else x.repeat_interleave(shared, 1) for x in (key, value))
    return [x.transpose(0, 1)[None] for x in (query, key, value)]


def _of_flash(query: Tensor, key: Tensor, shape: Shape, scale: float) -> dict[str, Any]:
    """The settings of torch's flash attention for the CPU, for [1, H, L, E]."""
    if shape.window is None:
        return {"is_causal": shape.causal, "scale": scale}
    hidden = _hidden(query.shape[2], key.shape[2], shape, query)
    mask = query.new_zeros(query.shape[2], key.shape[2]).masked_fill_(hidden, -torch.inf)
    return {"is_causal": False, "attn_mask": mask[None, None], "scale": scale}


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
