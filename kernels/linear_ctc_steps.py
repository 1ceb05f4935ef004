"""The four steps of `linear_ctc`, in the order in which they run; its docstring has the maths and the letters."""

from typing import NamedTuple

import torch
from torch import Tensor

from soundwave.kernels.ctc_lattice import ctc_lattice
from soundwave.kernels.ctc_targets import before, check_targets, distinct_labels, feasible
from soundwave.kernels.linear_ctc_path import Head, Packed, best, label_logits
from soundwave.kernels.vocab_rows import (
    RowStats,
    add_weight_gradient,
    longest_row,
    probabilities_times_weight,
    vocab_chunks,
)

LN2 = 0.6931471805599453


class Need(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    blank: bool


class Settings(NamedTuple):
    """What the caller chose; every step reads it."""

    product_dtype: torch.dtype
    impl: str
    reduction: str
    zero_infinity: bool
    exact: bool
    need: Need
    validate: bool


class Batch(NamedTuple):
    """The checked arguments, and what step 1 makes of them."""

    hidden: Tensor  # [B, T, D]
    head: Head
    input_lengths: Tensor  # int [B]
    target_lengths: Tensor  # int [B]
    wrong: Tensor | None  # bool [B], as `check_targets` returns it
    feasible: Tensor  # bool [B], whether there are frames enough
    packed: Packed
    labels: Tensor  # int64 [B, C], blank first, and again where unused
    used: Tensor  # bool [B, C]
    column: Tensor  # int64 [B, U], where each target stands in `labels`
    own: Tensor  # [N, C], logits of the labels


class Weights(NamedTuple):
    """How much each loss counts, relative to the one that counts most."""

    greatest: Tensor  # scalar, the weight of that one
    signed: Tensor  # [B], -1 to 1
    of_row: Tensor  # [N], 0 to 1
    of_skipped: Tensor  # [N], the one that P is multiplied with
    sign: Tensor  # [N, 1]
    groups: Tensor  # bool [G, N], rows that are skipped together


class Sums(NamedTuple):
    """What step 2 leaves. Gradients are empty where they are not needed."""

    stats: RowStats
    dhidden: Tensor  # [B, T, D], P W of each utterance's own loss
    dweight: Tensor  # [V, D], Pᵀ H of the weighted losses' sum
    active: float  # columns in P W, summed over the rows
    skipped: Tensor  # [G], squared norms of the mass in all other columns


class Alignment(NamedTuple):
    """What step 3 leaves."""

    path: Tensor  # int64 [B, T]
    path_log_prob: Tensor  # [B, T]
    log_probs: Tensor  # [N, C], of the labels
    nll: Tensor  # [B]
    gamma: Tensor  # [T, B, C], posteriors of the labels; empty without a gradient


def label_columns(
    hidden: Tensor, head: Head, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, settings: Settings
) -> Batch:
    """Step 1: the checked arguments, the rows inside the lengths, and the logits of each utterance's labels."""
    size, given = hidden.shape[1], input_lengths
    targets, input_lengths, target_lengths, wrong = check_targets(
        targets, input_lengths, target_lengths, frames=size, classes=head.size, blank=head.blank, device=hidden.device,
        validate=settings.validate, frames_of="hidden", classes_of="rows of the head",
    )  # fmt: skip
    fits = feasible(targets, input_lengths, target_lengths)
    fits = fits if wrong is None else fits & ~wrong
    packed = Packed.of(input_lengths if given.is_cuda else given.clamp(0, size), hidden)
    labels, order, rank = distinct_labels(targets, target_lengths, head.blank)
    rank = rank.masked_fill(~before(target_lengths, targets.shape[1]), 0)  # padding is sorted last
    used = labels != head.blank
    used[:, 0] = True
    column = torch.zeros_like(rank).scatter_(1, order, rank)
    own = label_logits(hidden, head, labels, used, packed)
    return Batch(hidden, head, input_lengths, target_lengths, wrong, fits, packed, labels, used, column, own)


def weigh(scale: Tensor, batch: Batch, settings: Settings) -> Weights:
    """`scale` [B], by which each loss is multiplied, in the forms that the steps need."""
    greatest = scale.abs().amax() if len(scale) else scale.sum()
    signed, utterance = scale / greatest.clamp(min=torch.finfo(scale.dtype).tiny), batch.packed.utterance
    of_row = of_skipped = signed.abs()[utterance]
    if not settings.need.weight:
        of_skipped = of_row.log2().round_().exp2_()  # only weighs what is skipped: dividing by it again is exact
    groups = utterance == torch.arange(len(scale), device=scale.device)[:, None]
    if settings.reduction != "none":  # which leaves the weights to backward: no utterance may lose more than its share
        groups = groups.any(0, keepdim=True)
    sign = signed.sign().to(settings.product_dtype)[utterance, None]
    return Weights(greatest, signed, of_row, of_skipped, sign, groups)


def over_vocabulary(batch: Batch, weights: Weights, settings: Settings) -> Sums:
    """Step 2: by chunks of rows the product S, its statistics, P, and what P adds to dH and dW."""
    hidden, packed, own, need = batch.hidden, batch.packed, batch.own, settings.need
    rows, weight = packed.pack(hidden).to(settings.product_dtype), batch.head.weight.to(settings.product_dtype)
    stats = RowStats.empty(len(rows), own)
    dhidden = hidden.new_zeros(hidden.shape if need.hidden else 0)
    dweight = own.new_zeros(weight.shape if need.weight else 0)
    active, skipped = 0.0, own.new_zeros(len(weights.groups))
    chunks = vocab_chunks(
        rows, weight, own, batch.labels.masked_fill(~batch.used, -1), packed.utterance,
        weights.of_skipped if need.hidden or need.weight else None, stats, settings.impl,
    )  # fmt: skip
    for start, stop, p in chunks:
        if need.hidden:
            s = weights.of_skipped[start:stop]
            product, columns, missing = probabilities_times_weight(
                p, weight, stats.off[start:stop] * s, settings.exact, weights.groups[:, start:stop]
            )
            product *= torch.where(s > 0, 1 / s, 0.0)[:, None]
            dhidden.view(-1, hidden.shape[2])[packed.place[start:stop]] = product.to(hidden.dtype)
            active += columns * (stop - start)
            skipped += missing
        if need.weight:
            add_weight_gradient(dweight, p, rows[start:stop] * weights.sign[start:stop])
    return Sums(stats, dhidden, dweight, active, skipped)


def align(batch: Batch, stats: RowStats, settings: Settings) -> Alignment:
    """Step 3: the most probable ids, and the lattice on the labels' log-probabilities."""
    path, path_log_prob = best(batch.own, batch.labels, stats, batch.packed, batch.hidden)
    top = torch.maximum(batch.own.amax(1), stats.top)
    log_probs = (batch.own - top[:, None]) - stats.log_sum[:, None]
    nll, gamma = ctc_lattice(
        batch.packed.pad(log_probs, batch.hidden).transpose(0, 1), batch.column, batch.input_lengths,
        batch.target_lengths, blank=0, impl=settings.impl, need_gamma=any(settings.need),
    )  # fmt: skip
    return Alignment(path, path_log_prob, log_probs, nll, gamma)


def add_labels(batch: Batch, weights: Weights, sums: Sums, alignment: Alignment, aligned: Tensor, need: Need) -> Tensor:
    """Step 4: adds (P_labels - gamma) W_labels to dH and its like to dW, in place; returns the blank's gradient.

    Only utterances that are `aligned` [B] have one.
    """
    hidden, head, packed, width, dtype = batch.hidden, batch.head, batch.packed, batch.hidden.shape[2], batch.own.dtype
    dblank = batch.own.new_zeros((len(hidden), width + 1) if need.blank else 0)
    if not any(need):
        return dblank
    gamma = alignment.gamma.transpose(0, 1).flatten(0, 1)[packed.place]
    gradient = label_gradient(alignment.log_probs, gamma, sums.stats)
    gradient.masked_fill_(~aligned[packed.utterance, None], 0.0)
    rows = len(head.weight)
    first = head.size - rows  # of the columns that are rows of the head: all, or all but the extra blank
    for b, g in enumerate(packed.utterances(gradient)):
        h = hidden[b, : len(g)].to(dtype)
        if need.hidden:
            dh = sums.dhidden[b, : len(g)]
            dh.copy_(torch.addmm(dh.to(dtype), g, head.rows(batch.labels[b], dtype)))
        if need.blank:
            dblank[b, :width], dblank[b, width] = g[:, 0] @ h, g[:, 0].sum()
        if need.weight:
            places = batch.labels[b, first:].clamp(max=rows - 1)  # an unused column adds zeros
            sums.dweight.index_add_(0, places, (g[:, first:] * weights.signed[b]).t() @ h)
    if need.weight:
        sums.dweight.mul_(weights.greatest)
    return dblank


def label_gradient(log_probs: Tensor, gamma: Tensor, stats: RowStats) -> Tensor:
    """P_labels - gamma [N, C] of `log_probs` [N, C], that of a label which is close to 1 from all others of its row."""
    gradient = log_probs.exp().sub_(gamma)
    top, at = log_probs.max(1, keepdim=True)
    others = gradient.scatter(1, at, 0.0).sum(1, keepdim=True) + stats.off[:, None]
    return gradient.scatter_(1, at, torch.where(top > -LN2, -others, gradient.gather(1, at)))


def error_bound(batch: Batch, weights: Weights, sums: Sums, need: Need) -> Tensor:
    """The most that the columns left out of P W may weigh in dH, relative to its norm: a scalar."""
    if not need.hidden or sums.active >= len(batch.own):
        return batch.own.new_zeros(())
    dtype = batch.own.dtype
    rows = batch.packed.pack(sums.dhidden).to(dtype) * weights.of_row[:, None]
    norms = weights.groups.to(dtype) @ rows.square().sum(1)
    # What was skipped weighs more where its weight was rounded down.
    rounded_down = torch.where(weights.of_skipped > 0, weights.of_row / weights.of_skipped, 0.0).amax()
    largest = longest_row(batch.head.weight, dtype) * sums.skipped.sqrt() * rounded_down
    return torch.where(largest == 0, 0.0, largest / norms.sqrt()).amax()
