"""The fused losses and adapters as modules; `functional` holds the operations. All are built on the Triton kernels.

`transformers_ctc_loss` is the CTC loss in the form that the models of Transformers call.
"""

from soundwave.fused import functional
from soundwave.fused.adapters import AlignmentAdapter, ShrinkingAdapter
from soundwave.fused.losses import CTCLoss, LinearCrossEntropyLoss, LinearCTCLoss, transformers_ctc_loss

__all__ = [
    "AlignmentAdapter",
    "CTCLoss",
    "LinearCTCLoss",
    "LinearCrossEntropyLoss",
    "ShrinkingAdapter",
    "functional",
    "transformers_ctc_loss",
]


def __dir__() -> list[str]:
    return __all__
