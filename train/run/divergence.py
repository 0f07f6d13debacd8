"""Detects a step whose loss or gradient is not finite, or whose loss exploded.

The detector looks at one number a step, which the trainer has reduced over all ranks, so that all of them agree.
"""

import math
import statistics
from collections import deque

from common.errors import DecantError

# Number of steps whose median loss the next one is compared with; nothing is compared before there are so many.
NUM_RECENT = 50

# The median counts as at least this many nats: a preference loss may come near 0, where any hard batch has many times
# the median.
MIN_MEDIAN = 0.1


class DivergedError(DecantError):
    """A step's loss or gradient is not a number, or its loss exploded."""


class DivergenceDetector:
    """Judges the loss of each step against those before it.

    A loss has exploded when it is more than `max_ratio` times the median of the 50 steps before it, which counts as
    0.1 at least. A start begins with no steps before it. A ratio of 0 lets every finite loss pass.
    """

    def __init__(self, max_ratio: float) -> None:
        self._max_ratio = max_ratio
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)

    def judge(self, loss: float, *, finite_gradient: bool) -> str | None:
        """What is wrong with a step, or None; then later steps are compared with it."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not finite_gradient:
            return f"the loss is {loss:.4g}, but its gradient is not finite"
        if self._max_ratio and len(self._recent) == NUM_RECENT:
            median = statistics.median(self._recent)
            if loss > self._max_ratio * max(median, MIN_MEDIAN):
                return (
                    f"the loss is {loss:.4g}, more than run.max_loss_ratio {self._max_ratio:g} times {median:.4g}, "
                    f"the median of the {NUM_RECENT} steps before"
                )
        self._recent.append(loss)
        return None
