"""One pass over rows of logits too wide to keep: softmax statistics, and probabilities in the place of the logits.

`z = h Wᵀ` [V] is one row. A few of its columns are labels: those of its utterance, or its target. Their logits l are
computed apart, in fp32. In z these columns count as -inf, and l is merged with z only here:

    maximum = max_v z      m = max(maximum, max_c l)      off = sum_v exp(z - m)      total = off + sum_c exp(l - m)
    log_sum = log(total)   off_label_mass = off / total   P[r, v] = scale[r] · exp(z - m) / total,  0 in label columns

So `P W` holds the gradient of all other columns only, and that of the label columns can be computed in fp32: in one
product the two would cancel where the model is sure. Where a label has the row's highest logit, `log_sum` is `log1p` of
all other terms, because 1 - P would otherwise be lost in the rounding of 1.

`vocab_chunks` walks over all rows in chunks: a product, this pass, the caller's use of P.

Shapes    logits [n, V]; label_logits [n, C] float32 (float64 for float64), -inf where unused; labels [G, C] int64, the
          label columns (outside 0 to V - 1 there is none), of which row r uses the line group[r]; scale [n] or None.
Numerics  everything but the logits and P in fp32 (fp64).       Of equal maxima the lowest column is the argmax.
Cost      the logits are read twice and written once; without `scale` read once and not written.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from soundwave.kernels.dispatch import interpreted

CHUNK_BYTES = 1 << 28  # of logits on a GPU: 1 024 rows of 128 k columns in bf16, enough to fill it
CHUNK_ROWS_CPU = 256  # more rows make no product faster, but hold more memory
BLOCK_BYTES_CPU = 1 << 21  # of fp32 in one step of the torch pass, so that it stays in the caches
GROUP_CPU = 64  # columns in a group of `_max`, which looks for the argmax in one group only
LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH, LN2_LOW = tl.constexpr(0.6931471824645996), tl.constexpr(-1.9046542999577679e-9)  # their sum is log(2)
LEAST = tl.constexpr(-200.0)  # below -104 exp is 0 in fp32
TILE_CPU = 2048  # columns of an fp32 product on the CPU: 1.2 to 1.8 times faster than all at once
WEIGHT_TILE = 8192  # rows of dW a step: bounds the temporary product beside the fp32 sum


def _config(columns: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(groups a block, columns a group, warps, most registers a thread) for logits of `dtype`.

    A group is what a thread loads at once, 16 bytes; two are in flight. With 48 registers a thread five blocks of 256
    threads share a multiprocessor, which then has 40 KB in flight. An H200 needs some 26 KB: 4.3 TB/s for 0.8 µs, by
    132 multiprocessors. Without a limit ptxas takes 32 registers for some cases, and spills two.
    """
    each = 16 // dtype.itemsize
    groups = min(512, max(32, triton.next_power_of_2(triton.cdiv(columns, each))))
    return groups, each, max(1, groups // 64), 64 if dtype == torch.float64 else 48


class RowStats(NamedTuple):
    """Of each row: maximum and argmax outside the label columns, `log_sum`, and the off-label share of all mass."""

    maximum: Tensor
    argmax: Tensor
    log_sum: Tensor
    off_label_mass: Tensor

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> "RowStats":
        return cls(*(like.new_empty(rows, dtype=torch.int64 if name == "argmax" else None) for name in cls._fields))

    def rows(self, start: int, stop: int) -> "RowStats":
        return RowStats(*(x[start:stop] for x in self))


def _max(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x.max(1)`, on the CPU in a quarter of the time: torch vectorises `amax`, but not `max` with its places."""
    whole = x.shape[1] // GROUP_CPU * GROUP_CPU
    if x.device.type != "cpu" or not whole:
        return x.max(1)
    groups = x[:, :whole].unflatten(1, (-1, GROUP_CPU))
    count = groups.shape[1]
    maximum, group = torch.cat([groups.amax(2), x[:, whole:]], 1).max(1)  # the columns after the groups stand alone
    inside = groups[torch.arange(len(x), device=x.device), group.clamp(max=count - 1)].argmax(1)
    return maximum, torch.where(group < count, group * GROUP_CPU + inside, group - count + whole)


def argmax(logits: Tensor) -> Tensor:
    """`logits.argmax(1)` of [n, V], of equals the lowest; on the CPU in an eighth of the time."""
    return _max(logits)[1]


def _vocab_rows_torch(
    logits: Tensor, label_logits: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`RowStats` and P, in place if dtypes allow it; in `logits` the label columns are -inf already."""
    x = logits.to(label_logits.dtype)
    maximum, argmax = _max(x)
    label_maximum, label_argmax = label_logits.max(-1, keepdim=True)
    highest = torch.maximum(label_maximum, maximum[:, None])
    off_label = x.sub_(highest).exp_().sum(-1)
    label_mass = (label_logits - highest).exp()
    rest = off_label + label_mass.scatter(1, label_argmax, 0.0).sum(-1)
    total = rest + label_mass.gather(1, label_argmax)[:, 0]
    log_sum = torch.where(label_maximum[:, 0] >= maximum, rest.log1p(), total.log())
    return maximum, argmax, log_sum, off_label / total, x if scale is None else x.mul_((scale / total)[:, None])


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, as 2·atanh(x / (2 + x)) where x is small: the hardware's log is not exact near 1."""
    y = x / (2.0 + x)
    square = y * y
    series = tl.zeros_like(x)
    for k in tl.static_range(11, -1, -1):
        series = series * square + 1.0 / (2 * k + 1)
    return tl.where(x < 0.5, 2.0 * y * series, tl.log(1.0 + x))


@triton.jit
def _exp(x, SPLIT: tl.constexpr):
    """exp(x) for x <= 0, exact within 4e-7 with SPLIT, which is for compiled fp32.

    The hardware has 2^y only. The rounding of y = x·log2(e) alone is 2.6e-6 of the result at x = -60. What y lacks is
    computed by fused multiply-adds, which the interpreter does not have, and multiplied on.
    """
    if SPLIT:
        x = tl.maximum(x, LEAST, propagate_nan=tl.PropagateNan.ALL)  # of -inf y would lack NaN
        y = x * LOG2E
        lacking = tl.fma(y, -LN2_LOW, tl.fma(y, -LN2_HIGH, x))
        power = tl.exp2(y)
        return tl.fma(power, lacking, power)
    return tl.exp(x)


@triton.jit
def _exp_of_logits(x, HALF: tl.constexpr, SPLIT: tl.constexpr):
    """exp(x). Logits of half types are themselves rounded to 2^-9 or 2^-11, so the error of 2^-24·|x| does not matter,
    and three operations for each logit are saved.
    """
    return tl.exp2(x * LOG2E) if HALF else _exp(x, SPLIT)


@triton.jit
def _add_block(x, start, maximum, total, at, HALF: tl.constexpr, SPLIT: tl.constexpr):
    """Take in columns x [groups, each]. Of each group: the maximum, the sum of exponentials relative to it, and the
    `start` of the first block that held it.

    The sum is rescaled once for all columns of a group, because an exponential is as dear as eight other operations.
    """
    highest = tl.max(x, 1)
    at = tl.where(highest > maximum, start, at)
    higher = tl.maximum(maximum, highest)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    terms = tl.sum(_exp_of_logits(x - base[:, None], HALF, SPLIT), 1)
    return higher, total * _exp(maximum - base, SPLIT) + terms, at


# A chunk starts at any row, so the alignment of what has one value a row, or C, varies; so does C.
@triton.jit(
    do_not_specialize=["C"],
    do_not_specialize_on_alignment=[
        "LABEL_LOGITS", "LABELS", "GROUP", "SCALE", "MAXIMUM", "ARGMAX", "LOG_SUM", "OFF_LABEL_MASS",
    ],
)  # fmt: skip
def _vocab_rows_kernel(
    LOGITS, LABEL_LOGITS, LABELS, GROUP, SCALE, MAXIMUM, ARGMAX, LOG_SUM, OFF_LABEL_MASS, V, C, stride,
    WRITE: tl.constexpr, SPLIT: tl.constexpr, GROUPS: tl.constexpr, EACH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row. What its whole blocks leave over is taken one column a thread, because with masks that end anywhere a
    group is not one load, and its addresses fill the registers.
    """
    row = tl.program_id(0).to(tl.int64)
    ROW, LABEL_LOGITS_ROW = LOGITS + row * stride, LABEL_LOGITS + row * C
    LABELS_ROW = LABELS + tl.load(GROUP + row) * C
    given: tl.constexpr = LOGITS.dtype.element_ty
    dtype: tl.constexpr = LABEL_LOGITS.dtype.element_ty
    HALF: tl.constexpr = given.primitive_bitwidth == 16
    BLOCK: tl.constexpr = GROUPS * EACH
    lowest = float("-inf")
    label_lane = tl.arange(0, BLOCK_C)
    label_maximum, label_at = tl.full([BLOCK_C], lowest, dtype), tl.zeros([BLOCK_C], tl.int32)
    for start in range(0, C, BLOCK_C):
        c = start + label_lane
        labels = tl.load(LABELS_ROW + c, mask=c < C, other=-1)
        inside = (labels >= 0) & (labels < V)
        tl.store(ROW + labels, tl.full([BLOCK_C], lowest, given), mask=inside)
        label_logits = tl.load(LABEL_LOGITS_ROW + c, mask=c < C, other=lowest)
        label_at = tl.where(label_logits > label_maximum, c, label_at)
        label_maximum = tl.maximum(label_maximum, label_logits)
    tl.debug_barrier()  # other threads read the columns just stored

    group = tl.arange(0, GROUPS)
    lane = group[:, None] * EACH + tl.arange(0, EACH)[None, :]
    whole = V // BLOCK
    maximum, total = tl.full([GROUPS], lowest, dtype), tl.zeros([GROUPS], dtype)
    at = tl.zeros([GROUPS], tl.int32)
    for block in range(0, whole):
        x = tl.load(ROW + block * BLOCK + lane).to(dtype)
        maximum, total, at = _add_block(x, block * BLOCK, maximum, total, at, HALF, SPLIT)
    for start in range(whole * BLOCK, V, GROUPS):
        column = start + group
        x = tl.load(ROW + column, mask=column < V, other=lowest).to(dtype)
        maximum, total, at = _add_block(x[:, None], column - group * EACH, maximum, total, at, HALF, SPLIT)
    off_label_maximum = tl.max(maximum, 0)
    # The groups that held it are read again, to tell in which of their columns it was.
    first = tl.full([GROUPS], 0, tl.int32) + (V - 1)
    for e in range(0, EACH):
        column = at + group * EACH + e
        held = (maximum == off_label_maximum) & (column < V)
        x = tl.load(ROW + column, mask=held, other=lowest).to(dtype)
        first = tl.where(held & (x == off_label_maximum), tl.minimum(first, column), first)
    argmax = tl.min(first, 0)

    highest_label = tl.max(label_maximum, 0)
    first_label = tl.min(tl.where(label_maximum == highest_label, label_at, C), 0)
    highest = tl.maximum(off_label_maximum, highest_label)
    off_label = tl.sum(total * _exp(maximum - highest, SPLIT), 0)
    others = tl.zeros([BLOCK_C], dtype)
    for start in range(0, C, BLOCK_C):
        c = start + label_lane
        label_logits = tl.load(LABEL_LOGITS_ROW + c, mask=c < C, other=lowest)
        others += tl.where(c == first_label, 0.0, _exp(label_logits - highest, SPLIT))
    rest = off_label + tl.sum(others, 0)
    total_mass = rest + _exp(highest_label - highest, SPLIT)
    tl.store(MAXIMUM + row, off_label_maximum)
    tl.store(ARGMAX + row, argmax.to(tl.int64))
    tl.store(LOG_SUM + row, tl.where(highest_label >= off_label_maximum, _log1p(rest), tl.log(total_mass)))
    tl.store(OFF_LABEL_MASS + row, off_label / total_mass)
    if WRITE:
        # The groups that held the maximum were read by other lanes; in one warp there are only shuffles in between.
        tl.debug_barrier()  # before columns are written that other lanes read
        factor = tl.load(SCALE + row) / total_mass
        # From the end backwards: what was read last is most likely to be in the L2 cache still.
        for start in range(whole * BLOCK, V, GROUPS):
            column = start + group
            x = tl.load(ROW + column, mask=column < V, other=lowest).to(dtype)
            tl.store(ROW + column, (_exp_of_logits(x - highest, HALF, SPLIT) * factor).to(given), mask=column < V)
        for block in range(0, whole):
            BLOCK_OF_ROW = ROW + (whole - 1 - block) * BLOCK + lane
            x = tl.load(BLOCK_OF_ROW).to(dtype)
            tl.store(BLOCK_OF_ROW, (_exp_of_logits(x - highest, HALF, SPLIT) * factor).to(given))


def vocab_rows(
    logits: Tensor,
    label_logits: Tensor,
    labels: Tensor,
    group: Tensor,
    scale: Tensor | None,
    out: RowStats,
    impl: str,
) -> None:
    """The pass over `logits` [n, V], which it overwrites: with P if `scale` is given, else with undefined values."""
    rows, columns = logits.shape
    if impl == "triton":
        groups, each, warps, registers = _config(columns, logits.dtype)
        with torch.cuda.device_of(logits):
            _vocab_rows_kernel[(rows,)](
                logits, label_logits, labels, group, label_logits if scale is None else scale, *out, columns,
                label_logits.shape[1], logits.stride(0),
                WRITE=scale is not None, SPLIT=label_logits.dtype == torch.float32 and not interpreted(),
                GROUPS=groups, EACH=each, BLOCK_C=32 * warps, num_warps=warps, maxnreg=registers,
            )  # fmt: skip
        return
    labels_of_row = labels[group]
    row, c = ((labels_of_row >= 0) & (labels_of_row < columns)).nonzero(as_tuple=True)
    logits[row, labels_of_row[row, c]] = -torch.inf
    step = max(1, BLOCK_BYTES_CPU // (label_logits.dtype.itemsize * columns)) if logits.device.type == "cpu" else rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = logits[start:stop]
        *stats, p = _vocab_rows_torch(block, label_logits[start:stop], None if scale is None else scale[start:stop])
        for values, target in zip(stats, out.rows(start, stop), strict=True):
            target.copy_(values)
        if scale is not None and p.dtype != block.dtype:
            block.copy_(p)


def logit_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, `hidden[start:stop] @ weight.T` [stop - start, V]); the next chunk overwrites it."""
    (rows, _), columns = hidden.shape, weight.shape[0]
    on_cpu = hidden.device.type == "cpu"
    most = CHUNK_ROWS_CPU if on_cpu else max(128, CHUNK_BYTES // (columns * hidden.dtype.itemsize) // 128 * 128)
    step = math.ceil(rows / max(math.ceil(rows / most), 1))
    if not on_cpu:
        step = -(-step // 128) * 128  # whole tiles of the product
    # A row starts at a multiple of 128 bytes on a GPU; the CPU's products copy what is not contiguous.
    buffer = hidden.new_empty(step, columns if on_cpu else -(-columns // 64) * 64)[:, :columns]
    tile = tile_of(hidden, columns)
    for start in range(0, rows, step) if rows else ():
        stop = min(start + step, rows)
        logits = buffer[: stop - start]
        for v in range(0, columns, tile):
            torch.mm(hidden[start:stop], weight[v : v + tile].t(), out=logits[:, v : v + tile])
        yield start, stop, logits


def vocab_chunks(
    hidden: Tensor,
    weight: Tensor,
    label_logits: Tensor,
    labels: Tensor,
    group: Tensor,
    scale: Tensor | None,
    out: RowStats,
    impl: str,
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, P [stop - start, V]) over chunks of `hidden` [N, D]; the next chunk overwrites P.

    `weight` [V, D] has the dtype of `hidden`, in which the products run. P is `p_factor` of that dtype times as large
    as `scale`, which is 0 to 1, makes it. `active_columns` and `add_weight_gradient` divide by it.
    """
    if scale is not None and p_factor(hidden.dtype) != 1:
        scale = scale * p_factor(hidden.dtype)
    for start, stop, logits in logit_chunks(hidden, weight):
        vocab_rows(
            logits, label_logits[start:stop], labels, group[start:stop], None if scale is None else scale[start:stop],
            out.rows(start, stop), impl,
        )  # fmt: skip
        yield start, stop, logits


def p_factor(dtype: torch.dtype) -> float:
    """The power of two by which P is larger in memory.

    Most of a large vocabulary's probabilities are below 6e-5, where fp16 loses digits, and many below 6e-8, where it
    ends. It ends at 65504 on the other side.
    """
    return 2.0**15 if dtype == torch.float16 else 1.0


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which the gradient of `hidden` is kept until backward: fp32 for fp16.

    It is that of a row's own loss. Where the model is sure, it is smaller than what fp16 holds, until backward
    multiplies it by the factor with which the loss was scaled for just this reason.
    """
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def divided(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` / `p_factor(dtype)`, in place."""
    return x if p_factor(dtype) == 1 else x.mul_(1 / p_factor(dtype))


def tile_of(x: Tensor, columns: int) -> int:
    """Columns of one product."""
    return TILE_CPU if x.device.type == "cpu" and x.dtype != torch.bfloat16 else max(columns, 1)


def wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The operand of a product with P: on the CPU products of fp16 give fp16, which the factor of P may exceed."""
    return x.to(dtype) if x.dtype == torch.float16 and not x.is_cuda else x


def add_weight_gradient(dweight: Tensor, p: Tensor, hidden: Tensor, first: bool = False) -> None:
    """`dweight` [V, D] += pᵀ hidden / `p_factor`, summed over chunks in the dtype of `dweight`.

    With `first` it is written, whatever it held: as large as it is, to fill it with zeros and read them takes time.
    """
    unit = 1 / p_factor(p.dtype)
    for v in range(0, p.shape[1], WEIGHT_TILE):
        out, left = dweight[v : v + WEIGHT_TILE], p[:, v : v + WEIGHT_TILE].t()
        if p.dtype == dweight.dtype:
            torch.mm(left, hidden, out=out) if first else out.addmm_(left, hidden)
            continue
        if p.is_cuda and dweight.dtype == torch.float32:
            product = torch.mm(left, hidden, out_dtype=dweight.dtype)
        else:
            product = torch.mm(wide(left, dweight.dtype), wide(hidden, dweight.dtype))
        torch.mul(product, unit, out=out) if first else out.add_(product, alpha=unit)
