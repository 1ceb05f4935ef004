"""Which samples make a batch: temperature sampling over tasks, and batches of samples of similar length.

Temperature sampling (arXiv 2502.12900, §3): task k is drawn with p_k ∝ (|D_k| / Σ|D_i|)^(1/T). T = 1 + 5·epoch moves
the mixture from the tasks' natural shares towards equal shares.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

BUCKET_BATCHES = 32  # number of batches whose samples are sorted by length together


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
        lengths: length of each sample in any unit; a sample with None (text only) may be in any batch.
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
        lengths: Sequence[float | None],
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
        self.members: dict[str, list[int]] = {}
        for i, group in enumerate(groups):
            self.members.setdefault(group, []).append(i)
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.ranks))

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch. Trainer calls this at the start of an epoch, and when it resumes in the middle of one."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        drawn = rng.permutation(self._draw(rng))
        known = [length for length in self.lengths if length is not None] or [0.0]
        keys = [known[rng.integers(len(known))] if self.lengths[i] is None else self.lengths[i] for i in drawn]
        size = self.batch_size * self.ranks
        bucket = BUCKET_BATCHES * size
        batches = []
        for start in range(0, len(drawn), bucket):
            order = start + np.argsort(keys[start : start + bucket], kind="stable")
            batches += [drawn[order[i : i + size]] for i in range(0, len(order), size)]
        for i in rng.permutation(len(batches)):
            yield batches[i][self.rank :: self.ranks].tolist()

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
