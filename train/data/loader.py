"""Makes micro-batches ahead of training: worker processes read, decode and collate them, a thread fetches them.

    MicroBatchDataset[item] ── FlatBatch, from a worker ──> thread ── Batch ──> training step

Workers get items in turn and their batches come back in the order of the items, so the order of training does not
depend on the number of workers or on their speed.
"""

import functools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Self

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

# Batches that the thread fetches ahead. Each worker makes two more.
_NUM_READY_BATCHES = 2

# One thread of this process reads at a time, because tokenizers and open files may not be shared by several threads,
# and a validation may begin while the next training batches are being read.
_READ_LOCK = threading.Lock()


_NO_TENSOR = torch.empty(0)


@dataclass(frozen=True)
class FlatBatch:
    """A batch with all of its tensors in one buffer.

    Torch passes each tensor of a worker in a shared memory file of its own, and opening one for each field takes longer
    than making a small batch.

    memory    uint8 [bytes]
    layout    (name, dtype, shape) of each tensor, in the order of the buffer
    empty     the batch, its tensors empty
    """

    memory: Tensor
    layout: tuple[tuple[str, torch.dtype, torch.Size], ...]
    empty: Batch

    @classmethod
    def pack(cls, batch: Batch) -> Self:
        """Returns a copy of the batch in one buffer."""
        tensors = batch.tensors
        memory = torch.empty(sum(map(_num_bytes, tensors.values())), dtype=torch.uint8)
        flat = cls(
            memory,
            tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()),
            batch.with_tensors(dict.fromkeys(tensors, _NO_TENSOR)),
        )
        for name, view in flat._views():
            view.copy_(tensors[name])
        return flat

    def unpack(self) -> Batch:
        """Returns the batch; its tensors are views of the buffer."""
        return self.empty.with_tensors(dict(self._views()))

    def pin_memory(self) -> Self:
        """Returns the batch in page-locked memory, from which a GPU copies while it computes; torch calls this."""
        return replace(self, memory=self.memory.pin_memory())

    def _views(self) -> Iterator[tuple[str, Tensor]]:
        start = 0
        for name, dtype, shape in self.layout:
            num_bytes = shape.numel() * dtype.itemsize
            yield name, self.memory[start : start + num_bytes].view(dtype).view(shape)
            start += _aligned(num_bytes)


def _ignore_stop_signals(rank_pid: int, _worker: int) -> None:
    """Makes a worker ignore SIGINT, and SIGTERM from any process but its rank.

    A launcher or a terminal sends these to all processes of a run. The rank then finishes its step, saves, and ends its
    workers by a SIGTERM of its own. All threads of a worker start with SIGTERM blocked, so that the signal is delivered
    to the thread that waits for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def exit_on_signal_of_rank() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank_pid:
            pass
        os._exit(0)

    threading.Thread(target=exit_on_signal_of_rank, name="signals", daemon=True).start()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _num_bytes(tensor: Tensor) -> int:
    return _aligned(tensor.numel() * tensor.element_size())


class MicroBatchDataset(TorchDataset[FlatBatch | DecantError]):
    """The micro-batches of one rank, in the order of training: item step * accumulation + position.

    If a batch cannot be made, its item is the error, which the loader raises. An error that is raised in a worker
    process would arrive with its message inside a traceback.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - three collaborators and three numbers that only this class needs together
        self,
        source: ExampleSource,
        sampler: GlobalBatchSampler,
        collator: Collator,
        rank: int,
        num_ranks: int,
        accumulation: int,
    ) -> None:
        assert accumulation * num_ranks == sampler.micro_batches_per_step
        self._source = source
        self._sampler = sampler
        self._collator = collator
        self._rank = rank
        self._num_ranks = num_ranks
        self._accumulation = accumulation

    @property
    def num_steps(self) -> int:
        """Returns the number of global steps of one epoch."""
        return self._sampler.steps_per_epoch

    def __getitem__(self, item: int) -> FlatBatch | DecantError:
        step, position = divmod(item, self._accumulation)
        with _READ_LOCK:
            try:
                positions = self._sampler.rank_micro_batch(step, self._rank, self._num_ranks, position)
                return FlatBatch.pack(self._collator([self._source[int(i)] for i in positions]))
            except DecantError as error:
                return error


class MicroBatchLoader:
    """Iterates over the micro-batches `items`; its length is that of the whole run, as the Trainer expects.

    Raises:
        DecantError: while iterating, at the batch that could not be made.
    """

    def __init__(self, dataset: MicroBatchDataset, items: range, num_workers: int) -> None:
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=items,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            # The rank's own id is passed, because a worker's parent may be a server that forks the workers.
            worker_init_fn=functools.partial(_ignore_stop_signals, os.getpid()),
            # Workers draw their base seed from this generator, so that the global one, and with it dropout, is not
            # advanced.
            generator=torch.Generator().manual_seed(0),
        )
        self.dataset = dataset
        self._total = items.stop

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[Batch]:
        # Workers are started before the thread, because a process with running threads should not fork.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            batches = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            with ThreadPoolExecutor(1, "batches") as thread:
                pending = deque(thread.submit(next, batches, None) for _ in range(_NUM_READY_BATCHES))
                try:
                    while (batch := pending.popleft().result()) is not None:
                        if isinstance(batch, DecantError):
                            raise batch
                        pending.append(thread.submit(next, batches, None))
                        yield batch.unpack()
                finally:
                    for future in pending:
                        future.cancel()
        finally:
            # Ends the workers now. If an error's traceback kept the iterator, the garbage collector would close their
            # queues before it ends them, and would then wait 5 seconds for each worker.
            del batches
