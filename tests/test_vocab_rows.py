"""The pass over rows of logits, against its definition in fp64."""

import pytest
import torch

from soundwave.kernels import vocab_rows
from soundwave.kernels.vocab_rows import RowStats
from tests.implementations import everywhere

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
# Columns, label columns, allocated columns: one and several blocks of both, with and without a tail.
SHAPES = [(1, 1, 1), (7, 3, 64), (63, 7, 63), (300, 20, 320), (5000, 40, 5056), (9000, 1100, 9024)]
shapes = pytest.mark.parametrize(("columns", "count", "stride"), SHAPES, ids=[f"V{v}-C{c}" for v, c, _ in SHAPES])


def make(columns, count, stride, dtype=FP32, device="cpu", rows=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, stride, generator=generator, dtype=FP64)).to(dtype)
    acc = torch.promote_types(dtype, FP32)
    label_logits = (3 * torch.randn(rows, count, generator=generator, dtype=FP64)).to(acc)
    label_logits[0] -= 30  # never the maximum
    label_logits[-1, -1] += 30  # always
    labels = torch.stack([torch.randperm(columns + count, generator=generator)[:count] - count // 2 for _ in range(2)])
    group = torch.randint(2, (rows,), generator=generator)
    scale = torch.rand(rows, generator=generator, dtype=FP64).to(acc)
    return [
        x.to(device) for x in (logits[:, :columns] if columns == stride else logits, label_logits, labels, group, scale)
    ]


def run(logits, label_logits, labels, group, scale, columns, impl):
    p = logits.clone()[:, :columns]
    stats = RowStats.empty(len(p), label_logits)
    vocab_rows.vocab_rows(p, label_logits, labels, group, scale, stats, impl)
    return p, stats


def definition(logits, label_logits, labels, group, scale, columns):
    z = logits[:, :columns].double().clone()
    for row, line in enumerate(labels[group].tolist()):
        z[row, [v for v in line if 0 <= v < columns]] = -torch.inf
    label_logits = label_logits.double()
    log_total = torch.cat([z, label_logits], 1).logsumexp(1)
    p = (z - log_total[:, None]).exp()
    maximum, argmax = z.max(1)
    return (
        p * scale[:, None].double(),
        maximum,
        argmax,
        log_total - torch.maximum(maximum, label_logits.amax(1)),
        p.sum(1),
    )


@everywhere
@shapes
@pytest.mark.parametrize("dtype", [FP64, FP32, BF16], ids=["float64", "float32", "bfloat16"])
def test_statistics_and_probabilities(device, impl, columns, count, stride, dtype):
    given = make(columns, count, stride, dtype, device)
    p, stats = run(*given, columns, impl)
    truth, maximum, argmax, log_sum, off_label = definition(*given, columns)
    # An interpreter that truncates to bfloat16 is off by up to a whole unit in the last place.
    torch.testing.assert_close(p.double(), truth, rtol=8e-3 if dtype == BF16 else 1e-5, atol=1e-30)
    assert torch.equal(stats.maximum.double(), maximum)
    found = maximum.isfinite()  # there is none where all columns are label columns
    assert torch.equal(stats.argmax[found], argmax[found])
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == FP64 else {"rtol": 2e-6, "atol": 1e-6}
    torch.testing.assert_close(stats.log_sum.double(), log_sum, **tolerance)
    torch.testing.assert_close(stats.off_label_mass.double(), off_label, rtol=tolerance["rtol"] * 10, atol=0)


@everywhere
def test_without_a_scale_only_statistics(device, impl):
    given = make(300, 20, 320, device=device)
    _, expected = run(*given, 300, impl)
    _, stats = run(*given[:-1], None, 300, impl)
    assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True))


@everywhere
@pytest.mark.parametrize("second", [11, 4106, 8999])
def test_the_lowest_of_equal_columns(device, impl, second):
    logits = torch.zeros(1, 9000, device=device)
    logits[0, [10, second]] = 5.0
    none = torch.full((1, 1), -1, dtype=torch.int64, device=device)
    group = torch.zeros(1, dtype=torch.int64, device=device)
    label_logits = torch.zeros(1, 1, device=device)
    _, stats = run(logits, label_logits, none, group, None, 9000, impl)
    assert stats.argmax.item() == 10


@everywhere
@pytest.mark.parametrize("gap", [10.0, 17.0, 25.0, 60.0])
@pytest.mark.parametrize("equals", [1, 2, 3])
def test_the_normaliser_of_a_row_that_is_sure(device, impl, gap, equals):
    """log(1 + rest) keeps all digits of the rest. Of several maxima one is the 1, and the others belong to the rest."""
    logits = torch.full((1, 300), -gap, device=device)
    label_logits = torch.full((1, 5), -gap, device=device)
    label_logits[0, 1 : 1 + equals] = 0.0
    none = torch.full((1, 5), -1, dtype=torch.int64, device=device)
    group = torch.zeros(1, dtype=torch.int64, device=device)
    _, stats = run(logits, label_logits, none, group, None, 300, impl)
    rest = (equals - 1) + (305 - equals) * torch.tensor(-gap, dtype=FP64).exp()
    torch.testing.assert_close(stats.log_sum.cpu().double(), rest.log1p()[None], rtol=2e-6, atol=0)


@everywhere
def test_nan_in_one_row_stays_there(device, impl):
    given = make(300, 20, 320, device=device)
    expected, _ = run(*given, 300, impl)
    given[0][2] = float("nan")
    p, stats = run(*given, 300, impl)
    assert stats.off_label_mass[2].isnan() and 0 <= stats.argmax[2] < 300
    others = [0, 1, 3, 4]
    assert torch.equal(p[others], expected[others])


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 1000])
def test_the_maximum_and_its_place(columns):
    x = torch.randint(5, (9, columns), generator=torch.Generator().manual_seed(0)).float()
    maximum, place = vocab_rows._max(x)
    assert torch.equal(maximum, x.amax(1)) and torch.equal(place, (x == maximum[:, None]).int().argmax(1))
