"""Targets of the CTC operations: whether they are valid and can be aligned, and which labels occur.

B utterances, U labels of the longest target, S labels of all targets together.
"""

import torch
from torch import Tensor

from soundwave.kernels.checks import raise_or_defer, raise_pending
from soundwave.kernels.dispatch import ranged, to_device


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """True where a position is before its row's length: bool [B, size]."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def feasible(targets: Tensor, input_lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """bool [B]: whether each utterance has enough frames, `T >= U + adjacent repeats`. `targets` int [B, U]."""
    lengths = target_lengths.to(targets.device)
    repeats = (targets[:, 1:] == targets[:, :-1]) & length_mask(lengths - 1, max(targets.shape[1] - 1, 0))
    return input_lengths.to(targets.device) >= lengths + repeats.sum(1)


def distinct_labels(targets: Tensor, target_lengths: Tensor, blank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct labels of each utterance, and their positions in it.

    Returns:
        labels int64 [B, U + 1]: `blank`, the distinct labels in rising order, then `blank` again as padding.
        order int64 [B, U]: the positions, sorted by label; padding last.
        column int64 [B, U]: for each position in `order` the column of its label in `labels`.
    """
    batch, size = targets.shape
    past = torch.iinfo(torch.int64).max
    valid = length_mask(target_lengths.to(targets.device), size)
    ordered, order = targets.to(torch.int64).masked_fill(~valid, past).sort(dim=1, stable=True)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    column = new.cumsum(1)
    labels = torch.full((batch, size + 1), blank, dtype=torch.int64, device=targets.device)
    return labels.scatter_(1, column, ordered.masked_fill(ordered == past, blank)), order, column


def check_targets(
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    *,
    frames: int,
    classes: int,
    blank: int,
    device: torch.device,
    validate: bool,
    frames_of: str = "log_probs",
    classes_of: str = "classes of log_probs",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Check that lengths fit their tensors, labels are classes, and none is the blank. `targets` int [B, U].

    Returns:
        targets and both lengths, on `device` and contiguous, as kernels read them.
        None if all three were on the CPU, else bool [B], the utterances with something wrong. Their lengths are then
        0, so that nothing is read out of bounds.

    Raises:
        ValueError: something is wrong; at once if all three are on the CPU or with `validate`, else later (see
            `checks`).
    """
    raise_pending()
    size, given = targets.shape[1], (targets, input_lengths, target_lengths)
    late = any(tensor.is_cuda for tensor in given)
    targets, input_lengths, target_lengths = (to_device(tensor, device) if late else tensor for tensor in given)
    # One table of lengths and labels, because separate checks would be some fifty small operations on a GPU.
    values = torch.cat([input_lengths[:, None], target_lengths[:, None], targets], 1)
    column = torch.arange(-2, size, device=values.device)
    limit = torch.where(column >= 0, classes - 1, torch.where(column == -1, size, frames))
    wrong = (values < 0) | (values > limit) | (values == blank) & (column >= 0)
    wrong &= column < target_lengths.clamp(min=0)[:, None]

    def message(row: int, column: int, value: int) -> str:
        if column < 2:
            name, limit, of = (
                ("input_lengths", frames, f"frames of {frames_of}"),
                ("target_lengths", size, "columns of targets"),
            )[column]
            return f"{name}[{row}] = {value}, but it must be 0 to {limit}, the {of}"
        return f"targets[{row}, {column - 2}] = {_wrong_label(value, classes, blank, classes_of)}"

    raise_or_defer(values, wrong, message, validate)
    if not late:
        targets, input_lengths, target_lengths = (to_device(tensor, device).contiguous() for tensor in given)
        return targets, input_lengths, target_lengths, None
    wrong = wrong.any(1)
    return targets.contiguous(), input_lengths.masked_fill(wrong, 0), target_lengths.masked_fill(wrong, 0), wrong


def _wrong_label(value: int, classes: int, blank: int, classes_of: str) -> str:
    what = "that is the blank" if value == blank else f"it must be 0 to {classes - 1}, one of the {classes_of}"
    return f"{value}, but {what}"


@torch.library.custom_op("soundwave::ctc_pad_targets", mutates_args=())
@ranged("soundwave.ctc_pad_targets")
def pad_targets(
    targets: Tensor,
    target_lengths: Tensor,
    classes: int = -1,
    blank: int = -1,
    classes_of: str = "classes of log_probs",
    validate: bool = False,
) -> Tensor:
    """Concatenated targets [S] -> [B, U], padded with -1. Lengths on CUDA cost a synchronisation, because they give U.

    Raises:
        ValueError: lengths that do not add up to S. With `classes` also a label that is the blank or no class, named by
            its place in [S], if targets are on the CPU or with `validate`; otherwise `check_targets` finds it later and
            names it by utterance and place.
    """
    lengths = target_lengths.cpu().to(torch.int64)
    raise_or_defer(lengths, lengths < 0, "target_lengths[{place}] = {value}, but it must be 0 or more")
    if int(lengths.sum()) != targets.shape[0]:
        raise ValueError(f"targets has {targets.shape[0]} labels, but target_lengths adds up to {int(lengths.sum())}")
    if classes >= 0 and (validate or not targets.is_cuda):
        wrong = (targets < 0) | (targets >= classes) | (targets == blank)
        raise_or_defer(
            targets,
            wrong,
            lambda i, value: f"targets[{i}] = {_wrong_label(value, classes, blank, classes_of)}",
            validate,
        )
    valid = length_mask(lengths, int(lengths.max()) if lengths.numel() else 0)
    places = torch.zeros_like(valid, dtype=torch.int64)
    places.masked_scatter_(valid, torch.arange(targets.shape[0], device=valid.device))
    return targets[to_device(places, targets.device)].masked_fill_(~to_device(valid, targets.device), -1)


@pad_targets.register_fake
def _(targets, target_lengths, classes=-1, blank=-1, classes_of="", validate=False):
    return targets.new_empty(target_lengths.shape[0], torch.library.get_ctx().new_dynamic_size())
