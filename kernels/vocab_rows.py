"""One pass over rows of logits too wide to keep: softmax statistics, and the logits overwritten by probabilities.

A row r of `z = h Wᵀ` [V] comes with a few columns of its own (the labels of its utterance, its target), whose logits
were computed apart in fp32. They count as -inf in the wide row, and are merged with it only here:

    top = max(max_v z, max_c own)     off = sum_v exp(z - top)     log_sum = log(off + sum_c exp(own - top))
    P[r, v] = scale[r] · exp(z - top - log_sum),  0 at the own columns

so that `P W` holds only what pushes away from all other columns, and the sum over the own columns can be taken in fp32:
formed in one product, the two cancel where the model is sure. Where an own column is the row's maximum, `log_sum` is
`log1p` of the rest, or 1 - P would drown in the rounding of 1.

`vocab_chunks` walks over all rows in chunks: a product, this pass, the caller's use of P. `probabilities_times_weight`
is that use for the gradient of h, and leaves out the columns that carry next to nothing:

    tail(τ)[r] = sum of P[r, v] over P[r, v] <= τ        τ = the largest 2^-j with ‖tail(τ)‖₂ <= 0.025·‖off‖₂, by chunk

A column whose maximum in the chunk is at most τ is skipped; with more than a quarter of them active, none is. A row's
error is at most max ‖W_v‖ times its skipped mass, which is returned. A limit on P itself would not do: rows that are
sure have flat tails, and these are all of their gradient. Where rows will be weighed by a factor that is not known yet,
the rule holds for each group of rows that share it.

Shapes    logits [n, V]; own [n, C] float32 (float64 for float64), -inf where unused; ids [G, C] int64, the own columns
          (none where outside 0 to V - 1), of which row r takes the line group[r]; scale [n] or None.
Numerics  everything but the logits and P in fp32 (fp64).       Ties: the lowest column is the index of the maximum.
Cost      the logits are read twice and written once; without `scale` read once and not written.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SKIPPED_MASS = 0.025  # of a chunk's off-label mass: the net gradient stays within 1.2 times eager's error in bf16
MOST_ACTIVE = 0.25  # gathering the columns of P and the rows of W costs more than the product of the others saves
BINS = 48  # powers of two down to which tails are told apart; 128 k columns of a sure row lie near 2^-40
CHUNK_BYTES = 1 << 28  # of logits on a GPU: 1 024 rows of 128 k columns in bf16, enough to fill it
CHUNK_ROWS_CPU = 256  # more rows make no product faster, but hold more memory
BLOCK_BYTES_CPU = 1 << 21  # of fp32 a step of the torch pass works on: stays in the caches
PLACES_CPU = 64  # columns of which only the greatest is looked for, until its group is known
TILE_CPU = 2048  # columns of an fp32 product on the CPU: 1.2 to 1.8 times faster than all at once
WEIGHT_TILE = 8192  # rows of dW a step: bounds the temporary product beside the fp32 sum


def _config(columns: int, own: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(BLOCK, BLOCK_C, warps): 16 elements a thread, 8 in fp64, whose maximum, sum and place the registers can hold."""
    block = min(8192 // (dtype.itemsize // 2), max(128, triton.next_power_of_2(columns)))
    block_c = min(4096 // dtype.itemsize, max(16, triton.next_power_of_2(own)))
    return block, block_c, max(1, min(8, block // 512))


class RowStats(NamedTuple):
    """Of each row: the greatest logit outside the own columns, its column, `log_sum`, and `off` as a share of all."""

    top: Tensor
    index: Tensor
    log_sum: Tensor
    off: Tensor

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> "RowStats":
        return cls(*(like.new_empty(rows, dtype=torch.int64 if name == "index" else None) for name in cls._fields))

    def rows(self, start: int, stop: int) -> "RowStats":
        return RowStats(*(x[start:stop] for x in self))


def _max(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x.max(1)`, on the CPU in a quarter of the time: torch vectorises `amax`, but not `max` with its places."""
    whole = x.shape[1] // PLACES_CPU * PLACES_CPU
    if x.device.type != "cpu" or not whole:
        return x.max(1)
    groups = x[:, :whole].unflatten(1, (-1, PLACES_CPU))
    count = groups.shape[1]
    top, group = torch.cat([groups.amax(2), x[:, whole:]], 1).max(1)  # each column after the groups is one of its own
    inside = groups[torch.arange(len(x)), group.clamp(max=count - 1)].argmax(1)
    return top, torch.where(group < count, group * PLACES_CPU + inside, group - count + whole)


def _vocab_rows_torch(
    logits: Tensor, own: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """top, index, log_sum, off and P, in place if dtypes allow it; in `logits` the own columns are -inf."""
    x = logits.to(own.dtype)
    top, index = _max(x)
    own_top, own_index = own.max(-1, keepdim=True)
    peak = torch.maximum(own_top, top[:, None])
    off = x.sub_(peak).exp_().sum(-1)
    own = (own - peak).exp()
    rest = off + own.scatter(1, own_index, 0.0).sum(-1)
    total = rest + own.gather(1, own_index)[:, 0]
    log_sum = torch.where(own_top[:, 0] >= top, rest.log1p(), total.log())
    return top, index, log_sum, off / total, x if scale is None else x.mul_((scale / total)[:, None])


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
def _vocab_rows_kernel(
    LOGITS, OWN, IDS, GROUP, SCALE, TOP, INDEX, LOG_SUM, OFF, V, C, stride,
    WRITE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    ROW, OWN_ROW = LOGITS + row * stride, OWN + row * C
    IDS_ROW = IDS + tl.load(GROUP + row) * C
    dtype = OWN.dtype.element_ty
    lowest = float("-inf")
    lane, own_lane = tl.arange(0, BLOCK), tl.arange(0, BLOCK_C)
    own_top, own_at = tl.full([BLOCK_C], lowest, dtype), tl.zeros([BLOCK_C], tl.int32)
    for start in range(0, C, BLOCK_C):
        c = start + own_lane
        ids = tl.load(IDS_ROW + c, mask=c < C, other=-1)
        tl.store(ROW + ids, tl.full([BLOCK_C], lowest, LOGITS.dtype.element_ty), mask=(ids >= 0) & (ids < V))
        own = tl.load(OWN_ROW + c, mask=c < C, other=lowest)
        own_at = tl.where(own > own_top, c, own_at)
        own_top = tl.maximum(own_top, own)
    tl.debug_barrier()  # other threads read the columns just stored

    top, total, at = tl.full([BLOCK], lowest, dtype), tl.zeros([BLOCK], dtype), tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        column = start + lane
        x = tl.load(ROW + column, mask=column < V, other=lowest).to(dtype)
        at = tl.where(x > top, start, at)
        higher = tl.maximum(top, x)
        base = tl.where(higher == lowest, 0.0, higher)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = higher
    off_top = tl.max(top, 0)
    index = tl.min(tl.where(top == off_top, at + lane, V - 1), 0)

    own_peak = tl.max(own_top, 0)
    own_first = tl.min(tl.where(own_top == own_peak, own_at, C), 0)
    peak = tl.maximum(off_top, own_peak)
    off = tl.sum(total * tl.exp(top - peak), 0)
    others = tl.zeros([BLOCK_C], dtype)
    for start in range(0, C, BLOCK_C):
        c = start + own_lane
        own = tl.load(OWN_ROW + c, mask=c < C, other=lowest)
        others += tl.where(c == own_first, 0.0, tl.exp(own - peak))
    rest = off + tl.sum(others, 0)
    total_mass = rest + tl.exp(own_peak - peak)
    tl.store(TOP + row, off_top)
    tl.store(INDEX + row, index.to(tl.int64))
    tl.store(LOG_SUM + row, tl.where(own_peak >= off_top, _log1p(rest), tl.log(total_mass)))
    tl.store(OFF + row, off / total_mass)
    if WRITE:
        factor = tl.load(SCALE + row) / total_mass
        for start in range(0, V, BLOCK):
            column = start + lane
            x = tl.load(ROW + column, mask=column < V, other=lowest).to(dtype)
            tl.store(ROW + column, (tl.exp(x - peak) * factor).to(LOGITS.dtype.element_ty), mask=column < V)


def vocab_rows(
    logits: Tensor, own: Tensor, ids: Tensor, group: Tensor, scale: Tensor | None, out: RowStats, impl: str
) -> None:
    """The pass over `logits` [n, V], which it overwrites: with P if there is a `scale`, else with anything."""
    rows, columns = logits.shape
    if impl == "triton":
        block, block_c, warps = _config(columns, own.shape[1], own.dtype)
        with torch.cuda.device_of(logits):
            _vocab_rows_kernel[(rows,)](
                logits, own, ids, group, own if scale is None else scale, *out, columns, own.shape[1], logits.stride(0),
                WRITE=scale is not None, BLOCK=block, BLOCK_C=block_c, num_warps=warps,
            )  # fmt: skip
        return
    columns_of_row = ids[group]
    row, c = ((columns_of_row >= 0) & (columns_of_row < columns)).nonzero(as_tuple=True)
    logits[row, columns_of_row[row, c]] = -torch.inf
    step = max(1, BLOCK_BYTES_CPU // (own.dtype.itemsize * columns)) if logits.device.type == "cpu" else rows
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        block = logits[start:stop]
        *stats, p = _vocab_rows_torch(block, own[start:stop], None if scale is None else scale[start:stop])
        for values, target in zip(stats, out.rows(start, stop), strict=True):
            target.copy_(values)
        if scale is not None and p.dtype != block.dtype:
            block.copy_(p)


def vocab_chunks(
    hidden: Tensor,
    weight: Tensor,
    own: Tensor,
    ids: Tensor,
    group: Tensor,
    scale: Tensor | None,
    out: RowStats,
    impl: str,
) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, P [stop - start, V]) over chunks of `hidden` [N, D]; P lives until the next one.

    `weight` [V, D] in the dtype of `hidden`, that of the products.
    """
    (rows, _), columns = hidden.shape, weight.shape[0]
    on_cpu = hidden.device.type == "cpu"
    most = CHUNK_ROWS_CPU if on_cpu else max(128, CHUNK_BYTES // (columns * hidden.dtype.itemsize) // 128 * 128)
    step = math.ceil(rows / max(math.ceil(rows / most), 1))
    # A row starts at a multiple of 128 bytes on a GPU; the CPU's products copy what is not contiguous.
    buffer = hidden.new_empty(step, columns if on_cpu else -(-columns // 64) * 64)[:, :columns]
    tile = _tile(hidden, columns)
    for start in range(0, rows, step) if rows else ():
        stop = min(start + step, rows)
        logits = buffer[: stop - start]
        for v in range(0, columns, tile):
            torch.mm(hidden[start:stop], weight[v : v + tile].t(), out=logits[:, v : v + tile])
        vocab_rows(
            logits, own[start:stop], ids, group[start:stop], None if scale is None else scale[start:stop],
            out.rows(start, stop), impl,
        )  # fmt: skip
        yield start, stop, logits


def _tile(x: Tensor, columns: int) -> int:
    return TILE_CPU if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) else max(columns, 1)


def _mm(p: Tensor, weight: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`p @ weight` (of its rows `columns`) in fp32, or as near as the device's products come to it."""
    if not p.shape[1]:
        return p.new_zeros(p.shape[0], weight.shape[1], dtype=dtype)
    tile = _tile(p, p.shape[1])
    out = None
    for v in range(0, p.shape[1], tile):
        rows = weight[v : v + tile] if columns is None else weight[columns[v : v + tile]]
        if out is not None:
            out.addmm_(p[:, v : v + tile], rows)
        elif p.is_cuda and dtype == torch.float32 != p.dtype:  # all that it sums half types in
            out = torch.mm(p, rows, out_dtype=dtype)
        else:
            out = torch.mm(p[:, v : v + tile], rows).to(dtype)
    return out


def probabilities_times_weight(
    p: Tensor, weight: Tensor, off: Tensor, exact: bool, groups: Tensor | None = None
) -> tuple[Tensor, float, Tensor]:
    """`P W` [n, D] in the dtype of `off`; the share of columns that took part; the squared 2-norms of the skipped mass.

    Args:
        p: [n, V], from `vocab_chunks`.
        off: [n], the sums of its rows.
        exact: skip nothing.
        groups: bool [G, n], the rows of each; one of all rows if None. The norms are [G].

    Two or three numbers come to the host, which wait for a GPU.
    """
    columns = p.shape[1]
    groups = (off.new_ones(1, off.shape[0]) if groups is None else groups).to(off.dtype)
    if not exact:
        peak = p.amax(0).to(off.dtype)
        # Column v is in bin j where 2^-(j + 1) < its maximum <= 2^-j.
        bins = peak.log2_().neg_().floor_().nan_to_num_(0.0, BINS - 1, 0).clamp_(0, BINS - 1).to(torch.int64)
        below = bins[:, None] >= torch.arange(BINS, device=p.device)  # [v, j]: its maximum is at most 2^-j
        skipped = _mm(p, below.to(p.dtype), None, off.dtype)  # [n, j]: mass in these columns
        limits = SKIPPED_MASS**2 * (groups @ off.square())
        too_much = (groups @ skipped.square() > limits[:, None]).any(0).sum()
        too_much, *inactive = torch.cat([too_much[None], below.sum(0)]).tolist()
        # The tail also holds the small entries of active columns; these are few, so they are looked at one by one.
        for j in range(max(too_much, 1), BINS):
            if columns - inactive[j] > MOST_ACTIVE * columns:
                break
            kept = (bins < j).nonzero()[:, 0]
            p_kept = _columns(p, kept)
            tail = skipped[:, j] + p_kept.masked_fill(p_kept > 2.0**-j, 0.0).sum(1, dtype=off.dtype)
            lost = groups @ tail.square()
            if (lost <= limits).all():
                return _mm(p_kept, weight, kept, off.dtype), kept.shape[0] / columns, lost
    return _mm(p, weight, None, off.dtype), 1.0, off.new_zeros(groups.shape[0])


def _columns(p: Tensor, kept: Tensor) -> Tensor:
    if p.device.type != "cpu":
        return p.index_select(1, kept)
    bits = p.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.dtype.itemsize])  # as integers and by rows: twice
    return torch.stack([row.index_select(0, kept) for row in bits]).view(p.dtype)  # as fast


def add_weight_gradient(dweight: Tensor, p: Tensor, hidden: Tensor) -> None:
    """`dweight` [V, D] += pᵀ hidden, summed over chunks in the dtype of `dweight`."""
    for v in range(0, p.shape[1], WEIGHT_TILE):
        out, left = dweight[v : v + WEIGHT_TILE], p[:, v : v + WEIGHT_TILE].t()
        if p.dtype == dweight.dtype:
            out.addmm_(left, hidden)
        elif p.is_cuda and dweight.dtype == torch.float32:
            out += torch.mm(left, hidden, out_dtype=dweight.dtype)
        else:
            out += torch.mm(left, hidden)


def longest_row(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The greatest 2-norm of a row of `weight`."""
    on_cpu = weight.device.type == "cpu"  # where the norm of bf16 is slow
    step = max(1, BLOCK_BYTES_CPU // (weight.shape[1] * dtype.itemsize)) if on_cpu else len(weight)
    blocks = (block.to(dtype) if on_cpu else block for block in weight.split(step))
    return torch.stack([torch.linalg.vector_norm(block, dim=1, dtype=dtype).amax() for block in blocks]).amax()
