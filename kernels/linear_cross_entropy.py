"""Cross-entropy of `softmax(hidden @ weight.T)` without the logits, its gradients formed in the forward pass.

    loss[n] = log_sum - (z[n, target] - maximum)       dH = P W - off · W_target        dW = Pᵀ H - scatter(off · H)

P is 0 at the row's target, and off, the off-label mass, is the sum of P: 1 - p[target], exact also where the model is
sure. The target's logit is a small product of its own in fp32; the others are formed in chunks of rows (see
vocab_rows). The gradients are those of each row's own loss, and backward multiplies them by the upstream gradient. For
dW, which is a sum over rows, that needs an upstream gradient of one number; with reduction "none" dW is computed in
backward.

Shapes    hidden [N, D], weight [V, D], target int [N], or any shape of N values (errors then name the place in that
          shape) -> scalar, or [N]. An ignored row costs nothing. With targets on the CPU nothing waits for a GPU; to
          leave out the ignored rows of targets on CUDA, the host waits once for their number.
Numerics  products in `product_dtype`; targets, softmax and sums in fp32 (fp64 if hidden or weight is).
Cost      4·N·V·D operations for a frozen head, 2 without a gradient, 6 if it is trained (8 with reduction "none").
          Memory: one chunk of logits, dH, and for a trained head dW in fp32.       Bitwise deterministic.
"""

import torch
from torch import Tensor

from soundwave.kernels.active_columns import Skipped, probabilities_times_weight
from soundwave.kernels.checks import needs_gradient, no_second_derivative, raise_or_defer, raise_pending
from soundwave.kernels.dispatch import ranged, to_device
from soundwave.kernels.linear_ctc_path import sum_dtype, without_autocast
from soundwave.kernels.vocab_rows import (
    RowStats,
    add_weight_gradient,
    gradient_dtype,
    p_factor,
    vocab_chunks,
)

TARGET_ROWS = 1024  # targets whose rows of the head are gathered at once: bounds the fp32 copy


def _valid_rows(target: Tensor, ignore_index: int, columns: int, validate: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Which of the N targets count: their places int64 [M]; `kept` and `wrong` bool [N]. Raises for the wrong ones.

    The host has to know M. It waits for targets on CUDA, and knows it of those on the CPU.
    """
    kept = target != ignore_index
    wrong = kept & ((target < 0) | (target >= columns))

    def message(*place_and_value: int) -> str:
        *place, value = place_and_value  # no place: target is a number
        return f"target{place or ''} = {value}, but it must be ignore_index or 0 to {columns - 1}, a row of weight"

    raise_pending()
    raise_or_defer(target, wrong, message, validate)
    kept, wrong = kept.flatten(), wrong.flatten()
    return (kept & ~wrong).nonzero()[:, 0], kept, wrong


def _target_logits(rows: Tensor, weight: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The logit of each row's own target: `rows` [M, D], `ids` [M] -> [M, 1]."""
    logits = rows.new_empty(len(rows), 1, dtype=dtype)
    for h, t, out in zip(*(x.split(TARGET_ROWS) for x in (rows, ids, logits)), strict=True):
        torch.sum(h.to(dtype) * weight[t].to(dtype), 1, keepdim=True, out=out)
    return logits


@without_autocast
def _run(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    product_dtype: torch.dtype,
    exact: bool,
    need_hidden: bool,
    need_weight: bool,
    impl: str,
    validate: bool,
    upstream: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [N], 0 where ignored; dH of each; dW of their sum, weighted by `upstream` [N]; how many rows count."""
    dtype = sum_dtype(hidden, weight)
    place, kept, wrong = _valid_rows(target, ignore_index, weight.shape[0], validate)
    ids = to_device(target.flatten()[place].to(torch.int64)[:, None], hidden.device)
    place, wrong, count = (to_device(x, hidden.device) for x in (place, wrong, kept.sum()))
    rows = hidden[place]
    target_logits = _target_logits(rows, weight, ids[:, 0], dtype)
    row_weight = sign = target_logits.new_ones(len(rows))
    greatest = target_logits.new_ones(())
    if upstream is not None and len(rows):
        factor = upstream[place].to(dtype)
        greatest = factor.abs().amax().clamp(min=torch.finfo(dtype).tiny)
        row_weight, sign = factor.abs() / greatest, factor.sign()
    dhidden = hidden.new_zeros(hidden.shape if need_hidden else 0, dtype=gradient_dtype(hidden))
    dweight = target_logits.new_zeros(weight.shape if need_weight else 0)
    stats = RowStats.empty(len(rows), target_logits)
    rows, product_weight = rows.to(product_dtype), weight.to(product_dtype)
    group = torch.arange(len(rows), device=hidden.device)
    scale = row_weight if need_hidden or need_weight else None
    for start, stop, p in vocab_chunks(rows, product_weight, target_logits, ids, group, scale, stats, impl):
        off_label = stats.off_label_mass[start:stop, None]
        if need_hidden:
            skipped = None if exact else Skipped.empty(stop - start, off_label)
            product = probabilities_times_weight(p, product_weight, off_label[:, 0], skipped, impl=impl)
            product.addcmul_(off_label, weight[ids[start:stop, 0]].to(dtype), value=-1)
            dhidden[place[start:stop]] = product.to(dhidden.dtype)
        if need_weight:
            of_target = -off_label * (row_weight[start:stop, None] * p_factor(p.dtype))
            p.scatter_(1, ids[start:stop], of_target.to(p.dtype))
            add_weight_gradient(dweight, p, rows[start:stop] * sign[start:stop, None].to(product_dtype))
    dweight *= greatest
    losses = target_logits.new_zeros(len(hidden))
    losses[place] = stats.log_sum + (torch.maximum(stats.maximum, target_logits[:, 0]) - target_logits[:, 0])
    losses.masked_fill_(wrong, torch.nan)
    return losses, dhidden, dweight, count


@torch.library.custom_op("soundwave::linear_cross_entropy_fwd", mutates_args=())
@ranged("soundwave.linear_cross_entropy_fwd")
def _linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    product_dtype: torch.dtype,
    impl: str,
    reduction: str,
    exact: bool,
    need_hidden: bool,
    need_weight: bool,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss; dH; dW, empty for reduction "none"; and the factor that the reduction gives both."""
    need_weight = need_weight and reduction != "none"
    losses, dhidden, dweight, count = _run(
        hidden, weight, target, ignore_index, product_dtype, exact, need_hidden, need_weight, impl, validate
    )
    scale = 1 / count.clamp(min=1).to(losses.dtype) if reduction == "mean" else losses.new_ones(())
    # As in torch the mean over no rows is NaN; its gradient is 0.
    loss = losses if reduction == "none" else losses.sum() / count if reduction == "mean" else losses.sum()
    return loss, dhidden, dweight, scale


@_linear_cross_entropy_fwd.register_fake
def _(
    hidden, weight, target, ignore_index, product_dtype, impl, reduction, exact, need_hidden, need_weight, validate
):  # fmt: skip
    loss = hidden.new_empty(hidden.shape[0] if reduction == "none" else (), dtype=sum_dtype(hidden, weight))
    dweight = loss.new_empty(weight.shape if need_weight and reduction != "none" else 0)
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0, dtype=gradient_dtype(hidden))
    return loss, dhidden, dweight, loss.new_empty(())


@torch.library.custom_op("soundwave::linear_cross_entropy_dweight", mutates_args=())
@ranged("soundwave.linear_cross_entropy_dweight")
def _linear_cross_entropy_dweight(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    product_dtype: torch.dtype,
    impl: str,
    grad: Tensor,
) -> Tensor:
    """dW for reduction "none": a sum over rows that cannot be formed before `grad` [N] is known."""
    _, _, dweight, _ = _run(hidden, weight, target, ignore_index, product_dtype, True, False, True, impl, False, grad)
    return dweight


@_linear_cross_entropy_dweight.register_fake
def _(hidden, weight, *_):
    return weight.new_empty(weight.shape, dtype=sum_dtype(hidden, weight))


@torch.library.custom_op("soundwave::linear_cross_entropy_bwd", mutates_args=())
@ranged("soundwave.linear_cross_entropy_bwd")
def _linear_cross_entropy_bwd(grad: Tensor, dhidden: Tensor, dweight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight; empty where the forward pass did not compute them."""
    raise_pending()
    grad = grad * scale
    rows, weight = torch.empty_like(dhidden), torch.empty_like(dweight)
    if dhidden.dim() == 2:
        torch.mul(dhidden, grad.expand(len(dhidden))[:, None], out=rows)
    if dweight.dim() == 2:
        torch.mul(dweight, grad, out=weight)
    return rows, weight


@_linear_cross_entropy_bwd.register_fake
def _(grad, dhidden, dweight, scale):
    return torch.empty_like(dhidden), torch.empty_like(dweight)


def _setup_context(ctx, inputs, output):
    ctx.settings, reduction = inputs[3:6], inputs[6]
    ctx.need_hidden, ctx.need_weight = inputs[8:10]
    ctx.again = ctx.need_weight and reduction == "none"
    ctx.hidden_dtype, ctx.weight_dtype = inputs[0].dtype, inputs[1].dtype
    ctx.save_for_backward(*output[1:], *(inputs[:3] if ctx.again else ()))
    ctx.mark_non_differentiable(output[3])  # dH and dW stay: a second derivative reaches them and is refused
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 11
    dhidden, dweight = _linear_cross_entropy_bwd(grad, *ctx.saved_tensors[:3])
    if ctx.again:
        dweight = _linear_cross_entropy_dweight(*ctx.saved_tensors[3:], *ctx.settings, grad)
    dweight = dweight.to(ctx.weight_dtype) if ctx.need_weight else None
    return dhidden.to(ctx.hidden_dtype) if ctx.need_hidden else None, dweight, *[None] * 9


_linear_cross_entropy_fwd.register_autograd(_autograd, setup_context=_setup_context)
no_second_derivative("linear_cross_entropy", _linear_cross_entropy_bwd, _linear_cross_entropy_dweight)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    product_dtype: torch.dtype,
    impl: str,
    reduction: str,
    exact: bool,
    validate: bool,
) -> Tensor:
    """The loss, a scalar or [N], of hidden [N, D]. target holds N values in any shape. `impl` is "triton" or "torch".

    Raises:
        ValueError: a target that is no row of `weight`, at once or later (see `checks`).
    """
    return _linear_cross_entropy_fwd(
        hidden, weight, target, ignore_index, product_dtype, impl, reduction, exact, needs_gradient(hidden),
        needs_gradient(weight), validate,
    )[0]  # fmt: skip
