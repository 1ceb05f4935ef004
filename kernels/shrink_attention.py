"""Shrinking attention: each kept frame attends to the frames of its utterance, packed, forward and backward.

    S = scale · Q Kᵀ      P = softmax(S)      O = P V      within one utterance and one head
    D = rowsum(dO ∘ O)    dS = P ∘ (dO Vᵀ - D)
    dQ = scale · dS K     dK = scale · dSᵀ Q     dV = Pᵀ dO

Shapes    query [K, H, E], key and value [N, H, E] -> [K, H, E]; cu_seqlens_q and cu_seqlens_k int32 [B + 1] bound the
          utterances. A query without keys gives 0 and has no gradient; keys without queries have gradient 0.
Numerics  products in the tensors' dtype with fp32 sums; softmax, its log-sum-exp (saved, [H, K]) and D in fp32. With
          Triton P and dS are rounded to the dtype for the products that follow. S is in units of log 2 and is rounded
          in the same way forward and backward. float64 with torch only.
Cost      4·E operations for each query, key and head forward, 10·E backward. Neither S nor P is stored.
Deterministic: one program writes each tile of dQ, or of dK and dV; there are no atomics.
"""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from soundwave.kernels.checks import no_second_derivative
from soundwave.kernels.dispatch import architecture, input_precision, ranged, resolve_impl, to_device
from soundwave.kernels.padded_attention import (
    flash_attention,
    flash_attention_backward,
    padded_attention,
    padded_attention_backward,
)

MAX_E = 256  # one row of a head in registers
LOG2E = tl.constexpr(1.4426950408889634)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """Queries (block_m) and keys (block_n) of one step, and launch settings."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 2


class Config(NamedTuple):
    fwd: Tile
    dq: Tile
    dkv: Tile


def _config(head_size: int, dtype: torch.dtype, arch: int) -> Config:
    """The largest tiles that compile without spills and fit 99 KB, or 128 KB on cards with more. `arch`: 86 is sm_86.

    sm_90 to sm_11x multiply by whole warp groups, 64 rows at a time. With small heads every card has room for 64 rows;
    with heads of 128 the other cards would spill. In fp32 products are single multiplications, whose operands take
    registers.
    """
    block_e = triton.next_power_of_2(head_size)
    if dtype == torch.float32:
        if block_e > 128:
            return Config(Tile(16, 16, 4), Tile(16, 16, 4), Tile(16, 16, 4))
        # Heads of 128: with 32 keys Triton 3.6 spills in dK and dV, with four warps 3.7 does.
        return Config(Tile(16, 32, 8), Tile(16, 32, 4), Tile(32, 32, 8) if block_e <= 64 else Tile(16, 16, 8))
    if block_e > 128:
        return Config(Tile(32, 32, 4), Tile(32, 32, 4), Tile(32, 32, 8))
    block_m = 64 if 90 <= arch < 120 or block_e <= 64 else 32
    return Config(Tile(block_m, 64, 4), Tile(block_m, 64, 4), Tile(64, 64, 8))


@triton.jit
def _bounds(CU_SEQLENS, b, B, ROWS, MAX):
    """First row and number of rows of utterance b, never past ROWS, and whether the bounds are valid."""
    start = tl.load(CU_SEQLENS + b)
    end = tl.load(CU_SEQLENS + b + 1)
    right = (tl.load(CU_SEQLENS) == 0) & (tl.load(CU_SEQLENS + B) == ROWS) & (start <= end)
    right = right & (start >= 0) & (end <= ROWS) & (end - start <= MAX)
    start = tl.minimum(tl.maximum(start, 0), ROWS)
    end = tl.minimum(tl.maximum(end, start), ROWS)
    return start.to(tl.int64), (end - start).to(tl.int32), right


@triton.jit
def _place(CU_Q, CU_K, B, H, ROWS_Q, ROWS_K, MAX_Q, MAX_K, MAX, BLOCK: tl.constexpr):
    """What one program works on: the first row and the rows of its tile, its head, and the bounds of its utterance.

    The tiled rows are at most MAX, in tiles of BLOCK. Programs are numbered by tile, then head, then utterance, so that
    those that share keys are neighbours.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(MAX, BLOCK)
    first, head, b = pid % tiles * BLOCK, (pid // tiles % H).to(tl.int64), (pid // tiles // H).to(tl.int64)
    row = first + tl.arange(0, BLOCK)
    q_start, q_size, q_right = _bounds(CU_Q, b, B, ROWS_Q, MAX_Q)
    k_start, k_size, k_right = _bounds(CU_K, b, B, ROWS_K, MAX_K)
    return first, row, head, q_start, q_size, k_start, k_size, q_right, k_right


@triton.jit
def _tile(X, start, position, size, stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Addresses [position, BLOCK_E] in one head's rows from `start` on, and which of them are within `size` rows."""
    column = tl.arange(0, BLOCK_E)
    at = X + (start + position)[:, None] * stride + column[None, :]
    inside = (position < size)[:, None]
    if E != BLOCK_E:
        inside = inside & (column < E)[None, :]
    return at, inside


@triton.jit
def _rows(X, start, position, size, stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """The tile's values; 0 past `size` rows."""
    at, inside = _tile(X, start, position, size, stride, E, BLOCK_E)
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store_rows(X, x, start, position, size, stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    at, inside = _tile(X, start, position, size, stride, E, BLOCK_E)
    tl.store(at, x.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _scores(q, k, SCALE, PRECISION: tl.constexpr):
    """S in units of log 2."""
    return tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2E)


# What varies from batch to batch must not decide how a kernel is compiled.
VARYING = ["B", "ROWS_Q", "ROWS_K", "MAX_Q", "MAX_K"]


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["CU_Q", "CU_K"])
def _shrink_attention_fwd_kernel(
    Q, K, V, OUT, LSE, CU_Q, CU_K, SCALE, B, H, ROWS_Q, ROWS_K, MAX_Q, MAX_K,
    Q_ROW, Q_HEAD, K_ROW, K_HEAD, V_ROW, V_HEAD,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O and the log-sum-exp of one tile of queries of one head."""
    first, m, head, q_start, q_size, k_start, k_size, q_right, k_right = _place(
        CU_Q, CU_K, B, H, ROWS_Q, ROWS_K, MAX_Q, MAX_K, MAX_Q, BLOCK_M
    )
    if first >= q_size:
        return
    q = _rows(Q + head * Q_HEAD, q_start, m, q_size, Q_ROW, E, BLOCK_E)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for start in range(0, k_size, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _rows(K + head * K_HEAD, k_start, n, k_size, K_ROW, E, BLOCK_E)
        s = _scores(q, k, SCALE, PRECISION)
        s = tl.where((n < k_size)[None, :], s, float("-inf"))
        previous = highest
        highest = tl.maximum(previous, tl.max(s, 1))
        p = tl.exp2(s - highest[:, None])
        shrink = tl.exp2(previous - highest)
        total = total * shrink + tl.sum(p, 1)
        v = _rows(V + head * V_HEAD, k_start, n, k_size, V_ROW, E, BLOCK_E)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    total = tl.where(k_size == 0, 1.0, total)
    out = tl.where(q_right & k_right, out / total[:, None], float("nan"))  # invalid bounds must be seen
    _store_rows(OUT + head * E, out, q_start, m, q_size, H * E, E, BLOCK_E)
    tl.store(LSE + head * ROWS_Q + q_start + m, highest + tl.log2(total), mask=m < q_size)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["CU_Q", "CU_K"])
def _shrink_attention_dq_kernel(
    Q, K, V, OUT, DOUT, LSE, DELTA, DQ, CU_Q, CU_K, SCALE, B, H, ROWS_Q, ROWS_K, MAX_Q, MAX_K,
    Q_ROW, Q_HEAD, K_ROW, K_HEAD, V_ROW, V_HEAD,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries, and D of its rows for the other kernel."""
    first, m, head, q_start, q_size, k_start, k_size, _, _ = _place(
        CU_Q, CU_K, B, H, ROWS_Q, ROWS_K, MAX_Q, MAX_K, MAX_Q, BLOCK_M
    )
    if first >= q_size:
        return
    q = _rows(Q + head * Q_HEAD, q_start, m, q_size, Q_ROW, E, BLOCK_E)
    dout = _rows(DOUT + head * E, q_start, m, q_size, H * E, E, BLOCK_E)
    out = _rows(OUT + head * E, q_start, m, q_size, H * E, E, BLOCK_E)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    lse = tl.load(LSE + head * ROWS_Q + q_start + m, mask=m < q_size, other=0.0)
    tl.store(DELTA + head * ROWS_Q + q_start + m, delta, mask=m < q_size)
    dq = tl.zeros([BLOCK_M, BLOCK_E], dtype=tl.float32)
    for start in range(0, k_size, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        k = _rows(K + head * K_HEAD, k_start, n, k_size, K_ROW, E, BLOCK_E)
        v = _rows(V + head * V_HEAD, k_start, n, k_size, V_ROW, E, BLOCK_E)
        s = _scores(q, k, SCALE, PRECISION)
        p = tl.where((n < k_size)[None, :], tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    _store_rows(DQ + head * E, dq * SCALE, q_start, m, q_size, H * E, E, BLOCK_E)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["CU_Q", "CU_K"])
def _shrink_attention_dkv_kernel(
    Q, K, V, DOUT, LSE, DELTA, DK, DV, CU_Q, CU_K, SCALE, B, H, ROWS_Q, ROWS_K, MAX_Q, MAX_K,
    Q_ROW, Q_HEAD, K_ROW, K_HEAD, V_ROW, V_HEAD,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, summed over all queries of its utterance. The tiles of S are transposed."""
    first, n, head, q_start, q_size, k_start, k_size, _, _ = _place(
        CU_Q, CU_K, B, H, ROWS_Q, ROWS_K, MAX_Q, MAX_K, MAX_K, BLOCK_N
    )
    if first >= k_size:
        return
    k = _rows(K + head * K_HEAD, k_start, n, k_size, K_ROW, E, BLOCK_E)
    v = _rows(V + head * V_HEAD, k_start, n, k_size, V_ROW, E, BLOCK_E)
    dk = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_E], dtype=tl.float32)
    for start in range(0, q_size, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        q = _rows(Q + head * Q_HEAD, q_start, m, q_size, Q_ROW, E, BLOCK_E)
        lse = tl.load(LSE + head * ROWS_Q + q_start + m, mask=m < q_size, other=0.0)
        # Past the last query q = 0 and lse = 0, so P = 1; but the rows of dO are 0 there, so nothing is added.
        p = tl.exp2(_scores(k, q, SCALE, PRECISION) - lse[None, :])
        dout = _rows(DOUT + head * E, q_start, m, q_size, H * E, E, BLOCK_E)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        delta = tl.load(DELTA + head * ROWS_Q + q_start + m, mask=m < q_size, other=0.0)
        ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    _store_rows(DK + head * E, dk * SCALE, k_start, n, k_size, H * E, E, BLOCK_E)
    _store_rows(DV + head * E, dv, k_start, n, k_size, H * E, E, BLOCK_E)


def _launch(kernel, tile: Tile, over_keys: bool, tensors, query, key, value, cu_seqlens, longest, scale):
    """One program for each tile of queries (or keys) and head. `tensors`: the kernel's arguments before the bounds."""
    (rows_q, heads, size), batch = query.shape, cu_seqlens[0].numel() - 1
    tiles = triton.cdiv(longest[1], tile.block_n) if over_keys else triton.cdiv(longest[0], tile.block_m)
    strides = (stride for tensor in (query, key, value) for stride in tensor.stride()[:2])
    if tiles * heads * batch:
        kernel[(tiles * heads * batch,)](
            *tensors, *cu_seqlens, scale, batch, heads, rows_q, key.shape[0], *longest, *strides,
            E=size, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_E=max(triton.next_power_of_2(size), 16),
            PRECISION=input_precision(), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip


def _settings(query: Tensor) -> Config:
    return _config(query.shape[2], query.dtype, architecture(query.device))


def _check_bounds(name: str, cu_seqlens: Tensor, rows: int, longest: int) -> None:
    batch = cu_seqlens.numel() - 1
    if rows > batch * longest:
        raise ValueError(f"max_seqlen_{name} = {longest}, but {batch} utterances have {rows} rows")
    if cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.tolist()
    sizes = [stop - start for start, stop in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != rows or any(size < 0 for size in sizes):
        raise ValueError(f"cu_seqlens_{name} = {bounds}, but it must rise from 0 to {rows}, the packed rows")
    if batch and max(sizes) > longest:
        raise ValueError(f"max_seqlen_{name} = {longest}, but an utterance has {max(sizes)} rows")


def _without_keys(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows: int) -> Tensor:
    """bool [K, 1, 1]: queries of utterances without keys, where the padded result may hold anything."""
    row = torch.arange(rows, dtype=cu_seqlens_q.dtype, device=cu_seqlens_q.device)
    utterance = torch.searchsorted(cu_seqlens_q, row, right=True).sub_(1).clamp_(0, cu_seqlens_q.numel() - 2)
    return (cu_seqlens_k.diff() == 0)[utterance][:, None, None]


@torch.library.custom_op("soundwave::shrink_attention_fwd", mutates_args=())
@ranged("soundwave.shrink_attention")
def _forward(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, scale: float, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """O [K, H, E] and the log-sum-exp of S [H, K]; with Triton its logarithm is of base 2."""
    _check_bounds("q", cu_seqlens_q, query.shape[0], max_seqlen_q)
    _check_bounds("k", cu_seqlens_k, key.shape[0], max_seqlen_k)
    cu_seqlens = to_device(cu_seqlens_q, query.device), to_device(cu_seqlens_k, query.device)
    longest = max_seqlen_q, max_seqlen_k
    if impl == "torch":
        with torch.autocast(query.device.type, enabled=False):
            if query.device.type == "cpu":
                return flash_attention(query, key, value, *cu_seqlens, scale)
            out, lse = padded_attention(query, key, value, *cu_seqlens, *longest, scale)
        if query.shape[0]:
            out.masked_fill_(_without_keys(*cu_seqlens, query.shape[0]), 0.0)
        return out, lse
    out, lse = query.new_full(query.shape, torch.nan), query.new_empty(query.shape[1::-1], dtype=torch.float32)
    tensors, tile = (query, key, value, out, lse), _settings(query).fwd
    _launch(_shrink_attention_fwd_kernel, tile, False, tensors, query, key, value, cu_seqlens, longest, scale)
    return out, lse


@_forward.register_fake
def _(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, impl):
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty(query.shape[1::-1], dtype=wide)


@torch.library.custom_op("soundwave::shrink_attention_bwd", mutates_args=())
@ranged("soundwave.shrink_attention.backward")
def _backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, scale: float,
    need_dkv: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ, dK and dV; the last two are empty where they are not needed."""
    cu_seqlens = to_device(cu_seqlens_q, query.device), to_device(cu_seqlens_k, query.device)
    longest = max_seqlen_q, max_seqlen_k
    if impl == "torch":
        with torch.autocast(query.device.type, enabled=False):
            given = dout, query, key, value, out, lse, *cu_seqlens
            if query.device.type == "cpu":
                dq, dk, dv = flash_attention_backward(*given, scale)
            else:
                dq, dk, dv = padded_attention_backward(*given, *longest, scale)
        if query.shape[0] and query.device.type != "cpu":
            dq.masked_fill_(_without_keys(*cu_seqlens, query.shape[0]), 0.0)
        return (dq, dk, dv) if need_dkv else (dq, key.new_empty(0), value.new_empty(0))
    dout, delta, dq = dout.contiguous(), torch.empty_like(lse), query.new_empty(query.shape)
    dk, dv = (x.new_empty(x.shape if need_dkv else (0,)) for x in (key, value))
    config, rest = _settings(query), (query, key, value, cu_seqlens, longest, scale)
    tensors = (query, key, value, out, dout, lse, delta, dq)
    _launch(_shrink_attention_dq_kernel, config.dq, False, tensors, *rest)
    tensors = (query, key, value, dout, lse, delta, dk, dv)
    if need_dkv:
        _launch(_shrink_attention_dkv_kernel, config.dkv, True, tensors, *rest)
    return dq, dk, dv


@_backward.register_fake
def _(dout, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, need_dkv, impl):
    return query.new_empty(query.shape), *(x.new_empty(x.shape if need_dkv else (0,)) for x in (key, value))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.max_seqlen_q, ctx.max_seqlen_k, ctx.scale, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, _):
    if dout is None:
        return (None,) * 9
    query, key, value, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    gradients = _backward(
        dout, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, ctx.max_seqlen_q, ctx.max_seqlen_k, ctx.scale,
        need[1] or need[2], ctx.impl,
    )  # fmt: skip
    return *(gradient if needed else None for gradient, needed in zip(gradients, need, strict=True)), *[None] * 6


_forward.register_autograd(_autograd, setup_context=_setup_context)
no_second_derivative("shrink_attention", _backward)


def shrink_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, scale: float | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """[K, H, E]: attention of packed queries to the packed keys of the same utterance; 0 where it has none.

    Args:
        query: [K, H, E]; key, value: [N, H, E]; all of one dtype. Strides whose last is 1 are read in place.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], rising from 0 to K and to N.
        max_seqlen_q, max_seqlen_k: at least the longest utterance of each.
        scale: factor of the products before the softmax; None is 1 / sqrt(E).
        impl: "auto", "triton" (fp32, bf16, fp16; E up to 256) or "torch".

    Raises:
        ValueError: tensors that `impl` cannot take; bounds on the CPU that do not fit. Bounds on CUDA are not checked,
            because reading them would wait for the device: the rows that they concern become NaN.
    """
    impl = resolve_impl(impl, query.device)
    size = query.shape[2]
    if not query.shape[1] or not size:
        raise ValueError(
            f"query has shape {list(query.shape)}, but there must be a head at least, of one column or more"
        )
    if impl == "triton" and (query.dtype not in DTYPES or size > MAX_E):
        raise ValueError(
            f"query is {query.dtype} with heads of {size}, but impl='triton' takes float32, bfloat16 and float16 and "
            f"heads of at most {MAX_E}; impl='torch' takes all"
        )
    query, key, value = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    scale = size**-0.5 if scale is None else scale
    return _forward(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, impl)[0]
