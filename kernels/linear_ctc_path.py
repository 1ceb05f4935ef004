"""The most probable id of each frame under `softmax(hidden @ weight.T)`, and its log-probability, without the logits.

    path[b, t] = argmax_v z[b, t, v], the lowest of several        path_log_prob[b, t] = max_v z - logsumexp_v z

The first half of `linear_ctc`, and what it shares with that: frames packed by their lengths, the head with its blank,
and the logits of a few labels in fp32 by a product of their own.

Shapes    hidden [B, T, D], weight [V, D], lengths int [B] -> path int64 [B, T], -1 past the length; its values [B, T].
          N rows inside the lengths; C labels of an utterance, its blank first.
Numerics  the product in `product_dtype`; blank and softmax in fp32 (fp64 if hidden or weight is).
Cost      2·N·V·D operations and one chunk of logits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soundwave.kernels.checks import raise_pending, report
from soundwave.kernels.dispatch import ranged
from soundwave.kernels.vocab_rows import RowStats, vocab_chunks


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for the body of an operation, in which autocast is live; its first argument is a tensor."""

    @functools.wraps(function)
    def call(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return call


def sum_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What softmax and sums are computed in."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


class Head(NamedTuple):
    """`weight` [V, D] with its blank: row `blank`, or the extra row of `blank_weight` [D] and `blank_bias`."""

    weight: Tensor
    blank: int
    blank_weight: Tensor | None
    blank_bias: Tensor | None

    @property
    def size(self) -> int:
        return self.weight.shape[0] + (self.blank_weight is not None)

    def rows(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of `labels` [C], blank first: [C, D]."""
        rows = self.weight[labels.clamp(max=self.weight.shape[0] - 1)].to(dtype)
        if self.blank_weight is not None:
            rows[0] = self.blank_weight
        return rows


class Packed(NamedTuple):
    """The rows inside the lengths, one utterance after the other."""

    bounds: list[int]
    utterance: Tensor  # [N], of each row
    place: Tensor  # [N], of each row in the B·T padded ones

    @classmethod
    def of(cls, lengths: Tensor, hidden: Tensor) -> "Packed":
        """`lengths` int [B] within T; on CUDA they are waited for."""
        size, count = hidden.shape[1], lengths.cpu().to(torch.int64)
        ends = count.cumsum(0)
        utterance = torch.arange(len(count)).repeat_interleave(count)
        place = torch.arange(len(utterance)) + (torch.arange(len(count)) * size - ends + count)[utterance]
        return cls([0, *ends.tolist()], utterance.to(hidden.device), place.to(hidden.device))

    def utterances(self, x: Tensor) -> list[Tensor]:
        """`x` [N, ...], cut at the bounds."""
        return [x[start:stop] for start, stop in zip(self.bounds[:-1], self.bounds[1:], strict=True)]

    def pack(self, x: Tensor) -> Tensor:
        """`x` [B, T, ...] -> [N, ...]."""
        parts = [row[: stop - start] for row, start, stop in zip(x, self.bounds[:-1], self.bounds[1:], strict=True)]
        return torch.cat(parts) if parts else x.flatten(0, 1)

    def pad(self, x: Tensor, like: Tensor, value: float = 0.0) -> Tensor:
        """`x` [N, ...] -> [B, T, ...], B and T as in `like`, with `value` past the lengths."""
        batch, size = like.shape[:2]
        out = x.new_full((batch * size, *x.shape[1:]), value)
        out[self.place] = x
        return out.view(batch, size, *x.shape[1:])


def label_logits(hidden: Tensor, head: Head, labels: Tensor, used: Tensor, packed: Packed) -> Tensor:
    """Logits of `labels` int64 [B, C]: [N, C], -inf where not `used` [B, C]."""
    dtype = sum_dtype(hidden, head.weight)
    own = hidden.new_empty(len(packed.place), labels.shape[1], dtype=dtype)
    for b, out in enumerate(packed.utterances(own)):
        torch.mm(hidden[b, : len(out)].to(dtype), head.rows(labels[b], dtype).t(), out=out)
    if head.blank_bias is not None:
        own[:, 0] += head.blank_bias
    return own.masked_fill_(~used[packed.utterance], -torch.inf)


def best(own: Tensor, labels: Tensor, stats: RowStats, packed: Packed, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """path and path_log_prob [B, T], from the logits `own` [N, C] of `labels` [B, C] and those of all other columns."""
    top = own.amax(1, keepdim=True)
    label = labels[packed.utterance].masked_fill_(own != top, torch.iinfo(torch.int64).max).amin(1)
    top = top[:, 0]
    is_label = (top > stats.top) | ((top == stats.top) & (label < stats.index))
    path = packed.pad(torch.where(is_label, label, stats.index), hidden, -1)
    return path, packed.pad(0.0 - stats.log_sum, hidden)


@torch.library.custom_op("soundwave::linear_ctc_path", mutates_args=())
@ranged("soundwave.linear_ctc_path")
@without_autocast
def linear_ctc_path(
    hidden: Tensor,
    weight: Tensor,
    blank_weight: Tensor | None,
    blank_bias: Tensor | None,
    lengths: Tensor,
    blank: int,
    product_dtype: torch.dtype,
    impl: str,
    validate: bool,
) -> tuple[Tensor, Tensor]:
    """path and path_log_prob; not differentiable. `impl` "triton" or "torch".

    Raises:
        ValueError: a length that is not 0 to T, as `checks.report` has it.
    """
    size = hidden.shape[1]
    raise_pending()
    message = f"lengths[{{place}}] = {{value}}, but it must be 0 to {size}, the frames of hidden"
    report(lengths, (lengths < 0) | (lengths > size), message, validate)
    head = Head(weight, blank, blank_weight, blank_bias)
    packed = Packed.of(lengths.clamp(0, size), hidden)
    labels = torch.full((hidden.shape[0], 1), blank, dtype=torch.int64, device=hidden.device)
    own = label_logits(hidden, head, labels, torch.ones_like(labels, dtype=torch.bool), packed)
    stats = RowStats.empty(len(own), own)
    rows, weight = packed.pack(hidden).to(product_dtype), weight.to(product_dtype)
    for _ in vocab_chunks(rows, weight, own, labels, packed.utterance, None, stats, impl):
        pass
    return best(own, labels, stats, packed, hidden)


@linear_ctc_path.register_fake
def _(hidden, weight, blank_weight, blank_bias, lengths, blank, product_dtype, impl, validate):
    shape = hidden.shape[:2]
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=sum_dtype(hidden, weight))
