"""The most probable id of each frame under `softmax(hidden @ weight.T)`, and its log-probability, without the logits.

    path[b, t] = argmax_v z[b, t, v]        path_log_prob[b, t] = max_v z - logsumexp_v z

Of equal logits the lowest id is the argmax. This is the first half of `linear_ctc`, and the file holds what both need:
frames packed by their lengths, the head with its blank, and the logits of a few labels, which a small product of their
own computes in fp32.

Shapes    hidden [B, T, D], weight [V, D], lengths int [B] -> path int64 [B, T], -1 past the length, and
          path_log_prob [B, T], 0 past it. N rows inside the lengths; C labels of an utterance, the blank first.
Numerics  the product in `product_dtype`; blank and softmax in fp32 (fp64 if hidden or weight is).
Cost      2·N·V·D operations and one chunk of logits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from soundwave.kernels.checks import raise_or_defer, raise_pending
from soundwave.kernels.dispatch import ranged, to_device_together
from soundwave.kernels.vocab_rows import RowStats, vocab_chunks

LABEL_BYTES = 1 << 28  # of frames in fp32 in one batched product of labels: 16 clips of 30 s with D = 4096


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: `function` runs without autocast, which is still active in a registered operation.

    The first argument is a tensor; autocast is switched off for its device.
    """

    @functools.wraps(function)
    def call(first: Tensor, *args: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return call


def sum_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of softmax and sums."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


class Head(NamedTuple):
    """`weight` [V, D] and its blank: row `blank`, or an extra row made of `blank_weight` [D] and `blank_bias`."""

    weight: Tensor
    blank: int
    blank_weight: Tensor | None
    blank_bias: Tensor | None

    @property
    def size(self) -> int:
        return self.weight.shape[0] + (self.blank_weight is not None)

    def places(self, labels: Tensor) -> Tensor:
        """The row of `weight` for each of `labels`: for the extra blank any row, for -1 (no label) the blank's."""
        return labels.where(labels >= 0, self.blank).clamp(max=self.weight.shape[0] - 1)

    def rows(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows `places` of [G, C] labels, of which the blank is the first: [G, C, D]."""
        rows = self.weight[places].to(dtype)
        if self.blank_weight is not None:
            rows[:, 0] = self.blank_weight
        return rows


def _together(hidden: Tensor) -> int:
    """How many utterances have their labels multiplied together: LABEL_BYTES of frames in fp32 bound the copies.

    On the CPU it is one, because there a batched product is no faster, and padding costs.
    """
    _, size, width = hidden.shape
    return 1 if hidden.device.type == "cpu" else max(1, LABEL_BYTES // max(4 * size * width, 1))


class Group(NamedTuple):
    """Utterances whose labels are multiplied in one batched product."""

    utterances: slice
    rows: slice  # those of them among the packed rows
    frames: int  # of each of them in the product
    padded: bool  # whether some of these frames are past a length


class Packed(NamedTuple):
    """Which rows are inside the lengths. Packed, the utterances' rows follow one another."""

    bounds: list[int]  # B + 1, of the utterances
    utterance: Tensor  # [N], to which each row belongs
    place: Tensor  # [N], the number of each row among the B·T padded ones
    starts: Tensor  # [B], the first row of each utterance

    @classmethod
    def of(cls, lengths: Tensor, hidden: Tensor) -> "Packed":
        """`lengths` int [B], each 0 to T. If they are on CUDA, the host waits for them."""
        size, count = hidden.shape[1], lengths.cpu().to(torch.int64)
        ends = count.cumsum(0)
        each = torch.arange(len(count), device="cpu")  # whatever torch's default device is
        utterance = each.repeat_interleave(count)
        place = torch.arange(len(utterance), device="cpu") + (each * size - ends + count)[utterance]
        return cls([0, *ends.tolist()], *to_device_together([utterance, place, ends - count], hidden.device))

    def groups(self, hidden: Tensor) -> list[Group]:
        """All utterances in order, in groups of `_together`."""
        (batch, size, _), step = hidden.shape, _together(hidden)
        groups = []
        for first in range(0, batch, step):
            last = min(first + step, batch)
            start, stop = self.bounds[first], self.bounds[last]
            frames = stop - start if last == first + 1 else size
            groups.append(Group(slice(first, last), slice(start, stop), frames, stop - start < (last - first) * frames))
        return groups

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


def bmm(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.bmm` with sums and result in `dtype`. Products of half types are exact in float32.

    A batch of one is a plain product, which on the CPU may sum in another order, and always has.
    """
    if x.is_cuda and x.dtype == y.dtype != dtype == torch.float32:
        return torch.bmm(x, y, out_dtype=dtype)
    x, y = x.to(dtype), y.to(dtype)
    return torch.mm(x[0], y[0])[None] if len(x) == 1 else torch.bmm(x, y)


def logits_of_labels(
    hidden: Tensor, head: Head, places: Tensor, unused: Tensor, packed: Packed, impossible: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Logits of the head's rows `places` int64 [B, C]: [N, C], -inf where `unused` bool [B, C].

    Returns also these rows [B, C, D], where all fit into one product. `impossible` bool [B] takes whether
    an utterance has a logit of -inf, perhaps in its padding.
    """
    dtype = sum_dtype(hidden, head.weight)
    extra = hidden if head.blank_weight is None else head.blank_weight
    # The blank's own row would lose digits in a half type.
    operands = hidden.dtype if hidden.dtype == head.weight.dtype == extra.dtype else dtype
    logits = hidden.new_empty(len(packed.place), places.shape[1], dtype=dtype)
    groups, rows = packed.groups(hidden), None
    for group in groups:
        rows = head.rows(places[group.utterances], operands)
        product = bmm(hidden[group.utterances, : group.frames], rows.mT, dtype)
        if head.blank_bias is not None:
            product[..., 0].add_(head.blank_bias)
        if impossible is not None:
            torch.any((product == -torch.inf).flatten(1), 1, out=impossible[group.utterances])
        product = product.masked_fill_(unused[group.utterances, None], -torch.inf).flatten(0, 1)
        if group.padded:
            place = packed.place[group.rows]
            if group.utterances.start:
                place = place - group.utterances.start * group.frames
            torch.index_select(product, 0, place, out=logits[group.rows])
        else:
            logits[group.rows] = product
    return logits, rows if len(groups) == 1 else None


def argmax_path(
    logits: Tensor, labels: Tensor, stats: RowStats, packed: Packed, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """path and path_log_prob [B, T], from `logits` [N, C] of `labels` [B, C] and `stats` of all other columns."""
    maximum = logits.amax(1, keepdim=True)
    label = labels[packed.utterance].masked_fill_(logits != maximum, torch.iinfo(torch.int64).max).amin(1)
    maximum = maximum[:, 0]
    is_label = (maximum > stats.maximum) | ((maximum == stats.maximum) & (label < stats.argmax))
    path = packed.pad(torch.where(is_label, label, stats.argmax), hidden, -1)
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
        ValueError: a length that is not 0 to T, at once or later (see `checks`).
    """
    size = hidden.shape[1]
    raise_pending()
    message = f"lengths[{{place}}] = {{value}}, but it must be 0 to {size}, the frames of hidden"
    raise_or_defer(lengths, (lengths < 0) | (lengths > size), message, validate)
    head = Head(weight, blank, blank_weight, blank_bias)
    packed = Packed.of(lengths.clamp(0, size), hidden)
    labels = torch.full((hidden.shape[0], 1), blank, dtype=torch.int64, device=hidden.device)
    logits, _ = logits_of_labels(hidden, head, head.places(labels), torch.zeros_like(labels, dtype=torch.bool), packed)
    stats = RowStats.empty(len(logits), logits)
    rows, weight = packed.pack(hidden).to(product_dtype), weight.to(product_dtype)
    # Only `stats`, which each chunk fills, are wanted.
    for _ in vocab_chunks(rows, weight, logits, labels, packed.utterance, None, stats, impl):
        pass
    return argmax_path(logits, labels, stats, packed, hidden)


@linear_ctc_path.register_fake
def _(hidden, weight, blank_weight, blank_bias, lengths, blank, product_dtype, impl, validate):
    shape = hidden.shape[:2]
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=sum_dtype(hidden, weight))
