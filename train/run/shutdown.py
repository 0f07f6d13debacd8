"""Graceful shutdown: SIGTERM and Ctrl-C are noted, so that the trainer can save a checkpoint before it exits."""

import signal
import threading
from types import FrameType
from typing import Any, Self

# The first to arrive counts; a launcher and a terminal may send both.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(KeyboardInterrupt):
    """The run was asked to stop and has saved what it had; the message says how to continue."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        # As a shell reports a process that died of the signal: 143 for SIGTERM, 130 for Ctrl-C.
        self.exit_code = 128 + signum


class GracefulShutdown:
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
