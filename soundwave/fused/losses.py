"""The fused losses as modules."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from soundwave.eager import IGNORE_INDEX
from soundwave.fused import functional
from soundwave.fused.arguments import check_reduction
from soundwave.kernels.dispatch import resolve_impl


def _check(reduction: str, impl: str) -> None:
    """ValueError for an unknown word. The call checks whether `impl` can run, because that depends on the device."""
    check_reduction(reduction)
    resolve_impl(impl, torch.device("cuda"))  # where every `impl` can run


class CTCLoss(nn.Module):
    """`functional.ctc_loss` as a replacement for `torch.nn.CTCLoss`: the same arguments, call and values.

    Differences from torch:

    - The gradient is that in the log-probabilities as given. Torch's is right only after a log-softmax; after one both
      give the same gradient for the logits.
    - An utterance that cannot be aligned has gradient 0, never NaN.
    - A label that is the blank or no class is a `ValueError`.
    - float16 and bfloat16 are accepted and give a float32 loss.
    - Targets and lengths must be int32 or int64, and lengths [B]. Torch also takes uint8, floating-point targets and
      lengths [B, 1]; here they are a `ValueError`.
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
        _check(reduction, impl)
        self.blank, self.reduction, self.zero_infinity = blank, reduction, zero_infinity
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


class LinearCTCLoss(nn.Module):
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
        exact: bool = False,
        validate: bool = False,
    ):
        super().__init__()
        _check(reduction, impl)
        self.blank, self.reduction, self.zero_infinity = blank, reduction, zero_infinity
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


class LinearCrossEntropyLoss(nn.Module):
    """`functional.linear_cross_entropy` as a module: a linear head and `nn.CrossEntropyLoss`, without the logits."""

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        reduction: str = "mean",
        impl: str = "auto",
        *,
        exact: bool = True,
        validate: bool = False,
    ):
        super().__init__()
        _check(reduction, impl)
        self.ignore_index, self.reduction = ignore_index, reduction
        self.impl, self.exact, self.validate = impl, exact, validate

    def forward(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """`hidden` [..., D], `weight` [V, D], `target` [...] -> the loss."""
        return functional.linear_cross_entropy(
            hidden,
            weight,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            exact=self.exact,
            impl=self.impl,
            validate=self.validate,
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, exact={self.exact}, impl={self.impl!r}"
