"""One pass over rows of logits for the cross-entropy with its options: statistics, and gradients in the logits' place.

Of a row x = z + bias [V], with c = x, or c = s·tanh(x / s) under a softcap s, target y and class weights w (1 without):

    lse = log sum_v exp(c_v)       P_v = exp(c_v - lse)       off = sum of P_v over v != y
    spread = sum_v w_v (c_v - c_y)                            label smoothing needs sum_v w_v (lse - c_v) of it
    Q_v = (a·P_v - b·w_v)·dc_v/dx_v for v != y, and 0 for y   with a = slope + lse_slope·lse

slope, lse_slope and b are numbers of the row, known before the pass: the caller makes them of the upstream gradient,
the class weights, z-loss and label smoothing. The target's logit c_y is given too, because it is computed apart, in the
dtype of the sums; its column of z is not used. As in vocab_rows, Q therefore holds the gradient of the other columns
only, and `log_sum` is log1p of them where the target has the highest logit: nothing is lost where the model is sure.

Shapes    logits [n, V] with any row stride; target int64 [n]; target_logits [n]; bias, class_weight [V] or None;
          coefficients [n, 4] (slope, lse_slope, b, and what |Q| and dloss/dc_y exceed |a| by at most) or None; ->
          `CrossEntropyStats` [n], and Q in the place of the logits.
Numerics  everything but z and Q in fp32 (fp64). fp16 has no range for Q, whose size nobody knows beforehand, so each
          row of it is divided by `magnitude` and multiplied by `p_factor`.
Cost      the logits are read twice and written once; without coefficients read once and not written. Two exponentials
          more a column under a softcap.       Bitwise deterministic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from soundwave.kernels.dispatch import interpreted
from soundwave.kernels.vocab_rows import BLOCK_BYTES_CPU, _exp, _exp_of_logits, _log1p, p_factor

SMALL = tl.constexpr(0.5)  # below it 1 - exp(-2|x|) has lost too many bits for tanh
TERMS = {torch.float32: 4, torch.float64: 7}  # of tanh's continued fraction: below SMALL within 5e-9 and 2e-17
LEAST_MAGNITUDE = 1e-20  # of a row of Q in fp16, because it is divided by it


def _config(columns: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(groups a block, columns a group, warps, most registers a thread): a group is what a thread loads at once.

    These are 16 bytes. One group a thread and half as many as in `vocab_rows`, because bias, class weight and
    derivative of each column stand beside its logit in registers. Left alone, ptxas takes 64 of them for float64 on
    sm_120 and spills two.
    """
    groups = min(256, max(32, triton.next_power_of_2(triton.cdiv(columns, 16 // dtype.itemsize))))
    return groups, 16 // dtype.itemsize, groups // 32, 128 if dtype == torch.float64 else 64


class CrossEntropyStats(NamedTuple):
    """Of each row: the maximum outside the target, lse less the overall maximum, off-target mass, spread, magnitude."""

    maximum: Tensor
    log_sum: Tensor
    off_target_mass: Tensor
    spread: Tensor
    magnitude: Tensor

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> "CrossEntropyStats":
        return cls(*(like.new_empty(rows) for _ in cls._fields))

    def rows(self, start: int, stop: int) -> "CrossEntropyStats":
        return CrossEntropyStats(*(x[start:stop] for x in self))


def softcapped(x: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """`softcap·tanh(x / softcap)` and its derivative, which `1 - tanh²` would round to 0 for large x; 0: x itself."""
    if not softcap:
        return x, torch.ones_like(x)
    x = x / softcap
    return softcap * x.tanh(), x.cosh().reciprocal_().square_()


def _cross_entropy_rows_torch(
    logits: Tensor,
    target: Tensor,
    target_logits: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    softcap: float,
    smooth: bool,
    coefficients: Tensor | None,
) -> tuple[CrossEntropyStats, Tensor | None]:
    """`CrossEntropyStats`, and Q in the dtype of the sums; overwrites logits of that dtype."""
    x, at, own = logits.to(target_logits.dtype), target[:, None], target_logits[:, None]
    if bias is not None:
        x += bias
    slope = None
    if softcap:
        x, slope = softcapped(x, softcap)
    spread = torch.zeros_like(target_logits)
    if smooth:
        relative = (x - own).scatter_(1, at, 0.0)
        spread = relative.sum(1) if class_weight is None else relative.mul_(class_weight).sum(1)
    x.scatter_(1, at, -torch.inf)
    maximum = x.amax(1)
    highest = torch.maximum(maximum, target_logits)
    off_target = x.sub_(highest[:, None]).exp_().sum(1)
    total = off_target + (target_logits - highest).exp()
    log_sum = torch.where(target_logits >= maximum, off_target.log1p(), total.log())
    stats = CrossEntropyStats(maximum, log_sum, off_target / total, spread, torch.ones_like(spread))
    if coefficients is None:
        return stats, None
    known, of_lse, constant, beyond = coefficients.unbind(1)
    factor = known + of_lse * (highest + log_sum)
    q = x.mul_((factor / total)[:, None])
    if smooth:
        q = q.sub_(constant[:, None]) if class_weight is None else q.sub_(constant[:, None] * class_weight)
    if slope is not None:
        q *= slope
    q.scatter_(1, at, 0.0)
    if logits.dtype == torch.float16:
        stats = stats._replace(magnitude=(factor.abs() + beyond).clamp_(min=LEAST_MAGNITUDE))
        q.mul_((p_factor(logits.dtype) / stats.magnitude)[:, None])
    return stats, q


@triton.jit
def _softcapped(x, CAP: tl.constexpr, HALF: tl.constexpr, SPLIT: tl.constexpr, TERMS: tl.constexpr):
    """CAP·tanh(x / CAP) and its derivative. With e = exp(-2|x|), tanh is (1 - e) / (1 + e), its derivative
    4e / (1 + e)². Near 0 the continued fraction of tanh is exact: x / (1 + x² / (3 + x² / (5 + ...))).
    """
    x = x / CAP
    size = tl.abs(x)
    e = _exp_of_logits(-2.0 * size, HALF, SPLIT)
    tanh = (1.0 - e) / (1.0 + e)
    if TERMS > 0:
        below = tl.zeros_like(x) + (2 * TERMS + 1)
        for k in tl.static_range(TERMS - 1, -1, -1):
            below = (2 * k + 1) + size * size / below
        tanh = tl.where(size < SMALL, size / below, tanh)
    return CAP * tl.where(x < 0, 0.0 - tanh, tanh), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _load(ROW, column, V, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ROW + column, mask=column < V, other=0.0)
    else:
        return tl.load(ROW + column)


@triton.jit
def _columns(
    LOGITS_ROW, BIAS, column, V, target, dtype: tl.constexpr, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr, HALF: tl.constexpr, SPLIT: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """c of columns, dc/dx, and which of them are there and not the target."""
    x = _load(LOGITS_ROW, column, V, MASKED).to(dtype)
    if HAS_BIAS:
        x += _load(BIAS, column, V, MASKED)
    other = column != target
    if MASKED:
        other = other & (column < V)
    derivative = tl.full(x.shape, 1.0, dtype)
    if CAP > 0:
        x, derivative = _softcapped(x, CAP, HALF, SPLIT, TERMS)
    return x, derivative, other


@triton.jit
def _weight(CLASS_WEIGHT, column, V, dtype: tl.constexpr, MASKED: tl.constexpr, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        return _load(CLASS_WEIGHT, column, V, MASKED)
    else:
        return tl.full(column.shape, 1.0, dtype)


@triton.jit
def _add_columns(x, other, weight, own, maximum, total, spread, HALF: tl.constexpr, SPLIT: tl.constexpr,
                 SMOOTH: tl.constexpr):  # fmt: skip
    """Take in columns x [groups, each]: of each group the maximum, the sum of exponentials relative to it, spread."""
    if SMOOTH:
        spread += tl.sum(tl.where(other, weight * (x - own), 0.0), 1)
    x = tl.where(other, x, float("-inf"))
    higher = tl.maximum(maximum, tl.max(x, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    terms = tl.sum(_exp_of_logits(x - base[:, None], HALF, SPLIT), 1)
    return higher, total * _exp(maximum - base, SPLIT) + terms, spread


# A chunk starts at any row, so the alignment of what has one value a row varies.
@triton.jit(
    do_not_specialize_on_alignment=[
        "TARGET", "TARGET_LOGITS", "COEFFICIENTS", "MAXIMUM", "LOG_SUM", "OFF_TARGET_MASS", "SPREAD", "MAGNITUDE",
    ],
)  # fmt: skip
def _cross_entropy_rows_kernel(
    LOGITS, TARGET, TARGET_LOGITS, BIAS, CLASS_WEIGHT, COEFFICIENTS, MAXIMUM, LOG_SUM, OFF_TARGET_MASS, SPREAD,
    MAGNITUDE, V, stride,
    WRITE: tl.constexpr, HAS_BIAS: tl.constexpr, CAP: tl.constexpr, SMOOTH: tl.constexpr, WEIGHTED: tl.constexpr,
    FACTOR: tl.constexpr, LEAST: tl.constexpr, SPLIT: tl.constexpr, TERMS: tl.constexpr, GROUPS: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    """One row. What its whole blocks leave over is taken one column a thread, as in `vocab_rows`."""
    row = tl.program_id(0).to(tl.int64)
    ROW = LOGITS + row * stride
    given: tl.constexpr = LOGITS.dtype.element_ty
    dtype: tl.constexpr = TARGET_LOGITS.dtype.element_ty
    HALF: tl.constexpr = given.primitive_bitwidth == 16
    BLOCK: tl.constexpr = GROUPS * EACH
    target, own = tl.load(TARGET + row).to(tl.int32), tl.load(TARGET_LOGITS + row)
    group = tl.arange(0, GROUPS)
    lane = group[:, None] * EACH + tl.arange(0, EACH)[None, :]
    whole = V // BLOCK
    maximum, total = tl.full([GROUPS], float("-inf"), dtype), tl.zeros([GROUPS], dtype)
    spread = tl.zeros([GROUPS], dtype)
    for block in range(0, whole):
        column = block * BLOCK + lane
        x, _, other = _columns(ROW, BIAS, column, V, target, dtype, False, HAS_BIAS, CAP, HALF, SPLIT, TERMS)
        weight = _weight(CLASS_WEIGHT, column, V, dtype, False, WEIGHTED and SMOOTH)
        maximum, total, spread = _add_columns(
            x, other, weight, own, maximum, total, spread, HALF, SPLIT, SMOOTH
        )  # fmt: skip
    for start in range(whole * BLOCK, V, GROUPS):
        column = start + group[:, None]
        x, _, other = _columns(ROW, BIAS, column, V, target, dtype, True, HAS_BIAS, CAP, HALF, SPLIT, TERMS)
        weight = _weight(CLASS_WEIGHT, column, V, dtype, True, WEIGHTED and SMOOTH)
        maximum, total, spread = _add_columns(
            x, other, weight, own, maximum, total, spread, HALF, SPLIT, SMOOTH
        )  # fmt: skip
    others_maximum = tl.max(maximum, 0)
    highest = tl.maximum(others_maximum, own)
    off_target = tl.sum(total * _exp(maximum - highest, SPLIT), 0)
    total_mass = off_target + _exp(own - highest, SPLIT)
    log_sum = tl.where(own >= others_maximum, _log1p(off_target), tl.log(total_mass))
    tl.store(MAXIMUM + row, others_maximum)
    tl.store(LOG_SUM + row, log_sum)
    tl.store(OFF_TARGET_MASS + row, off_target / total_mass)
    tl.store(SPREAD + row, tl.sum(spread, 0))
    if WRITE:
        COEFFICIENTS_ROW = COEFFICIENTS + 4 * row
        factor = tl.load(COEFFICIENTS_ROW) + tl.load(COEFFICIENTS_ROW + 1) * (highest + log_sum)
        constant = tl.load(COEFFICIENTS_ROW + 2)
        unit = 1.0
        magnitude = tl.full([], 1.0, dtype)
        if FACTOR != 1.0:  # no |Q| of the row is more than this, because P and dc/dx are at most 1
            magnitude = tl.maximum(tl.abs(factor) + tl.load(COEFFICIENTS_ROW + 3), LEAST)
            unit = FACTOR / magnitude
        tl.store(MAGNITUDE + row, magnitude)
        share = factor / total_mass
        # From the end backwards: what was read last is most likely to be in the L2 cache still.
        for start in range(whole * BLOCK, V, GROUPS):
            column = start + group[:, None]
            x, slope, other = _columns(ROW, BIAS, column, V, target, dtype, True, HAS_BIAS, CAP, HALF, SPLIT, TERMS)
            q = _exp_of_logits(x - highest, HALF, SPLIT) * share
            if SMOOTH:
                q -= constant * _weight(CLASS_WEIGHT, column, V, dtype, True, WEIGHTED)
            q = tl.where(other, q * slope * unit, 0.0)
            tl.store(ROW + column, q.to(given), mask=column < V)
        for block in range(0, whole):
            column = (whole - 1 - block) * BLOCK + lane
            x, slope, other = _columns(ROW, BIAS, column, V, target, dtype, False, HAS_BIAS, CAP, HALF, SPLIT, TERMS)
            q = _exp_of_logits(x - highest, HALF, SPLIT) * share
            if SMOOTH:
                q -= constant * _weight(CLASS_WEIGHT, column, V, dtype, False, WEIGHTED)
            q = tl.where(other, q * slope * unit, 0.0)
            tl.store(ROW + column, q.to(given))


def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    target_logits: Tensor,
    bias: Tensor | None,
    class_weight: Tensor | None,
    softcap: float,
    smooth: bool,
    coefficients: Tensor | None,
    out: CrossEntropyStats,
    impl: str,
) -> None:
    """The pass over `logits` [n, V], which it overwrites: with Q if `coefficients` are given, else with anything.

    `bias`, `class_weight` and `coefficients` have the dtype of `target_logits`; `spread` is filled with `smooth`.
    """
    rows, columns = logits.shape
    if impl == "triton":
        groups, each, warps, registers = _config(columns, logits.dtype)
        dtype = target_logits.dtype
        unused = target_logits
        with torch.cuda.device_of(logits):
            _cross_entropy_rows_kernel[(rows,)](
                logits, target, target_logits, unused if bias is None else bias,
                unused if class_weight is None else class_weight, unused if coefficients is None else coefficients,
                *out, columns, logits.stride(0),
                WRITE=coefficients is not None, HAS_BIAS=bias is not None, CAP=float(softcap), SMOOTH=smooth,
                WEIGHTED=smooth and class_weight is not None, FACTOR=p_factor(logits.dtype), LEAST=LEAST_MAGNITUDE,
                SPLIT=dtype == torch.float32 and not interpreted(), TERMS=TERMS.get(logits.dtype, 0), GROUPS=groups,
                EACH=each, num_warps=warps, maxnreg=registers,
            )  # fmt: skip
        return
    step = max(1, BLOCK_BYTES_CPU // (target_logits.dtype.itemsize * columns)) if logits.device.type == "cpu" else rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block, given = logits[start:stop], None if coefficients is None else coefficients[start:stop]
        stats, q = _cross_entropy_rows_torch(
            block, target[start:stop], target_logits[start:stop], bias, class_weight, softcap, smooth, given
        )
        for values, place in zip(stats, out.rows(start, stop), strict=True):
            place.copy_(values)
        if q is not None and q.data_ptr() != block.data_ptr():
            block.copy_(q)
