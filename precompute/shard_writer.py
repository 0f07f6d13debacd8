"""Collects the results of a shard's items, and publishes the shard in a thread once it has them all."""

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from common.concurrency import BackgroundWriter
from common.shards.manifest import ShardedManifest, is_complete
from common.storage.files import Location, directory_lock

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")


class ShardWriter(Generic[ResultT]):
    """Publishes shards of one output in a thread, each at most once.

    Other processes may work on the same output: a shard that one of them has published is neither begun nor written.
    Leaving the context waits until all full shards are published, also after a failure of the caller. Several threads
    may call it.
    """

    def __init__(
        self,
        output: Location,
        manifest: ShardedManifest,
        write: Callable[[int, list[ResultT]], None],
        bar: Any,
        *,
        max_waiting: int,
    ) -> None:
        """Prepares the thread; no shard is begun yet.

        Args:
            output: a directory or an address that `manifest` was opened in.
            manifest: says which items each shard holds.
            write: publishes a shard, given its number and its items' results in the order in which they were added.
            bar: a tqdm bar of items.
            max_waiting: full shards that wait besides the one that is written; with more, `add` blocks.
        """
        self._output = output
        self._manifest = manifest
        self._write = write
        self._bar = bar
        self._writer = BackgroundWriter(self._publish, max_waiting=max_waiting)
        self._lock = threading.Lock()
        self._results: dict[int, list[ResultT]] = {}

    @property
    def num_open(self) -> int:
        """Number of shards that were begun and lack a result."""
        return len(self._results)

    def begin(self, number: int) -> bool:
        """Begins a shard; returns False, and counts its items as done, if it is published already."""
        is_published = is_complete(self._output, number, self._manifest)
        with self._lock:
            if is_published:
                self._bar.update(len(self._manifest.shard_range(number)))
            else:
                self._results[number] = []
        return not is_published

    def add(self, index: int, result: ResultT) -> None:
        """Adds the result of item `index`, once; with the last one, hands its shard to the writer's thread.

        Raises whatever writing an earlier shard raised.
        """
        number = index // self._manifest.items_per_shard
        with self._lock:
            results = self._results[number]
            results.append(result)
            self._bar.update()
            if len(results) == len(self._manifest.shard_range(number)):
                self._writer.put((number, self._results.pop(number)))

    def check(self) -> None:
        """Raises what writing a shard raised so far. Cheap enough to be called in a loop."""
        self._writer.check()

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def _publish(self, shard: tuple[int, list[ResultT]]) -> None:
        number, results = shard
        with directory_lock(self._output):
            if is_complete(self._output, number, self._manifest):
                logger.info("shard %d was written by another process meanwhile", number)
                return
            self._write(number, results)
