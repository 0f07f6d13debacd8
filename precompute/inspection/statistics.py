"""Numbers of each scored token, and how they are distributed over an output.

Legend: R scored tokens, N kept entries of all rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.shards.scores import TeacherScores

FloatArray = npt.NDArray[np.float64]

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MAX_BINS = 36
# Values of one measure that are held at once, 16 MiB of them.
_MAX_HELD = 1 << 22


@dataclass(frozen=True)
class Metric:
    """What is counted. `is_whole` for whole numbers."""

    name: str
    unit: str
    meaning: str
    is_whole: bool = False


MASS = Metric("kept mass", "probability", "probability of the kept entries together, 1 - rest_mass")
ENTROPY = Metric("entropy", "nats", "of the kept entries and the rest as one entry: a lower bound of the teacher's")
DRAWN_ENTROPY = Metric("entropy", "nats", "of the shares of the draws; few draws give less than the teacher's")
KEPT = Metric("k", "entries", "kept entries a scored token", is_whole=True)
OWN = Metric("own log-prob", "nats", "log-prob of the token that stands there, at temperature 1")
SCORED = Metric("scored tokens", "tokens", "scored tokens a conversation", is_whole=True)
LENGTH = Metric("length", "tokens", "all tokens a conversation, an image as one", is_whole=True)
MARGIN = Metric("margin", "nats", "log-prob of the chosen answer less that of the rejected one")


@dataclass(frozen=True)
class Distribution:
    """`quantiles` at 0, 5, 25, 50, 75, 95 and 100%; `counts` of the values from each of `edges` to the next."""

    measure: Metric
    num_values: int
    mean: float
    quantiles: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]


class StreamingDistribution:
    """Values of one measure as they come. Past `max_held` of them every second is dropped, again and again.

    Mean, least and greatest are those of all values, the other quantiles those of the values still held.
    """

    def __init__(self, measure: Metric, max_held: int = _MAX_HELD) -> None:
        self.measure = measure
        self._max_held = max_held
        self._held: list[npt.NDArray[np.float32]] = []
        self._num_held = 0
        self._stride = 1
        self._count = 0
        self._sum = 0.0
        self._least, self._greatest = np.inf, -np.inf

    def add(self, values: npt.NDArray[np.number]) -> None:
        """Takes values [n] of any n."""
        if not len(values):
            return
        self._append(values[-self._count % self._stride :: self._stride].astype(np.float32))
        self._count += len(values)
        self._sum += float(values.sum(dtype=np.float64))
        self._least = min(self._least, float(values.min()))
        self._greatest = max(self._greatest, float(values.max()))
        while self._num_held > self._max_held:
            held = np.concatenate(self._held)
            self._held, self._num_held, self._stride = [], 0, self._stride * 2
            self._append(held[::2])

    def distribution(self) -> Distribution | None:
        """What has come so far; None if nothing has."""
        if not self._count:
            return None
        held = np.concatenate(self._held).astype(np.float64)
        inner = np.quantile(held, _QUANTILES[1:-1])
        edges = _edges(self._least, self._greatest, self.measure.is_whole)
        return Distribution(
            measure=self.measure,
            num_values=self._count,
            mean=self._sum / self._count,
            quantiles=(self._least, *map(float, inner), self._greatest),
            edges=tuple(map(float, edges)),
            counts=tuple(map(int, np.histogram(held, edges)[0])),
        )

    def _append(self, values: npt.NDArray[np.float32]) -> None:
        self._held.append(values)
        self._num_held += len(values)


def entropies(scores: TeacherScores) -> FloatArray:
    """Entropy of each row in nats, float64 [R]: -sum p ln p over its kept entries, and the rest as one more entry.

    Splitting an entry never lowers an entropy, so it is a lower bound of that of the whole distribution. Of drawn
    entries p is the share of the draws.
    """
    logprobs_N = scores.logprobs.astype(np.float64)
    probs_N = np.exp(logprobs_N)
    rows_N = np.repeat(np.arange(scores.num_rows), scores.counts)
    terms_N = np.where(probs_N > 0, probs_N * np.where(probs_N > 0, logprobs_N, 0.0), 0.0)
    rest_R = scores.rest_mass.astype(np.float64)
    rest_terms_R = rest_R * np.log(np.where(rest_R > 0, rest_R, 1.0))
    # Rounding may leave -1e-8 where one entry has all the mass.
    entropy_R: FloatArray = np.maximum(0.0, -np.bincount(rows_N, terms_N, minlength=scores.num_rows) - rest_terms_R)
    return entropy_R


def _edges(least: float, greatest: float, is_whole: bool) -> FloatArray:
    """Bins of one width, at most 36. Each whole number is in the middle of its bin, or the bins are whole wide."""
    if is_whole:
        width = -(-(int(greatest) - int(least) + 1) // MAX_BINS)
        return np.arange(int(least), int(greatest) + width + 1, width).astype(np.float64) - 0.5
    # float32 values may lie just outside edges that were rounded another way.
    least, greatest = float(np.float32(least)), float(np.float32(greatest))
    if least == greatest:
        return np.array([least - 0.5, least + 0.5])
    return np.linspace(least, greatest, MAX_BINS + 1)
