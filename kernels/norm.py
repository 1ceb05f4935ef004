"""Residual + LayerNorm: add a sublayer's output to the residual stream and normalise each row.

    s = x + r        y = w · x̂ + b,   x̂ = (s - mean s) · rstd,   rstd = 1 / sqrt(var s + eps)
    g = w · dy       ds = rstd · (g - mean g - x̂ · mean(g · x̂)) + (the gradient of s itself)
    dx = dr = ds     dw = Σ_n dy · x̂     db = Σ_n dy

r is a row of `residual`: row n, or row `index[n]`. The gathered rows are never stored.

Shapes    x [N, D], residual [N, D], or [R, D] with index int64 [N], no row twice; weight, bias [D] -> y [N, D] and, on
          request, s [N, D].
Numerics  everything in fp32 (fp64 for fp64 input). s is rounded only if it is returned; then y is the norm of the
          rounded s, which backward reads again. y and s have the promoted dtype of x and residual. For dw and db each
          of a fixed number of programs sums its rows, and then these sums are added up: no atomics.
Cost      forward 3·N·D elements moved (4 with s), backward 4·N·D (one more for the gradient of s) and
          2·PROGRAMS·D of fp32 sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from soundwave.kernels.checks import no_second_derivative
from soundwave.kernels.dispatch import ranged, resolve_impl

MAX_D = 8192  # one row in registers, 16 elements a thread of 16 warps; Llama 70B, the widest in use, has 8192
PROGRAMS = 256  # of backward: one wave of two blocks on each of the 128 to 132 multiprocessors of the larger cards

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


class Config(NamedTuple):
    """Launch settings. `together`: one pass of backward computes the gradients of both rows and parameters."""

    block_d: int
    num_warps: int
    together: bool


def _config(width: int) -> Config:
    """Settings for every architecture and dtype: registers depend on the width alone, shared memory is for reductions.

    512 elements a warp are 16 a thread. Backward holds six such vectors and takes up to 128 registers (150 on sm_120).
    With 16 warps the limit is 128, and some architectures spill; so the gradients of the parameters then have a pass of
    their own.
    """
    block_d = max(triton.next_power_of_2(width), 32)
    return Config(block_d, min(max(block_d // 512, 1), 16), together=block_d <= 4096)


@triton.jit(do_not_specialize=["R"])
def _add_layer_norm_fwd_kernel(
    X, RESIDUAL, INDEX, WEIGHT, BIAS, Y, SUM, MEAN, RSTD, R, D,
    EPS: tl.constexpr, HAS_INDEX: tl.constexpr, STORE_SUM: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    row, known = n, True
    if HAS_INDEX:
        row = tl.load(INDEX + n).to(tl.int64)
        known = (row >= 0) & (row < R)
    # A row that does not exist gives NaN; its address is not read.
    residual = tl.load(RESIDUAL + row * D + column, mask=inside & known, other=float("nan")).to(COMPUTE)
    total = tl.load(X + n * D + column, mask=inside, other=0.0).to(COMPUTE) + residual
    if STORE_SUM:
        stored = total.to(SUM.dtype.element_ty)
        tl.store(SUM + n * D + column, stored, mask=inside)
        total = stored.to(COMPUTE)
    total = tl.where(inside, total, 0.0)
    mean = tl.sum(total, 0) / D
    centred = tl.where(inside, total - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS)
    weight = tl.load(WEIGHT + column, mask=inside, other=0.0).to(COMPUTE)
    bias = tl.load(BIAS + column, mask=inside, other=0.0).to(COMPUTE)
    tl.store(Y + n * D + column, (centred * rstd * weight + bias).to(Y.dtype.element_ty), mask=inside)
    tl.store(MEAN + n, mean)
    tl.store(RSTD + n, rstd)


@triton.jit(do_not_specialize=["N", "R"])
def _add_layer_norm_bwd_kernel(
    DY, DSUM, X, RESIDUAL, INDEX, WEIGHT, MEAN, RSTD, DX, DRESIDUAL, DWEIGHT, DBIAS, N, R, D,
    HAS_INDEX: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_DSUM: tl.constexpr, STORE_DX: tl.constexpr,
    STORE_DRESIDUAL: tl.constexpr, STORE_DPARAMS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < D
    dweight = tl.zeros([BLOCK_D], dtype=COMPUTE)
    dbias = tl.zeros([BLOCK_D], dtype=COMPUTE)
    programs = tl.num_programs(0)
    for step in range(0, tl.cdiv(N - program, programs)):
        n = program + step * programs
        start = n * D
        row, known = n, True
        if HAS_INDEX:
            row = tl.load(INDEX + n).to(tl.int64)
            known = (row >= 0) & (row < R)
        total = tl.load(X + start + column, mask=inside, other=0.0).to(COMPUTE)
        if HAS_RESIDUAL:
            total += tl.load(RESIDUAL + row * D + column, mask=inside & known, other=0.0).to(COMPUTE)
        rstd = tl.load(RSTD + n)  # NaN if the row of the residual does not exist
        xhat = (total - tl.load(MEAN + n)) * rstd  # past D every use multiplies it by dy = 0
        dy = tl.load(DY + start + column, mask=inside, other=0.0).to(COMPUTE)
        if STORE_DPARAMS:
            dweight += dy * xhat
            dbias += dy
        if STORE_DX or STORE_DRESIDUAL:
            # Read again for every row, from the cache: with it in registers they are more than 128, and one block fits.
            scaled = dy * tl.load(WEIGHT + column, mask=inside, other=0.0).to(COMPUTE)
            along = tl.sum(scaled * xhat, 0) / D
            dtotal = (scaled - tl.sum(scaled, 0) / D - xhat * along) * rstd
            if HAS_DSUM:
                dtotal += tl.load(DSUM + start + column, mask=inside, other=0.0).to(COMPUTE)
            if STORE_DX:
                tl.store(DX + start + column, dtotal.to(DX.dtype.element_ty), mask=inside)
            if STORE_DRESIDUAL:
                to = DRESIDUAL + row * D + column
                tl.store(to, dtotal.to(DRESIDUAL.dtype.element_ty), mask=inside & known)
    if STORE_DPARAMS:
        tl.store(DWEIGHT + program * D + column, dweight, mask=inside)
        tl.store(DBIAS + program * D + column, dbias, mask=inside)


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _check_index(index: Tensor, rows: int) -> None:
    """ValueError for rows that do not exist or come twice. Triton's path skips this, as the host would have to wait."""
    wrong = ((index < 0) | (index >= rows)).nonzero()
    if wrong.numel():
        n = int(wrong[0])
        raise ValueError(f"residual_index[{n}] = {int(index[n])}, but residual has {rows} rows")
    in_order = index.sort().values
    twice = (in_order[1:] == in_order[:-1]).nonzero()
    if twice.numel():
        raise ValueError(f"residual_index holds {int(in_order[twice[0]])} twice, but its rows must differ")


@torch.library.custom_op("soundwave::add_layer_norm_fwd", mutates_args=())
@ranged("soundwave.add_layer_norm")
def _forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_index: Tensor | None,
    eps: float,
    return_sum: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, s (empty without `return_sum`), and mean and rstd of each row."""
    rows, width = x.shape
    compute, dtype = _compute_dtype(x, residual, weight), torch.promote_types(x.dtype, residual.dtype)
    if impl == "torch":
        if residual_index is not None:
            _check_index(residual_index, residual.shape[0])
            residual = residual[residual_index]
        total = x.to(compute) + residual.to(compute)
        stored = x.new_empty(x.shape if return_sum else 0, dtype=dtype)
        if return_sum:
            total = stored.copy_(total).to(compute)
        y, mean, rstd = torch.native_layer_norm(total, (width,), weight.to(compute), bias.to(compute), eps)
        return y.to(dtype), stored, mean.view(rows), rstd.view(rows)
    x, residual, weight, bias = (tensor.contiguous() for tensor in (x, residual, weight, bias))
    y, stored = x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape if return_sum else 0, dtype=dtype)
    mean, rstd = x.new_empty(rows, dtype=compute), x.new_empty(rows, dtype=compute)
    config = _config(width)
    if rows:
        index = x if residual_index is None else residual_index.contiguous()
        _add_layer_norm_fwd_kernel[(rows,)](
            x, residual, index, weight, bias, y, stored, mean, rstd, residual.shape[0], width,
            EPS=eps, HAS_INDEX=residual_index is not None, STORE_SUM=return_sum, COMPUTE=TRITON_DTYPE[compute],
            BLOCK_D=config.block_d, num_warps=config.num_warps,
        )  # fmt: skip
    return y, stored, mean, rstd


@_forward.register_fake
def _(x, residual, weight, bias, residual_index, eps, return_sum, impl):
    compute, dtype = _compute_dtype(x, residual, weight), torch.promote_types(x.dtype, residual.dtype)
    stored = x.new_empty(x.shape if return_sum else (0,), dtype=dtype)
    mean, rstd = (x.new_empty(x.shape[0], dtype=compute) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), stored, mean, rstd


@torch.library.custom_op("soundwave::add_layer_norm_bwd", mutates_args=())
@ranged("soundwave.add_layer_norm.backward")
def _backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    residual_index: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual_rows: int,
    dx_dtype: torch.dtype,
    dresidual_dtype: torch.dtype,
    need_dx: bool,
    need_dresidual: bool,
    need_dparams: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, dweight and dbias; empty if not needed. If `residual` is None, `x` is s itself."""
    (rows, width), compute = dy.shape, mean.dtype
    dx = x.new_empty((rows if need_dx else 0, width), dtype=dx_dtype)
    dresidual = x.new_zeros((residual_rows if need_dresidual else 0, width), dtype=dresidual_dtype)
    if impl == "torch":
        total = x.to(compute)
        if residual is not None:
            total = total + (residual if residual_index is None else residual[residual_index]).to(compute)
        wanted = (need_dx or need_dresidual, need_dparams, need_dparams)
        dtotal, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dy.to(compute).contiguous(), total.contiguous(), (width,), mean[:, None], rstd[:, None],
            weight.to(compute), bias.to(compute), wanted,
        )  # fmt: skip
        if dtotal is not None and dsum is not None:
            dtotal += dsum
        if need_dx:
            dx.copy_(dtotal)
        if need_dresidual:
            dresidual[slice(None) if residual_index is None else residual_index] = dtotal.to(dresidual_dtype)
    else:
        x, residual, dy, weight = (t if t is None else t.contiguous() for t in (x, residual, dy, weight))
        config, programs = _config(width), min(rows, PROGRAMS)
        dweight, dbias = (x.new_empty((programs if need_dparams else 0, width), dtype=compute) for _ in range(2))
        passes = [(need_dx, need_dresidual, need_dparams)]
        if not config.together:
            passes = [(need_dx, need_dresidual, False), (False, False, need_dparams)]
        index = x if residual_index is None else residual_index.contiguous()
        for store_dx, store_dresidual, store_dparams in passes:
            if not programs or not (store_dx or store_dresidual or store_dparams):
                continue
            _add_layer_norm_bwd_kernel[(programs,)](
                dy, dy if dsum is None else dsum.contiguous(), x, x if residual is None else residual, index, weight,
                mean, rstd, dx, dresidual, dweight, dbias, rows, residual_rows, width,
                HAS_INDEX=residual_index is not None, HAS_RESIDUAL=residual is not None, HAS_DSUM=dsum is not None,
                STORE_DX=store_dx, STORE_DRESIDUAL=store_dresidual, STORE_DPARAMS=store_dparams,
                COMPUTE=TRITON_DTYPE[compute], BLOCK_D=config.block_d, num_warps=config.num_warps,
            )  # fmt: skip
        dweight, dbias = dweight.sum(0), dbias.sum(0)
    if not need_dparams:
        dweight, dbias = weight.new_empty(0), bias.new_empty(0)
    return dx, dresidual, dweight.to(weight.dtype), dbias.to(bias.dtype)


@_backward.register_fake
def _(
    dy, dsum, x, residual, residual_index, weight, bias, mean, rstd, residual_rows, dx_dtype, dresidual_dtype, need_dx,
    need_dresidual, need_dparams, impl,
):  # fmt: skip
    rows, width = dy.shape
    return (
        x.new_empty((rows if need_dx else 0, width), dtype=dx_dtype),
        x.new_empty((residual_rows if need_dresidual else 0, width), dtype=dresidual_dtype),
        weight.new_empty(width if need_dparams else 0),
        bias.new_empty(width if need_dparams else 0),
    )


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, residual_index, ctx.eps, ctx.return_sum, ctx.impl = inputs
    _, stored, mean, rstd = output
    kept = (stored, None) if ctx.return_sum else (x, residual)
    ctx.save_for_backward(*kept, residual_index, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.residual_rows, ctx.dtypes = residual.shape[0], (x.dtype, residual.dtype)


def _autograd(ctx, dy, dsum, *_):
    x, residual, residual_index, weight, bias, mean, rstd = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
    if dy is None:  # only s has a gradient
        dy = torch.zeros_like(x) if dsum is None else torch.zeros_like(dsum)
    # Without an index both gradients are the same numbers; if the dtypes agree too, one tensor serves both.
    shared = residual_index is None and ctx.dtypes[0] == ctx.dtypes[1]
    dx, dresidual, dweight, dbias = _backward(
        dy, dsum if ctx.return_sum else None, x, residual, residual_index, weight, bias, mean, rstd, ctx.residual_rows,
        *ctx.dtypes, need_x or (need_residual and shared), need_residual and not shared, need_weight or need_bias,
        ctx.impl,
    )  # fmt: skip
    if shared:
        dresidual = dx
    gradients = (dx, dresidual, dweight, dbias)
    needed = (need_x, need_residual, need_weight, need_bias)
    return *(g if need else None for g, need in zip(gradients, needed, strict=True)), None, None, None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)
no_second_derivative("add_layer_norm", _backward)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    impl: str = "auto",
    *,
    residual_index: Tensor | None = None,
    return_sum: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm of each row of `x + residual`; with `return_sum` (y, s), where s is the sum.

    Args:
        x: [N, D] of fp32, fp64, bf16 or fp16; D at most 8192 with Triton.
        residual: [N, D], or [R, D] with `residual_index`; its dtype may differ.
        weight, bias: [D].
        residual_index: int [N], the row of `residual` for each row of x, no row twice. Wrong ones are a ValueError with
            torch. With Triton a row that does not exist gives NaN, and one that comes twice gets one of its gradients.
    """
    impl = resolve_impl(impl, x.device)
    if impl == "triton" and x.shape[1] > MAX_D:
        raise ValueError(f"x has D = {x.shape[1]} columns, but impl = 'triton' takes up to {MAX_D}")
    y, total, _, _ = _forward(x, residual, weight, bias, residual_index, eps, return_sum, impl)
    return (y, total) if return_sum else y
