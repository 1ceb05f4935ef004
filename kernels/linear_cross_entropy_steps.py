"""The steps of the cross-entropy of a linear head with its options: which rows count, and their losses and gradients.

With the logit x_v = h·W_v + bias_v, softcapped to c_v = s·tanh(x_v / s), class weights w, smoothing ε and z-loss λ

    loss = (1 - ε)·w_y·(lse - c_y) + ε/V·sum_v w_v (lse - c_v) + λ·lse²

as in `F.cross_entropy`, whose mean divides by the sum of w_y; the mean of lse² is that over rows, as in Liger's
kernels. With u the upstream gradient of a row's loss and v that of its lse, the derivative in c is

    a·P_v - b·w_v,   and for y also   -u·(1 - ε)·w_y,   with a = u·((1 - ε)·w_y + ε/V·sum w + 2λ·lse) + v, b = u·ε/V

and is written in the logits' place for all columns but y (see cross_entropy_rows). That of y is computed in fp32, with
1 - P_y as the mass of the other columns, so that it is exact where the model is sure.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from soundwave.kernels.active_columns import probabilities_times_weight
from soundwave.kernels.checks import raise_or_defer, raise_pending
from soundwave.kernels.cross_entropy_rows import CrossEntropyStats, cross_entropy_rows, softcapped
from soundwave.kernels.dispatch import to_device
from soundwave.kernels.linear_ctc_path import sum_dtype, without_autocast
from soundwave.kernels.vocab_rows import WEIGHT_TILE, add_weight_gradient, gradient_dtype, logit_chunks, p_factor

TARGET_ROWS = 1024  # targets whose rows of the head are gathered at once: bounds the fp32 copy


class Options(NamedTuple):
    """`bias` and `class_weight` [V] or None; softcap 0 is none."""

    bias: Tensor | None
    class_weight: Tensor | None
    label_smoothing: float
    softcap: float
    z_loss: float

    @property
    def none(self) -> bool:
        return self.bias is None and self.class_weight is None and not any(self[2:])


class Needed(NamedTuple):
    """Which gradients are computed."""

    hidden: bool
    weight: bool
    bias: bool


class Rows(NamedTuple):
    """The M of N rows that count: `place` int64 [M], `target` int64 [M], `hidden` [M, D].

    `wrong` bool [N]: rows with a target that is no row of the head. `count`: how many rows are not ignored.
    """

    place: Tensor
    target: Tensor
    hidden: Tensor
    wrong: Tensor
    count: Tensor

    def spread(self, values: Tensor) -> Tensor:
        """[M] -> [N]: 0 for the other rows, NaN for wrong ones."""
        out = values.new_zeros(len(self.wrong))
        out[self.place] = values
        return out.masked_fill_(self.wrong, torch.nan)


class Results(NamedTuple):
    """Of N rows: losses [N] and lse [N], 0 where ignored; how many are not, and what the mean divides by; the
    gradients. What is not needed is empty.
    """

    losses: Tensor
    lse: Tensor
    count: Tensor
    divisor: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor


def rows_that_count(hidden: Tensor, target: Tensor, ignore_index: int, columns: int, validate: bool) -> Rows:
    """Raises for targets that are no row of the head.

    The host has to know M. It waits for targets on CUDA, and knows it of those on the CPU.
    """
    kept = target != ignore_index
    wrong = kept & ((target < 0) | (target >= columns))

    def message(*place_and_value: int) -> str:
        *place, value = place_and_value  # no place: target is a number
        return f"target{place or ''} = {value}, but it must be ignore_index or 0 to {columns - 1}, a row of weight"

    raise_pending()
    raise_or_defer(target, wrong, message, validate)
    kept, wrong = kept.flatten(), wrong.flatten()
    place = (kept & ~wrong).nonzero()[:, 0]
    ids = to_device(target.flatten()[place].to(torch.int64), hidden.device)
    place, wrong, count = (to_device(x, hidden.device) for x in (place, wrong, kept.sum()))
    return Rows(place, ids, hidden[place], wrong, count)


def target_logits(rows: Rows, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The logit of each row's own target [M, 1]."""
    logits = rows.hidden.new_empty(len(rows.hidden), 1, dtype=dtype)
    for h, t, out in zip(*(x.split(TARGET_ROWS) for x in (rows.hidden, rows.target, logits)), strict=True):
        torch.sum(h.to(dtype) * weight[t].to(dtype), 1, keepdim=True, out=out)
    return logits


def _add_bias_gradient(dbias: Tensor, q: Tensor, magnitude: Tensor | None) -> None:
    """`dbias` [V] += the sum of the rows of q, each times its magnitude, if given, over `p_factor`."""
    for v in range(0, q.shape[1], WEIGHT_TILE):
        part = q[:, v : v + WEIGHT_TILE]
        if magnitude is not None:
            part = part.to(dbias.dtype) * (magnitude / p_factor(q.dtype))[:, None]
        dbias[v : v + WEIGHT_TILE] += part.sum(0, dtype=dbias.dtype)


def _add_weight_gradient(dweight: Tensor, q: Tensor, rows: Tensor, magnitude: Tensor | None, first: bool) -> None:
    """`dweight` [V, D] += qᵀ rows, of rows each times its magnitude, if given; with `first` it is written."""
    if magnitude is None:
        return add_weight_gradient(dweight, q, rows, first)
    greatest = magnitude.amax()  # times it, rows could be more than fp16 holds
    if not first:
        dweight.div_(greatest)
    add_weight_gradient(dweight, q, (rows * (magnitude / greatest)[:, None]).to(rows.dtype), first)
    dweight.mul_(greatest)


@without_autocast
def run_with_options(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    options: Options,
    ignore_index: int,
    product_dtype: torch.dtype,
    mean: bool,
    with_lse: bool,
    need: Needed,
    impl: str,
    validate: bool,
    upstream: tuple[Tensor, Tensor] | None = None,
) -> Results:
    """`upstream`: the gradients [N] of each row's loss and lse; None: 1 and 0. `mean`: z-loss is divided as a mean."""
    dtype, columns = sum_dtype(hidden, weight), weight.shape[0]
    smoothing, softcap = options.label_smoothing, options.softcap
    rows = rows_that_count(hidden, target, ignore_index, columns, validate)
    bias, class_weight = (None if x is None else x.to(dtype).contiguous() for x in options[:2])
    own = target_logits(rows, weight, dtype)[:, 0]
    own, own_slope = softcapped(own if bias is None else own + bias[rows.target], softcap)
    ones = torch.ones_like(own)
    own_weight = ones if class_weight is None else class_weight[rows.target]
    weight_sum = columns if class_weight is None else class_weight.sum()
    divisor = rows.count if class_weight is None else own_weight.sum()
    of_z = options.z_loss * (divisor / rows.count if mean and class_weight is not None else 1.0)

    u, v = (ones, 0 * ones) if upstream is None else (x[rows.place].to(dtype) for x in upstream)
    of_own, of_lse, constant = (1 - smoothing) * u * own_weight, 2 * of_z * u, smoothing / columns * u
    of_all = weight_sum * constant + v
    heaviest = 1.0 if class_weight is None else class_weight.abs().amax()
    coefficients = None
    if any(need):
        beyond = of_own.abs() + constant.abs() * heaviest
        coefficients = torch.stack([of_own + of_all, of_lse, constant, beyond], 1)

    dhidden = hidden.new_zeros(hidden.shape if need.hidden else 0, dtype=gradient_dtype(hidden))
    dweight = (own.new_empty if len(own) else own.new_zeros)(weight.shape if need.weight else 0)
    dbias = own.new_zeros(columns if need.bias else 0)
    stats = CrossEntropyStats.empty(len(own), own)
    product_rows, product_weight = rows.hidden.to(product_dtype), weight.to(product_dtype)
    for start, stop, q in logit_chunks(product_rows, product_weight):
        some = slice(start, stop)
        here, ids = stats.rows(start, stop), rows.target[some]
        given = None if coefficients is None else coefficients[some]
        cross_entropy_rows(q, ids, own[some], bias, class_weight, softcap, smoothing > 0, given, here, impl)
        if given is None:
            continue
        lse = torch.maximum(here.maximum, own[some]) + here.log_sum
        of_target = (of_all[some] + of_lse[some] * lse) * (own[some] - lse).exp() - constant[some] * own_weight[some]
        of_target = (of_target - of_own[some] * here.off_target_mass) * own_slope[some]
        magnitude = here.magnitude if q.dtype == torch.float16 else None
        if need.hidden:
            product = probabilities_times_weight(q, product_weight, here.off_target_mass, None, impl=impl)
            if magnitude is not None:
                product *= magnitude[:, None]
            product.addcmul_(of_target[:, None], weight[ids].to(dtype))
            dhidden[rows.place[some]] = product.to(dhidden.dtype)
        if need.weight or need.bias:
            scaled = of_target if magnitude is None else of_target * (p_factor(q.dtype) / magnitude)
            q.scatter_(1, ids[:, None], scaled[:, None].to(q.dtype))
        if need.weight:
            _add_weight_gradient(dweight, q, product_rows[some], magnitude, not start)
        if need.bias:
            _add_bias_gradient(dbias, q, magnitude)

    highest = torch.maximum(stats.maximum, own)
    nll, lse = stats.log_sum + (highest - own), highest + stats.log_sum
    loss = (1 - smoothing) * own_weight * nll
    if smoothing:
        smooth = smoothing / columns * (weight_sum * nll - stats.spread)
        loss += torch.where(nll == torch.inf, nll, smooth)
    if options.z_loss:
        loss += of_z * lse.square()
    lse = rows.spread(lse) if with_lse else own.new_empty(0)
    return Results(rows.spread(loss), lse, rows.count, divisor, dhidden, dweight, dbias)
