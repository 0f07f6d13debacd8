"""An iterable drawn in a thread of its own, so that whoever consumes it never waits for more than it must."""

import queue
import threading
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")

# How often a full queue looks whether it was closed.
_POLL_S = 0.1


class Feed(Generic[T]):
    """Draws `items` in a thread, at most `ahead` of them early. What drawing raises is raised by `ready`."""

    def __init__(self, items: Iterable[T], ahead: int) -> None:
        self.ended = False
        self._queue: queue.Queue[tuple[T] | None] = queue.Queue(ahead)
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._draw, args=(items,), name="feed", daemon=True)
        self._thread.start()

    def ready(self, most: int, *, wait: bool) -> list[T]:
        """Up to `most` items that are ready now; with `wait` at least one, unless there are no more."""
        items: list[T] = []
        while len(items) < most and not self.ended:
            try:
                entry = self._queue.get(block=wait and not items)
            except queue.Empty:
                break
            if entry is not None:
                items.append(entry[0])
                continue
            self.ended = True
            if self._failure is not None:
                raise self._failure
        return items

    def close(self) -> None:
        """Stops drawing; returns when the thread has ended, after the item under way at the latest."""
        self._closed.set()
        self._thread.join()

    def _draw(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                self._put((item,))
                if self._closed.is_set():
                    return
        except BaseException as error:
            self._failure = error
        self._put(None)

    def _put(self, entry: tuple[T] | None) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=_POLL_S)
            except queue.Full:
                continue
            return
