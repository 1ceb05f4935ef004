"""The fused losses and adapters as modules; `functional` holds the operations. All are built on the Triton kernels."""

from soundwave.fused import functional
from soundwave.fused.adapters import AlignmentAdapter, ShrinkingAdapter
from soundwave.fused.losses import CTCLoss, LinearCrossEntropyLoss, LinearCTCLoss

__all__ = [
    "AlignmentAdapter",
    "CTCLoss",
    "LinearCTCLoss",
    "LinearCrossEntropyLoss",
    "ShrinkingAdapter",
    "functional",
]


def __dir__() -> list[str]:
    return __all__
