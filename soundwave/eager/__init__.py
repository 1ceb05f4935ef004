"""Soundwave's operations and adapters in plain PyTorch: each is defined here once.

Tests and benches compare the implementations of `soundwave.fused` with these, and a model can be built of them alone.
"""

from soundwave.eager.adapters import AdapterLayer, AlignmentAdapter, SelfAttention, ShrinkingAdapter
from soundwave.eager.operations import (
    IGNORE_INDEX,
    LinearCTCOutput,
    Peaks,
    add_layer_norm,
    ctc_loss,
    ctc_peaks,
    every_frame,
    length_mask,
    linear_cross_entropy,
    linear_ctc_loss,
    linear_ctc_path,
    shrink_attention,
    splice,
)

__all__ = [
    "IGNORE_INDEX",
    "AdapterLayer",
    "AlignmentAdapter",
    "LinearCTCOutput",
    "Peaks",
    "SelfAttention",
    "ShrinkingAdapter",
    "add_layer_norm",
    "ctc_loss",
    "ctc_peaks",
    "every_frame",
    "length_mask",
    "linear_cross_entropy",
    "linear_ctc_loss",
    "linear_ctc_path",
    "shrink_attention",
    "splice",
]


def __dir__() -> list[str]:
    return __all__
