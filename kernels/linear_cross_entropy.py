"""Cross-entropy of `softmax(hidden @ weight.T)` without the logits, its gradients formed in the forward pass.

    loss[n] = log_sum - (z[n, target] - maximum)       dH = P W - off · W_target        dW = Pᵀ H - scatter(off · H)

P is 0 at the row's target, and off, the off-label mass, is the sum of P: 1 - p[target], exact also where the model is
sure. The target's logit is a small product of its own in fp32; the others are formed in chunks of rows (see
vocab_rows). The gradients are those of each row's own loss, and backward multiplies them by the upstream gradient. For
dW, which is a sum over rows, that needs an upstream gradient of one number; with reduction "none" dW is computed in
backward. So is everything else that depends on the gradient of lse.

With bias, class weights, label smoothing, softcap or z-loss the formulas are those of linear_cross_entropy_steps, the
chunks are the same, and so is the number of products.

Shapes    hidden [N, D], weight [V, D], target int [N], or any shape of N values (errors then name the place in that
          shape) -> scalar, or [N]; lse [N]. An ignored row costs nothing. With targets on the CPU nothing waits for a
          GPU; to leave out the ignored rows of targets on CUDA, the host waits once for their number.
Numerics  products in `product_dtype`; targets, softmax and sums in fp32 (fp64 if hidden or weight is).
Cost      4·N·V·D operations for a frozen head, 2 without a gradient, 6 if it is trained (8 with reduction "none"); as
          many again in backward for the gradient of lse. Memory: one chunk of logits, dH, and for a trained head dW in
          fp32.       Bitwise deterministic.
"""

import torch
from torch import Tensor

from soundwave.kernels.active_columns import Skipped, probabilities_times_weight
from soundwave.kernels.checks import needs_gradient, no_second_derivative, raise_pending
from soundwave.kernels.dispatch import ranged
from soundwave.kernels.linear_cross_entropy_steps import (
    Needed,
    Options,
    Results,
    rows_that_count,
    run_with_options,
    target_logits,
)
from soundwave.kernels.linear_ctc_path import sum_dtype, without_autocast
from soundwave.kernels.vocab_rows import RowStats, add_weight_gradient, gradient_dtype, p_factor, vocab_chunks


@without_autocast
def _run(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    product_dtype: torch.dtype,
    exact: bool,
    with_lse: bool,
    need: Needed,
    impl: str,
    validate: bool,
    upstream: Tensor | None = None,
    each: bool = False,
) -> Results:
    """Without options. The gradients are those of each row's loss; with `upstream` [N] dW alone, weighted by it.

    `each`: what is skipped must be small for each row alone, because the losses will be weighed later.
    """
    dtype = sum_dtype(hidden, weight)
    valid = rows_that_count(hidden, target, ignore_index, weight.shape[0], validate)
    place, rows, ids = valid.place, valid.hidden, valid.target[:, None]
    own = target_logits(valid, weight, dtype)
    row_weight = sign = own.new_ones(len(rows))
    greatest = None
    if upstream is not None and len(rows):
        factor = upstream[place].to(dtype)
        greatest = factor.abs().amax().clamp(min=torch.finfo(dtype).tiny)
        row_weight, sign = factor.abs() / greatest, factor.sign()
    dhidden = hidden.new_zeros(hidden.shape if need.hidden else 0, dtype=gradient_dtype(hidden))
    dweight = (own.new_empty if len(rows) else own.new_zeros)(weight.shape if need.weight else 0)
    stats = RowStats.empty(len(rows), own)
    rows, product_weight = rows.to(product_dtype), weight.to(product_dtype)
    group = torch.arange(len(rows), device=hidden.device)
    scale = row_weight if any(need) else None
    for start, stop, p in vocab_chunks(rows, product_weight, own, ids, group, scale, stats, impl):
        off_label = stats.off_label_mass[start:stop, None]
        if need.hidden:
            skipped = None if exact else Skipped.empty(stop - start, off_label)
            alone = torch.arange(stop - start, device=hidden.device) if each and skipped is not None else None
            product = probabilities_times_weight(p, product_weight, off_label[:, 0], skipped, None, alone, impl)
            product.addcmul_(off_label, weight[ids[start:stop, 0]].to(dtype), value=-1)
            dhidden[place[start:stop]] = product.to(dhidden.dtype)
        if need.weight:
            of_target = -off_label * (row_weight[start:stop, None] * p_factor(p.dtype))
            p.scatter_(1, ids[start:stop], of_target.to(p.dtype))
            some = rows[start:stop] * sign[start:stop, None].to(product_dtype)
            add_weight_gradient(dweight, p, some, first=not start)
    if greatest is not None:
        dweight *= greatest
    highest = torch.maximum(stats.maximum, own[:, 0])
    losses = valid.spread(stats.log_sum + (highest - own[:, 0]))
    lse = valid.spread(highest + stats.log_sum) if with_lse else own.new_empty(0)
    return Results(losses, lse, valid.count, valid.count, dhidden, dweight, own.new_empty(0))


@torch.library.custom_op("soundwave::linear_cross_entropy_fwd", mutates_args=())
@ranged("soundwave.linear_cross_entropy_fwd")
def _linear_cross_entropy_fwd(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    ignore_index: int,
    product_dtype: torch.dtype,
    impl: str,
    reduction: str,
    return_lse: bool,
    exact: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss; lse, empty unless asked for; dH; dW and dbias, empty for reduction "none"; the factor that the reduction
    gives all three.
    """
    options = Options(bias, class_weight, label_smoothing, softcap, z_loss)
    need = Needed(need_hidden, need_weight and reduction != "none", need_bias and reduction != "none")
    if options.none:
        found = _run(
            hidden, weight, target, ignore_index, product_dtype, exact, return_lse, need, impl, validate, None,
            reduction == "none",
        )  # fmt: skip
    else:
        found = run_with_options(
            hidden, weight, target, options, ignore_index, product_dtype, reduction == "mean", return_lse, need, impl,
            validate,
        )  # fmt: skip
    losses, divisor = found.losses, found.divisor
    # As in torch the mean over no rows is NaN; its gradient is 0.
    scale = losses.new_ones(())
    if reduction == "mean":
        some = divisor.clamp(min=1) if class_weight is None else torch.where(found.count > 0, divisor, 1)
        scale = 1 / some.to(losses.dtype)
    loss = losses if reduction == "none" else losses.sum() / divisor if reduction == "mean" else losses.sum()
    return loss, found.lse, found.hidden, found.weight, found.bias, scale


@_linear_cross_entropy_fwd.register_fake
def _(
    hidden, weight, target, bias, class_weight, label_smoothing, softcap, z_loss, ignore_index, product_dtype, impl,
    reduction, return_lse, exact, need_hidden, need_weight, need_bias, validate,
):  # fmt: skip
    loss = hidden.new_empty(hidden.shape[0] if reduction == "none" else (), dtype=sum_dtype(hidden, weight))
    lse = loss.new_empty(hidden.shape[0] if return_lse else 0)
    dhidden = hidden.new_empty(hidden.shape if need_hidden else 0, dtype=gradient_dtype(hidden))
    dweight = loss.new_empty(weight.shape if need_weight and reduction != "none" else 0)
    dbias = loss.new_empty(weight.shape[0] if need_bias and reduction != "none" else 0)
    return loss, lse, dhidden, dweight, dbias, loss.new_empty(())


@torch.library.custom_op("soundwave::linear_cross_entropy_again", mutates_args=())
@ranged("soundwave.linear_cross_entropy_again")
def _linear_cross_entropy_again(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    ignore_index: int,
    product_dtype: torch.dtype,
    impl: str,
    reduction: str,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    grad: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dH, dW and dbias from the gradients [N] of each row's loss and lse: what the forward pass cannot know."""
    options = Options(bias, class_weight, label_smoothing, softcap, z_loss)
    need = Needed(need_hidden, need_weight, need_bias)
    given = hidden, weight, target
    if options.none and grad_lse is None:
        found = _run(*given, ignore_index, product_dtype, True, False, need, impl, False, grad)
    else:
        upstream = grad, torch.zeros_like(grad) if grad_lse is None else grad_lse
        found = run_with_options(
            *given, options, ignore_index, product_dtype, reduction == "mean", False, need, impl, False, upstream
        )  # fmt: skip
    return found.hidden, found.weight, found.bias


@_linear_cross_entropy_again.register_fake
def _(
    hidden, weight, target, bias, class_weight, label_smoothing, softcap, z_loss, ignore_index, product_dtype, impl,
    reduction, need_hidden, need_weight, need_bias, grad, grad_lse,
):  # fmt: skip
    dtype = sum_dtype(hidden, weight)
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0, dtype=gradient_dtype(hidden)),
        weight.new_empty(weight.shape if need_weight else 0, dtype=dtype),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=dtype),
    )


@torch.library.custom_op("soundwave::linear_cross_entropy_bwd", mutates_args=())
@ranged("soundwave.linear_cross_entropy_bwd")
def _linear_cross_entropy_bwd(
    grad: Tensor, dhidden: Tensor, dweight: Tensor, dbias: Tensor, scale: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where the forward pass did not compute them."""
    raise_pending()
    grad = grad * scale
    rows, bias = torch.empty_like(dhidden), torch.empty_like(dbias)
    weight = torch.empty_like(dweight, dtype=weight_dtype)
    if dhidden.dim() == 2:
        torch.mul(dhidden, grad.expand(len(dhidden))[:, None], out=rows)
    if dweight.dim() == 2:
        torch.mul(dweight, grad, out=weight)
    if len(dbias):
        torch.mul(dbias, grad, out=bias)
    return rows, weight, bias


@_linear_cross_entropy_bwd.register_fake
def _(grad, dhidden, dweight, dbias, scale, weight_dtype):
    return torch.empty_like(dhidden), torch.empty_like(dweight, dtype=weight_dtype), torch.empty_like(dbias)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.label_smoothing, ctx.softcap, ctx.z_loss = inputs[:8]
    ctx.settings, (ctx.reduction, ctx.return_lse) = inputs[8:11], inputs[11:13]
    ctx.need = inputs[14:17]
    ctx.again = ctx.reduction == "none" and any(ctx.need[1:])  # dW and dbias are not there
    ctx.dtypes = [None if tensors[i] is None else tensors[i].dtype for i in (0, 1, 3)]
    ctx.save_for_backward(*output[2:], *(tensors if ctx.again or ctx.return_lse else ()))
    ctx.mark_non_differentiable(output[5])  # dH, dW, dbias stay: a second derivative reaches them and is refused
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, grad_lse, *_):
    grad_lse = grad_lse if ctx.return_lse else None  # in a compiled graph that of the empty lse is zeros
    if grad is None and grad_lse is None:
        return (None,) * 18
    *found, scale = ctx.saved_tensors[:4]
    if grad_lse is None:
        found = list(_linear_cross_entropy_bwd(grad, *found, scale, ctx.dtypes[1]))
    need = [bool(ctx.need[0]) and grad_lse is not None, *ctx.need[1:]]
    if grad_lse is not None or ctx.again:
        tensors = ctx.saved_tensors[4:]
        rows = len(tensors[0])
        grad = grad_lse.new_zeros(rows) if grad is None else (grad * scale).expand(rows)
        again = _linear_cross_entropy_again(
            *tensors, ctx.label_smoothing, ctx.softcap, ctx.z_loss, *ctx.settings, ctx.reduction, *need, grad, grad_lse
        )
        found = [new if wanted else old for old, new, wanted in zip(found, again, need, strict=True)]
    dhidden, dweight, dbias = (
        gradient.to(dtype) if wanted else None
        for gradient, dtype, wanted in zip(found, ctx.dtypes, ctx.need, strict=True)
    )
    return dhidden, dweight, None, dbias, *[None] * 14


_linear_cross_entropy_fwd.register_autograd(_autograd, setup_context=_setup_context)
no_second_derivative("linear_cross_entropy", _linear_cross_entropy_bwd, _linear_cross_entropy_again)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    *,
    label_smoothing: float,
    softcap: float,
    z_loss: float,
    ignore_index: int,
    product_dtype: torch.dtype,
    impl: str,
    reduction: str,
    return_lse: bool,
    exact: bool,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    """The loss of hidden [N, D], a scalar or [N], and lse [N], empty without `return_lse`.

    target holds N values in any shape. A softcap of 0 is none. `impl` is "triton" or "torch".

    Raises:
        ValueError: a target that is no row of `weight`, at once or later (see `checks`).
    """
    return _linear_cross_entropy_fwd(
        hidden, weight, target, bias, class_weight, label_smoothing, softcap, z_loss, ignore_index, product_dtype, impl,
        reduction, return_lse, exact, needs_gradient(hidden), needs_gradient(weight), needs_gradient(bias), validate,
    )[:2]  # fmt: skip
