"""CTC over the vocabulary of a language model without its logits: loss, gradients and the path of most probable ids.

With z = H Wᵀ, P = softmax(z) and gamma the posteriors of the CTC lattice, the summed loss has the gradients

    dH = P W - gamma W_labels        dW = Pᵀ H - scatter(gammaᵀ H)

"Labels" are blank and the *distinct* labels of an utterance. The lattice needs only their log-probabilities. So z is
formed in chunks of rows, and each chunk is used before the next overwrites it (see vocab_rows). The four steps, in
`linear_ctc_steps`:

  1. pack the rows inside the lengths; compute the labels' logits in fp32, by a small product of their own
  2. for each chunk of rows S = H_c Wᵀ; one pass over S without the row's labels: maximum, sum, argmax, merged with the
     labels; S <- P, 0 at the labels; dH_c = P W over the columns that matter; dW += Pᵀ H_c
  3. the lattice on the labels' log-probabilities
  4. dH += (P_labels - gamma) W_labels in fp32, and the same for dW and the extra blank

An utterance may have enough frames and still be lost, because a label or blank that it needs has probability 0: a
probability is 0 where a logit is -inf, and that step 1 shows. Where it would have a part in dW, a lattice of its own
finds it before step 2; where it would have one in the choice of columns, its rows are computed with all of them.

Where the model is sure, P_labels - gamma is much smaller than both of its terms. A row of the gradient sums to 0 over
its columns, so the difference of the most probable label is computed as minus the sum of all others, none of which is
close to 1.

Shapes    hidden [B, T, D], weight [V, D], targets int [B, U], lengths int [B]; C = U + 1 columns of the lattice; N rows
          inside the lengths, packed. An extra blank row (`blank_weight` [D], `blank_bias`) never enters S.
Numerics  products in `product_dtype`; labels, softmax and lattice in fp32 (fp64 if hidden or weight is). For fp16 the
          probabilities are stored 2^15 times as large, and dH is fp32 until backward: small ones would be lost.
Cost      4·N·V·D operations for a frozen head, 2 without a gradient, 6 if it is trained (8 with reduction "none"), less
          what is skipped. Memory: one chunk of logits, dH, a few N·C of the lattice, and for a trained head dW in fp32.
Bitwise deterministic: scattered rows go to distinct labels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from soundwave.kernels.checks import needs_gradient, no_second_derivative, raise_pending
from soundwave.kernels.ctc_targets import pad_targets
from soundwave.kernels.dispatch import ranged, to_device
from soundwave.kernels.label_rows import utterance_losses
from soundwave.kernels.linear_ctc_path import Head, sum_dtype, without_autocast
from soundwave.kernels.linear_ctc_steps import (
    Need,
    Settings,
    add_labels,
    align,
    label_columns,
    loss_weights,
    over_vocabulary,
    skipping,
    without_alignment,
)
from soundwave.kernels.vocab_rows import gradient_dtype


class Result(NamedTuple):
    """Gradients are empty where they are not needed. Those of hidden and blank belong to each utterance's own loss."""

    loss: Tensor  # scalar, or [B]
    path: Tensor  # int64 [B, T]
    path_log_prob: Tensor  # [B, T]
    skipping: Tensor  # [2], the share of columns that took part in P W; what the others can have changed
    dhidden: Tensor  # [B, T, D]
    dweight: Tensor  # [V, D], of the sum of the losses times their factors
    dblank: Tensor  # [B, D + 1], row and bias
    scale: Tensor  # [B], the factor of each utterance's loss; 0 where it cannot be aligned


@without_autocast
def _run(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    settings: Settings,
    upstream: Tensor | None = None,
) -> Result:
    """The four steps. dW is that of the losses multiplied by `upstream` [B], or by 1."""
    need = settings.need
    batch = label_columns(hidden, head, targets, input_lengths, target_lengths, settings)
    scale = batch.factor
    if upstream is not None:
        scale = torch.where(batch.feasible, to_device(scale, hidden.device) * upstream, 0.0)
    no_alignment, takes_part = None, scale
    if need.weight:  # it would be in dW
        no_alignment = without_alignment(batch, settings)
        takes_part = to_device(scale, hidden.device).masked_fill(no_alignment, 0.0)
    weights = loss_weights(takes_part, batch, settings)
    sums = over_vocabulary(batch, weights, settings)
    alignment = align(batch, sums.stats, settings)
    scale = to_device(scale, hidden.device) if weights.factor is None else weights.factor
    if need.weight:
        # Differences of logits beyond the largest float make other utterances infeasible. They are in dW already.
        unforeseen = ((alignment.nll == torch.inf) & ~no_alignment & (scale != 0)).any()
        weights = weights._replace(greatest=weights.greatest.masked_fill(unforeseen, torch.nan))
    loss, scale, aligned = utterance_losses(
        alignment.nll, scale, batch.feasible, batch.wrong, batch.divisor if settings.reduction == "mean" else None,
        zero_infinity=settings.zero_infinity, impl=settings.impl,
    )  # fmt: skip
    dblank = add_labels(batch, weights, sums, alignment, aligned, need, settings.impl)
    return Result(
        loss=loss.clone() if settings.reduction == "none" else loss.sum(),
        path=alignment.path,
        path_log_prob=alignment.path_log_prob,
        skipping=skipping(batch, sums, scale, settings),
        dhidden=sums.dhidden,
        dweight=sums.dweight,
        dblank=dblank,
        scale=scale,
    )


@torch.library.custom_op("soundwave::linear_ctc_fwd", mutates_args=())
@ranged("soundwave.linear_ctc_fwd")
def _linear_ctc_fwd(
    hidden: Tensor,
    weight: Tensor,
    blank_weight: Tensor | None,
    blank_bias: Tensor | None,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    product_dtype: torch.dtype,
    impl: str,
    reduction: str,
    zero_infinity: bool,
    exact: bool,
    need_hidden: bool,
    need_weight: bool,
    need_blank: bool,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`Result`; with reduction "none" dW is empty, because `_linear_ctc_dweight` computes it in backward."""
    need = Need(need_hidden, need_weight and reduction != "none", need_blank)
    settings = Settings(product_dtype, impl, reduction, zero_infinity, exact, need, validate)
    head = Head(weight, blank, blank_weight, blank_bias)
    return _run(hidden, head, targets, input_lengths, target_lengths, settings)


@_linear_ctc_fwd.register_fake
def _(
    hidden, weight, blank_weight, blank_bias, targets, input_lengths, target_lengths, blank, product_dtype, impl,
    reduction, zero_infinity, exact, need_hidden, need_weight, need_blank, validate,
):  # fmt: skip
    batch, size, width = hidden.shape
    like = hidden.new_empty(0, dtype=sum_dtype(hidden, weight))
    return Result(
        loss=like.new_empty(batch if reduction == "none" else ()),
        path=like.new_empty(batch, size, dtype=torch.int64),
        path_log_prob=like.new_empty(batch, size),
        skipping=like.new_empty(2),
        dhidden=hidden.new_empty(hidden.shape if need_hidden else 0, dtype=gradient_dtype(hidden)),
        dweight=like.new_empty(weight.shape if need_weight and reduction != "none" else 0),
        dblank=like.new_empty((batch, width + 1) if need_blank else 0),
        scale=like.new_empty(batch),
    )


@torch.library.custom_op("soundwave::linear_ctc_dweight", mutates_args=())
@ranged("soundwave.linear_ctc_dweight")
def _linear_ctc_dweight(
    hidden: Tensor,
    weight: Tensor,
    blank_weight: Tensor | None,
    blank_bias: Tensor | None,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    product_dtype: torch.dtype,
    impl: str,
    grad: Tensor,
) -> Tensor:
    """dW for reduction "none": a sum over rows that cannot be formed before `grad` [B] is known."""
    head = Head(weight, blank, blank_weight, blank_bias)
    settings = Settings(
        product_dtype, impl, reduction="none", zero_infinity=False, exact=True, need=Need(False, True, False),
        validate=False,
    )  # fmt: skip
    return _run(hidden, head, targets, input_lengths, target_lengths, settings, grad).dweight


@_linear_ctc_dweight.register_fake
def _(hidden, weight, *_):
    return weight.new_empty(weight.shape, dtype=sum_dtype(hidden, weight))


@torch.library.custom_op("soundwave::linear_ctc_bwd", mutates_args=())
@ranged("soundwave.linear_ctc_bwd")
def _linear_ctc_bwd(
    grad: Tensor, dhidden: Tensor, dweight: Tensor, dblank: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, of weight, and of blank_weight with blank_bias behind it; the last two in fp32 (fp64)."""
    raise_pending()
    factor = (scale * grad).masked_fill_(scale == 0, 0.0)
    rows = torch.empty_like(dhidden)
    if dhidden.dim() == 3:
        torch.mul(dhidden, factor[:, None, None], out=rows)
    blank = factor @ dblank if dblank.dim() == 2 else dblank.new_zeros(1)
    return rows, dweight * grad if dweight.dim() == 2 else dweight.new_empty(0), blank


@_linear_ctc_bwd.register_fake
def _(grad, dhidden, dweight, dblank, scale):
    blank = dblank.new_empty(dblank.shape[1] if dblank.dim() == 2 else 1)
    return torch.empty_like(dhidden), torch.empty_like(dweight), blank


def _setup_context(ctx, inputs, output):
    tensors, ctx.settings, reduction = inputs[:7], inputs[7:10], inputs[10]
    ctx.need_hidden, ctx.need_weight, _ = inputs[13:16]
    ctx.again, ctx.hidden_dtype = ctx.need_weight and reduction == "none", tensors[0].dtype
    ctx.like = [None if x is None else (x.dtype, x.shape) for x in tensors[1:4]]
    ctx.save_for_backward(*output[4:], *(tensors if ctx.again else ()))
    ctx.mark_non_differentiable(*output[1:4])  # the gradients stay: a second derivative reaches them
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 17
    *saved, scale = ctx.saved_tensors[:4]
    dhidden, dweight, blank = _linear_ctc_bwd(grad, *saved, scale)
    if ctx.again:
        dweight = _linear_ctc_dweight(*ctx.saved_tensors[4:], *ctx.settings, grad)
    others = dweight, blank[:-1], blank[-1]
    wanted = ctx.need_weight, *ctx.needs_input_grad[2:4]
    others = [
        x.to(like[0]).view(like[1]) if want else None for x, like, want in zip(others, ctx.like, wanted, strict=True)
    ]
    return dhidden.to(ctx.hidden_dtype) if ctx.need_hidden else None, *others, *[None] * 13


_linear_ctc_fwd.register_autograd(_autograd, setup_context=_setup_context)
no_second_derivative("linear_ctc_loss", _linear_ctc_bwd, _linear_ctc_dweight)


def linear_ctc(
    hidden: Tensor,
    weight: Tensor,
    blank_weight: Tensor | None,
    blank_bias: Tensor | None,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int,
    product_dtype: torch.dtype,
    impl: str,
    reduction: str,
    zero_infinity: bool,
    exact: bool,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, path, path_log_prob, active_share and error_bound. Only the loss is differentiable.

    `targets` is int [B, U], padded with anything, or [S], concatenated; `impl` is "triton" or "torch". Raises as
    `check_targets` does.
    """
    if targets.dim() == 1:
        targets = pad_targets(targets, target_lengths)
    need = needs_gradient(hidden), needs_gradient(weight), needs_gradient(blank_weight) or needs_gradient(blank_bias)
    loss, path, path_log_prob, skipping, *_ = _linear_ctc_fwd(
        hidden, weight, blank_weight, blank_bias, targets, input_lengths, target_lengths, blank, product_dtype, impl,
        reduction, zero_infinity, exact, *need, validate,
    )  # fmt: skip
    return loss, path, path_log_prob, *skipping.unbind()
