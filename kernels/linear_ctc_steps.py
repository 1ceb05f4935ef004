"""The four steps of `linear_ctc`, in the order in which they run. Its docstring has the maths and the letters."""

from typing import NamedTuple

import torch
from torch import Tensor

from soundwave.kernels.ctc_lattice import ctc_lattice
from soundwave.kernels.ctc_targets import check_targets, distinct_labels, feasible, length_mask
from soundwave.kernels.dispatch import to_device, to_device_together
from soundwave.kernels.linear_ctc_path import Head, Packed, argmax_path, logits_of_labels, sum_dtype
from soundwave.kernels.vocab_rows import (
    RowStats,
    add_weight_gradient,
    gradient_dtype,
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
    """What the caller chose, for all steps."""

    product_dtype: torch.dtype
    impl: str
    reduction: str
    zero_infinity: bool
    exact: bool
    need: Need
    validate: bool


class Batch(NamedTuple):
    """What step 1 returns: the checked arguments, the rows inside the lengths, and the labels with their logits."""

    hidden: Tensor  # [B, T, D]
    head: Head
    input_lengths: Tensor  # int [B]
    target_lengths: Tensor  # int [B]
    wrong: Tensor | None  # bool [B], utterances with a wrong length or label, as `check_targets` returns them
    feasible: Tensor  # bool [B], utterances with enough frames for their labels
    packed: Packed
    labels: Tensor  # int64 [B, C], blank first; unused columns hold the blank again
    used: Tensor  # bool [B, C]
    column: Tensor  # int64 [B, U], where each target stands in `labels`
    label_logits: Tensor  # [N, C], -inf in unused columns
    factor: Tensor  # [B], of each utterance's loss in the reduction, 0 where it does not fit; perhaps on the CPU


class Weights(NamedTuple):
    """The factors of the losses, as multiples of the greatest one, so that they lie between -1 and 1.

    Those of utterances may be on the CPU. What only the choice of columns or dW needs is None without them.
    """

    greatest: Tensor  # scalar, the largest absolute factor
    utterance: Tensor  # [B], the factor of each utterance, with its sign
    p: Tensor  # [N], what the rows of P are multiplied with
    inverse: Tensor  # [N], 1 / p, or 0
    row: Tensor | None  # [N], the absolute value of each row's factor
    sign: Tensor | None  # [N, 1], in the dtype of the products
    groups: Tensor | None  # bool [G, N], groups of rows for each of which the bound on skipped columns holds


class Sums(NamedTuple):
    """What step 2 returns. Gradients are empty where they are not needed."""

    stats: RowStats
    dhidden: Tensor  # [B, T, D], P W of each utterance's own loss, without its factor
    dweight: Tensor  # [V, D], Pᵀ H with the factors
    active: float  # share of the columns that took part in P W, summed over the rows
    skipped: Tensor  # [G], squared 2-norms of the mass in skipped columns


class Alignment(NamedTuple):
    """What step 3 returns."""

    path: Tensor  # int64 [B, T]
    path_log_prob: Tensor  # [B, T]
    log_probs: Tensor  # [N, C], of the labels
    nll: Tensor  # [B]
    gamma: Tensor  # [T, B, C], posteriors of the labels; empty without a gradient


def label_columns(
    hidden: Tensor, head: Head, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, settings: Settings
) -> Batch:
    """Step 1: the checked arguments, the rows inside the lengths, and the logits of each utterance's labels.

    Where labels and lengths are on the CPU, what follows from them is computed there, and sent in one copy.
    """
    size, given = hidden.shape[1], input_lengths
    late = any(x.is_cuda for x in (targets, input_lengths, target_lengths))
    targets, input_lengths, target_lengths, wrong = check_targets(
        targets, input_lengths, target_lengths, frames=size, classes=head.size, blank=head.blank,
        device=hidden.device if late else targets.device, validate=settings.validate, frames_of="hidden",
        classes_of="rows of the head",
    )  # fmt: skip
    fits = feasible(targets, input_lengths, target_lengths)
    if wrong is not None:
        fits &= ~wrong
    packed = Packed.of(input_lengths if given.is_cuda else given.clamp(0, size), hidden)
    labels, order, rank = distinct_labels(targets, target_lengths, head.blank)
    rank = rank.masked_fill(~length_mask(target_lengths, targets.shape[1]), 0)  # padding is sorted last
    used = labels != head.blank
    used[:, 0] = True
    column = torch.zeros_like(rank).scatter_(1, order, rank)
    factor = _factor(fits, target_lengths, settings.reduction, sum_dtype(hidden, head.weight))
    labels, used, column, input_lengths, target_lengths, can = to_device_together(
        [labels, used, column, input_lengths, target_lengths, fits], hidden.device
    )
    used, can = used.to(torch.bool), can.to(torch.bool)
    logits = logits_of_labels(hidden, head, labels, used, packed)
    return Batch(hidden, head, input_lengths, target_lengths, wrong, can, packed, labels, used, column, logits, factor)


def _factor(fits: Tensor, target_lengths: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """[B]: the factor of each loss in the reduction, before any sum; 0 where an utterance does not fit."""
    factor = fits.to(dtype)
    return factor / (target_lengths.clamp(min=1) * len(factor)) if reduction == "mean" else factor


def without_alignment(batch: Batch, settings: Settings) -> Tensor:
    """bool [B]: utterances with enough frames that cannot be aligned, because what they need has a logit of -inf."""
    impossible = batch.label_logits == -torch.inf
    if not impossible.is_cuda and not (impossible & batch.used[batch.packed.utterance]).any():  # nothing waits there
        return torch.zeros_like(batch.feasible)
    log_probs = torch.zeros_like(batch.label_logits).masked_fill_(impossible, -torch.inf)
    nll, _ = ctc_lattice(
        batch.packed.pad(log_probs, batch.hidden).transpose(0, 1), batch.column, batch.input_lengths,
        batch.target_lengths, blank=0, impl=settings.impl, need_gamma=False,
    )  # fmt: skip
    return batch.feasible & (nll == torch.inf)


def loss_weights(scale: Tensor, batch: Batch, settings: Settings) -> Weights:
    """The factors `scale` [B] of the losses in the forms that the steps need."""
    need, utterance, device = settings.need, batch.packed.utterance, batch.hidden.device
    greatest = scale.abs().amax() if len(scale) else scale.sum()
    weight = scale / greatest.clamp(min=torch.finfo(scale.dtype).tiny)
    p = weight.abs()
    if not need.weight:
        # Then the factor of P only decides which columns are skipped and is divided out again. A power of two makes
        # that exact.
        p = p.log2().round_().exp2_()
    p, inverse = to_device(torch.stack([p, torch.where(p > 0, 1 / p, 0.0)]), device)[:, utterance]
    row = sign = groups = None
    if need.weight:
        sign = to_device(weight.sign().to(settings.product_dtype), device)[utterance, None]
    if need.hidden and not settings.exact:
        row = to_device(weight.abs(), device)[utterance]
        groups = utterance == torch.arange(len(scale), device=device)[:, None]
        if settings.reduction != "none":
            # One bound for all rows. With "none" the caller weighs the losses later: it must hold for each utterance.
            groups = groups.any(0, keepdim=True)
    return Weights(greatest, weight, p, inverse, row, sign, groups)


def over_vocabulary(batch: Batch, weights: Weights, settings: Settings) -> Sums:
    """Step 2: for each chunk of rows the product S, its statistics and P; then dH = P W, and dW += Pᵀ H."""
    hidden, packed, label_logits, need = batch.hidden, batch.packed, batch.label_logits, settings.need
    rows, weight = packed.pack(hidden).to(settings.product_dtype), batch.head.weight.to(settings.product_dtype)
    stats = RowStats.empty(len(rows), label_logits)
    dhidden = hidden.new_zeros(hidden.shape if need.hidden else 0, dtype=gradient_dtype(hidden))
    dweight = label_logits.new_zeros(weight.shape if need.weight else 0)
    active, skipped = 0.0, label_logits.new_zeros(0 if weights.groups is None else len(weights.groups))
    chunks = vocab_chunks(
        rows, weight, label_logits, batch.labels.masked_fill(~batch.used, -1), packed.utterance,
        weights.p if need.hidden or need.weight else None, stats, settings.impl,
    )  # fmt: skip
    for start, stop, p in chunks:
        if need.hidden:
            mass, groups = stats.off_label_mass[start:stop], weights.groups
            if groups is not None:
                mass, groups = mass * weights.p[start:stop], groups[:, start:stop]
            product, columns, missing = probabilities_times_weight(p, weight, mass, settings.exact, groups)
            product *= weights.inverse[start:stop, None]
            dhidden.view(-1, hidden.shape[2])[packed.place[start:stop]] = product.to(dhidden.dtype)
            active += columns * (stop - start)
            if groups is not None:
                skipped += missing
        if need.weight:
            add_weight_gradient(dweight, p, rows[start:stop] * weights.sign[start:stop])
    return Sums(stats, dhidden, dweight, active, skipped)


def align(batch: Batch, stats: RowStats, settings: Settings) -> Alignment:
    """Step 3: the most probable ids, and the lattice on the log-probabilities of the labels."""
    path, path_log_prob = argmax_path(batch.label_logits, batch.labels, stats, batch.packed, batch.hidden)
    maximum = torch.maximum(batch.label_logits.amax(1), stats.maximum)
    log_probs = (batch.label_logits - maximum[:, None]) - stats.log_sum[:, None]
    nll, gamma = ctc_lattice(
        batch.packed.pad(log_probs, batch.hidden).transpose(0, 1), batch.column, batch.input_lengths,
        batch.target_lengths, blank=0, impl=settings.impl, need_gamma=any(settings.need),
    )  # fmt: skip
    return Alignment(path, path_log_prob, log_probs, nll, gamma)


def add_labels(batch: Batch, weights: Weights, sums: Sums, alignment: Alignment, aligned: Tensor, need: Need) -> Tensor:
    """Step 4: dH += (P_labels - gamma) W_labels, and the same columns' part of dW, both in place.

    Only the utterances `aligned` bool [B] have a gradient. Returns that of the extra blank [B, D + 1].
    """
    hidden, head, packed = batch.hidden, batch.head, batch.packed
    width, dtype = hidden.shape[2], batch.label_logits.dtype
    dblank = batch.label_logits.new_zeros((len(hidden), width + 1) if need.blank else 0)
    if not any(need):
        return dblank
    gamma = alignment.gamma.transpose(0, 1).flatten(0, 1)[packed.place]
    gradient = label_gradient(alignment.log_probs, gamma, sums.stats)
    gradient.masked_fill_(~aligned[packed.utterance, None], 0.0)
    gradient = packed.pad(gradient, hidden)
    rows = len(head.weight)
    first = head.size - rows  # the extra blank is column 0 and no row of `head.weight`
    for group in packed.groups(hidden):
        at, labels = (group.utterances, slice(group.frames)), batch.labels[group.utterances]
        g = gradient[at]
        if need.hidden:
            dh, of_labels = sums.dhidden[at], head.rows(labels, dtype)
            if dh.dtype == dtype:
                dh.baddbmm_(g, of_labels)
            else:
                dh.copy_(torch.baddbmm(dh.to(dtype), g, of_labels))
        if not (need.blank or need.weight):
            continue
        h = hidden[at].to(dtype)
        if group.padded:  # past a length there may be NaN, which 0 does not hide
            h = h.masked_fill(~length_mask(batch.input_lengths[group.utterances], group.frames)[..., None], 0.0)
        if need.blank:
            # Of one utterance as a vector times a matrix, whose order of sums the CPU has always had.
            of_blank = g[0, :, 0] @ h[0] if len(g) == 1 else torch.bmm(g[..., :1].mT, h)[:, 0]
            dblank[group.utterances, :width], dblank[group.utterances, width] = of_blank, g[..., 0].sum(1)
        if need.weight:
            product = torch.bmm((g[..., first:] * to_device(weights.utterance[at[0]], h.device)[:, None, None]).mT, h)
            places = labels[:, first:].clamp(max=rows - 1)  # an unused column adds zeros
            # Utterances share labels: `index_put_` adds them in a fixed order, where atomics would not.
            sums.dweight.index_put_((places.flatten(),), product.flatten(0, 1), accumulate=True)
    if need.weight:
        sums.dweight.mul_(to_device(weights.greatest, hidden.device))
    return dblank


def label_gradient(log_probs: Tensor, gamma: Tensor, stats: RowStats) -> Tensor:
    """P_labels - gamma [N, C]. Where a label's P is above 1/2, minus the sum of all other columns is more exact."""
    gradient = log_probs.exp().sub_(gamma)
    maximum, at = log_probs.max(1, keepdim=True)
    others = gradient.scatter(1, at, 0.0).sum(1, keepdim=True) + stats.off_label_mass[:, None]
    return gradient.scatter_(1, at, torch.where(maximum > -LN2, -others, gradient.gather(1, at)))


def error_bound(batch: Batch, weights: Weights, sums: Sums, need: Need) -> Tensor:
    """The most that skipped columns can have changed dH, relative to its norm: a scalar, the largest of all groups."""
    if not need.hidden or sums.active >= len(batch.label_logits):
        return batch.label_logits.new_zeros(())
    dtype = batch.label_logits.dtype
    rows = batch.packed.pack(sums.dhidden).to(dtype) * weights.row[:, None]
    norms = weights.groups.to(dtype) @ rows.square().sum(1)
    # Where the factor of P was rounded down, what was skipped counts more than `skipped` says.
    rounded_down = torch.where(weights.p > 0, weights.row / weights.p, 0.0).amax()
    largest = longest_row(batch.head.weight, dtype) * sums.skipped.sqrt() * rounded_down
    return torch.where(largest == 0, 0.0, largest / norms.sqrt()).amax()
