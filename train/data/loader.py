"""Micro-batches ahead of training: read, decoded and collated by worker processes, taken in by a thread.

    MicroBatches[item] ── Packed, by a worker ──> thread ── Batch ──> the step

Workers get items in turn and their batches come back in the order of the items, so the order of training depends on
neither.
"""

import functools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from common.errors import DecantError
from train.data.collator import Batch, Collator
from train.data.sampling import GlobalBatchSampler
from train.data.sources import ExampleSource

# Tensors begin at multiples of this many bytes.
_ALIGNMENT = 64

# Batches that the thread holds ready. Each worker holds two more.
_READY = 2

# A worker's torch has one thread; this process has one reader at a time, since tokenizers and open files are not for
# several threads: a validation may begin while the next training batches are being read.
_READING = threading.Lock()


@dataclass(frozen=True)
class FlatBatch:
    """A batch with its tensors in one piece of memory, uint8 [bytes]; `layout` says (name, dtype, shape) of each.

    Each tensor that a worker hands over is a file of shared memory, which takes longer than making a small batch.
    """

    memory: Tensor
    layout: tuple[tuple[str, torch.dtype, torch.Size], ...]
    others: dict[str, Any]

    @classmethod
    def pack(cls, batch: Batch) -> Self:
        """Copies the batch's tensors."""
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        memory = torch.empty(sum(map(_num_bytes, tensors.values())), dtype=torch.uint8)
        packed = cls(
            memory,
            tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()),
            {name: value for name, value in values.items() if name not in tensors},
        )
        for name, view in packed._views():
            view.copy_(tensors[name])
        return packed

    def unpack(self) -> Batch:
        """The batch, on the same memory."""
        return Batch(**self.others, **dict(self._views()))

    def pin_memory(self) -> Self:
        """In pages that a GPU copies from while it computes; the data loader asks for it."""
        return replace(self, memory=self.memory.pin_memory())

    def _views(self) -> Iterator[tuple[str, Tensor]]:
        start = 0
        for name, dtype, shape in self.layout:
            num_bytes = shape.numel() * dtype.itemsize
            yield name, self.memory[start : start + num_bytes].view(dtype).view(shape)
            start += _aligned(num_bytes)


def _ignore_stop_signals(rank_pid: int, _worker: int) -> None:
    """Keeps a worker at work when a launcher or a terminal sends SIGTERM or SIGINT to all processes of a run.

    The rank then finishes its step, saves, and ends its workers itself: its own SIGTERM they obey. All threads
    of a worker were started with SIGTERM blocked, so that it comes to the one that waits for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank_pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, name="signals", daemon=True).start()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _num_bytes(tensor: Tensor) -> int:
    return _aligned(tensor.numel() * tensor.element_size())


class MicroBatchDataset(TorchDataset[FlatBatch | DecantError]):
    """The micro-batches of one rank, in the order of training: item step * accumulation + position.

    An error takes the place of its batch and is raised by who reads it: raised in a worker process, its message would
    arrive inside a traceback.
    """

    def __init__(
        self,
        source: ExampleSource,
        plan: GlobalBatchSampler,
        collator: Collator,
        rank: int,
        num_ranks: int,
        accumulation: int,
    ) -> None:
        assert accumulation * num_ranks == plan.micro_batches_per_step
        self._source = source
        self._plan = plan
        self._collator = collator
        self._rank = rank, num_ranks
        self._accumulation = accumulation

    @property
    def num_steps(self) -> int:
        """Global steps of one epoch."""
        return self._plan.steps_per_epoch

    def __getitem__(self, item: int) -> FlatBatch | DecantError:
        step, position = divmod(item, self._accumulation)
        with _READING:
            try:
                positions = self._plan.of_rank(step, *self._rank, position)
                return FlatBatch.pack(self._collator([self._source[int(i)] for i in positions]))
            except DecantError as error:
                return error


class MicroBatchLoader:
    """Micro-batches `items` as the Trainer expects them: an iterable whose length is that of the whole run.

    Raises:
        DecantError: while iterating, in the place of the batch that could not be made.
    """

    def __init__(self, dataset: MicroBatchDataset, items: range, num_workers: int) -> None:
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=items,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            # Not the parent: a worker may be the child of a server that forks them.
            worker_init_fn=functools.partial(_ignore_stop_signals, os.getpid()),
            # Workers draw their base seed from this generator, so the global one, and dropout, stay as they are.
            generator=torch.Generator().manual_seed(0),
        )
        self.dataset = dataset
        self._total = items.stop

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[Batch]:
        # Workers are started here: a process with running threads should not fork.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            batches = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            with ThreadPoolExecutor(1, "batches") as thread:
                pending = deque(thread.submit(next, batches, None) for _ in range(_READY))
                try:
                    while (batch := pending.popleft().result()) is not None:
                        if isinstance(batch, DecantError):
                            raise batch
                        pending.append(thread.submit(next, batches, None))
                        yield batch.unpack()
                finally:
                    for waiting in pending:
                        waiting.cancel()
        finally:
            # Ends the workers. Kept by an error's traceback they would end in a collection of cycles, which closes
            # their queues first, so that each is waited for in vain, 5 seconds long.
            del batches
