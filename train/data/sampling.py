"""Which samples make up which micro-batch of which global step: a function of (seed, epoch) alone.

    sample_order(set, seed, pass) ──> permutation of one set
    epoch_order(sets, seed, epoch) ──> the sets' samples, each in its own order, woven by their shares
    StepPlan ── micro_batch(step, m) ──> samples of micro-batch m of global step `step`
             └─ of_rank(step, ...) ──> those of the micro-batch that a rank takes next

Dealing a step's samples by length looks at the samples as well, and at nothing else.

The position of a run is its global step, so resuming needs no state: any number of ranks and workers asks the plan
for its own micro-batches from any step on. The last step of an epoch is shorter.

An epoch has as many samples as all sets together. Without weights each sample is seen once in it. Weights are the sets'
shares of its samples: a set whose share is above its size is begun again, one whose share is below goes on in the next
epoch where it stood. No sample of a set is seen again before all others of it were.

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
    """Positions in the source that are trained on, ascending; `weight` is relative to those of the other sets."""

    positions: Sequence[int] | IntArray
    weight: float | None = None


def shuffled_order(num_samples: int, seed: int, epoch: int, window: int, number: int = 0) -> IntArray:
    """Order of one pass over set `number`: runs of neighbours shuffled, then samples within each `window` of them.

    Neighbours share a row group on disk, so a window touches few; a window of all samples is a plain shuffle.
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
    """How many samples of each set an epoch has: by weight, rounded so that the sum is that of the sizes.

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
    # Largest remainders first.
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

    Every stretch of training holds the sets by their shares, to within a sample or so. Micro-batch m of a step holds
    the same samples on any number of ranks. Within a step each set's samples are dealt in their order on disk, so
    that a micro-batch, and the rank that reads it, keeps to its own part of the window's row groups.

    With `length_of`, which tells a source position's length, a step has the same samples, but they are dealt by length,
    the longest first: what does not fit into memory is then found at once. Ranks take turns, so that those which work
    at the same time have neighbouring lengths. Every rank then reads all row groups of a window. A length is asked for
    when its step is, so that nothing has to be read before training starts.

    Raises:
        DataError: a set without samples.
        ConfigError: a batch that is not a multiple of the micro-batch; see also `samples_per_epoch`.
    """

    def __init__(
        self,
        sets: Sequence[SampleSet],
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        window: int,
        length_of: Callable[[int], int] | None = None,
    ) -> None:
        if not sets or not all(len(each.positions) for each in sets):
            raise DataError("no sample is left to train on; the dataset is empty or all of it is held out")
        if global_batch_size % micro_batch_size:
            raise ConfigError(
                f"optim.global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size}"
            )
        self._positions = [np.asarray(each.positions, np.int64) for each in sets]
        self.samples_per_epoch = samples_per_epoch([*map(len, self._positions)], [each.weight for each in sets])
        self._global = global_batch_size
        self._micro = micro_batch_size
        self._seed = seed
        # What is held decoded at a time is one window in all, so each set gets its share of it.
        self.windows = [max(1, round(window * n / sum(self.samples_per_epoch))) for n in self.samples_per_epoch]
        self._length_of = length_of
        self._order: tuple[int, IntArray] | None = None
        self._by_length: tuple[int, IntArray] | None = None
        self.steps_per_epoch = -(-sum(self.samples_per_epoch) // global_batch_size)
        self.micro_batches_per_step = global_batch_size // micro_batch_size

    def micro_batch(self, step: int, number: int) -> IntArray:
        """Source positions of a micro-batch; fewer, or none, at the end of an epoch.

        Raises:
            DecantError: a sample whose length is needed cannot be read.
        """
        start = number * self._micro
        return self._of_step(step)[start : start + self._micro]

    def of_rank(self, step: int, rank: int, num_ranks: int, position: int) -> IntArray:
        """The micro-batch that `rank` of `num_ranks` takes as number `position` of those that it accumulates."""
        if self._length_of is not None:
            return self.micro_batch(step, position * num_ranks + rank)
        return self.micro_batch(step, rank * (self.micro_batches_per_step // num_ranks) + position)

    def _of_step(self, step: int) -> IntArray:
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self._epoch_order(epoch)
        start = step_in_epoch * self._global
        samples = self._order[1][start : start + self._global]
        if self._length_of is None:
            return samples
        if self._by_length is None or self._by_length[0] != step:
            lengths = np.array([self._length_of(int(i)) for i in samples])
            self._by_length = step, samples[np.argsort(-lengths, kind="stable")]
        return self._by_length[1]

    def _epoch_order(self, epoch: int) -> IntArray:
        counts_of_sets = self.samples_per_epoch
        parts = [self._of_set(number, epoch) for number in range(len(counts_of_sets))]
        # The j-th of a set's n samples falls due at (j + 1/2) / n of the epoch.
        due_N = np.concatenate([(np.arange(n) + 0.5) / n for n in counts_of_sets])
        woven_N = np.argsort(due_N, kind="stable")
        order_N = np.concatenate(parts)[woven_N]
        set_N = np.repeat(np.arange(len(parts)), counts_of_sets)[woven_N]
        step_N = np.arange(len(order_N)) // self._global
        dealt_N = np.empty_like(order_N)
        dealt_N[np.lexsort((set_N, step_N))] = order_N[np.lexsort((order_N, set_N, step_N))]
        return dealt_N

    def _of_set(self, number: int, epoch: int) -> IntArray:
        """The set's samples of an epoch: where its endless sequence of passes stands then."""
        positions, count = self._positions[number], self.samples_per_epoch[number]
        start, size = epoch * count, len(positions)
        first = start // size
        passes = [
            shuffled_order(size, self._seed, p, self.windows[number], number)
            for p in range(first, (start + count - 1) // size + 1)
        ]
        return positions[np.concatenate(passes)[start - first * size :][:count]]


def split_validation(num_samples: int, fraction: float) -> tuple[list[int], list[int]]:
    """Evenly spread positions held out, the rest to train on: (train, validation)."""
    held_out = set(np.linspace(0, num_samples - 1, round(num_samples * fraction)).astype(int).tolist())
    return [i for i in range(num_samples) if i not in held_out], sorted(held_out)
