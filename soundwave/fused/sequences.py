"""Packed sequences for a language model: text and speech, one sequence after another, without padding."""

from typing import NamedTuple

import torch
from torch import Tensor

from soundwave.eager import IGNORE_INDEX
from soundwave.fused.functional import check_splice
from soundwave.kernels import splice as _splice
from soundwave.kernels.dispatch import to_device_together


class PackedSequences(NamedTuple):
    """`embeddings` [M, D], the sequences one after another; `labels` [M] or None.

    `cu_seqlens` int64 [B + 1] are their bounds, and `max_seqlen` is the number of rows of the longest one.
    """

    embeddings: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor | None


def splice_packed(
    embeddings: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    speech: Tensor,
    cu_seqlens: Tensor,
    *,
    audio_placeholder_id: int,
    labels: Tensor | None = None,
    impl: str = "auto",
) -> PackedSequences:
    """`functional.splice` without padding: the sequences follow one another.

    Arguments and errors are those of `functional.splice`. `input_ids`, `attention_mask`, `labels` and `cu_seqlens` may
    all be on the CPU. Then nothing waits for a GPU, and bounds and labels of the result are there, too.
    """
    check_splice(embeddings, input_ids, attention_mask, speech, cu_seqlens, labels, None)
    source, inverse, bounds, longest = _splice.packed_places(
        input_ids, attention_mask, cu_seqlens, speech.shape[0], placeholder=audio_placeholder_id
    )
    places = to_device_together([source, inverse], embeddings.device)
    out = _splice.splice_rows(embeddings.flatten(0, 1), speech, *places, impl)
    if labels is not None:
        labels = torch.cat([labels.flatten(), labels.new_full((1,), IGNORE_INDEX)])
        labels = labels[source.clamp(max=input_ids.numel())]
    return PackedSequences(out, bounds, longest, labels)
