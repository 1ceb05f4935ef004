"""CTC: the negative log-likelihood of label sequences under given log-probabilities, and its gradient.

    nll[b] = -log sum over alignments a of prod_t p[t, b, a(t)]        d nll[b] / d log_probs[t, b, c] = -gamma[t, b, c]

gamma are the posteriors of the lattice, summed over all positions of a label (see ctc_lattice). This is the gradient in
the log-probabilities as given; autograd continues it through a log-softmax before them.

Shapes    log_probs [T, B, C], any strides; targets int [B, U] or [S]; lengths int [B] -> nll [B].
Numerics  as the lattice; the gradient in the dtype of log_probs.
Cost      the lattice's. B·T·(U + 1) posteriors are kept for backward, which writes B·T·C gradients.
Bitwise deterministic.
"""

import torch
from torch import Tensor

from soundwave.kernels.checks import needs_gradient, no_second_derivative, raise_pending
from soundwave.kernels.ctc_lattice import LATTICES, spread
from soundwave.kernels.ctc_targets import check_targets, pad_targets
from soundwave.kernels.dispatch import ranged


@torch.library.custom_op("soundwave::ctc_fwd", mutates_args=())
@ranged("soundwave.ctc_fwd")
def _ctc_fwd(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    need_gradient: bool,
    impl: str,
    validate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size, _, classes = log_probs.shape
    *checked, wrong = check_targets(
        targets, input_lengths, target_lengths,
        frames=size, classes=classes, blank=blank, device=log_probs.device, validate=validate,
    )  # fmt: skip
    nll, posteriors, labels = LATTICES[impl](log_probs, *checked, blank, need_gradient)
    return nll if wrong is None else nll.masked_fill(wrong, torch.nan), posteriors, labels


@_ctc_fwd.register_fake
def _(log_probs, targets, input_lengths, target_lengths, blank, need_gradient, impl, validate):
    (size, batch, _), width = log_probs.shape, targets.shape[1] + 1
    nll = log_probs.new_empty(batch, dtype=torch.promote_types(log_probs.dtype, torch.float32))
    posteriors = nll.new_empty(size if need_gradient else 0, batch, width)
    return nll, posteriors, nll.new_empty(batch, width, dtype=torch.int64)


@torch.library.custom_op("soundwave::ctc_bwd", mutates_args=())
@ranged("soundwave.ctc_bwd")
def _ctc_bwd(grad: Tensor, nll: Tensor, posteriors: Tensor, labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    raise_pending()
    # Without a posterior the gradient is 0, even if a loss of inf was squared and `grad` is inf or NaN.
    grad = grad.masked_fill(~nll.isfinite(), 0.0)
    return spread((posteriors * -grad[:, None]).to(dtype), labels, classes)


@_ctc_bwd.register_fake
def _(grad, nll, posteriors, labels, classes, dtype):
    return posteriors.new_empty(*posteriors.shape[:2], classes, dtype=dtype)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output)
    ctx.classes, ctx.dtype = inputs[0].shape[2], inputs[0].dtype
    ctx.mark_non_differentiable(output[2])  # the posteriors stay: a second derivative reaches them
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad, *_):
    gradient = None if grad is None else _ctc_bwd(grad, *ctx.saved_tensors, ctx.classes, ctx.dtype)
    return gradient, *[None] * 7


_ctc_fwd.register_autograd(_autograd, setup_context=_setup_context)
no_second_derivative("ctc_loss", _ctc_bwd)


def ctc_nll(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    *,
    blank: int,
    impl: str,
    validate: bool = False,
) -> Tensor:
    """nll [B], differentiable in log_probs [T, B, C].

    `targets` is int [B, U], padded with anything, or [S], concatenated; `impl` is "triton" or "torch".

    Raises:
        ValueError: lengths or labels out of range, or a label that is the blank. For values on CUDA that utterance has
            nll NaN and gradient 0, and the error comes at backward or at the next call; with `validate` at once.
    """
    if targets.dim() == 1:
        targets = pad_targets(targets, target_lengths)
    need_gradient = needs_gradient(log_probs)
    return _ctc_fwd(log_probs, targets, input_lengths, target_lengths, blank, need_gradient, impl, validate)[0]
