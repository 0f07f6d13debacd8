"""Batches made ahead of training: the same ones, in the same order, and errors in their place."""

import itertools
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor

from common.data.chat_encoding import ChatEncoder
from common.data.images import ImageSpec
from common.errors import DataError
from tests.support.models import tiny_llava
from tests.support.training import write_mixed_dataset
from train.data.collator import Batch, Collator
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


def micro_batches(root: Path, rank: int = 0, num_ranks: int = 1, *, packed: bool = False) -> MicroBatchDataset:
    encoder = ChatEncoder.load(root / "model")
    collator = Collator(
        kind="kd",
        image_spec=ImageSpec.load(root / "model"),
        image_processor=AutoImageProcessor.from_pretrained(root / "model"),
        image_token_id=encoder.image_token_id,
        image_root=root / "data",
        aspect_ratio="pad",
        max_tokens=2048,
        pad_token_id=0,
        packed=packed,
    )
    source = DatasetSource(root / "data" / "kd.json", "kd", encoder)
    plan = GlobalBatchSampler([SampleSet(range(len(source)))], 8, 2, 0, 64)
    return MicroBatchDataset(source, plan, collator, rank, num_ranks, accumulation=4 // num_ranks)


def same(a: Batch, b: Batch) -> bool:
    def equal(x: Any, y: Any) -> bool:
        return torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y

    return all(equal(value, getattr(b, name)) for name, value in vars(a).items())


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_comes_out_of_one_piece_of_memory_as_it_went_in(root: Path, packed: bool) -> None:
    # The last step holds 6 of 8 samples, so that one micro-batch is empty.
    for item in (0, 10, 11):
        piece = micro_batches(root, packed=packed)[item]
        assert isinstance(piece, FlatBatch)
        batch = piece.unpack()
        assert (batch.attention_mask is None) == packed == (batch.position_ids is not None)
        assert batch.num_rows == 0 if item == 11 else batch.num_rows > 0
        assert same(FlatBatch.pack(batch).unpack(), batch)
        starts = [value.data_ptr() for value in vars(batch).values() if isinstance(value, torch.Tensor)]
        assert all(start % 8 == 0 for start in starts)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_stream_is_the_rest_of_the_whole_one(root: Path, num_workers: int) -> None:
    whole = list(MicroBatchLoader(micro_batches(root), range(16), 0))
    rest = list(MicroBatchLoader(micro_batches(root), range(5, 16), num_workers))
    assert len(rest) == 11
    assert all(same(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_two_ranks_share_the_micro_batches_of_one(root: Path) -> None:
    alone = [batch.sample_ids for batch in MicroBatchLoader(micro_batches(root), range(12), 0)]
    ranks = [
        [batch.sample_ids for batch in MicroBatchLoader(micro_batches(root, rank, 2), range(6), 0)] for rank in range(2)
    ]
    assert alone == [ids for step in range(3) for rank in range(2) for ids in ranks[rank][2 * step : 2 * step + 2]]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_comes_in_the_place_of_its_batch(
    root: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = micro_batches(root)
    bad = int(dataset._plan.micro_batch(1, 2)[0])
    read = DatasetSource.__getitem__

    def broken(self: DatasetSource, index: int) -> Any:
        if index == bad:
            raise DataError("sample 'bad' cannot be read")
        return read(self, index)

    monkeypatch.setattr(DatasetSource, "__getitem__", broken)
    batches = iter(MicroBatchLoader(dataset, range(12), num_workers))
    assert len(list(itertools.islice(batches, 6))) == 6
    with pytest.raises(DataError, match=r"^sample 'bad' cannot be read$"):
        next(batches)
    # Its worker has ended, though the error's traceback is still there.
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_loader_that_is_left_early_leaves_no_thread(root: Path) -> None:
    batches = iter(MicroBatchLoader(micro_batches(root), range(12), 0))
    next(batches)
    assert any(thread.name.startswith("batches") for thread in threading.enumerate())
    batches.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("batches") for thread in threading.enumerate())
