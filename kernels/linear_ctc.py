"""CTC over the vocabulary of a language model without its logits: loss, gradients and the path of most probable ids.

With z = H Wᵀ, P = softmax(z) and gamma the posteriors of the CTC lattice, the summed loss has the gradients

    dH = P W - gamma W_labels        dW = Pᵀ H - scatter(gammaᵀ H)

"Labels" are blank and the *distinct* labels of an utterance. The lattice needs their log-probabilities only, so z is
formed in chunks of rows, each used while it is there (see vocab_rows):

  1. the labels' logits in fp32 by a small product of their own; the chunk S = H_c Wᵀ
  2. one pass over S without the row's labels: maximum, sum, argmax, merged with the labels; S <- P, 0 at the labels
  3. dH_c = P W, over the columns that matter
  4. after all chunks the lattice on the labels' log-probabilities, and dH += (P_labels - gamma) W_labels in fp32

P_labels - gamma is small against either where the model is sure. A row of the gradient sums to 0 over its columns, so
the difference of its most probable label is taken as minus the sum of the others, none of which is close to 1.

Shapes    hidden [B, T, D], weight [V, D], targets int [B, U], lengths int [B]; C = U + 1 columns of the lattice; N rows
          inside the lengths, packed. An extra blank row (`blank_weight` [D], `blank_bias`) never enters S.
Numerics  products in `product_dtype`; labels, softmax and lattice in fp32 (fp64 if hidden or weight is). fp16 rounds
          probabilities below 3e-8 to 0: where a model is sure, what lies beside its labels is lost; bf16 keeps it.
Cost      4·N·V·D operations for a frozen head, 2 without a gradient, 6 if it is trained (8 with reduction "none"), less
          what is skipped. Memory: one chunk of logits, dH, a few N·C of the lattice, and for a trained head dW in fp32.
Bitwise deterministic: what is scattered goes to distinct labels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from soundwave.kernels.checks import raise_pending
from soundwave.kernels.ctc_lattice import ctc_lattice
from soundwave.kernels.ctc_targets import before, check_targets, distinct_labels, feasible, pad_targets
from soundwave.kernels.dispatch import ranged
from soundwave.kernels.linear_ctc_path import Head, Packed, best, label_logits, sum_dtype, without_autocast
from soundwave.kernels.vocab_rows import (
    RowStats,
    add_weight_gradient,
    longest_row,
    probabilities_times_weight,
    vocab_chunks,
)

REDUCTIONS = ("mean", "sum", "none")
LN2 = 0.6931471805599453


def linear_ctc_ref(
    hidden: Tensor, weight: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int
) -> Tensor:
    """nll [B], for a blank that is a row of `weight`."""
    log_probs = (hidden @ weight.t()).log_softmax(-1).transpose(0, 1)
    return torch.nn.functional.ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, "none")


class _Result(NamedTuple):
    """Gradients are empty where they are not needed. dH and the blank's are those of each utterance's own loss."""

    loss: Tensor  # scalar, or [B]
    path: Tensor  # int64 [B, T]
    path_log_prob: Tensor  # [B, T]
    active_share: Tensor  # of the columns in P W
    error_bound: Tensor  # of skipping the others, relative to the norm of dH
    dhidden: Tensor  # [B, T, D]
    dweight: Tensor  # [V, D], of the scaled losses' sum
    dblank: Tensor  # [B, D + 1], row and bias
    scale: Tensor  # [B], of each utterance's loss; 0 where it cannot be aligned


def _alphabet(targets: Tensor, target_lengths: Tensor, blank: int) -> tuple[Tensor, Tensor, Tensor]:
    """labels int64 [B, C], `blank` first and where unused; used bool [B, C]; where each target stands in it [B, U]."""
    labels, order, rank = distinct_labels(targets, target_lengths, blank)
    rank = rank.masked_fill(~before(target_lengths, targets.shape[1]), 0)  # padding is sorted last
    used = labels != blank
    used[:, 0] = True
    return labels, used, torch.zeros_like(rank).scatter_(1, order, rank)


def _scale(nll: Tensor, target_lengths: Tensor, reduction: str) -> Tensor:
    """`nll` [B] as the reduction weighs it, before any sum."""
    return nll / (target_lengths.clamp(min=1) * len(nll)) if reduction == "mean" else nll


def _label_gradient(log_probs: Tensor, gamma: Tensor, stats: RowStats) -> Tensor:
    """P_labels - gamma [N, C] of `log_probs` [N, C], that of a label which is close to 1 from all others of its row."""
    gradient = log_probs.exp().sub_(gamma)
    top, at = log_probs.max(1, keepdim=True)
    others = gradient.scatter(1, at, 0.0).sum(1, keepdim=True) + stats.off[:, None]
    return gradient.scatter_(1, at, torch.where(top > -LN2, -others, gradient.gather(1, at)))


@without_autocast
def _run(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    product_dtype: torch.dtype,
    reduction: str,
    zero_infinity: bool,
    exact: bool,
    need: tuple[bool, bool, bool],
    impl: str,
    validate: bool,
    upstream: Tensor | None = None,
    checked: tuple | None = None,
) -> _Result:
    """`need`: the gradients of hidden, weight and blank; `upstream` [B]: what the losses in dW are multiplied with.

    `checked` is what `check_targets` gave for the same arguments.
    """
    need_hidden, need_weight, need_blank = need
    (batch, size, width), dtype = hidden.shape, sum_dtype(hidden, head.weight)
    given, given_targets, given_target_lengths = input_lengths, targets, target_lengths
    checked = checked or check_targets(
        targets, input_lengths, target_lengths, frames=size, classes=head.size, blank=head.blank, device=hidden.device,
        validate=validate, frames_of="hidden", classes_of="rows of the head",
    )  # fmt: skip
    targets, input_lengths, target_lengths, wrong = checked
    fits = feasible(targets, input_lengths, target_lengths)
    fits = fits if wrong is None else fits & ~wrong
    scale = _scale(fits.to(dtype), target_lengths, reduction)
    scale = scale if upstream is None else torch.where(fits, scale * upstream, 0.0)
    greatest = scale.abs().amax() if batch else scale.sum()
    share = scale / greatest.clamp(min=torch.finfo(dtype).tiny)

    packed = Packed.of(input_lengths if given.is_cuda else given.clamp(0, size), hidden)
    labels, used, column = _alphabet(targets, target_lengths, head.blank)
    own = label_logits(hidden, head, labels, used, packed)
    rows, weight = packed.pack(hidden).to(product_dtype), head.weight.to(product_dtype)
    stats = RowStats.empty(len(rows), own)
    dhidden = hidden.new_zeros(hidden.shape if need_hidden else 0)
    dweight = own.new_zeros(weight.shape if need_weight else 0)
    dblank = own.new_zeros((batch, width + 1) if need_blank else 0)
    true_share, row_sign = share.abs()[packed.utterance], share.sign().to(product_dtype)[packed.utterance, None]
    row_share = true_share
    if not need_weight:
        row_share = true_share.log2().round_().exp2_()  # only weighs what is skipped: dividing by it again is exact
    groups = packed.utterance == torch.arange(batch, device=hidden.device)[:, None]
    if reduction != "none":  # which leaves the weights to backward: no utterance may lose more than its share then
        groups = groups.any(0, keepdim=True)
    active, skipped = 0.0, own.new_zeros(len(groups))
    chunks = vocab_chunks(
        rows, weight, own, labels.masked_fill(~used, -1), packed.utterance,
        row_share if need_hidden or need_weight else None, stats, impl,
    )  # fmt: skip
    for start, stop, p in chunks:
        if need_hidden:
            s = row_share[start:stop]
            off = stats.off[start:stop] * s
            product, columns, missing = probabilities_times_weight(p, weight, off, exact, groups[:, start:stop])
            product *= torch.where(s > 0, 1 / s, 0.0)[:, None]
            dhidden.view(-1, width)[packed.place[start:stop]] = product.to(hidden.dtype)
            active += columns * (stop - start)
            skipped += missing
        if need_weight:
            add_weight_gradient(dweight, p, rows[start:stop] * row_sign[start:stop])

    path, path_log_prob = best(own, labels, stats, packed, hidden)
    top = torch.maximum(own.amax(1), stats.top)
    log_probs = (own - top[:, None]) - stats.log_sum[:, None]
    nll, gamma = ctc_lattice(
        packed.pad(log_probs, hidden).transpose(0, 1), column, input_lengths, target_lengths,
        blank=0, impl=impl, need_gamma=any(need),
    )  # fmt: skip
    lost = fits & (nll == torch.inf)  # it has frames enough, but what it needs has probability 0
    took_part = need_weight or (need_hidden and active < len(rows))  # in dW, or in what columns are skipped
    if took_part and bool((lost & (scale != 0)).any()):  # once more, without it
        kept = scale.new_ones(batch).masked_fill(lost, 0.0)
        return _run(
            hidden, head, given_targets, given, given_target_lengths, product_dtype, reduction, zero_infinity, exact,
            need, impl, validate, kept if upstream is None else torch.where(lost, 0.0, upstream), checked,
        )  # fmt: skip
    fits, scale = fits & ~lost, scale.masked_fill(lost, 0.0)
    if any(need):
        gradient = _label_gradient(log_probs, gamma.transpose(0, 1).flatten(0, 1)[packed.place], stats)
        gradient.masked_fill_(~fits[packed.utterance, None], 0.0)
        first = head.size - len(weight)  # of the columns that are rows of the head: all, or all but the extra blank
        for b, g in enumerate(packed.utterances(gradient)):
            h, dh = hidden[b, : len(g)].to(dtype), dhidden[b, : len(g)] if need_hidden else None
            if need_hidden:
                dh.copy_(torch.addmm(dh.to(dtype), g, head.rows(labels[b], dtype)))
            if need_blank:
                dblank[b, :width], dblank[b, width] = g[:, 0] @ h, g[:, 0].sum()
            if need_weight:
                places = labels[b, first:].clamp(max=len(weight) - 1)  # an unused column adds zeros
                dweight.index_add_(0, places, (g[:, first:] * share[b]).t() @ h)
        if need_weight:
            dweight *= greatest
    error_bound = own.new_zeros(())
    if active < len(rows) and need_hidden:
        norms = groups.to(dtype) @ (packed.pack(dhidden).to(dtype) * true_share[:, None]).square().sum(1)
        rounded_down = torch.where(row_share > 0, true_share / row_share, 0.0).amax()  # what was skipped weighs more
        largest = longest_row(head.weight, dtype) * skipped.sqrt() * rounded_down
        error_bound = torch.where(largest == 0, 0.0, largest / norms.sqrt()).amax()
    if zero_infinity:
        nll = nll.masked_fill(nll == torch.inf, 0.0)
    if wrong is not None:
        nll = nll.masked_fill(wrong, torch.nan)
    loss = _scale(nll, target_lengths, reduction)
    loss = loss.clone() if reduction == "none" else loss.sum()
    active_share = own.new_tensor(active / max(len(rows), 1))
    return _Result(loss, path, path_log_prob, active_share, error_bound, dhidden, dweight, dblank, scale)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_Result`; with reduction "none" without dW, which then is `_linear_ctc_dweight`."""
    need = need_hidden, need_weight and reduction != "none", need_blank
    head = Head(weight, blank, blank_weight, blank_bias)
    return _run(
        hidden, head, targets, input_lengths, target_lengths, product_dtype, reduction, zero_infinity, exact, need,
        impl, validate,
    )  # fmt: skip


@_linear_ctc_fwd.register_fake
def _(
    hidden, weight, blank_weight, blank_bias, targets, input_lengths, target_lengths, blank, product_dtype, impl,
    reduction, zero_infinity, exact, need_hidden, need_weight, need_blank, validate,
):  # fmt: skip
    batch, size, width = hidden.shape
    own = hidden.new_empty(0, dtype=sum_dtype(hidden, weight))
    return _Result(
        loss=own.new_empty(batch if reduction == "none" else ()),
        path=own.new_empty(batch, size, dtype=torch.int64),
        path_log_prob=own.new_empty(batch, size),
        active_share=own.new_empty(()),
        error_bound=own.new_empty(()),
        dhidden=hidden.new_empty(hidden.shape if need_hidden else 0),
        dweight=own.new_empty(weight.shape if need_weight and reduction != "none" else 0),
        dblank=own.new_empty((batch, width + 1) if need_blank else 0),
        scale=own.new_empty(batch),
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
    """dW for reduction "none": its sum over rows cannot be formed before `grad` [B] is known."""
    head = Head(weight, blank, blank_weight, blank_bias)
    need = False, True, False
    return _run(
        hidden, head, targets, input_lengths, target_lengths, product_dtype, "none", False, True, need,
        impl, False, grad,
    ).dweight  # fmt: skip


@_linear_ctc_dweight.register_fake
def _(hidden, weight, *_):
    return weight.new_empty(weight.shape, dtype=sum_dtype(hidden, weight))


@torch.library.custom_op("soundwave::linear_ctc_bwd", mutates_args=())
@ranged("soundwave.linear_ctc_bwd")
def _linear_ctc_bwd(
    grad: Tensor, dhidden: Tensor, dweight: Tensor, dblank: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight, blank_weight and blank_bias; all but the first in fp32 (fp64)."""
    raise_pending()
    of_utterance = torch.where(scale == 0, 0.0, scale * grad)
    rows = torch.empty_like(dhidden)
    if dhidden.dim() == 3:
        torch.mul(dhidden, of_utterance[:, None, None], out=rows)
    blank = of_utterance @ dblank if dblank.dim() == 2 else dblank.new_zeros(1)
    return rows, dweight * grad if dweight.dim() == 2 else dweight.clone(), blank[:-1].clone(), blank[-1].clone()


@_linear_ctc_bwd.register_fake
def _(grad, dhidden, dweight, dblank, scale):
    blank = dblank.new_empty(dblank.shape[1] - 1 if dblank.dim() == 2 else 0)
    return torch.empty_like(dhidden), torch.empty_like(dweight), blank, dblank.new_empty(())


def _save(ctx, inputs, output):
    tensors, ctx.settings, reduction = inputs[:7], inputs[7:10], inputs[10]
    ctx.need_hidden, ctx.need_weight, _ = inputs[13:16]
    ctx.again = ctx.need_weight and reduction == "none"
    ctx.like = [None if x is None else (x.dtype, x.shape) for x in tensors[1:4]]
    ctx.save_for_backward(*output[5:], *(tensors if ctx.again else ()))
    ctx.mark_non_differentiable(*output[1:5])  # but not the gradients: through them a second derivative is noticed
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 17
    *saved, scale = ctx.saved_tensors[:4]
    dhidden, *others = _linear_ctc_bwd(grad, *saved, scale)
    if ctx.again:
        others[0] = _linear_ctc_dweight(*ctx.saved_tensors[4:], *ctx.settings, grad)
    wanted = ctx.need_weight, *ctx.needs_input_grad[2:4]
    others = [
        x.to(like[0]).view(like[1]) if want else None for x, like, want in zip(others, ctx.like, wanted, strict=True)
    ]
    return dhidden if ctx.need_hidden else None, *others, *[None] * 13


def _backward_twice(ctx, *_):
    raise RuntimeError("linear_ctc_loss has no second derivative: its gradient cannot be differentiated")


_linear_ctc_fwd.register_autograd(_backward, setup_context=_save)
_linear_ctc_bwd.register_autograd(_backward_twice)
_linear_ctc_dweight.register_autograd(_backward_twice)


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
    """loss, path, path_log_prob, active_share, error_bound; differentiable is the loss. `impl` "triton" or "torch".

    `targets` int [B, U], padded with anything, or [S], concatenated. Raises as `check_targets` does.
    """
    if targets.dim() == 1:
        targets = pad_targets(targets, target_lengths)
    on = torch.is_grad_enabled()
    need_blank = any(x is not None and x.requires_grad for x in (blank_weight, blank_bias))
    need = on and hidden.requires_grad, on and weight.requires_grad, on and need_blank
    return _linear_ctc_fwd(
        hidden, weight, blank_weight, blank_bias, targets, input_lengths, target_lengths, blank, product_dtype, impl,
        reduction, zero_infinity, exact, *need, validate,
    )[:5]  # fmt: skip
