"""Tests of batches made ahead of training: the same ones, in the same order, and errors at their batch."""

import itertools
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from common.data.chat_encoding import ChatEncoder
from common.errors import DataError
from tests.support.models import tiny_llava
from tests.support.training import write_mixed_dataset
from train.data.collator import Batch, Collator, StudentInputs
from train.data.image_cache import ImageCache
from train.data.loader import FlatBatch, MicroBatchDataset, MicroBatchLoader
from train.data.sampling import GlobalBatchSampler, SampleSet
from train.data.sources import DatasetSource

NUM_SAMPLES = 22


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loader")
    write_mixed_dataset(root / "data", NUM_SAMPLES)
    tiny_llava(root / "model", num_layers=1)
    return root


def make_sampler() -> GlobalBatchSampler:
    return GlobalBatchSampler([SampleSet(range(NUM_SAMPLES))], 8, 2, 0, 64)


def micro_batches(root: Path, rank: int = 0, num_ranks: int = 1, *, packed: bool = False) -> MicroBatchDataset:
    encoder = ChatEncoder.load(root / "model")
    student = StudentInputs(ImageCache.load(root / "model", "pad"), encoder.image_token_id, pad_token_id=0)
    collator = Collator(student, kind="kd", image_root=root / "data", max_tokens=2048, packed=packed)
    source = DatasetSource(root / "data" / "kd.json", "kd", encoder)
    return MicroBatchDataset(source, make_sampler(), collator, rank, num_ranks, accumulation=4 // num_ranks)


def is_same(a: Batch, b: Batch) -> bool:
    others = [name for name, value in vars(a).items() if name != "images" and not isinstance(value, torch.Tensor)]
    return (
        a.tensors.keys() == b.tensors.keys()
        and all(
            torch.equal(x, y) and x.dtype == y.dtype
            for x, y in zip(a.tensors.values(), b.tensors.values(), strict=True)
        )
        and all(getattr(a, name) == getattr(b, name) for name in others)
    )


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_is_unpacked_from_one_buffer_as_it_was_packed(root: Path, packed: bool) -> None:
    # The last step has 6 of 8 samples, so that one micro-batch is empty.
    for item in (0, 10, 11):
        flat = micro_batches(root, packed=packed)[item]
        assert isinstance(flat, FlatBatch)
        batch = flat.unpack()
        assert (batch.attention_mask is None) == packed == (batch.position_ids is not None)
        assert batch.num_rows == 0 if item == 11 else batch.num_rows > 0
        assert is_same(FlatBatch.pack(batch).unpack(), batch)
        starts = [value.data_ptr() for value in batch.tensors.values()]
        assert all(start % 8 == 0 for start in starts)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_is_the_rest_of_the_whole_one(root: Path, num_workers: int) -> None:
    whole = list(MicroBatchLoader(micro_batches(root), range(16), 0))
    rest = list(MicroBatchLoader(micro_batches(root), range(5, 16), num_workers))
    assert len(rest) == 11
    assert all(is_same(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_two_ranks_share_the_micro_batches_of_one(root: Path) -> None:
    alone = [batch.sample_ids for batch in MicroBatchLoader(micro_batches(root), range(12), 0)]
    ranks = [
        [batch.sample_ids for batch in MicroBatchLoader(micro_batches(root, rank, 2), range(6), 0)] for rank in range(2)
    ]
    assert alone == [ids for step in range(3) for rank in range(2) for ids in ranks[rank][2 * step : 2 * step + 2]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_is_raised_at_its_batch(root: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = micro_batches(root)
    bad = int(make_sampler().micro_batch(1, 2)[0])
    read = DatasetSource.__getitem__

    def read_or_fail(self: DatasetSource, index: int) -> Any:
        if index == bad:
            raise DataError("sample 'bad' cannot be read")
        return read(self, index)

    monkeypatch.setattr(DatasetSource, "__getitem__", read_or_fail)
    batches = iter(MicroBatchLoader(dataset, range(12), num_workers))
    assert len(list(itertools.islice(batches, 6))) == 6
    with pytest.raises(DataError, match=r"^sample 'bad' cannot be read$"):
        next(batches)
    # The worker has ended, although the error's traceback still exists.
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_loader_that_is_left_early_leaves_no_thread(root: Path) -> None:
    batches = iter(MicroBatchLoader(micro_batches(root), range(12), 0))
    next(batches)
    assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
