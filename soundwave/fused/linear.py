"""Operations on hidden states and the rows of a head, without the logits; `functional` is their public place.

Dimension letters: B utterances, T frames of the longest, N packed rows, D width, V rows of the head, U labels of the
longest target.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from soundwave.eager import IGNORE_INDEX
from soundwave.fused.arguments import (
    as_integer,
    check_cross_entropy_options,
    check_flag,
    check_head,
    check_reduction,
    check_targets,
    check_weight,
    expect,
    expect_tensor,
    lengths_of,
    padded_targets,
    product_dtype_of,
)
from soundwave.fused.rows import Packed
from soundwave.kernels import linear_cross_entropy as _linear_cross_entropy
from soundwave.kernels import linear_ctc as _linear_ctc
from soundwave.kernels import linear_ctc_path as _linear_ctc_path
from soundwave.kernels.active_columns import skipping_pays
from soundwave.kernels.checks import refuse_transforms
from soundwave.kernels.dispatch import resolve_impl


class LinearCTCOutput(NamedTuple):
    """The loss, the path, and how much skipping columns can have changed the gradient of hidden.

    loss: scalar, or [B] for `reduction="none"`; None without targets.
    path, path_log_prob: [B, T], the most probable id of each frame (-1 past the length) and its log-probability (0).
    active_share: the share of the vocabulary's columns that took part in `P W`, 0 to 1; 0 without a gradient.
    error_bound: the most that skipping can have changed the gradient of hidden, relative to its norm. In
        training the error itself was 3 to 4 times smaller. With `reduction="none"` it is the largest of all utterances,
        so that it holds for any weights of their losses. 0 if nothing was skipped.

    Only the loss has a gradient. Floating-point ones are float32, and float64 for float64 input.
    """

    loss: Tensor | None
    path: Tensor
    path_log_prob: Tensor
    active_share: Tensor | None = None
    error_bound: Tensor | None = None


def linear_ctc_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int] | None,
    *,
    blank: int,
    blank_weight: Tensor | None = None,
    blank_bias: Tensor | None = None,
    reduction: str = "mean",
    zero_infinity: bool = False,
    exact: bool | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> LinearCTCOutput:
    """CTC of `softmax(hidden @ weight.T)` without the [B, T, V] logits, and each frame's most probable id.

    Args:
        hidden: [B, T, D]. Frames past a length cost nothing and may have any values. Or packed [N, D], the sum of the
            lengths: then path and path_log_prob are [N].
        weight: [V, D], the head; trained if it requires a gradient.
        targets: int [B, U], padded with anything past `target_lengths`, or concatenated [sum of lengths]; None computes
            the path only.
        input_lengths, target_lengths: int [B], on the CPU if possible: on CUDA they cost one synchronisation.
        blank: a row of `weight`, or `V` together with `blank_weight` [D] and the scalar `blank_bias`: one extra row.
        reduction: "mean" (each loss over its target length, then over utterances), "sum" or "none".
        zero_infinity: an utterance that cannot be aligned counts 0, not inf. Its gradient is 0 in any case.
        exact: True computes the gradient of hidden from all columns of the head. False leaves out those that carry
            next to nothing, tile by tile of rows: half the time once the model is sure, and an error in the gradient of
            up to 1.2 times that of bfloat16, 0.5 to 1.5 % of it, see `LinearCTCOutput.error_bound`. None leaves them
            out where products run in bfloat16, whose own rounding costs as much, and the head has at least 16 384 rows.
        impl: "auto", "triton" or "torch".
        validate: if tensors are on CUDA, wait for the check of lengths and labels.

    Products run in autocast's dtype, else in that of `weight`; the rest runs in float32 (float64 for float64). If no
    gradient is needed, only the first product runs. NaN or inf in the frames of an utterance makes its loss and its
    gradient NaN, as in `eager.linear_ctc_loss`.

    Raises:
        ValueError: tensors that do not fit; a label that is the blank or no row of the head; a length past its tensor.
            For values on CUDA the loss of that utterance is NaN, and the error comes at backward or at the next call.
        RuntimeError: a second derivative.
    """
    if isinstance(hidden, Tensor) and hidden.dim() == 2:
        packed = Packed.of("hidden", hidden, input_lengths)
        out = linear_ctc_loss(
            packed.pad(hidden), weight, targets, packed.lengths, target_lengths, blank=blank, blank_weight=blank_weight,
            blank_bias=blank_bias, reduction=reduction, zero_infinity=zero_infinity, exact=exact, impl=impl,
            validate=validate,
        )  # fmt: skip
        return out._replace(path=packed.unpad(out.path), path_log_prob=packed.unpad(out.path_log_prob))
    if targets is None:
        path = linear_ctc_path(
            hidden, weight, input_lengths, blank=blank, blank_weight=blank_weight, blank_bias=blank_bias, impl=impl,
            validate=validate,
        )  # fmt: skip
        return LinearCTCOutput(None, *path)
    refuse_transforms("linear_ctc_loss", hidden, weight, blank_weight, blank_bias)
    blank = as_integer("blank", blank)
    weights = check_head(hidden, weight, blank, blank_weight, blank_bias)
    batch = hidden.shape[0]
    check_reduction(reduction)
    for name, value in (("zero_infinity", zero_infinity), ("validate", validate)):
        check_flag(name, value)
    product_dtype = product_dtype_of(hidden, weight)
    if exact is None:
        exact = not skipping_pays(product_dtype, len(weight))
    check_flag("exact", exact)
    if target_lengths is None:
        raise ValueError("target_lengths = None, but targets are given")
    targets = check_targets(targets, batch, "hidden", hidden)
    input_lengths = lengths_of("input_lengths", input_lengths, batch, hidden)
    target_lengths = lengths_of("target_lengths", target_lengths, batch, hidden)
    classes = weight.shape[0] + (blank_weight is not None)
    targets = padded_targets(targets, target_lengths, classes, blank, "rows of the head", validate)
    return LinearCTCOutput(
        *_linear_ctc.linear_ctc(
            hidden, *weights, targets, input_lengths, target_lengths, blank=blank,
            product_dtype=product_dtype, impl=resolve_impl(impl, hidden.device), reduction=reduction,
            zero_infinity=zero_infinity, exact=exact, validate=validate,
        )
    )  # fmt: skip


def linear_ctc_path(
    hidden: Tensor,
    weight: Tensor,
    lengths: Tensor | Sequence[int],
    *,
    blank: int,
    blank_weight: Tensor | None = None,
    blank_bias: Tensor | None = None,
    impl: str = "auto",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    """The most probable id of each frame [B, T] and its log-probability [B, T], or [N] for packed rows.

    Of equally probable ids it is the lowest. Past a length the id is -1 and the log-probability 0. Arguments, numerics
    and errors are those of `linear_ctc_loss`. It takes one product and has no gradient.
    """
    if isinstance(hidden, Tensor) and hidden.dim() == 2:
        packed = Packed.of("hidden", hidden, lengths)
        path, scores = linear_ctc_path(
            packed.pad(hidden), weight, packed.lengths, blank=blank, blank_weight=blank_weight, blank_bias=blank_bias,
            impl=impl, validate=validate,
        )  # fmt: skip
        return packed.unpad(path), packed.unpad(scores)
    blank = as_integer("blank", blank)
    weights = check_head(hidden, weight, blank, blank_weight, blank_bias)
    lengths = lengths_of("lengths", lengths, hidden.shape[0], hidden)
    with torch.no_grad():
        return _linear_ctc_path.linear_ctc_path(
            hidden,
            *weights,
            lengths,
            blank,
            product_dtype_of(hidden, weight),
            resolve_impl(impl, hidden.device),
            validate,
        )


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ..., class_weight: Tensor | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., softcap: float | None = ..., z_loss: float = ...,
    reduction: str = ..., return_lse: Literal[False] = ..., exact: bool = ..., impl: str = ...,
    validate: bool = ...,
) -> Tensor: ...  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ..., class_weight: Tensor | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., softcap: float | None = ..., z_loss: float = ...,
    reduction: str = ..., return_lse: Literal[True], exact: bool = ..., impl: str = ...,
    validate: bool = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ..., class_weight: Tensor | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., softcap: float | None = ..., z_loss: float = ...,
    reduction: str = ..., return_lse: bool, exact: bool = ..., impl: str = ...,
    validate: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    return_lse: bool = False,
    exact: bool = True,
    impl: str = "auto",
    validate: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`F.cross_entropy(F.linear(hidden, weight, bias).float(), target)` without the logits.

    Args:
        hidden: [..., D].
        weight: [V, D], the head; trained if it requires a gradient.
        target: int [...], a row of `weight`, or `ignore_index`: then that row of hidden costs nothing and may have any
            values. On the CPU if possible: on CUDA the host waits once, for the number of rows that are not ignored.
        bias: [V], added to the logits; trained if it requires a gradient.
        class_weight: [V], the `weight` of `F.cross_entropy`: each row's loss times the weight of its target, and the
            mean over the sum of these weights. It gets no gradient.
        label_smoothing: 0 to 1, as in `F.cross_entropy`, with class weights too.
        softcap: logits become `softcap·tanh(logits / softcap)`, as in Gemma 2; None leaves them as they are.
        z_loss: `z_loss·lse²` is added to each row's loss, where lse is the log-sum-exp of its logits (PaLM; Liger calls
            it `lse_square_scale`). Its mean is that over the rows that are not ignored, whatever their class weights.
        reduction: "mean" over the rows that are not ignored (NaN if all are), "sum", or "none": [...], 0 if ignored.
        return_lse: return (loss, lse), lse [...], 0 where ignored. It has a gradient, for which backward computes the
            logits once more.
        exact: False leaves columns out of the gradient of hidden, as `linear_ctc_loss` does, but none with `bias`,
            `class_weight`, `label_smoothing`, `softcap` or `z_loss`, nor from the gradient of lse.
        impl: "auto", "triton" or "torch".
        validate: if tensors are on CUDA, wait for the check of the targets.

    Products run in autocast's dtype, else in that of `weight`. The rest runs in float32 (float64 for float64), and loss
    and lse have that dtype. With `reduction="none"` backward computes the logits once more for a trained head or bias.

    What other libraries offer and this does not: targets that are probabilities, a head that is spread over several
    devices, and an argument that shifts the targets by one token (take `hidden[:, :-1]` and `target[:, 1:]`).

    Raises:
        ValueError: tensors that do not fit; a number out of its range; a target that is no row of `weight` (on CUDA
            its row's loss is NaN, and the error comes at backward or at the next call).
        RuntimeError: a second derivative.
    """
    expect_tensor("hidden", hidden)
    refuse_transforms("linear_cross_entropy", hidden, weight, bias)
    expect("hidden", hidden, (*hidden.shape[:-1], "D") if hidden.dim() else ("...", "D"))
    check_weight(weight, hidden)
    on_cpu = isinstance(target, Tensor) and target.device.type == "cpu"
    expect("target", target, hidden.shape[:-1], None if on_cpu else hidden, floating=False)
    for name, values in (("bias", bias), ("class_weight", class_weight)):
        if values is not None:
            expect(name, values, (weight.shape[0],), hidden)
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError("class_weight requires a gradient, but it gets none; pass class_weight.detach()")
    check_cross_entropy_options(label_smoothing, softcap, z_loss)
    check_reduction(reduction)
    for name, flag in (("return_lse", return_lse), ("exact", exact), ("validate", validate)):
        check_flag(name, flag)
    loss, lse = _linear_cross_entropy.linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), weight, target, bias, class_weight, label_smoothing=label_smoothing,
        softcap=0.0 if softcap is None else softcap, z_loss=z_loss,
        ignore_index=as_integer("ignore_index", ignore_index), product_dtype=product_dtype_of(hidden, weight),
        impl=resolve_impl(impl, hidden.device), reduction=reduction, return_lse=return_lse, exact=exact,
        validate=validate,
    )  # fmt: skip
    loss = loss.view(target.shape) if reduction == "none" else loss
    return (loss, lse.view(target.shape)) if return_lse else loss
