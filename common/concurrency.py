"""Work in threads beside a loop: prefetching what the loop needs next, and writing what it has made."""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
ResultT = TypeVar("ResultT")

# Pause between two checks of whether the prefetcher was closed, while its queue is full.
_POLL_S = 0.1


def prefetch_map(
    function: Callable[[T], ResultT], items: Iterable[T], *, num_threads: int, ahead: int
) -> Generator[ResultT, None, None]:
    """Yields `function(item)` of each item in order, computed in threads at most `ahead` items early.

    An exception of `function` or of `items` is raised at its item's turn, so that no earlier result is lost. `items` is
    iterated in the caller's thread.
    """
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="load")
    pending: deque[Future[ResultT]] = deque()
    iterator = iter(items)
    failure: Exception | None = None
    try:
        while failure is None:
            try:
                pending.append(pool.submit(function, next(iterator)))
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - raised below, at its item's turn
                failure = error
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
        if failure is not None:
            raise failure
    finally:
        pool.shutdown(cancel_futures=True)


class BackgroundWriter(Generic[T]):
    """Calls `function` with each item, in order, in one thread, while the caller goes on.

    `put` blocks while more than `max_waiting` items wait besides the one under way; a `check` in another thread blocks
    as long. Leaving the context waits for all items, even after a failure of the caller, so that none is lost.
    """

    def __init__(self, function: Callable[[T], None], *, max_waiting: int) -> None:
        self._function = function
        self._max_waiting = max_waiting
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: deque[Future[None]] = deque()
        self._lock = threading.Lock()

    def put(self, item: T) -> None:
        """Adds `item` to the queue. Raises what `function` raised for an earlier item."""
        with self._lock:
            while self._pending and (self._pending[0].done() or len(self._pending) > self._max_waiting):
                self._pending.popleft().result()
            self._pending.append(self._pool.submit(self._function, item))

    def check(self) -> None:
        """Raises what `function` raised for an item so far. Cheap enough to be called in a loop."""
        with self._lock:
            while self._pending and self._pending[0].done():
                self._pending.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        failures = [failure for future in self._pending if (failure := future.exception())]
        if failures and error is None:
            raise failures[0]
        for failure in failures:
            # Logged, not raised, because the caller's own failure came first and must stay the visible cause.
            logger.error("and while finishing: %s", failure)


class Prefetcher(Generic[T]):
    """Iterator over `items` in a thread, at most `ahead` items early. An exception of `items` is raised by `take`."""

    def __init__(self, items: Iterable[T], ahead: int) -> None:
        self.is_exhausted = False
        self._queue: queue.Queue[tuple[T] | None] = queue.Queue(ahead)
        self._failure: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill_queue, args=(items,), name="prefetch", daemon=True)
        self._thread.start()

    def take(self, max_items: int, *, wait: bool) -> list[T]:
        """Returns up to `max_items` items that are ready now; with `wait` at least one, unless there are no more."""
        items: list[T] = []
        while len(items) < max_items and not self.is_exhausted:
            try:
                entry = self._queue.get(block=wait and not items)
            except queue.Empty:
                break
            if entry is not None:
                items.append(entry[0])
                continue
            self.is_exhausted = True
            if self._failure is not None:
                raise self._failure
        return items

    def close(self) -> None:
        """Stops the thread and waits for its end, which comes after the item under way at the latest."""
        self._closed.set()
        self._thread.join()

    def _fill_queue(self, items: Iterable[T]) -> None:
        try:
            for item in items:
                self._put((item,))
                if self._closed.is_set():
                    return
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread by `take`
            self._failure = error
        self._put(None)

    def _put(self, entry: tuple[T] | None) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=_POLL_S)
            except queue.Full:
                continue
            return
