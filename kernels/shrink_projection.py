"""Projections of the shrinking adapter: queries of the kept rows of x, which are read in place; keys and values.

    q[i] = W_q x[index[i]] + b_q      k[n] = W_k x[rows[n]] + b_k      v[n] = W_v x[rows[n]] + b_v
    dx[rows[n]] = W_kᵀ dk[n] + W_vᵀ dv[n], other rows 0, and then dx[index[i]] += W_qᵀ dq[i]
    dW_q = Σ_i dq[i] x[index[i]]ᵀ     dW_k = Σ_n dk[n] x[rows[n]]ᵀ     db_q = Σ_i dq[i]     ...

Shapes    x [R, D]; index int64 [K] and rows int64 [N], each rising, so no row comes twice; weight [3·D, D] and bias
          [3·D], those of query, key and value stacked -> q [K, D], k and v [N, D]. If `rows` is None, k and v are those
          of every row of x. With `kept` they are those of the kept rows: one product q [K, 3·D], without k and v.
Numerics  products in the dtype of the weight, to which rows of x are cast when they are read, with fp32 sums. In dx a
          kept row is the sum of two parts, added in the dtype of x.
Cost      2·D² operations for each query, key and value, three times that with backward. With Triton x[index] is never
          stored, and dx is written once, because the part of the queries is added to its rows in place.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from soundwave.kernels.checks import no_second_derivative
from soundwave.kernels.dispatch import architecture, input_precision, ranged, resolve_impl

GROUP = 8  # tiles of rows that run next to each other, so that the tiles of W they share stay in the L2 cache
TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Config(NamedTuple):
    """Rows (i), columns (j) and terms of the sum (r) of one step, and launch settings."""

    block_i: int
    block_j: int
    block_r: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def _config(dtype: torch.dtype, aligned: bool, arch: int, mixed: bool) -> Config:
    """Settings for a product in `dtype`. `aligned`: all strides are multiples of 16, so that a load takes 16 bytes.

    A step reads about 16 KB for 128 x 128 outputs. 64 x 64 where more would spill: in fp32, and without `aligned`,
    because the addresses of single elements take registers. sm_90 to sm_11x have shared memory for 64 terms a step.
    `mixed`: x is wider than the weight. Then a limit of 255 registers, which is none, keeps ptxas from taking 128 for
    the sake of a second block and spilling two, as it does under Triton 3.6.
    """
    if dtype == torch.float32 or not aligned:
        return Config(64, 64, 32, 8, 2)
    return Config(128, 128, 64 if 90 <= arch < 120 else 32, 8, 3, 255 if mixed else None)


def shrink_projection_ref(
    x: Tensor, index: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: q, k and v."""
    parts = zip((index, rows, rows), weight.chunk(3), bias.chunk(3), strict=True)
    q, k, v = (F.linear(x if at is None else x[at], w, b) for at, w, b in parts)
    return q, k, v


@triton.jit(do_not_specialize=["COUNT", "ROWS"])  # the numbers of kept and of all frames
def _gather_matmul_kernel(
    A, B, BIAS, INDEX, C, COUNT, SIZE, SIZE_J, ROWS, A_I, A_R, B_R, B_J, C_I,
    GATHER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """C[i, j] = Σ_r A[i, r] B[r, j]. INDEX gives the rows of one of them, and GATHER says which: "a", "b" or "c".

    INDEX has COUNT rows; these are the terms of the sum for "b", else the rows of C. The other number is SIZE.
    With "a" BIAS[j] is added, with "c" the former value of C. Where an indexed row does not exist, C is NaN for "a",
    the term is left out for "b", and nothing is stored for "c".
    """
    pid = tl.program_id(0)
    SIZE_I, SIZE_R = COUNT, SIZE
    if GATHER == "b":
        SIZE_I, SIZE_R = SIZE, COUNT
    tiles_i, tiles_j = tl.cdiv(SIZE_I, BLOCK_I), tl.cdiv(SIZE_J, BLOCK_J)
    group, within = pid // (GROUP * tiles_j), pid % (GROUP * tiles_j)
    together = tl.minimum(tiles_i - group * GROUP, GROUP)
    i = (group * GROUP + within % together) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = (within // together) * BLOCK_J + tl.arange(0, BLOCK_J)
    # Offsets are int64: K rows of 3·D columns pass 2^31 at K = 174 763 for D = 4096.
    row, column = i.to(tl.int64), j.to(tl.int64)
    known = i < SIZE_I
    if GATHER != "b":
        row = tl.load(INDEX + i, mask=i < SIZE_I, other=-1)
        known = (row >= 0) & (row < ROWS)
    row_a = row if GATHER == "a" else i.to(tl.int64)
    row_c = row if GATHER == "c" else i.to(tl.int64)
    A_ROW, B_COLUMN = A + row_a[:, None] * A_I, B + column[None, :] * B_J
    total = tl.zeros([BLOCK_I, BLOCK_J], dtype=tl.float32)
    for first in range(0, SIZE_R, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        term = r.to(tl.int64)
        row_b = term
        known_b = r < SIZE_R
        if GATHER == "b":
            row_b = tl.load(INDEX + r, mask=r < SIZE_R, other=-1)
            known_b = (row_b >= 0) & (row_b < ROWS)
        a = tl.load(A_ROW + term[None, :] * A_R, mask=known[:, None] & (r < SIZE_R)[None, :], other=0.0)
        b = tl.load(B_COLUMN + row_b[:, None] * B_R, mask=known_b[:, None] & (j < SIZE_J)[None, :], other=0.0)
        total = tl.dot(a.to(DTYPE), b.to(DTYPE), total, input_precision=PRECISION)
    if GATHER == "a":
        total += tl.load(BIAS + j, mask=j < SIZE_J, other=0.0).to(tl.float32)[None, :]
        total = tl.where(known[:, None], total, float("nan"))
        known = i < SIZE_I
    at_c = C + row_c[:, None] * C_I + j[None, :]
    inside = known[:, None] & (j < SIZE_J)[None, :]
    if GATHER == "c":
        total += tl.load(at_c, mask=inside, other=0.0).to(tl.float32)
    tl.store(at_c, total.to(C.dtype.element_ty), mask=inside)


def _gather_matmul(gather: str, a: Tensor, b: Tensor, bias: Tensor | None, index: Tensor, c: Tensor) -> None:
    """`a` @ `b` into `c`. `gather` names the tensor whose rows `index` gives. Any of them may be transposed."""
    dtype = (a if gather == "b" else b).dtype  # that of the weight; x may have a wider one
    count, (size_i, size_r) = index.shape[0], a.shape
    if gather == "a":
        size_i = count
    rows, size_j = {"a": a, "b": b, "c": c}[gather].shape[0], b.shape[1]
    aligned = not any(stride % 16 for stride in (*a.stride(), *b.stride(), c.stride(0)) if stride != 1)
    config = _config(dtype, aligned, architecture(a.device), a.dtype != b.dtype or c.dtype != dtype)
    grid = (triton.cdiv(size_i, config.block_i) * triton.cdiv(size_j, config.block_j),)
    if grid[0]:
        _gather_matmul_kernel[grid](
            a, b, bias, index.contiguous(), c, count, size_i if gather == "b" else size_r, size_j, rows, *a.stride(),
            *b.stride(), c.stride(0),
            GATHER=gather, DTYPE=TRITON_DTYPE[dtype], GROUP=GROUP,
            PRECISION=input_precision(),
            BLOCK_I=config.block_i, BLOCK_J=config.block_j, BLOCK_R=config.block_r,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.maxnreg,
        )  # fmt: skip


def _check_index(name: str, index: Tensor, rows: int) -> None:
    """ValueError unless `index` rises within `rows`. Triton's path skips this, as the host would have to wait."""
    wrong = ((index < 0) | (index >= rows)).nonzero()
    if wrong.numel():
        i = int(wrong[0])
        raise ValueError(f"{name}[{i}] = {int(index[i])}, but there are {rows} rows")
    wrong = (index.diff() <= 0).nonzero()
    if wrong.numel():
        i = int(wrong[0]) + 1
        raise ValueError(f"{name}[{i}] = {int(index[i])} comes after {int(index[i - 1])}, but {name} must rise")


def _take(x: Tensor, rows: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (x if rows is None else x.index_select(0, rows)).to(dtype)


@torch.library.custom_op("soundwave::shrink_projection_fwd", mutates_args=())
@ranged("soundwave.shrink_projection")
def _forward(
    x: Tensor, index: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor, kept: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v. With `kept` q holds all three, and k and v are empty."""
    count, width = x.shape
    columns = 3 * width if kept else width
    with torch.autocast(x.device.type, enabled=False):
        if impl == "torch":
            _check_index("index", index, count)
            q = F.linear(_take(x, index, weight.dtype), weight[:columns], bias[:columns])
        else:
            q = weight.new_empty(index.shape[0], columns)
            _gather_matmul("a", x, weight[:columns].t(), bias.contiguous(), index, q)
        if kept:
            return q, weight.new_empty(0), weight.new_empty(0)
        context = _take(x, rows, weight.dtype)
        k, v = (F.linear(context, weight[n : n + width], bias[n : n + width]) for n in (width, 2 * width))
        return q, k, v


@_forward.register_fake
def _(x, index, rows, weight, bias, kept, impl):
    width = x.shape[1]
    shape = 0 if kept else ((x if rows is None else rows).shape[0], width)
    q = weight.new_empty(index.shape[0], 3 * width if kept else width)
    return q, weight.new_empty(shape), weight.new_empty(shape)


@torch.library.custom_op("soundwave::shrink_projection_bwd", mutates_args=())
@ranged("soundwave.shrink_projection.backward")
def _backward(
    dq: Tensor, dk: Tensor | None, dv: Tensor | None, x: Tensor, index: Tensor, rows: Tensor | None, weight: Tensor,
    need_x: bool, need_weight: bool, need_bias: bool, impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dW and db; empty if not needed. If dk and dv are None, dq holds all three."""
    width, dtype = x.shape[1], weight.dtype
    gradients = [dq] if dk is None else [dq, dk, dv]
    dbias = torch.cat([gradient.sum(0) for gradient in gradients]) if need_bias else weight.new_empty(0)
    dweight = weight.new_empty(weight.shape if need_weight else (0,))
    dx = x.new_zeros(x.shape if need_x and (dk is None or rows is not None) else (0,))
    with torch.autocast(x.device.type, enabled=False):
        if dk is not None and need_weight:
            context = _take(x, rows, dtype)
            torch.mm(dk.t(), context, out=dweight[width : 2 * width])
            torch.mm(dv.t(), context, out=dweight[2 * width :])
        if dk is not None and need_x:
            dcontext = torch.mm(dk, weight[width : 2 * width]).addmm_(dv, weight[2 * width :]).to(x.dtype)
            dx = dcontext if rows is None else dx.index_copy_(0, rows, dcontext)
        columns = dq.shape[1]
        if impl == "triton":
            dq = dq.contiguous()
            if need_weight:
                _gather_matmul("b", dq.t(), x, None, index, dweight[:columns])
            if need_x:
                _gather_matmul("c", dq, weight[:columns], None, index, dx)
            return dx, dweight, dbias
        if need_weight:
            torch.mm(dq.t(), _take(x, index, dtype), out=dweight[:columns])
        if need_x:
            dx.index_add_(0, index, torch.mm(dq, weight[:columns]).to(x.dtype))
    return dx, dweight, dbias


@_backward.register_fake
def _(dq, dk, dv, x, index, rows, weight, need_x, need_weight, need_bias, impl):
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    x, index, rows, weight, _, ctx.kept, ctx.impl = inputs
    ctx.save_for_backward(x, index, rows, weight)


def _autograd(ctx, dq, dk, dv):
    need_x, _, _, need_weight, need_bias, _, _ = ctx.needs_input_grad
    if ctx.kept:
        dk = dv = None
    dx, dweight, dbias = _backward(dq, dk, dv, *ctx.saved_tensors, need_x, need_weight, need_bias, ctx.impl)
    none = (None, None)
    return dx if need_x else None, *none, dweight if need_weight else None, dbias if need_bias else None, *none


_forward.register_autograd(_autograd, setup_context=_setup_context)
no_second_derivative("shrink_projection", _backward)


def shrink_projection(
    x: Tensor, index: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor, *, kept: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q [K, D], queries of the kept rows; k and v [N, D], keys and values of `rows`, or with `kept` of the kept rows.

    Args:
        x: [R, D]; outside autocast of the weight's dtype.
        index: int64 [K], rising: the kept rows.
        rows: int64 [N], rising: the rows that have keys and values; None for every row of x. Ignored with `kept`.
        weight, bias: [3·D, D] and [3·D] of query, key and value. Under autocast products run in its dtype.
        impl: "auto", "triton" (fp32, bf16, fp16) or "torch".

    Raises:
        ValueError: dtypes that do not fit; with torch also an index that does not rise or is no row of x. With Triton
            such a row of q is NaN, and a row that comes twice gets one of its gradients.
    """
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # not on meta
    if autocast and torch.float64 not in (x.dtype, weight.dtype):
        weight, bias = (tensor.to(torch.get_autocast_dtype(kind)) for tensor in (weight, bias))
    elif x.dtype != weight.dtype:
        raise ValueError(f"x is {x.dtype}, but weight is {weight.dtype}: they must agree outside autocast")
    impl = resolve_impl(impl, x.device)
    if impl == "triton" and not {x.dtype, weight.dtype} <= set(TRITON_DTYPE):
        raise ValueError(f"x is {x.dtype}, but impl='triton' takes float32, bfloat16 and float16; impl='torch' all")
    q, k, v = _forward(x, index, None if kept else rows, weight, bias, kept, impl)
    return q.chunk(3, dim=1) if kept else (q, k, v)
