"""The fused losses as modules, and the CTC loss as the models of Transformers call theirs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from soundwave.eager import IGNORE_INDEX
from soundwave.fused import functional
from soundwave.fused.arguments import (
    NotScriptable,
    as_integer,
    check_cross_entropy_options,
    check_flag,
    check_impl,
    check_reduction,
    expect,
    expect_tensor,
)
from soundwave.kernels.dispatch import to_device


def _blank(blank: int) -> int:
    """`blank` as an int; ValueError if no loss can have such a blank. How many classes there are, the call shows."""
    blank = as_integer("blank", blank)
    if blank < 0:
        raise ValueError(f"blank = {blank}, but it must be 0 or more")
    return blank


class CTCLoss(NotScriptable, nn.Module):
    """`functional.ctc_loss` as a replacement for `torch.nn.CTCLoss`: the same arguments, call and values.

    Differences from torch:

    - The gradient is that in the log-probabilities as given. Torch's is right only after a log-softmax; after one both
      give the same gradient for the logits.
    - An utterance that cannot be aligned has gradient 0, never NaN.
    - A label that is the blank or no class is a `ValueError`.
    - float16 and bfloat16 are accepted and give a float32 loss.
    - Targets are integers, and lengths are [B]. Torch also takes floating-point targets and lengths [B, 1]; here they
      are a `ValueError`.
    - `torch.jit.script` is refused; `torch.compile` works.
    """

    def __init__(
        self,
        blank: int = 0,
        reduction: str = "mean",
        zero_infinity: bool = False,
        impl: str = "auto",
        validate: bool = False,
    ):
        super().__init__()
        check_reduction(reduction)
        check_impl(impl)
        check_flag("zero_infinity", zero_infinity)
        check_flag("validate", validate)
        self.blank, self.reduction, self.zero_infinity = _blank(blank), reduction, zero_infinity
        self.impl, self.validate = impl, validate

    def forward(
        self,
        log_probs: Tensor,
        targets: Tensor,
        input_lengths: Tensor | Sequence[int],
        target_lengths: Tensor | Sequence[int],
    ) -> Tensor:
        """`log_probs` [T, B, C] or [T, C], `targets` [B, U] or concatenated [S], lengths [B] -> the loss."""
        return functional.ctc_loss(
            log_probs,
            targets,
            input_lengths,
            target_lengths,
            self.blank,
            self.reduction,
            self.zero_infinity,
            impl=self.impl,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        return (
            f"blank={self.blank}, reduction={self.reduction!r}, zero_infinity={self.zero_infinity}, impl={self.impl!r}"
        )


class LinearCTCLoss(NotScriptable, nn.Module):
    """`functional.linear_ctc_loss` as a module, which returns the loss alone.

    The head is an argument of the call, because it belongs to the language model and not to the loss.
    """

    def __init__(
        self,
        blank: int,
        reduction: str = "mean",
        zero_infinity: bool = False,
        impl: str = "auto",
        *,
        exact: bool | None = None,
        validate: bool = False,
    ):
        super().__init__()
        check_reduction(reduction)
        check_impl(impl)
        check_flag("zero_infinity", zero_infinity)
        check_flag("validate", validate)
        self.blank, self.reduction, self.zero_infinity = _blank(blank), reduction, zero_infinity
        if exact is not None:
            check_flag("exact", exact)
        self.impl, self.exact, self.validate = impl, exact, validate

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        input_lengths: Tensor | Sequence[int],
        target_lengths: Tensor | Sequence[int],
        blank_weight: Tensor | None = None,
        blank_bias: Tensor | None = None,
    ) -> Tensor:
        """`hidden` [B, T, D], `weight` [V, D], `targets` [B, U] or concatenated [S], lengths [B] -> the loss."""
        return functional.linear_ctc_loss(
            hidden,
            weight,
            targets,
            input_lengths,
            target_lengths,
            blank=self.blank,
            blank_weight=blank_weight,
            blank_bias=blank_bias,
            reduction=self.reduction,
            zero_infinity=self.zero_infinity,
            exact=self.exact,
            impl=self.impl,
            validate=self.validate,
        ).loss

    def extra_repr(self) -> str:
        return (
            f"blank={self.blank}, reduction={self.reduction!r}, zero_infinity={self.zero_infinity}, "
            f"exact={self.exact}, impl={self.impl!r}"
        )


class LinearCrossEntropyLoss(NotScriptable, nn.Module):
    """`functional.linear_cross_entropy` as a module: a linear head and `nn.CrossEntropyLoss`, without the logits.

    What `nn.CrossEntropyLoss` calls `weight` is `class_weight` here: a buffer, which moves with the module.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        impl: str = "auto",
        *,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
        return_lse: bool = False,
        exact: bool = True,
        validate: bool = False,
    ):
        super().__init__()
        check_reduction(reduction)
        check_impl(impl)
        check_cross_entropy_options(label_smoothing, softcap, z_loss)
        if class_weight is not None:
            expect("class_weight", class_weight, ("V",))
        for name, flag in (("return_lse", return_lse), ("exact", exact), ("validate", validate)):
            check_flag(name, flag)
        self.register_buffer("class_weight", class_weight)
        self.ignore_index, self.reduction = as_integer("ignore_index", ignore_index), reduction
        self.label_smoothing, self.softcap, self.z_loss = label_smoothing, softcap, z_loss
        self.impl, self.return_lse, self.exact, self.validate = impl, return_lse, exact, validate

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`hidden` [..., D], `weight` [V, D], `target` [...], `bias` [V] -> the loss, or (loss, lse)."""
        return functional.linear_cross_entropy(
            hidden,
            weight,
            target,
            bias=bias,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            z_loss=self.z_loss,
            reduction=self.reduction,
            return_lse=self.return_lse,
            exact=self.exact,
            impl=self.impl,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        options = {"label_smoothing": 0.0, "softcap": None, "z_loss": 0.0, "return_lse": False}
        chosen = "".join(
            f"{name}={getattr(self, name)}, " for name, usual in options.items() if getattr(self, name) != usual
        )
        weighted = "" if self.class_weight is None else f"class_weight=[{len(self.class_weight)}], "
        return (
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, {weighted}{chosen}exact={self.exact}, "
            f"impl={self.impl!r}"
        )


def transformers_ctc_loss(
    logits: Tensor,
    labels: Tensor,
    logit_lengths: Tensor,
    blank_token_id: int,
    reduction: str = "mean",
    zero_infinity: bool = False,
    ignore_index: int = IGNORE_INDEX,
    **_: Any,
) -> Tensor:
    """The CTC loss as the CTC models of Transformers call theirs: `model.loss_function = transformers_ctc_loss`.

    They ask for `loss_function` since Transformers 5.21; older ones never call it. Set this function and no module:
    `nn.Module` would file a module away as a part of the model, and the model would keep its own loss.

    Args:
        logits: [B, T, C], before any softmax.
        labels: int [B, U]; those that are `ignore_index` or the blank are left out, wherever they stand.
        logit_lengths: int [B], the valid frames of `logits`.
        blank_token_id: the blank, `config.pad_token_id`.
        reduction, zero_infinity: as in `CTCLoss`; the models pass those of their configuration.
        ignore_index: the label that pads.
        _: what else a model passes on, such as `num_items_in_batch`; without effect, as in Transformers' own loss.

    Returns:
        The loss, float32 (float64 for float64 logits): a scalar, or [B] for "none".

    Raises:
        ValueError: as `functional.ctc_loss`, such as for a label that is negative and not `ignore_index`.
    """
    expect_tensor("logits", logits)
    expect_tensor("labels", labels)
    labels = to_device(torch.atleast_2d(labels), logits.device)
    used = (labels != ignore_index) & (labels != blank_token_id)
    # Labels move to the front and keep their order. Picking them out would wait for the GPU, to know their number.
    labels = labels.gather(1, used.logical_not().to(torch.uint8).argsort(dim=1, stable=True))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probs = logits.log_softmax(-1, dtype=dtype).transpose(0, 1)
    return functional.ctc_loss(
        log_probs, labels, logit_lengths, used.sum(1), blank_token_id, reduction, zero_infinity
    )  # fmt: skip
