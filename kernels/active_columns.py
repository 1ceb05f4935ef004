"""`P W` without the columns of P that carry next to nothing: each tile of rows has its own list of active columns.

P [n, V] holds the probabilities that `vocab_rows` leaves in the place of the logits. Its rows are taken in tiles: on a
GPU of a few rows, because few rows have few active columns in common; on the CPU all n rows are one.

    bin[t, v]     = the j with 2^-(j + 1) <= max_r P[r, v] < 2^-j, over the rows r of tile t
    skipped[r, j] = sum of P[r, v] over the columns with bin[t, v] >= j
    j             = the lowest from 1 on where ‖skipped[:, j]‖₂ <= SKIPPED_MASS·‖off-label mass‖₂

In each tile the columns with bin[t, v] >= j are left out, but none is where more than a third of them would remain (on
the CPU a quarter); the rows of such a tile are in neither norm. The norms are over all other rows: unsure ones have
nearly all of the off-label mass and of the gradient, so beside them the sure ones may lose more of theirs. A row's
error is at most max ‖W_v‖ times its skipped mass, which is returned (in bf16 on the CPU as rounded as its products
are). A limit on P itself would be wrong: the tails of rows that are sure are flat, and they are all of these rows'
gradient. In the norms each row has the factor that its gradient will have. Where that is not known yet, each tile has a
j of its own, and the rule holds there for each group of rows that share a factor.

In Triton five kernels do this for each chunk, and the host learns nothing of what they decide:

    bins     of each tile and block of columns: every column's bin; of each row the mass in each bin
    losses   of each tile and j: what it would lose, from the sums over the blocks
    choose   j, from the sums over the tiles
    compact  of each tile: the active columns in rising order, and P [rows, active columns] beside each other
    product  of each tile and block of D: the sum over its own list, whose length it reads; over all columns where it
             has none. Rows of W are read in place.

Shapes    p [n, V] with any row stride; weight [V, D]; off_label [n]; group int64 [n] or None -> [n, D].
Numerics  products of half types and fp32 are summed in fp32; sums and result in the dtype of off_label. P is
          `p_factor` times as large as in the result. In fp64 the Triton form skips nothing.
Cost      beside the row pass, P is read once, and the product costs 2·n·D operations for each active column. On a GPU
          it needs a third of a chunk more memory.
Bitwise deterministic: the lists are in order, and nothing is summed by atomics.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from soundwave.kernels.dispatch import architecture, input_precision
from soundwave.kernels.vocab_rows import BLOCK_BYTES_CPU, divided, p_factor, tile_of, wide

SKIPPED_MASS = 0.0175  # of the rows' off-label mass: the net gradient stays within 1.2 times eager's error in bf16
MOST_ACTIVE = 4  # above V / 4 active columns, gathering costs the CPU more than the shorter product saves
MOST_ACTIVE_TRITON = 3  # where a column costs as much in either product, but P of the active ones takes memory
BINS = 48  # columns are told apart down to 2^-48, because 128 k columns of a sure row lie near 2^-40
LEAST_COLUMNS = 16384  # of a head: in fewer the choice of columns costs more than the shorter product saves
LANES = tl.constexpr(64)  # bins in a program, a power of two
LAST_BIN = tl.constexpr(BINS - 1)
BLOCK_COLUMNS = 4096  # of one program that looks for active columns: two programs a multiprocessor and chunk
VARYING = ["N", "tiles"]  # from chunk to chunk; a kernel for each kind of value would be compiled again and again


def skipping_pays(dtype: torch.dtype, columns: int) -> bool:
    """Whether columns are skipped unless the caller says: in bfloat16, whose own error is as large, and if it pays."""
    return dtype == torch.bfloat16 and columns >= LEAST_COLUMNS


class Skipped(NamedTuple):
    """Of each row: the share of the columns that took part, and the mass in the others."""

    share: Tensor  # [N]
    mass: Tensor  # [N]

    @classmethod
    def empty(cls, rows: int, like: Tensor) -> "Skipped":
        return cls(like.new_empty(rows), like.new_empty(rows))

    def rows(self, start: int, stop: int) -> "Skipped":
        return Skipped(self.share[start:stop], self.mass[start:stop])


class Config(NamedTuple):
    """Of a tile: its rows, the columns that its first two kernels take at once, those of D, terms of the sum."""

    rows: int
    step: int
    width: int
    terms: int
    num_warps: int
    num_stages: int


def _config(dtype: torch.dtype, arch: int) -> Config:
    """Settings for P in `dtype`. sm_90 to sm_11x have shared memory for 64 terms a round."""
    if dtype == torch.float32:
        return Config(64, 32, 64, 32, 8, 2)
    return Config(128, 64, 128, 64 if 90 <= arch < 120 else 32, 8, 3)


@triton.jit(do_not_specialize=VARYING)
def _column_bins_kernel(
    P, BIN, MASS, COUNT, N, V, stride, LOG_FACTOR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """One tile and block of columns: each column's bin; for each bin the mass of each row and the number of columns."""
    tile, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, lane = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    mass, count = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([LANES], tl.int32)
    for start in range(0, BLOCK, STEP):
        column = block * BLOCK + start + tl.arange(0, STEP)
        inside = column < V
        p = tl.load(P + row[:, None] * stride + column[None, :], mask=(row < N)[:, None] & inside[None, :], other=0.0)
        # The exponent of a float32 x is bits 23 to 30: 127 for 1 <= x < 2. Of NaN it is the largest, of 0 the smallest.
        exponent = tl.max(p.to(tl.float32), 0).to(tl.int32, bitcast=True) >> 23
        bin = tl.minimum(tl.maximum(126 + LOG_FACTOR - exponent, 0), LAST_BIN)
        of_bin = (bin[:, None] == lane[None, :]) & inside[:, None]
        mass = tl.dot(p, of_bin.to(p.dtype), mass, input_precision="ieee")
        count += tl.sum(of_bin.to(tl.int32), 0)
        tl.store(BIN + tile * V + column, bin.to(tl.int8), mask=inside)
    at = tile * tl.num_programs(1) + block
    tl.store(MASS + (at * ROWS + tl.arange(0, ROWS))[:, None] * LANES + lane[None, :], mass)
    tl.store(COUNT + at * LANES + lane, count)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["OFF_LABEL", "FACTOR", "GROUP"])
def _tile_losses_kernel(
    MASS, COUNT, OFF_LABEL, FACTOR, GROUP, LOSS, BELOW, LOST, BUDGET, N, blocks, most,
    SHARE_OF_MASS: tl.constexpr, UNIT: tl.constexpr, WEIGHED: tl.constexpr, GROUPED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile: for each j how many columns remain if they are skipped from bin j on (BELOW), what each row loses then
    (LOSS), and the squared norms of what the tile loses (LOST) and may lose (BUDGET, NaN if it has NaN); both are 0
    where too many columns would remain. Where rows have groups, LOST is 0 if every group may lose as much, else 1."""
    tile = tl.program_id(0).to(tl.int64)
    row, lane = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    mass, count = tl.zeros([ROWS, LANES], tl.float32), tl.zeros([LANES], tl.int32)
    for block in range(0, blocks):
        at = tile * blocks + block
        mass += tl.load(MASS + (at * ROWS + tl.arange(0, ROWS))[:, None] * LANES + lane[None, :])
        count += tl.load(COUNT + at * LANES + lane)
    skipped, below = tl.cumsum(mass, 1, reverse=True) * UNIT, tl.cumsum(count, 0) - count
    tl.store(LOSS + row[:, None] * LANES + lane[None, :], skipped, mask=(row < N)[:, None])
    tl.store(BELOW + tile * LANES + lane, below)
    # In float64, because the squares of a row that is very sure are 0 in float32.
    whole, square = tl.load(OFF_LABEL + row, mask=row < N, other=0.0).to(tl.float64), skipped.to(tl.float64)
    if WEIGHED:
        factor = tl.load(FACTOR + row, mask=row < N, other=0.0).to(tl.float64)
        whole, square = whole * factor, square * factor[:, None]
    whole, square = whole * whole * SHARE_OF_MASS * SHARE_OF_MASS, square * square
    if GROUPED:
        of_row = tl.load(GROUP + row, mask=row < N, other=-1)
        last = tl.load(GROUP + tl.minimum(tile * ROWS + ROWS, N) - 1)
        lost = tl.zeros([LANES], tl.float64)
        for group in range(tl.load(GROUP + tile * ROWS), last + 1):
            of_group = tl.sum(tl.where((of_row == group)[:, None], square, 0.0), 0)
            within = of_group <= tl.sum(tl.where(of_row == group, whole, 0.0), 0)  # False for NaN
            lost = tl.where(within, lost, 1.0)
        budget = lost * 0 + tl.sum(whole, 0) * 0  # NaN stays
    else:
        lost = tl.sum(square, 0)
        budget = tl.where(tl.sum(lost, 0) >= 0, tl.sum(whole, 0) + lost * 0, float("nan"))
    exact = (below > most) & (budget == budget)
    tl.store(LOST + tile * LANES + lane, tl.where(exact, 0.0, lost))
    tl.store(BUDGET + tile * LANES + lane, tl.where(exact, 0.0, budget))


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=["SHARE", "SKIPPED"])
def _choose_columns_kernel(
    LOSS, BELOW, LOST, BUDGET, LIMIT, KEPT, SHARE, SKIPPED, N, V, tiles, most,
    GROUPED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One tile: from which bin on columns are skipped (LIMIT; 0 if none is), how many remain, what each row loses."""
    tile = tl.program_id(0).to(tl.int64)
    row, lane = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES)
    lost, budget = tl.zeros([LANES], tl.float64), tl.zeros([LANES], tl.float64)
    for other in range(tile if GROUPED else 0, tile + 1 if GROUPED else tiles):
        of_tile = tl.load(BUDGET + other * LANES + lane)
        known = of_tile == of_tile  # a tile with NaN is exact, and has no say
        lost += tl.where(known, tl.load(LOST + other * LANES + lane), 0.0)
        budget += tl.where(known, of_tile, 0.0)
    # The lowest that holds: for higher ones tiles of unsure rows may be exact, and take what they may lose with them.
    limit = tl.min(tl.where((lost <= budget) & (lane > 0), lane, LAST_BIN + 1), 0)
    kept, own = tl.load(BELOW + tile * LANES + limit), tl.load(BUDGET + tile * LANES)
    gathered = (kept <= most) & (own == own)
    tl.store(LIMIT + tile, tl.where(gathered, limit, 0))
    tl.store(KEPT + tile, tl.where(gathered, kept, V))
    share = tl.where(gathered, kept.to(tl.float32) / V, 1.0)  # division is not exact
    tl.store(SHARE + row, tl.zeros([ROWS], tl.float32) + share, mask=row < N)
    tl.store(SKIPPED + row, tl.load(LOSS + row * LANES + limit, mask=(row < N) & gathered, other=0.0), mask=row < N)


@triton.jit(do_not_specialize=VARYING)
def _compact_columns_kernel(
    P, BIN, COUNT, LIMIT, LIST, COMPACT, N, V, stride, room,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One tile and block of columns: appends its active ones to the tile's list, and P's to its rows of COMPACT."""
    tile, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    limit = tl.load(LIMIT + tile)
    if limit > 0:
        row, lane, before = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, LANES), tl.arange(0, BLOCKS)
        counted = (before < block)[:, None] & (lane < limit)[None, :]
        counts = tl.load(COUNT + (tile * blocks + before[:, None]) * LANES + lane[None, :], mask=counted, other=0)
        first = tl.sum(tl.sum(counts, 1), 0)
        for start in range(0, BLOCK, STEP):
            column = block * BLOCK + start + tl.arange(0, STEP)
            active = (tl.load(BIN + tile * V + column, mask=column < V, other=LAST_BIN + 1) < limit) & (column < V)
            at = first + tl.cumsum(active.to(tl.int32), 0) - 1
            first += tl.sum(active.to(tl.int32), 0)
            tl.store(LIST + tile * room + at, column, mask=active)
            inside = (row < N)[:, None] & active[None, :]
            p = tl.load(P + row[:, None] * stride + column[None, :], mask=inside, other=0.0)
            tl.store(COMPACT + row[:, None] * room + at[None, :], p, mask=inside)


@triton.jit
def _sum_over_columns(
    P_ROW, W_COLUMN, LIST, total, row_inside, column_inside, count, W_V,
    LISTED: tl.constexpr, PRECISION: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """total += the product of P's rows with `count` rows of W: those in LIST, or the first ones."""
    for start in range(0, count, TERMS):
        k = start + tl.arange(0, TERMS)
        v = tl.load(LIST + k, mask=k < count, other=0).to(tl.int64) if LISTED else k.to(tl.int64)
        p = tl.load(P_ROW + k[None, :], mask=row_inside[:, None] & (k < count)[None, :], other=0.0)
        w = tl.load(W_COLUMN + v[:, None] * W_V, mask=(k < count)[:, None] & column_inside[None, :], other=0.0)
        total = tl.dot(p, w, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=VARYING)
def _active_product_kernel(
    P, COMPACT, LIST, LIMIT, KEPT, W, OUT, N, V, D, stride, room, W_V, W_D,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TERMS: tl.constexpr,
):  # fmt: skip
    """One tile and block of D: OUT = P W · UNIT over the tile's active columns."""
    tile = tl.program_id(0).to(tl.int64)
    row, d = tile * ROWS + tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    row_inside, d_inside = row < N, d < D
    W_COLUMN = W + d.to(tl.int64)[None, :] * W_D
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    if tl.load(LIMIT + tile) > 0:
        total = _sum_over_columns(
            COMPACT + row[:, None] * room, W_COLUMN, LIST + tile * room, total, row_inside, d_inside,
            tl.load(KEPT + tile), W_V, True, PRECISION, TERMS,
        )  # fmt: skip
    else:
        total = _sum_over_columns(
            P + row[:, None] * stride, W_COLUMN, LIST, total, row_inside, d_inside, V, W_V, False, PRECISION,
            TERMS,
        )  # fmt: skip
    tl.store(OUT + row[:, None] * D + d[None, :], total * UNIT, mask=row_inside[:, None] & d_inside[None, :])


def _triton(
    p: Tensor, weight: Tensor, off_label: Tensor, skipped: Skipped, factor: Tensor | None, group: Tensor | None
) -> Tensor:
    """`probabilities_times_weight` by the five kernels."""
    (n, columns), width = p.shape, weight.shape[1]
    config, most = _config(p.dtype, architecture(p.device)), columns // MOST_ACTIVE_TRITON
    room = -(-most // 64) * 64  # rows of COMPACT begin at a multiple of 128 bytes
    tiles, blocks = triton.cdiv(n, config.rows), triton.cdiv(columns, BLOCK_COLUMNS)
    bigger = p_factor(p.dtype)
    bins = torch.empty(tiles, columns, dtype=torch.int8, device=p.device)
    mass = torch.empty(tiles * blocks * config.rows, LANES.value, dtype=torch.float32, device=p.device)
    # One tensor of each kind: each part begins at a multiple of 128 bytes, as every kernel expects of it.
    sizes = [
        -(-size // 32) * 32 for size in (tiles * blocks * LANES.value, tiles * LANES.value, tiles, tiles, tiles * room)
    ]
    integers = torch.empty(sum(sizes), dtype=torch.int32, device=p.device)
    count, below, limit, kept, columns_of = integers.split(sizes)
    loss = torch.empty(n, LANES.value, dtype=torch.float32, device=p.device)
    lost, budget = torch.empty(2, tiles, LANES.value, dtype=torch.float64, device=p.device)
    compact = p.new_empty(n, room)
    out = off_label.new_empty(n, width)
    common = {"ROWS": config.rows, "num_warps": config.num_warps}
    each_block = {"BLOCK": BLOCK_COLUMNS, "STEP": config.step}
    with torch.cuda.device_of(p):
        _column_bins_kernel[(tiles, blocks)](
            p, bins, mass, count, n, columns, p.stride(0), LOG_FACTOR=int(math.log2(bigger)), **each_block, **common
        )
        _tile_losses_kernel[(tiles,)](
            mass, count, off_label, mass if factor is None else factor, limit if group is None else group, loss, below,
            lost, budget, n, blocks, most, SHARE_OF_MASS=SKIPPED_MASS, UNIT=1 / bigger, WEIGHED=factor is not None,
            GROUPED=group is not None, **common,
        )  # fmt: skip
        _choose_columns_kernel[(tiles,)](
            loss, below, lost, budget, limit, kept, skipped.share, skipped.mass, n, columns, tiles, most,
            GROUPED=group is not None, **common,
        )  # fmt: skip
        _compact_columns_kernel[(tiles, blocks)](
            p, bins, count, limit, columns_of, compact, n, columns, p.stride(0), room,
            BLOCKS=triton.next_power_of_2(blocks), **each_block, **common,
        )  # fmt: skip
        _active_product_kernel[(tiles, triton.cdiv(width, config.width))](
            p, compact, columns_of, limit, kept, weight, out, n, columns, width, p.stride(0), room, *weight.stride(),
            UNIT=1 / bigger, PRECISION=input_precision(), WIDTH=config.width, TERMS=config.terms,
            num_stages=config.num_stages, **common,
        )  # fmt: skip
    return out


def _torch(
    p: Tensor, weight: Tensor, off_label: Tensor, skipped: Skipped, factor: Tensor | None, group: Tensor | None
) -> Tensor:
    """`probabilities_times_weight` with all rows as one tile. Of a GPU it waits for which columns these are."""
    columns, dtype = p.shape[1], off_label.dtype
    # The bits of numbers that are not negative are in the numbers' order, and torch compares integers faster.
    maximum = divided(_bits(p).amax(0).view(p.dtype).to(dtype), p.dtype)
    bins = torch.where(maximum > 0, -maximum.frexp().exponent, BINS - 1).clamp_(0, BINS - 1)
    below = torch.ones(BINS, BINS, dtype=p.dtype, device=p.device).tril_()  # [bin, j]: bin >= j
    mass = _product(p, torch.nn.functional.embedding(bins, below), None, dtype)  # [n, j]: what is lost from bin j on
    # In float64, because the squares of a row that is very sure are 0 in float32.
    weighed, whole = mass.double(), off_label.double()
    if factor is not None:
        weighed, whole = weighed * factor[:, None], whole * factor
    groups = weighed.new_ones(1, len(p))
    if group is not None:
        known = torch.arange(int(group[0]), int(group[-1]) + 1, device=p.device)
        groups = (known[:, None] == group).to(weighed.dtype)
    within = groups @ weighed.square() <= SKIPPED_MASS**2 * (groups @ whole.square())[:, None]  # False for NaN
    last = torch.where(within.all(0), 0, torch.arange(BINS, device=p.device)).amax()
    limit = max(int(last) + 1, 1)
    kept = (bins < limit).nonzero()[:, 0]
    if len(kept) > columns // MOST_ACTIVE:
        skipped.share.fill_(1.0)
        skipped.mass.zero_()
        return _product(p, weight, None, dtype)
    skipped.share.fill_(len(kept) / columns)
    skipped.mass.copy_(mass[:, limit])
    return _product(_columns(p, kept), weight, kept, dtype)


def _product(p: Tensor, weight: Tensor, columns: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`p @ weight / p_factor` (of the rows `columns`, if given), summed in fp32 as far as the device's products can."""
    if not p.shape[1]:
        return p.new_zeros(p.shape[0], weight.shape[1], dtype=dtype)
    tile = tile_of(p, p.shape[1])
    out = None
    for v in range(0, p.shape[1], tile):
        rows = wide(weight[v : v + tile] if columns is None else weight[columns[v : v + tile]], dtype)
        if out is not None:
            out.addmm_(wide(p[:, v : v + tile], dtype), rows)
        elif p.is_cuda and dtype == torch.float32 != p.dtype:  # half types are summed in float32 only
            out = torch.mm(p, rows, out_dtype=dtype)
        else:
            out = torch.mm(wide(p[:, v : v + tile], dtype), rows).to(dtype)
    return divided(out, p.dtype)


def _columns(p: Tensor, kept: Tensor) -> Tensor:
    """`p[:, kept]`."""
    if p.device.type != "cpu":
        return p.index_select(1, kept)
    # By rows, and as integers: twice as fast on the CPU.
    return torch.stack([row.index_select(0, kept) for row in _bits(p)]).view(p.dtype)


def _bits(p: Tensor) -> Tensor:
    """`p` as integers of the same size."""
    return p.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[p.dtype.itemsize])


def probabilities_times_weight(
    p: Tensor,
    weight: Tensor,
    off_label: Tensor,
    skipped: Skipped | None = None,
    factor: Tensor | None = None,
    group: Tensor | None = None,
    impl: str = "torch",
) -> Tensor:
    """`P W` [n, D] in the dtype of `off_label`.

    Args:
        p: [n, V], from `vocab_chunks`, `p_factor` times as large as it is in the result.
        off_label: [n], the sums of its rows.
        skipped: [n], where to write what was left out; None leaves out nothing.
        factor: [n], of each row's gradient, in the dtype of `off_label`; None for 1. NaN makes its tile exact.
        group: int64 [n], rising, the group of each row, which loses no more than its own share; None makes one group
            of all rows.
        impl: "triton" or "torch".
    """
    if skipped is None or not len(p):
        return _product(p, weight, None, off_label.dtype)
    if impl == "torch":
        return _torch(p, weight, off_label, skipped, factor, group)
    if p.dtype == torch.float64:
        skipped.share.fill_(1.0)
        skipped.mass.zero_()
        return _product(p, weight, None, off_label.dtype)
    return _triton(p, weight, off_label, skipped, factor, group)


def longest_row(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The greatest 2-norm of a row of `weight`."""
    if weight.device.type != "cpu":
        return torch.linalg.vector_norm(weight, dim=1, dtype=dtype).amax()
    # Here the norm of bf16 is slow, so blocks of rows are converted first.
    blocks = weight.split(max(1, BLOCK_BYTES_CPU // (weight.shape[1] * dtype.itemsize)))
    return torch.stack([torch.linalg.vector_norm(block.to(dtype), dim=1).amax() for block in blocks]).amax()
