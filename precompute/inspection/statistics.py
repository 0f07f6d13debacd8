"""Distributions of numbers over an output, such as the entropy of each scored token.

Legend: R scored tokens, N kept entries of all rows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.shards.scores import TeacherScores

FloatArray = npt.NDArray[np.float64]

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
MAX_BINS = 36
# Maximum number of values of one metric in memory: 16 MiB.
_MAX_HELD = 1 << 22


@dataclass(frozen=True)
class Metric:
    """A number that scored tokens or conversations have; `is_whole` if it is always a whole number."""

    name: str
    unit: str
    meaning: str
    is_whole: bool = False


KEPT_MASS = Metric("kept mass", "probability", "probability of the kept entries together, 1 - rest_mass")
ENTROPY = Metric("entropy", "nats", "of the kept entries and the rest as one entry: a lower bound of the teacher's")
DRAWN_ENTROPY = Metric("entropy", "nats", "of the shares of the draws; few draws give less than the teacher's")
NUM_KEPT = Metric("k", "entries", "kept entries a scored token", is_whole=True)
OWN_LOGPROB = Metric("own log-prob", "nats", "log-prob of the token that stands there, at temperature 1")
NUM_SCORED = Metric("scored tokens", "tokens", "scored tokens a conversation", is_whole=True)
LENGTH = Metric("length", "tokens", "all tokens a conversation, an image as one", is_whole=True)
MARGIN = Metric("margin", "nats", "log-prob of the chosen answer less that of the rejected one")


@dataclass(frozen=True)
class Distribution:
    """Distribution of a metric: `quantiles` at 0, 5, 25, 50, 75, 95 and 100%, and a histogram.

    `counts[i]` values lie between `edges[i]` and `edges[i + 1]`.
    """

    measure: Metric
    num_values: int
    mean: float
    quantiles: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]


class StreamingDistribution:
    """Distribution of values that are added bit by bit, in bounded memory.

    Whenever more than `max_held` values are in memory, every second one is dropped. Mean, minimum and maximum are
    exact; the other quantiles and the histogram are those of the values in memory.
    """

    def __init__(self, metric: Metric, max_held: int = _MAX_HELD) -> None:
        self._metric = metric
        self._max_held = max_held
        self._held: list[npt.NDArray[np.float32]] = []
        self._num_held = 0
        self._stride = 1
        self._count = 0
        self._sum = 0.0
        self._min, self._max = np.inf, -np.inf

    def add(self, values: npt.NDArray[np.number]) -> None:
        """Adds values [n] of any n."""
        if not len(values):
            return
        self._append(values[-self._count % self._stride :: self._stride].astype(np.float32))
        self._count += len(values)
        self._sum += float(values.sum(dtype=np.float64))
        self._min = min(self._min, float(values.min()))
        self._max = max(self._max, float(values.max()))
        while self._num_held > self._max_held:
            held = np.concatenate(self._held)
            self._held, self._num_held, self._stride = [], 0, self._stride * 2
            self._append(held[::2])

    def distribution(self) -> Distribution | None:
        """Returns the distribution of all values so far; None if there are none."""
        if not self._count:
            return None
        held = np.concatenate(self._held).astype(np.float64)
        inner = np.quantile(held, _QUANTILES[1:-1])
        edges = _bin_edges(self._min, self._max, self._metric.is_whole)
        return Distribution(
            measure=self._metric,
            num_values=self._count,
            mean=self._sum / self._count,
            quantiles=(self._min, *map(float, inner), self._max),
            edges=tuple(map(float, edges)),
            counts=tuple(map(int, np.histogram(held, edges)[0])),
        )

    def _append(self, values: npt.NDArray[np.float32]) -> None:
        self._held.append(values)
        self._num_held += len(values)


def entropies(scores: TeacherScores) -> FloatArray:
    """Returns the entropy of each row in nats, float64 [R]: -sum p ln p over its kept entries and one for the rest.

    Splitting an entry never lowers an entropy, so this is a lower bound of the entropy of the whole distribution. For
    drawn entries, p is the share of the draws.
    """
    logprobs_N = scores.logprobs.astype(np.float64)
    probs_N = np.exp(logprobs_N)
    rows_N = np.repeat(np.arange(scores.num_rows), scores.counts)
    terms_N = np.where(probs_N > 0, probs_N * np.where(probs_N > 0, logprobs_N, 0.0), 0.0)
    rest_R = scores.rest_mass.astype(np.float64)
    rest_terms_R = rest_R * np.log(np.where(rest_R > 0, rest_R, 1.0))
    # Where one entry has all the mass, rounding may leave -1e-8.
    entropy_R: FloatArray = np.maximum(0.0, -np.bincount(rows_N, terms_N, minlength=scores.num_rows) - rest_terms_R)
    return entropy_R


def _bin_edges(low: float, high: float, is_whole: bool) -> FloatArray:
    """Returns the edges of at most `MAX_BINS` bins of equal width.

    Bins of whole numbers have a whole width and edges halfway between two numbers, so that no value lies on an edge.
    """
    if is_whole:
        width = -(-(int(high) - int(low) + 1) // MAX_BINS)
        return np.arange(int(low), int(high) + width + 1, width).astype(np.float64) - 0.5
    # Values are held as float32, which may lie just outside of edges in float64.
    low, high = float(np.float32(low)), float(np.float32(high))
    if low == high:
        return np.array([low - 0.5, low + 0.5])
    return np.linspace(low, high, MAX_BINS + 1)
