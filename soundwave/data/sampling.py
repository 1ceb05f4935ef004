"""Which samples make a batch: temperature sampling over tasks, and batches of samples of similar length.

Temperature sampling (arXiv 2502.12900, §3): task k is drawn with p_k ∝ (|D_k| / Σ|D_i|)^(1/T). T = 1 + 5·epoch moves
the mixture from the tasks' natural shares towards equal shares.

A batch has a fixed number of samples (`BucketBatchSampler`), or as many as a budget of seconds or tokens lets it have
(`DynamicBatchSampler`).
"""

import bisect
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

BUCKET_BATCHES = 32  # number of batches whose samples are sorted by length together
UNITS = 1000  # Costs are whole thousandths, whose sums are exact.


def paper_temperature(epoch: int) -> float:
    """T = 1 + 5·epoch."""
    return 1.0 + 5.0 * epoch


def temperature_weights(sizes: dict[str, int], temperature: float) -> dict[str, float]:
    """Probability of each group at a temperature >= 1; temperature 1 gives the natural shares.

    Raises:
        ValueError: the temperature is below 1.
    """
    if temperature < 1:
        raise ValueError(f"temperature = {temperature}, but it must be at least 1")
    names = list(sizes)
    shares = np.array([sizes[name] for name in names], dtype=np.float64)
    weights = (shares / shares.sum()) ** (1.0 / temperature)
    return dict(zip(names, (weights / weights.sum()).tolist(), strict=True))


def group_counts(sizes: dict[str, int], temperature: float, total: int) -> dict[str, int]:
    """Number of samples of each group among `total`: whole numbers by the largest-remainder method."""
    exact = {name: total * weight for name, weight in temperature_weights(sizes, temperature).items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of samples of similar length. Each epoch has another order and the same number of batches.

    Args:
        lengths: length of each sample in any unit; a sample with None or NaN (text only) may be in any batch.
        groups: group of each sample, e.g. its task.
        batch_size: samples per batch; one batch of an epoch may be smaller.
        seed: seed of the random draws; together with the epoch it decides all batches.
        temperature: epoch -> T. With None an epoch has every sample once.
        rank, ranks: this process, and the number of processes that train together. They share out the batches of
            `ranks * batch_size` samples that one process alone would draw: every `ranks`-th sample is this process's,
            so that all have as many samples, of lengths as similar, and wait little for each other. Of the smaller
            batch at the end of an epoch some may get one sample less, or none.

    Raises:
        ValueError: no sample, not one group per sample, a batch size below 1, or a rank that is not below `ranks`.
    """

    def __init__(
        self,
        lengths: Sequence[float | None] | np.ndarray,
        groups: Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        temperature: Callable[[int], float] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ):
        if not len(lengths):
            raise ValueError("lengths is empty: there is nothing to sample from")
        if len(groups) != len(lengths):
            raise ValueError(f"groups has {len(groups)} entries, but lengths has {len(lengths)}")
        if batch_size < 1:
            raise ValueError(f"batch_size = {batch_size}, but it must be at least 1")
        if not 0 <= rank < ranks:
            raise ValueError(f"rank = {rank}, but it must be 0 to {ranks - 1}, one below ranks")
        self.rank, self.ranks = rank, ranks
        self.lengths, self.batch_size, self.seed, self.temperature = lengths, batch_size, seed, temperature
        self._lengths = np.array(lengths, dtype=np.float64)  # None becomes NaN
        self._known = self._lengths[~np.isnan(self._lengths)]
        numbers: dict[str, int] = {}
        group_of = np.fromiter((numbers.setdefault(group, len(numbers)) for group in groups), np.int64, len(groups))
        ends = np.bincount(group_of).cumsum()[:-1]
        self.members = dict(zip(numbers, np.split(np.argsort(group_of, kind="stable"), ends), strict=True))
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.ranks))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. Trainer calls this at the start of an epoch, and when it resumes in the middle of one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        drawn, keys = self._shuffled(rng)
        size = self.batch_size * self.ranks
        bucket = BUCKET_BATCHES * size
        for start in range(0, len(drawn), bucket):
            here = slice(start, start + bucket)
            drawn[here] = drawn[here][np.argsort(keys[here], kind="stable")]
        for i in rng.permutation(-(-len(drawn) // size)):
            yield drawn[i * size : (i + 1) * size][self.rank :: self.ranks].tolist()

    def _shuffled(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Indices of one epoch in random order, and the length by which each of them is sorted."""
        drawn = rng.permutation(self._draw(rng))
        keys = self._lengths[drawn]
        unknown = np.isnan(keys)
        if unknown.any():
            known = self._known if len(self._known) else np.zeros(1)
            keys[unknown] = known[rng.integers(len(known), size=np.count_nonzero(unknown))]
        return drawn, keys

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """Indices of one epoch, not yet shuffled. A sample comes again only after a whole pass over its group."""
        if self.temperature is None:
            return np.arange(len(self.lengths))
        sizes = {name: len(members) for name, members in self.members.items()}
        counts = group_counts(sizes, self.temperature(self.epoch), len(self.lengths))
        drawn = []
        for name, count in counts.items():
            passes = [rng.permutation(self.members[name]) for _ in range(-(-count // sizes[name]))]
            drawn += [np.concatenate(passes)[:count]] if count else []
        return np.concatenate(drawn)


class DynamicBatchSampler(BucketBatchSampler):
    """Batches of samples of similar length, of which each has as many as its budget lets it have.

    Epochs differ in their number of batches, which transformers' Trainer does not allow, so the sampler goes from epoch
    to epoch by itself: to Trainer the whole run is one epoch. `epoch_at` tells the true one.

    Args:
        lengths, groups, seed, temperature, rank, ranks: as in `BucketBatchSampler`. Of each batch the processes get as
            many samples, dealt out in turns (0 1 1 0 for two), so that the sums of their lengths hardly differ. Only of
            the last batch of an epoch some may get one sample less, or none.
        costs: [n, k], what each sample takes of each of k budgets, e.g. its seconds and its tokens.
        budget: [k]; the costs of one process's batch add up to these at most. All are rounded to thousandths.
        batches: number of batches of the whole run.
        batch_size: the most samples of one process's batch; None for any number.

    Raises:
        ValueError: as in `BucketBatchSampler`; a sample costs more than the budget; costs of another shape,
            below 0 or not finite; or a budget that is not above 0.
    """

    def __init__(
        self,
        lengths: Sequence[float | None] | np.ndarray,
        groups: Sequence[str],
        costs: Sequence[Sequence[float]] | np.ndarray,
        budget: Sequence[float],
        batches: int,
        *,
        batch_size: int | None = None,
        seed: int = 0,
        temperature: Callable[[int], float] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ):
        most = max(1, len(lengths)) if batch_size is None else batch_size
        super().__init__(lengths, groups, most, seed=seed, temperature=temperature, rank=rank, ranks=ranks)
        exact = np.asarray(costs, dtype=np.float64)
        if exact.shape != (len(lengths), len(budget)):
            raise ValueError(
                f"costs has shape {list(exact.shape)}, but there are {len(lengths)} samples and {len(budget)} budgets"
            )
        if not (exact >= 0).all() or not np.isfinite(exact).all():
            raise ValueError("costs must be finite, and 0 or more")
        if not min(budget, default=1) > 0:
            raise ValueError(f"budget = {list(budget)}, but each must be above 0")
        self.costs = np.rint(exact * UNITS).astype(np.int64)
        self.budget = np.rint(np.asarray(budget, dtype=np.float64) * UNITS).astype(np.int64)
        over = (self.costs > self.budget).any(1)
        if over.any():
            first = int(over.argmax())
            raise ValueError(f"costs[{first}] = {exact[first].tolist()} is over the budget {list(budget)}")
        if batches < 1:
            raise ValueError(f"batches = {batches}, but it must be at least 1")
        self.batches = batches
        self._ends: list[int] = []  # of the epochs begun so far, the number of batches up to their ends

    def __len__(self) -> int:
        return self.batches

    def epoch_at(self, batches: int) -> float:
        """How many epochs so many batches are, e.g. 1.5 in the middle of the second one."""
        while not self._ends or self._ends[-1] < batches:
            self._end_epoch(len(self._ends), len(self._cut(len(self._ends))))
        epoch = bisect.bisect_left(self._ends, batches)
        start = self._ends[epoch - 1] if epoch else 0
        return epoch + (batches - start) / (self._ends[epoch] - start)

    def __iter__(self) -> Iterator[list[int]]:
        given = epoch = 0
        while given < self.batches:
            cut = self._cut(epoch)
            self._end_epoch(epoch, len(cut))
            for batch in cut[: self.batches - given]:
                yield [i for i in batch[:, self.rank].tolist() if i >= 0]
            given += len(cut)
            epoch += 1

    def _end_epoch(self, epoch: int, count: int) -> None:
        if epoch == len(self._ends):
            self._ends.append((self._ends[-1] if self._ends else 0) + count)

    def _cut(self, epoch: int) -> list[np.ndarray]:
        """The batches of an epoch, each int64 [samples of a process, ranks]; where a process has none, -1."""
        self.epoch = epoch  # `_draw` asks for its temperature
        rng = np.random.default_rng((self.seed, epoch))
        drawn, keys = self._shuffled(rng)
        share = float((self.costs[drawn] / self.budget).max(1).mean()) or 1.0
        bucket = BUCKET_BATCHES * max(1, round(1 / share)) * self.ranks
        parts = []
        for number, start in enumerate(range(0, len(drawn), bucket)):
            order = np.argsort(keys[start : start + bucket], kind="stable")
            # Every second bucket begins with its longest samples: they fill up the last batch of the bucket before.
            parts.append(drawn[start + (order[::-1] if number % 2 else order)])
        padding = np.full(-len(drawn) % self.ranks, -1)
        rows = np.concatenate([*parts, padding]).astype(np.int64).reshape(-1, self.ranks)
        rows[1::2] = rows[1::2, ::-1]
        costs = np.where(rows[..., None] >= 0, self.costs[rows], 0)
        sums = np.concatenate([np.zeros_like(costs[:1]), costs.cumsum(0)]).reshape(len(rows) + 1, -1)
        budget, columns = np.tile(self.budget, self.ranks), list(np.ascontiguousarray(sums.T))
        cuts = [0]
        while cuts[-1] < len(rows):
            first = cuts[-1]
            fitting = (
                column.searchsorted(column[first] + b, "right") - 1 for column, b in zip(columns, budget, strict=True)
            )
            cuts.append(min(first + self.batch_size, *fitting))
        return [rows[cuts[i] : cuts[i + 1]] for i in rng.permutation(len(cuts) - 1)]
