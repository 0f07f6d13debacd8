"""When a run has to stop before its end: its loss broke, or it was asked to.

Nothing here talks to other ranks; the trainer makes them agree.
"""

import math
import signal
import statistics
import threading
from collections import deque
from types import FrameType
from typing import Any, Self

from common.errors import DecantError

# How many steps' losses the next one is compared with; nothing is compared before there are so many.
NUM_RECENT = 50

# Losses (nats) below this do not count as small: a preference loss may come near 0, where any hard batch is many
# times the median.
LEAST_MEDIAN = 0.1

# The first to arrive counts; a launcher and a terminal may send both.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class DivergedError(DecantError):
    """A step's loss or gradient is not a number, or its loss exploded."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved what it had; the message says how to continue."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        # As a shell reports a process that died of the signal: 143 for SIGTERM, 130 for Ctrl-C.
        self.exit_code = 128 + signum


class LossWatch:
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
            if loss > self._max_ratio * max(median, LEAST_MEDIAN):
                return (
                    f"the loss is {loss:.4g}, more than run.max_loss_ratio {self._max_ratio:g} times {median:.4g}, "
                    f"the median of the {NUM_RECENT} steps before"
                )
        self._recent.append(loss)
        return None


class StopRequest:
    """Remembers SIGTERM and Ctrl-C instead of dying of them, from `with` to its end.

    `signum` is the signal that came, or None. Later ones change nothing; SIGQUIT (Ctrl-backslash) ends a process at
    once. In a thread other than the main one, which gets no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._remember) for each in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = self.signum or signum
