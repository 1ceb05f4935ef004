"""Sampling: the paper's mixtures, whole passes, batches of similar length, the same order for a seed and epoch."""

from collections import Counter

import numpy as np
import pytest

from soundwave.data.sampling import (
    BucketBatchSampler,
    DynamicBatchSampler,
    group_counts,
    paper_temperature,
    temperature_weights,
)

PAPER = {"qa": 78_000, "asr": 3_012_000, "st": 460_000, "sound": 25_000}
GROUPS = ["asr"] * 300 + ["qa"] * 40 + ["sound"] * 7


def make(batch_size=8, temperature=None, groups=GROUPS, seed=0, text_only=()):
    lengths = np.random.default_rng(1).uniform(0.5, 30, len(groups)).tolist()
    lengths = [None if group in text_only else length for length, group in zip(lengths, groups, strict=True)]
    return BucketBatchSampler(lengths, groups, batch_size, seed=seed, temperature=temperature)


def epoch_of(sampler, epoch):
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize(
    ("epoch", "figures"), [(0, (0.022, 0.843, 0.129, 0.007)), (1, (0.20, 0.37, 0.27, 0.17))], ids=["T1", "T6"]
)
def test_weights_are_the_papers(epoch, figures):
    weights = temperature_weights(PAPER, paper_temperature(epoch))
    places = 3 if epoch == 0 else 2
    assert tuple(round(weights[name], places) for name in PAPER) == figures


def test_temperature_starts_at_1_and_grows_by_5_an_epoch():
    assert [paper_temperature(epoch) for epoch in range(3)] == [1, 6, 11]


def test_a_temperature_below_1_is_refused():
    with pytest.raises(ValueError, match="temperature = 0.5"):
        temperature_weights(PAPER, 0.5)


@pytest.mark.parametrize("temperature", [1.0, 6.0, 1e9])
@pytest.mark.parametrize("total", [0, 1, 7, 100, 3_575])
def test_counts_are_whole_and_within_one_of_their_share(total, temperature):
    counts = group_counts(PAPER, temperature, total)
    weights = temperature_weights(PAPER, temperature)
    assert sum(counts.values()) == total
    assert all(abs(counts[name] - total * weights[name]) < 1 for name in PAPER)


@pytest.mark.parametrize("epoch", [0, 1, 6], ids=["T1", "T6", "T31"])
@pytest.mark.parametrize("kind", ["by_count", "by_budget"])
def test_100_000_draws_of_the_papers_mixture_are_within_a_hundredth_of_the_formula(kind, epoch):
    sizes = group_counts(PAPER, 1.0, 100_000)
    groups = [name for name, size in sizes.items() for _ in range(size)]
    lengths = np.random.default_rng(0).uniform(0.5, 30, len(groups))
    settings = {"seed": 5, "temperature": lambda _: paper_temperature(epoch)}
    if kind == "by_count":
        batches = list(BucketBatchSampler(lengths, groups, 16, **settings))
    else:
        sampler = DynamicBatchSampler(lengths, groups, lengths[:, None], [240], 1, **settings)
        batches = [batch[:, 0].tolist() for batch in sampler._cut(0)]
    drawn = Counter(groups[i] for batch in batches for i in batch)
    assert sum(drawn.values()) == 100_000
    weights = temperature_weights(PAPER, paper_temperature(epoch))
    assert {name: drawn[name] / 100_000 for name in PAPER} == pytest.approx(weights, rel=0.01)


def test_counts_at_temperature_1_are_the_groups_sizes():
    sizes = dict(Counter(GROUPS))
    assert group_counts(sizes, 1.0, len(GROUPS)) == sizes


@pytest.mark.parametrize("batch_size", [1, 7, 8, 347, 1_000])
@pytest.mark.parametrize("temperature", [None, paper_temperature], ids=["plain", "temperature"])
def test_every_epoch_has_the_stated_number_of_batches(batch_size, temperature):
    sampler = make(batch_size, temperature)
    for epoch in range(3):
        batches = epoch_of(sampler, epoch)
        assert len(batches) == len(sampler) == -(-len(GROUPS) // batch_size)
        assert sum(map(len, batches)) == len(GROUPS)
        assert sum(len(batch) != batch_size for batch in batches) <= 1


@pytest.mark.parametrize("temperature", [None, paper_temperature], ids=["plain", "temperature"])
def test_seed_and_epoch_decide_the_batches(temperature):
    first = epoch_of(make(temperature=temperature, seed=3), 2)
    sampler = make(temperature=temperature, seed=3)
    epoch_of(sampler, 0)  # earlier draws must not matter
    assert epoch_of(sampler, 2) == first
    assert epoch_of(sampler, 1) != first
    assert epoch_of(make(temperature=temperature, seed=4), 2) != first


def test_without_temperature_every_sample_comes_once():
    for epoch in range(2):
        assert sorted(sum(epoch_of(make(), epoch), [])) == list(range(len(GROUPS)))


def test_an_epoch_has_the_mixture_of_its_temperature():
    for epoch in range(3):
        drawn = Counter(GROUPS[i] for batch in epoch_of(make(temperature=paper_temperature), epoch) for i in batch)
        assert drawn == group_counts(dict(Counter(GROUPS)), paper_temperature(epoch), len(GROUPS))


def test_a_group_is_passed_whole_before_a_sample_repeats():
    drawn = Counter(i for batch in epoch_of(make(temperature=paper_temperature), 2) for i in batch)
    for group in ("asr", "qa", "sound"):
        times = [drawn[i] for i, name in enumerate(GROUPS) if name == group]
        assert max(times) - min(times) <= 1
    assert max(drawn[i] for i, name in enumerate(GROUPS) if name == "sound") > 1


def test_what_a_part_of_a_pass_leaves_out_changes_from_epoch_to_epoch():
    sampler = make(temperature=lambda epoch: 11.0)
    first, second = ({i for batch in epoch_of(sampler, epoch) for i in batch} for epoch in (0, 1))
    assert len(first) < len(GROUPS) and first != second


def padding_share(batches, lengths):
    """Share of padding in batches that are each as long as their longest recording."""
    known = [[lengths[i] for i in batch if lengths[i] is not None] for batch in batches]
    padded = sum(max(batch) * len(batch) for batch in known if batch)
    return 1 - sum(map(sum, known)) / padded


@pytest.mark.parametrize("text_only", [(), ("qa",)], ids=["audio", "text_among_it"])
def test_batches_hold_similar_lengths(text_only):
    sampler = make(temperature=paper_temperature, text_only=text_only)
    # Sorted in buckets of 256, lengths within a batch differ by 1/32 of the range; drawn at random they pad over 40 %.
    assert padding_share(epoch_of(sampler, 0), sampler.lengths) < 0.06


def test_batches_do_not_come_in_the_order_of_their_length():
    sampler = make()
    means = [np.mean([sampler.lengths[i] for i in batch]) for batch in epoch_of(sampler, 0)]
    places = np.argsort(np.argsort(means))
    assert abs(np.corrcoef(places, np.arange(len(means)))[0, 1]) < 0.5


def test_text_only_samples_are_spread_over_the_batches():
    sampler = make(groups=["asr"] * 200 + ["qa"] * 200, text_only=("qa",))
    shares = [np.mean([sampler.lengths[i] is None for i in batch]) for batch in epoch_of(sampler, 0)]
    assert np.mean([0 < share < 1 for share in shares]) > 0.9


def test_text_alone_can_be_sampled():
    batches = epoch_of(BucketBatchSampler([None] * 10, ["qa"] * 10, 4), 0)
    assert sorted(sum(batches, [])) == list(range(10))


def test_nothing_to_sample_from_is_refused():
    with pytest.raises(ValueError, match="lengths is empty"):
        BucketBatchSampler([], [], 4)


def test_a_sample_without_a_group_is_refused():
    with pytest.raises(ValueError, match="groups has 1 entries, but lengths has 2"):
        BucketBatchSampler([1.0, 2.0], ["asr"], 4)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="batch_size = 0"):
        BucketBatchSampler([1.0], ["asr"], 0)


# ---------------------------------------------------------------- batches by a budget

COSTS = np.random.default_rng(2).uniform([0.5, 1], [30, 200], (len(GROUPS), 2)).round(3)
BUDGET = (240.0, 1500.0)


def dynamic(batches=100, costs=COSTS, budget=BUDGET, seed=0, temperature=None, **settings):
    return DynamicBatchSampler(
        costs[:, 0].tolist(), GROUPS, costs, budget, batches, seed=seed, temperature=temperature, **settings
    )


def loads_of(batches, costs=COSTS):
    """What each batch takes of each budget, [batches, 2]."""
    return np.array([costs[batch].sum(0) if batch else np.zeros(2) for batch in batches])


@pytest.mark.parametrize("temperature", [None, paper_temperature], ids=["plain", "temperature"])
def test_a_batch_is_as_full_as_its_budget_allows(temperature):
    loads = loads_of(dynamic(100, temperature=temperature)) / BUDGET
    assert (loads <= 1 + 1e-9).all()
    # What is left is less than the next sample: here up to 30 of 240 s and 200 of 1500 tokens, on average half of it.
    assert loads.max(1).mean() > 0.9


def test_a_budget_is_met_to_the_last_thousandth():
    costs = np.array([[0.1, 0.0]] * len(GROUPS))
    sizes = [len(batch) for batch in dynamic(10, costs=costs, budget=(0.7, 1.0))]
    assert set(sizes) == {7}  # 0.1 added up 7 times is 0.7000000000000001 in binary


def test_a_budget_takes_every_sample_once_an_epoch_whatever_the_number_of_its_batches():
    counts = [len(dynamic()._cut(epoch)) for epoch in range(3)]
    batches = list(dynamic(sum(counts)))
    starts = np.cumsum([0, *counts])
    for start, stop in zip(starts[:-1], starts[1:], strict=True):
        assert sorted(sum(batches[start:stop], [])) == list(range(len(GROUPS)))
    assert batches[: counts[0]] != batches[counts[0] : 2 * counts[0]]


def test_a_budget_gives_the_mixture_of_each_epochs_temperature():
    counts = [len(dynamic(temperature=paper_temperature)._cut(epoch)) for epoch in range(3)]
    batches = iter(list(dynamic(sum(counts), temperature=paper_temperature)))
    for epoch, count in enumerate(counts):
        drawn = Counter(GROUPS[i] for _ in range(count) for i in next(batches))
        assert drawn == group_counts(dict(Counter(GROUPS)), paper_temperature(epoch), len(GROUPS))


def test_a_run_of_more_batches_begins_with_the_same_ones_and_tells_its_epochs():
    sampler, longer = dynamic(20, seed=3), dynamic(200, seed=3)
    sampler.set_epoch(7)  # Trainer's epochs are not this sampler's
    assert list(sampler) == list(longer)[:20] and len(sampler) == 20
    first = len(longer._cut(0))
    assert [longer.epoch_at(n) for n in (0, first // 2, first)] == [0, pytest.approx(first // 2 / first), 1.0]
    assert dynamic(200, seed=3).epoch_at(first + 1) == longer.epoch_at(first + 1)  # not begun by an iteration


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_processes_share_batches_of_equal_length_and_count(ranks):
    whole = dynamic(ranks=ranks)._cut(0)
    shares = [list(dynamic(len(whole), rank=rank, ranks=ranks)) for rank in range(ranks)]
    assert sorted(i for share in shares for batch in share for i in batch) == list(range(len(GROUPS)))
    for batches in zip(*shares, strict=True):
        loads, sizes = loads_of(batches), [len(batch) for batch in batches]
        assert (loads <= np.array(BUDGET) + 1e-9).all()
        if min(sizes) == max(sizes):  # dealt in turns: rows of rising lengths cancel each other
            lengths = [COSTS[i, 0] for batch in batches for i in batch]
            assert np.ptp(loads[:, 0]) <= np.ptp(lengths) + 1e-9
    uneven = sum(len({len(batch) for batch in batches}) > 1 for batches in zip(*shares, strict=True))
    assert uneven == (len(GROUPS) % ranks > 0)  # the last samples of the epoch


def test_a_budget_may_be_capped_by_a_number_of_samples():
    assert max(map(len, dynamic(batch_size=3))) == 3


def test_batches_of_a_budget_hold_similar_lengths():
    assert padding_share(list(dynamic(len(dynamic()._cut(0)))), COSTS[:, 0].tolist()) < 0.06


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": (29.0, 1500.0)}, r"costs\[\d+\] = .* is over the budget \[29.0, 1500.0\]"),
        ({"budget": (240.0,)}, r"costs has shape \[347, 2\], but there are 347 samples and 1 budgets"),
        ({"costs": np.full((347, 2), np.nan)}, "costs must be finite, and 0 or more"),
        ({"costs": np.full((347, 2), -1.0)}, "costs must be finite, and 0 or more"),
        ({"costs": np.zeros((347, 2)), "budget": (0.0, 1.0)}, r"budget = \[0.0, 1.0\], but each must be above 0"),
        ({"batches": 0}, "batches = 0, but it must be at least 1"),
        ({"batch_size": 0}, "batch_size = 0"),
    ],
    ids=["too-small", "shape", "nan", "below-0", "no-budget", "no-batches", "empty"],
)
def test_a_wrong_budget_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dynamic(**settings)
