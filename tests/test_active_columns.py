"""The product that skips columns: which ones in which tile, and what is lost, against a definition in fp64."""

import pytest
import torch

from soundwave.kernels import active_columns
from soundwave.kernels.active_columns import Skipped, longest_row, probabilities_times_weight
from soundwave.kernels.dispatch import architecture
from soundwave.kernels.vocab_rows import p_factor
from tests.implementations import everywhere, skip_unless_runnable

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(autouse=True)
def several_blocks_of_columns(monkeypatch):
    monkeypatch.setattr(active_columns, "BLOCK_COLUMNS", 512)


def make(rows, columns, width=40, dtype=FP32, device="cpu", seed=0, strength=9.0):
    """P and the sums of its rows, where the largest columns of 16 neighbouring rows are the same; and a head."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, generator=generator, dtype=FP64)
    places = torch.randint(columns, (rows // 16 + 1, 6), generator=generator)
    each = torch.arange(rows)
    logits[each[:, None], places[each // 16]] += strength
    mass = torch.rand(rows, 1, generator=generator, dtype=FP64)
    p = (logits.softmax(1) * mass * p_factor(dtype)).to(dtype)
    weight = torch.randn(columns, width, generator=generator, dtype=FP64).to(dtype)
    acc = torch.promote_types(dtype, FP32)
    return p.to(device), weight.to(device), (p.double().sum(1) / p_factor(dtype)).to(acc).to(device)


def run(p, weight, off_label, impl, group=None, factor=None):
    skipped = Skipped.empty(len(p), off_label)
    factor = factor if factor is None else factor.to(off_label)
    product = probabilities_times_weight(p, weight, off_label, skipped, factor, group, impl)
    return product, skipped


def rows_of_tile(p, impl):
    return active_columns._config(p.dtype, architecture(p.device)).rows if impl == "triton" else len(p)


def most_active(impl):
    """One over the share of the columns above which a tile is exact."""
    return active_columns.MOST_ACTIVE_TRITON if impl == "triton" else active_columns.MOST_ACTIVE


def definition(p, weight, off_label, impl, group=None, factor=None):
    """The rule as its docstring states it, column by column of the limits: product, shares and what each row loses."""
    rows = rows_of_tile(p, impl)
    p, off_label = p.double().cpu() / p_factor(p.dtype), off_label.double().cpu()
    factor = torch.ones(len(p), dtype=FP64) if factor is None else factor
    product, share, lost = p @ weight.double().cpu(), torch.ones(len(p), dtype=FP64), torch.zeros(len(p), dtype=FP64)
    tiles = [slice(first, first + rows) for first in range(0, len(p), rows)]
    most = p.shape[1] // most_active(impl)
    unknown = [bool((p[tile].sum(1) * off_label[tile] * factor[tile]).isnan().any()) for tile in tiles]

    def active(tile, j):
        return p[tile].amax(0) >= 2.0**-j

    def within(j, tiles, rows=None):
        loses, may = torch.zeros((), dtype=FP64), torch.zeros((), dtype=FP64)
        for tile in tiles:
            of = slice(None) if rows is None else rows[tile]
            left_out = ~active(tile, j)
            if (~left_out).sum() <= most:
                loses += (p[tile][:, left_out].sum(1) * factor[tile])[of].square().sum()
                may += (off_label[tile] * factor[tile])[of].square().sum()
        return loses <= active_columns.SKIPPED_MASS**2 * may

    known = [tile for tile, no in zip(tiles, unknown, strict=True) if not no]
    common = next((j for j in range(1, active_columns.BINS + 1) if within(j, known)), None)
    for tile in known:
        limit = common
        if group is not None:
            groups = [group == g for g in group[tile].unique()]
            limit = next(j for j in range(1, active_columns.BINS + 1) if all(within(j, [tile], of) for of in groups))
        kept = active(tile, limit)
        if kept.sum() <= most:
            product[tile] = p[tile][:, kept] @ weight[kept.to(weight.device)].double().cpu()
            share[tile], lost[tile] = kept.double().mean(), p[tile][:, ~kept].sum(1)
    return product, share, lost


def rounding(p, weight, impl):
    """[n, D]: of sums in fp32, and on the CPU of the product's own dtype, in which its tiles of columns are added."""
    terms = p.double().cpu().abs() @ weight.double().cpu().abs() / p_factor(p.dtype)
    eps = torch.finfo(p.dtype).eps if impl == "torch" else torch.finfo(FP32).eps
    return (eps + torch.finfo(torch.promote_types(p.dtype, FP32)).eps * p.shape[1] ** 0.5) * terms


def check(p, weight, off_label, impl, group=None, factor=None):
    """Ours against the definition -> (product, skipped)."""
    product, skipped = run(p, weight, off_label, impl, None if group is None else group.to(p.device), factor)
    expected, share, lost = definition(p, weight, off_label, impl, group, factor)
    torch.testing.assert_close(skipped.share.double().cpu(), share, rtol=1e-6, atol=0)
    eps = torch.finfo(p.dtype).eps if impl == "torch" else 0  # of the CPU's product, whose dtype is P's
    torch.testing.assert_close(skipped.mass.double().cpu(), lost, rtol=eps + 2e-5, atol=1e-9)
    slack = rounding(p, weight, impl)
    assert (product.double().cpu() - expected).norm() <= slack.norm()
    whole = p.double().cpu() @ weight.double().cpu() / p_factor(p.dtype)
    each = (product.double().cpu() - whole).norm(dim=1)
    assert (each <= float(longest_row(weight, FP64)) * lost + slack.norm(dim=1)).all()
    return product, skipped


@everywhere
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("rows", "columns", "strength"),
    [(150, 1500, 12.0), (200, 1030, 8.0), (20, 300, 12.0), (130, 400, 0.0), (1, 5, 3.0), (3, 1, 0.0), (64, 64, 30.0)],
)
def test_each_tile_skips_by_the_rule(device, impl, dtype, rows, columns, strength):
    skip_unless_runnable(device, impl, dtype)
    _, skipped = check(*make(rows, columns, dtype=dtype, device=device, strength=strength), impl)
    assert strength != 12 or (skipped.share < 1 / most_active(impl)).all()


@everywhere
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("columns", "strength"), [(2000, 12.0), (1000, 9.4), (992, 9.4)])
def test_tiles_have_lists_of_their_own(device, impl, dtype, columns, strength):
    """Sure rows skip although flat rows in another tile cannot; lists are short, and longer than a round of terms."""
    skip_unless_runnable(device, impl, dtype)
    p, weight, off_label = make(160, columns, dtype=dtype, device=device, strength=strength)
    p[128:] = p_factor(dtype) / columns
    off_label[128:] = 1
    _, skipped = check(p, weight, off_label, impl)
    few = skipped.share < 1 / most_active(impl)
    assert few[:128].all() == (impl == "triton") and (skipped.share[128:] == 1).all()


@everywhere
def test_sure_rows_lose_more_of_their_mass_beside_unsure_ones(device, impl):
    """Only the sum over all rows is bounded, so that few columns take part; what each row loses is told."""
    p, weight, off_label = make(256, 2000, device=device, strength=11.0)
    p[:128] *= 1e-3
    off_label[:128] *= 1e-3
    _, skipped = check(p, weight, off_label, impl)
    share = active_columns.SKIPPED_MASS
    assert skipped.mass.norm() <= share * off_label.norm()
    assert skipped.mass[:128].norm() > 2 * share * off_label[:128].norm()
    assert (skipped.share < 0.2).all()
    _, alone = check(p[:128], weight, off_label[:128], impl)
    assert (skipped.share[:128] < alone.share).all() or impl == "torch"


@everywhere
def test_rows_that_lose_nothing_leave_their_share_to_nobody(device, impl):
    """At the start of a training a chunk's last tile may have few rows: not all of the chunk's error may be theirs."""
    for strength in (9.0, 12.0):  # alone these rows cannot skip, and can
        p, weight, off_label = make(140, 2000, device=device, strength=strength)
        p[:128], off_label[:128] = 1 / 2000, 1
        _, skipped = check(p, weight, off_label, impl)
        assert (skipped.share[:128] == 1).all()
        assert (skipped.share[128:] < 1).all() == (impl == "triton" and strength == 12)
        assert skipped.mass[128:].norm() <= active_columns.SKIPPED_MASS * off_label[128:].norm()


@everywhere
def test_of_the_limits_that_hold_the_one_with_fewest_columns_is_taken(device, impl):
    """A lower limit may hold where higher ones do not: from 2^-17 on the first tile, of unsure rows, would be exact,
    and the sure rows behind it may lose next to nothing alone."""
    columns = torch.zeros(2, 2000)
    columns[0, :100], columns[0, 100:1000] = 9e-3, 1.1e-5
    columns[1, :300], columns[1, 300:600] = 2e-7, 5e-8
    p = columns.repeat_interleave(torch.tensor([128, 12]), 0).to(device)
    weight = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)).to(device)
    _, skipped = check(p, weight, p.sum(1), impl)
    assert (skipped.share[:128] == 0.05).all()
    assert (skipped.share[128:] == (0 if impl == "triton" else 0.05)).all()


@everywhere
def test_no_group_of_rows_loses_more_than_its_share(device, impl):
    """Two rows would lose a small part of a large mass, the third a large part of a small mass.

    As one group they may; as two groups the third row forbids skipping.
    """
    p = torch.zeros(3, 4000, device=device)
    p[:2, :3] = 0.3
    p[:2, 3:] = 2e-6
    p[2, 3:] = 1e-6
    weight = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).to(device)
    off_label = p.sum(1)
    _, skipped = check(p, weight, off_label, impl)
    assert skipped.share.mul(4000).round().eq(3).all() and (skipped.mass > 0).all()
    _, skipped = check(p, weight, off_label, impl, torch.tensor([4, 4, 5]))
    assert (skipped.share == 1).all() and not skipped.mass.any()
    _, skipped = check(p[:2], weight, off_label[:2], impl, torch.tensor([4, 5]))
    assert skipped.share.mul(4000).round().eq(3).all()


@everywhere
def test_groups_over_the_edges_of_tiles(device, impl):
    shares = []
    for seed in range(2):
        group = torch.randint(6, (150,), generator=torch.Generator().manual_seed(seed)).sort()[0]
        p, weight, off_label = make(150, 900, device=device, seed=seed, strength=11.0)
        p[group == 3] = p[group == 3].mean(1, keepdim=True) * 1e-3  # flat, but next to nothing beside the others
        off_label = p.sum(1)
        for of in (group, None):
            shares.append(float(check(p, weight, off_label, impl, of)[1].share.mean()))
    assert shares[0] > shares[1] and shares[2] > shares[3]


@everywhere
def test_masses_whose_squares_are_no_floats(device, impl):
    """Rows that are so sure that 1 - p is 1e-24 have a gradient, and lose no more of it than others."""
    p, weight, off_label = make(40, 800, device=device, strength=12.0)
    _, expected = check(p, weight, off_label, impl)
    _, skipped = run(p * 1e-24, weight, off_label * 1e-24, impl)
    assert skipped.share[0] > 0 and (skipped.mass <= 0.1 * off_label * 1e-24).all() and (expected.share > 0).all()


@everywhere
def test_rows_weigh_as_much_as_their_gradients_will(device, impl):
    """A flat row forbids skipping unless its factor is small; a factor of NaN forbids it in its own tile."""
    p, weight, off_label = make(64, 900, device=device, strength=12.0)
    p[5], off_label[5] = 1 / 900, 1
    shares = []
    for value in (1.0, 1e-3, float("nan")):
        factor = torch.ones(64, dtype=FP64)
        factor[5] = value
        _, skipped = check(p, weight, off_label, impl, factor=factor)
        shares.append(float(skipped.share[0]))
    assert shares[0] == shares[2] == 1 and shares[1] < 0.2


@everywhere
def test_a_head_with_any_strides(device, impl):
    p, weight, off_label = make(70, 900, device=device, strength=12.0)
    product, _ = check(p, weight, off_label, impl)
    transposed, _ = run(p, weight.t().contiguous().t(), off_label, impl)
    torch.testing.assert_close(transposed, product)


@everywhere
def test_a_row_of_nan_makes_its_tile_exact_and_no_other_row_nan(device, impl):
    p, weight, off_label = make(140, 800, device=device, strength=12.0)
    p[3], off_label[3] = float("nan"), float("nan")
    product, skipped = run(p, weight, off_label, impl)
    others = torch.arange(140, device=device) != 3
    assert product[3].isnan().all() and not product[others].isnan().any()
    rows = rows_of_tile(p, impl)
    assert (skipped.share[:rows] == 1).all() and not skipped.mass[:rows].any()
    whole = p[others].double() @ weight.double()
    lost = skipped.mass[others].double() * float(longest_row(weight, FP64))
    slack = rounding(p[others], weight, impl).norm(dim=1).to(device)
    assert ((product[others].double() - whole).norm(dim=1) <= lost + slack).all()


@everywhere
def test_rows_without_mass_have_no_say(device, impl):
    """As those of utterances that have no part in the loss."""
    p, weight, off_label = make(40, 800, device=device, strength=12.0)
    p[30:], off_label[30:] = 0, 0
    product, skipped = check(p, weight, off_label, impl)
    assert not product[30:].any() and (skipped.share < 0.2).all()
    product, skipped = check(torch.zeros_like(p), weight, torch.zeros_like(off_label), impl)
    assert not product.any() and not skipped.mass.any()


@everywhere
def test_bitwise_equal_again(device, impl):
    given = make(150, 1500, device=device)
    first, *others = (run(*given, impl) for _ in range(3))
    assert all(torch.equal(first[0], x[0]) and torch.equal(first[1].mass, x[1].mass) for x in others)


@everywhere
def test_float64(device, impl):
    """The torch form skips by the same rule; the Triton form skips nothing."""
    given = make(60, 900, dtype=FP64, device=device, strength=12.0)
    if impl == "torch":
        _, skipped = check(*given, impl)
        assert (skipped.share < 0.2).all()
    else:
        product, skipped = run(*given, impl)
        assert torch.equal(product, given[0] @ given[1]) and (skipped.share == 1).all() and not skipped.mass.any()


def test_without_a_place_for_what_is_skipped_nothing_is():
    p, weight, off_label = make(60, 900, strength=12.0)
    torch.testing.assert_close(probabilities_times_weight(p, weight, off_label), p @ weight)
