"""Fused operations and drop-in modules over `soundwave.kernels`; `functional` holds the operations."""

from soundwave.fused import functional as functional
from soundwave.fused.adapters import AlignmentAdapter as AlignmentAdapter
from soundwave.fused.adapters import ShrinkingAdapter as ShrinkingAdapter
from soundwave.fused.losses import CTCLoss as CTCLoss
from soundwave.fused.losses import LinearCrossEntropyLoss as LinearCrossEntropyLoss
from soundwave.fused.losses import LinearCTCLoss as LinearCTCLoss
