"""Decides which samples make up each micro-batch of each global step, as a function of seed and epoch alone.

    shuffled_order(size, seed, pass, ...) ──> permutation of one set
    GlobalBatchSampler ── micro_batch(step, m) ────────> samples of micro-batch m of global step `step`
                       └─ rank_micro_batch(step, ...) ──> samples of the micro-batch that a rank computes next

Only where samples are grouped by length does the order depend on the samples as well.

The position of a run is its global step, so resuming needs no state: each of any number of ranks and workers can get
its micro-batches from the sampler from any step on. The last step of an epoch may be shorter.

An epoch has as many samples as all sets together. Without weights it has each sample once. Weights are the sets' shares
of its samples: a set whose share is above its size starts another pass within the epoch, and one whose share is below
continues its pass in the next epoch. No sample of a set is repeated before all others of the set were seen.

Legend: N samples of an epoch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.errors import ConfigError, DataError
from common.shards.score_shard import ROWS_PER_GROUP

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampleSet:
    """One set's positions in the source, ascending; `weight` is relative to the weights of the other sets."""

    positions: Sequence[int] | IntArray
    weight: float | None = None


def shuffled_order(num_samples: int, seed: int, epoch: int, window: int, number: int = 0) -> IntArray:
    """Returns the order of one pass over set `number`: row groups shuffled, then samples within each `window`.

    Neighbours on disk share a row group, so a window touches few of them; a window of all samples is a plain shuffle.
    """
    rng = np.random.default_rng([seed, epoch, number])
    runs = np.arange(0, num_samples, ROWS_PER_GROUP)
    rng.shuffle(runs)
    order = (runs[:, None] + np.arange(ROWS_PER_GROUP)).reshape(-1)
    order = order[order < num_samples]
    for start in range(0, num_samples, window):
        rng.shuffle(order[start : start + window])
    return order


def samples_per_epoch(sizes: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """Returns the number of samples of each set in an epoch, by weight; they add up to the sum of the sizes.

    Raises:
        ConfigError: a weight is too small for one sample.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return list(sizes)
    assert len(given) == len(sizes), "some sets have a weight and others none"
    total = sum(sizes)
    exact = np.asarray(given) / sum(given) * total
    counts = np.floor(exact).astype(int)
    # The samples that rounding down leaves over go to the sets with the largest remainders.
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    if not counts.all():
        number = int(np.argmin(counts))
        raise ConfigError(
            f"data.mix: the weight {given[number]:g} of set {number + 1} is less than one of the {total:,} samples of "
            "an epoch; raise it, or leave the set out"
        )
    return [int(count) for count in counts]


class GlobalBatchSampler:
    """Deals the samples of `sets` to steps and micro-batches.

    Every stretch of training has the sets by their shares, to within a sample or so. Micro-batch m of a step has the
    same samples on any number of ranks. Within a step each set's samples are dealt in their order on disk, so that a
    micro-batch, and the rank that reads it, touches few of the window's row groups.

    With `get_length`, which returns the length of the sample at a source position, a step has the same samples, but
    they are dealt by length, the longest first, so that a batch too large for the memory fails at once. Ranks take
    turns, so that they work on similar lengths at the same time. Every rank then reads all row groups of a window.
    Lengths are read when their step is dealt, so that training starts at once.

    Raises:
        DataError: a set has no samples.
        ConfigError: the global batch is not a multiple of the micro-batch; see also `samples_per_epoch`.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - a record of these numbers would have no other use
        self,
        sets: Sequence[SampleSet],
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        window: int,
        get_length: Callable[[int], int] | None = None,
    ) -> None:
        if not sets or not all(len(each.positions) for each in sets):
            raise DataError("no sample is left to train on; the dataset is empty or all of it is held out")
        if global_batch_size % micro_batch_size:
            raise ConfigError(
                f"optim.global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size}"
            )
        self._positions = [np.asarray(each.positions, np.int64) for each in sets]
        self.samples_per_epoch = samples_per_epoch([*map(len, self._positions)], [each.weight for each in sets])
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        # All sets together have one window of decoded samples, so each set gets its share of it.
        self.windows = [max(1, round(window * n / sum(self.samples_per_epoch))) for n in self.samples_per_epoch]
        self._get_length = get_length
        # The latest epoch with its order, and the latest step with its samples by length.
        self._order: tuple[int, IntArray] | None = None
        self._by_length: tuple[int, IntArray] | None = None
        self.steps_per_epoch = -(-sum(self.samples_per_epoch) // global_batch_size)
        self.micro_batches_per_step = global_batch_size // micro_batch_size

    @property
    def positions(self) -> IntArray:
        """Returns the source positions of all samples, set by set."""
        return np.concatenate(self._positions)

    def micro_batch(self, step: int, number: int) -> IntArray:
        """Returns the source positions of a micro-batch; fewer, or none, at the end of an epoch.

        Raises:
            DecantError: a sample whose length is needed cannot be read.
        """
        start = number * self._micro_batch_size
        return self._step_samples(step)[start : start + self._micro_batch_size]

    def rank_micro_batch(self, step: int, rank: int, num_ranks: int, position: int) -> IntArray:
        """Returns the micro-batch that `rank` of `num_ranks` computes at `position` among those that it accumulates."""
        if self._get_length is not None:
            return self.micro_batch(step, position * num_ranks + rank)
        return self.micro_batch(step, rank * (self.micro_batches_per_step // num_ranks) + position)

    def _step_samples(self, step: int) -> IntArray:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._epoch_order(epoch)
        start = step_in_epoch * self._global_batch_size
        samples = self._order[1][start : start + self._global_batch_size]
        if self._get_length is None:
            return samples
        if self._by_length is None or self._by_length[0] != step:
            lengths = np.array([self._get_length(int(i)) for i in samples])
            self._by_length = step, samples[np.argsort(-lengths, kind="stable")]
        return self._by_length[1]

    def _epoch_order(self, epoch: int) -> IntArray:
        set_counts = self.samples_per_epoch
        parts = [self._set_samples(number, epoch) for number in range(len(set_counts))]
        # The j-th of a set's n samples is due at (j + 1/2) / n of the epoch.
        due_N = np.concatenate([(np.arange(n) + 0.5) / n for n in set_counts])
        interleaved_N = np.argsort(due_N, kind="stable")
        order_N = np.concatenate(parts)[interleaved_N]
        set_N = np.repeat(np.arange(len(parts)), set_counts)[interleaved_N]
        step_N = np.arange(len(order_N)) // self._global_batch_size
        dealt_N = np.empty_like(order_N)
        dealt_N[np.lexsort((set_N, step_N))] = order_N[np.lexsort((order_N, set_N, step_N))]
        return dealt_N

    def _set_samples(self, number: int, epoch: int) -> IntArray:
        """Returns an epoch's samples of a set: the next `count` of its endless sequence of passes."""
        positions, count = self._positions[number], self.samples_per_epoch[number]
        start, size = epoch * count, len(positions)
        first_pass = start // size
        passes = [
            shuffled_order(size, self._seed, p, self.windows[number], number)
            for p in range(first_pass, (start + count - 1) // size + 1)
        ]
        return positions[np.concatenate(passes)[start - first_pass * size :][:count]]


def split_validation(num_samples: int, fraction: float, name: str = "the set") -> tuple[list[int], list[int]]:
    """Returns (training positions, validation positions): a fraction of all is held out, evenly spread.

    A fraction above 0 holds out at least one sample, so that a trial run on a few samples validates too.

    Args:
        name: of the set, for the error.

    Raises:
        ConfigError: the set has a single sample, which cannot be both trained on and held out.
    """
    num_held_out = max(1, round(num_samples * fraction)) if fraction else 0
    if fraction and num_held_out >= num_samples:
        raise ConfigError(
            f"data.validation_fraction = {fraction:g}: {num_held_out} of {num_samples} sample(s) of {name} would be "
            "held out and none trained on; set it to 0, add samples, or name other samples in data.validation"
        )
    held_out = set(np.linspace(0, num_samples - 1, num_held_out).astype(int).tolist())
    return [i for i in range(num_samples) if i not in held_out], sorted(held_out)
