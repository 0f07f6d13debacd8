"""Detects a step whose loss or gradient is not finite, or whose loss exploded, and reports its samples.

The detector sees one number per step, which the trainer has reduced over all ranks, so that all of them agree.
"""

import json
import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from common.errors import DecantError

# Number of steps whose median loss the next one is compared with; nothing is compared before there are so many.
NUM_RECENT = 50

# The median counts as at least this many nats, because a preference loss may come near 0, where the loss of any hard
# batch is many times the median.
MIN_MEDIAN = 0.1

# Samples that the error message names.
_MAX_NAMED_SAMPLES = 32


class DivergedError(DecantError):
    """A step's loss or gradient is not a number, or its loss exploded."""


class DivergenceDetector:
    """Compares the loss of each step with those of the steps before it.

    A loss has exploded when it is more than `max_ratio` times the median of the 50 steps before it, which counts as
    at least 0.1. A start of a run begins with no steps before it. With a ratio of 0 every finite loss is allowed.
    """

    def __init__(self, max_ratio: float) -> None:
        self._max_ratio = max_ratio
        self._recent: deque[float] = deque(maxlen=NUM_RECENT)

    def find_problem(self, loss: float, *, finite_gradient: bool) -> str | None:
        """Returns what is wrong with a step, or None; a step without a problem is added to the recent ones."""
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


@dataclass(frozen=True)
class RankLoss:
    """Loss of one micro-batch, with the rank that computed it and the ids of its samples."""

    rank: int
    sample_ids: tuple[str, ...]
    loss: float


@dataclass(frozen=True)
class DivergedStep:
    """Report of a diverged step, with the micro-batches of all ranks."""

    step: int
    problem: str
    micro_batches: tuple[RankLoss, ...]

    @property
    def suspects(self) -> list[str]:
        """Returns the sample ids of micro-batches whose loss is not finite, or all ids if every loss is finite."""
        diverged = [m for m in self.micro_batches if not math.isfinite(m.loss)] or self.micro_batches
        return [sample_id for micro_batch in diverged for sample_id in micro_batch.sample_ids]

    def to_json(self) -> bytes:
        """Returns the content of the report's file."""
        micro_batches = [
            {"rank": m.rank, "loss": repr(m.loss), "sample_ids": list(m.sample_ids)} for m in self.micro_batches
        ]
        content = {"step": self.step, "problem": self.problem, "micro_batches": micro_batches}
        return json.dumps(content, indent=1).encode()

    def to_error(self, record: Path) -> DivergedError:
        """Returns the error that ends the run; `record` is the report's file."""
        suspects = self.suspects
        named = ", ".join(map(repr, suspects[:_MAX_NAMED_SAMPLES]))
        if len(suspects) > _MAX_NAMED_SAMPLES:
            named += f" and {len(suspects) - _MAX_NAMED_SAMPLES} more"
        return DivergedError(
            f"step {self.step}: {self.problem}. Its samples: {named} (all micro-batches: {record}). Nothing of this "
            "step was saved. Look at these samples first; lower optim.learning_rate or leave samples out, which makes "
            "it another run, or raise run.max_loss_ratio if the loss is no surprise: the same command continues from "
            "the newest checkpoint"
        )
