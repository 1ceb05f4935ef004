"""The four steps of `linear_ctc`, in the order in which they run. Its docstring has the maths and the letters."""

from typing import NamedTuple

import torch
from torch import Tensor

from soundwave.kernels.active_columns import Skipped, longest_row, probabilities_times_weight
from soundwave.kernels.ctc_lattice import ctc_lattice
from soundwave.kernels.ctc_targets import check_targets, distinct_labels, feasible, length_mask
from soundwave.kernels.dispatch import to_device, to_device_together
from soundwave.kernels.label_rows import label_gradients, label_path
from soundwave.kernels.linear_ctc_path import Head, Packed, bmm, logits_of_labels, sum_dtype
from soundwave.kernels.vocab_rows import RowStats, add_weight_gradient, gradient_dtype, vocab_chunks


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
    labels: Tensor  # int64 [B, C], blank first; -1 in unused columns
    places: Tensor  # int64 [B, C], their rows of the head
    column: Tensor  # int64 [B, U], where each target stands in `labels`
    order: Tensor  # int64 [B, U], the positions sorted by label
    rank: Tensor  # int64 [B, U], `column` in that order
    label_logits: Tensor  # [N, C], -inf in unused columns
    rows: Tensor | None  # [B, C, D], the labels' rows of the head, where all fit into one product
    impossible: Tensor | None  # bool [B], utterances with a label logit of -inf, if columns may be skipped
    factor: Tensor  # [B], of each utterance's loss in the reduction, 0 where it does not fit; perhaps on the CPU
    divisor: Tensor  # int64 [B], of the reduction "mean"


class Weights(NamedTuple):
    """The factors of the losses in the forms that the steps need; those of utterances may be on the CPU.

    What only the choice of columns or dW needs is None without them.
    """

    greatest: Tensor  # scalar, the largest absolute factor
    utterance: Tensor  # [B], each factor as a multiple of the greatest, so between -1 and 1
    p: Tensor  # [N], what the rows of P are multiplied with: 0 or 1, and with dW the absolute values of `utterance`
    inverse: Tensor | None  # [N], 1 / p, or 0; None if every p is 0 or 1
    row: Tensor | None  # [N], a row's say in which columns are skipped, beside p; NaN forbids it
    sign: Tensor | None  # [N, 1], in the dtype of the products
    group: Tensor | None  # int64 [N], of each row, where the bound on skipped columns holds for each utterance
    factor: Tensor | None  # [B], what was given, on the device of hidden, if the head is frozen


class Sums(NamedTuple):
    """What step 2 returns. Gradients are empty where they are not needed."""

    stats: RowStats
    dhidden: Tensor  # [B, T, D], P W of each utterance's own loss, without its factor
    dweight: Tensor  # [V, D], Pᵀ H with the factors
    skipped: Skipped | None  # [N], of the columns that took no part in P W


class Alignment(NamedTuple):
    """What step 3 returns."""

    path: Tensor  # int64 [B, T]
    path_log_prob: Tensor  # [B, T]
    log_probs: Tensor  # [B, T, C], of the labels
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
    labels[:, 1:] = labels[:, 1:].masked_fill(labels[:, 1:] == head.blank, -1)
    column = torch.zeros_like(rank).scatter_(1, order, rank)
    factor, divisor = fits.to(sum_dtype(hidden, head.weight)), target_lengths.clamp(min=1) * len(fits)
    factor = factor / divisor if settings.reduction == "mean" else factor
    labels, places, unused, column, order, rank, input_lengths, target_lengths, divisor, can = to_device_together(
        [labels, head.places(labels), labels < 0, column, order, rank, input_lengths, target_lengths, divisor, fits],
        hidden.device,
    )
    impossible = None
    if settings.need.hidden and not settings.exact and not settings.need.weight:
        impossible = torch.empty(len(fits), dtype=torch.bool, device=hidden.device)
    logits, rows = logits_of_labels(hidden, head, places, unused.to(torch.bool), packed, impossible)
    return Batch(
        hidden, head, input_lengths, target_lengths, wrong, can.to(torch.bool), packed, labels, places, column, order,
        rank, logits, rows, impossible, factor, divisor,
    )  # fmt: skip


def without_alignment(batch: Batch, settings: Settings) -> Tensor:
    """bool [B]: utterances with enough frames that cannot be aligned, because what they need has a logit of -inf."""
    impossible = batch.label_logits == -torch.inf
    if (
        not impossible.is_cuda and not (impossible & (batch.labels >= 0)[batch.packed.utterance]).any()
    ):  # nothing waits there
        return torch.zeros_like(batch.feasible)
    log_probs = torch.zeros_like(batch.label_logits).masked_fill_(impossible, -torch.inf)
    nll, _ = ctc_lattice(
        batch.packed.pad(log_probs, batch.hidden).transpose(0, 1), batch.column, batch.input_lengths,
        batch.target_lengths, blank=0, impl=settings.impl, need_gamma=False, in_order=(batch.order, batch.rank),
    )  # fmt: skip
    return batch.feasible & (nll == torch.inf)


def loss_weights(scale: Tensor, batch: Batch, settings: Settings) -> Weights:
    """The factors `scale` [B] of the losses in the forms that the steps need."""
    need, utterance, device = settings.need, batch.packed.utterance, batch.hidden.device
    skips = need.hidden and not settings.exact
    # One bound for all rows. With "none" the caller weighs the losses later: it must hold for each utterance.
    group = utterance if skips and settings.reduction == "none" else None
    greatest = scale.abs().amax() if len(scale) else scale.sum()
    weight = scale / greatest.clamp(min=torch.finfo(scale.dtype).tiny)
    if not need.weight:
        p, factor = to_device(torch.stack([(weight > 0).to(scale.dtype), scale]), device)
        row = None
        if skips:
            # Without an alignment an utterance has no gradient, and must have no say. Whether it is without one is not
            # known yet where a logit is -inf: then nothing is skipped in its rows, nor in others of their tiles.
            row = factor.masked_fill(batch.impossible, torch.nan)[utterance]
        return Weights(greatest, weight, p[utterance], None, row, None, group, factor)
    p = weight.abs()
    p, inverse = to_device(torch.stack([p, torch.where(p > 0, 1 / p, 0.0)]), device)[:, utterance]
    sign = to_device(weight.sign().to(settings.product_dtype), device)[utterance, None]
    return Weights(greatest, weight, p, inverse, None, sign, group, None)


def over_vocabulary(batch: Batch, weights: Weights, settings: Settings) -> Sums:
    """Step 2: for each chunk of rows the product S, its statistics and P; then dH = P W, and dW += Pᵀ H."""
    hidden, packed, label_logits, need = batch.hidden, batch.packed, batch.label_logits, settings.need
    rows, weight = packed.pack(hidden).to(settings.product_dtype), batch.head.weight.to(settings.product_dtype)
    stats = RowStats.empty(len(rows), label_logits)
    dhidden = hidden.new_zeros(hidden.shape if need.hidden else 0, dtype=gradient_dtype(hidden))
    dweight = label_logits.new_zeros(weight.shape if need.weight else 0)
    skipped = Skipped.empty(len(rows), label_logits) if need.hidden and not settings.exact else None
    chunks = vocab_chunks(
        rows, weight, label_logits, batch.labels, packed.utterance,
        weights.p if need.hidden or need.weight else None, stats, settings.impl,
    )  # fmt: skip
    for start, stop, p in chunks:
        if need.hidden:
            mass, of_chunk, row, group = stats.off_label_mass[start:stop], None, None, None
            if skipped is not None:
                mass, of_chunk = mass * weights.p[start:stop], skipped.rows(start, stop)
                row = None if weights.row is None else weights.row[start:stop]
                group = None if weights.group is None else weights.group[start:stop]
            product = probabilities_times_weight(p, weight, mass, of_chunk, row, group, settings.impl)
            if weights.inverse is not None:
                product *= weights.inverse[start:stop, None]
                if of_chunk is not None:
                    of_chunk.mass.mul_(weights.inverse[start:stop])
            dhidden.view(-1, hidden.shape[2])[packed.place[start:stop]] = product.to(dhidden.dtype)
        if need.weight:
            add_weight_gradient(dweight, p, rows[start:stop] * weights.sign[start:stop])
    return Sums(stats, dhidden, dweight, skipped)


def align(batch: Batch, stats: RowStats, settings: Settings) -> Alignment:
    """Step 3: the most probable ids, and the lattice on the log-probabilities of the labels."""
    path, path_log_prob, log_probs = label_path(
        batch.label_logits, batch.labels, batch.input_lengths, stats, batch.packed, batch.hidden, settings.impl
    )
    nll, gamma = ctc_lattice(
        log_probs.transpose(0, 1), batch.column, batch.input_lengths, batch.target_lengths, blank=0,
        impl=settings.impl, need_gamma=any(settings.need), in_order=(batch.order, batch.rank),
    )  # fmt: skip
    return Alignment(path, path_log_prob, log_probs, nll, gamma)


def add_labels(
    batch: Batch, weights: Weights, sums: Sums, alignment: Alignment, aligned: Tensor, need: Need, impl: str
) -> Tensor:
    """Step 4: dH += (P_labels - gamma) W_labels, and the same columns' part of dW, both in place.

    Only the utterances `aligned` bool [B] have a gradient. Returns that of the extra blank [B, D + 1].
    """
    hidden, head, packed = batch.hidden, batch.head, batch.packed
    width, dtype = hidden.shape[2], batch.label_logits.dtype
    dblank = batch.label_logits.new_empty((len(hidden), width + 1) if need.blank else 0)
    if not any(need):
        return dblank
    gradient = label_gradients(
        alignment.log_probs, alignment.gamma, aligned, batch.input_lengths, sums.stats, packed, impl
    )
    first = head.size - len(head.weight)  # the extra blank is column 0 and no row of `head.weight`
    for group in packed.groups(hidden):
        at, places = (group.utterances, slice(group.frames)), batch.places[group.utterances]
        g = gradient[at]
        if need.hidden:
            dh = sums.dhidden[at]
            of_labels = head.rows(places, dtype) if batch.rows is None else batch.rows.to(dtype)
            if len(g) == 1:
                dh[0].copy_(torch.addmm(dh[0].to(dtype), g[0], of_labels[0]))  # as in `bmm`
            elif dh.dtype == dtype:
                dh.baddbmm_(g, of_labels)
            else:
                dh.copy_(torch.baddbmm(dh.to(dtype), g, of_labels))
        if not (need.blank or need.weight):
            continue
        h = hidden[at].to(dtype)
        if group.padded:  # past a length there may be NaN, which 0 does not hide
            past = torch.arange(group.frames, device=h.device) >= batch.input_lengths[group.utterances, None]
            h = h.masked_fill(past[..., None], 0.0)
        if need.blank:
            # Of one utterance as a vector times a matrix, whose order of sums the CPU has always had.
            row, bias = dblank[group.utterances, :width], dblank[group.utterances, width]
            if len(g) == 1:
                row[0] = g[0, :, 0] @ h[0]
            else:
                torch.bmm(g[..., :1].mT, h, out=row[:, None])
            torch.sum(g[..., 0], 1, out=bias)
        if need.weight:
            of_rows = g[..., first:] * to_device(weights.utterance[at[0]], h.device)[:, None, None]
            product = bmm(of_rows.mT, h, dtype)
            # Unused columns add zeros. Of labels that utterances share, `index_put_` adds the sums in a fixed order.
            sums.dweight.index_put_((places[:, first:].flatten(),), product.flatten(0, 1), accumulate=True)
    if need.weight:
        sums.dweight.mul_(to_device(weights.greatest, hidden.device))
    return dblank


def skipping(batch: Batch, sums: Sums, scale: Tensor, settings: Settings) -> Tensor:
    """[2]: the share of the columns that took part in P W, and the most that the others can have changed dH.

    That is relative to the norm of dH, whose rows have the factors `scale` [B], 0 where an utterance has no gradient.
    With reduction "none" it is the largest of all utterances.
    """
    dtype, device, skipped = batch.label_logits.dtype, batch.hidden.device, sums.skipped
    if skipped is None or not len(skipped.share):
        share = float(settings.need.hidden and len(batch.packed.place) > 0)
        return to_device(torch.tensor([share, 0.0], dtype=dtype, device="cpu"), device)
    share = skipped.share.mean()
    if device.type == "cpu" and not skipped.mass.any():
        return torch.stack([share, torch.zeros_like(share)])
    # In float64, because squares of what a row that is very sure loses are 0 in float32.
    wide, scale = torch.float64, scale.double()
    norm = torch.linalg.vector_norm(sums.dhidden, dim=(1, 2), dtype=wide)
    if settings.reduction == "none":
        mass = batch.packed.pad(skipped.mass, batch.hidden)
        lost = torch.linalg.vector_norm(mass, dim=1, dtype=wide) * (scale != 0)
    else:
        lost = torch.linalg.vector_norm(skipped.mass * scale[batch.packed.utterance])
        norm = torch.linalg.vector_norm(norm * scale)
    bound = (longest_row(batch.head.weight, dtype) * lost / norm.clamp(min=torch.finfo(wide).tiny)).to(dtype)
    return torch.stack([share, bound.amax() if bound.dim() else bound])
