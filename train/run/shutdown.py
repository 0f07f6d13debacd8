"""Graceful shutdown: remembers SIGTERM and Ctrl-C, so that the trainer can save a checkpoint before it exits."""

import signal
import threading
from types import FrameType
from typing import Any, Self

# Only the one that arrives earliest counts, because a launcher and a terminal may send both.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class TrainingInterrupted(KeyboardInterrupt):
    """A stop signal came and the run was saved; the message says how to continue."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        # The code that a shell reports for a process that died of the signal: 143 for SIGTERM, 130 for Ctrl-C.
        self.exit_code = 128 + signum


class GracefulShutdown:
    """Context manager in which SIGTERM and Ctrl-C are remembered and do not end the process.

    `signum` is the signal that came, or None. Later signals change nothing; SIGQUIT (Ctrl-backslash) ends the process
    at once. Entering it does nothing in any thread but the main one, because only that one receives signals.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {signum: signal.signal(signum, self._remember) for signum in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)

    def _remember(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = self.signum or signum
