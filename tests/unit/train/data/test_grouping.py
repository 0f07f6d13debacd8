"""Tests of samples dealt to micro-batches by length: the same steps, less padding, and correct lengths."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data.chat_encoding import ChatEncoder
from common.data.samples import Kind
from common.errors import ShardError
from common.shards.manifest import shard_path
from common.shards.score_shard import ShardFile
from tests.support.models import TOKENS_PER_IMAGE, tiny_llava
from tests.support.training import LiveTeacher, stage, write_mixed_dataset
from train.config import TrainConfig
from train.data.collator import Collator, StudentInputs
from train.data.image_cache import ImageCache
from train.data.loader import MicroBatchDataset, MicroBatchLoader
from train.data.sampling import GlobalBatchSampler, SampleSet
from train.data.sources import DatasetSource, ExampleSource, MixtureSource, ShardSource
from train.run.training_data import open_data_splits

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=150)


def make_samplers(lengths: list[int], seed: int, micro: int) -> tuple[GlobalBatchSampler, GlobalBatchSampler]:
    """Returns a sampler that deals in the order of the disk, and one that deals by length."""
    half = len(lengths) // 2
    sets = [SampleSet(range(half)), SampleSet(range(half, len(lengths)))] if half else [SampleSet(range(len(lengths)))]
    return GlobalBatchSampler(sets, 16, micro, seed, 64), GlobalBatchSampler(
        sets, 16, micro, seed, 64, lengths.__getitem__
    )


def micro_batches(sampler: GlobalBatchSampler, step: int) -> list[list[int]]:
    return [sampler.micro_batch(step, number).tolist() for number in range(sampler.micro_batches_per_step)]


def padded_size(lengths: list[int], parts: list[list[int]]) -> int:
    return sum(len(part) * max((lengths[i] for i in part), default=0) for part in parts)


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 5), micro=st.sampled_from([1, 2, 4, 8]))
def test_a_step_keeps_its_samples_and_is_padded_no_more(lengths: list[int], seed: int, micro: int) -> None:
    plain, grouped = make_samplers(lengths, seed, micro)
    assert grouped.steps_per_epoch == plain.steps_per_epoch
    for step in range(2 * plain.steps_per_epoch):
        before, after = micro_batches(plain, step), micro_batches(grouped, step)
        assert sorted(itertools.chain(*after)) == sorted(itertools.chain(*before))
        assert list(map(len, after)) == list(map(len, before))
        # A short last micro-batch is left out, because the longest sample may be in it and then causes less padding.
        if all(len(part) in (0, micro) for part in after):
            assert padded_size(lengths, after) <= padded_size(lengths, before)
        # A new sampler, as after a resume, deals the same.
        assert micro_batches(make_samplers(lengths, seed, micro)[1], step) == after


@settings(max_examples=80, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 5), num_ranks=st.sampled_from([1, 2, 4, 8]), grouped=st.booleans())
def test_ranks_share_the_micro_batches_and_work_on_neighbouring_lengths(
    lengths: list[int], seed: int, num_ranks: int, grouped: bool
) -> None:
    sampler = make_samplers(lengths, seed, 2)[grouped]
    for step in range(sampler.steps_per_epoch):
        at_once = [
            [sampler.rank_micro_batch(step, rank, num_ranks, position).tolist() for rank in range(num_ranks)]
            for position in range(8 // num_ranks)
        ]
        assert sorted(itertools.chain(*at_once)) == sorted(micro_batches(sampler, step))
        if grouped:
            sizes = [[lengths[i] for i in itertools.chain(*parts)] for parts in at_once]
            assert all(min(a) >= max(b) for a, b in itertools.pairwise(filter(None, sizes)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("grouping")
    tiny_llava(root / "model", num_layers=1)
    kinds: tuple[Kind, ...] = ("kd", "dpo")
    for name, number in (("a", 40), ("b", 12)):
        for kind in kinds:
            dataset = write_mixed_dataset(root / name, number, kind)
            teacher = LiveTeacher(root / "model", root / name)
            teacher.write_output(root / f"{name}-{kind}", dataset, kind, top_k=3)
    return root


def make_collator(root: Path, kind: Kind) -> Collator:
    image_token_id = ChatEncoder.load(root / "model").image_token_id
    student = StudentInputs(ImageCache.load(root / "model", "pad"), image_token_id, pad_token_id=0)
    return Collator(student, kind=kind, image_root=root / "a", max_tokens=2048, packed=True)


def collated_lengths(root: Path, source: ExampleSource, kind: Kind) -> list[int]:
    """Returns the length of each sample in the collator's batch, without dummies; of a pair the longer one."""
    found = []
    make = make_collator(root, kind)
    for index in range(len(source)):
        batch = make([source[index]])
        assert batch.position_ids is not None
        positions = batch.position_ids[batch.token_mask]
        found.append(int(positions.max()) + 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_lengths_of_shards_are_those_of_the_batch_and_decode_no_row(
    root: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = ChatEncoder.load(root / "model")
    source = ShardSource(root / f"a-{kind}", encoder, "pad")
    with monkeypatch.context() as patch:
        patch.delattr(ShardFile, "read_group")
        found = [source.length(i, TOKENS_PER_IMAGE) for i in range(len(source))]
    # The template ends with a newline, which is not scored.
    assert found == [length - 1 for length in collated_lengths(root, source, kind)]
    assert len(set(found)) > 10
    other = ShardSource(root / f"b-{kind}", encoder, "pad")
    mixed = MixtureSource([other, source], [None, None])
    assert [mixed.length(12 + i, TOKENS_PER_IMAGE) for i in range(40)] == found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_estimated_lengths_of_dataset_files_have_the_order_of_the_real_ones(root: Path, kind: Kind) -> None:
    source = DatasetSource(root / "a" / f"{kind}.json", kind, ChatEncoder.load(root / "model"))
    # The tiny tokenizer's tokens are single characters, so that text and images are not in proportion, and samples with
    # and without an image are compared apart.
    estimated = np.array([source.length(i, TOKENS_PER_IMAGE) for i in range(40)])
    actual = np.array(collated_lengths(root, source, kind))
    for samples in (slice(0, None, 2), slice(1, None, 2)):
        estimated_ranks, actual_ranks = (values[samples].argsort().argsort() for values in (estimated, actual))
        assert np.corrcoef(estimated_ranks, actual_ranks)[0, 1] > 0.9
    assert source.length(0, 100) - source.length(0, 1) == 99
    assert source.length(1, 100) == source.length(1, 1)


def position_in_length_column(shard: Path) -> int:
    """Returns a position in the file within the last page of the column that lengths are read from."""
    group = pq.read_metadata(shard).row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    found = columns["response_spans.list.element.stop"]
    return int(found.data_page_offset + found.total_compressed_size - 2)


def grouped_loader(root: Path, shards: Path, **data: Any) -> MicroBatchDataset:
    settings = stage(
        root / "run",
        root / "model",
        data={"shards": str(shards), "group_by_length": True, **data},
        loss={"distillation": 1.0},
        optim={"global_batch_size": 16, "micro_batch_size": 4},
    )
    encoder = ChatEncoder.load(root / "model")
    train = open_data_splits(TrainConfig.model_validate(settings), encoder, num_ranks=1).train
    return MicroBatchDataset(train.source, train.sampler, make_collator(root, "kd"), 0, 1, accumulation=4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_step_is_read_longest_first_with_any_number_of_workers(
    root: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    batches = list(MicroBatchLoader(grouped_loader(root, root / "a-kd"), range(8), num_workers))
    for step in (batches[:4], batches[4:]):
        lengths = []
        for batch in step:
            assert batch.position_ids is not None
            ends = (batch.position_ids[0] == 0).nonzero()[1:, 0].tolist()
            real = np.diff([0, *ends, batch.position_ids.shape[1]])[:4]
            lengths.append(sorted(real.tolist(), reverse=True))
        flat = list(itertools.chain(*lengths))
        assert flat == sorted(flat, reverse=True)
    assert len({name for batch in batches for name in batch.sample_ids}) == 32


def test_a_shard_whose_lengths_cannot_be_read_is_named_at_the_batch(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    for path in (root / "a-kd").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = tmp_path / shard_path(tmp_path, 1).name
    data = bytearray(damaged.read_bytes())
    data[position_in_length_column(damaged)] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(ShardError, match="shard-00001"):
        next(iter(MicroBatchLoader(grouped_loader(root, tmp_path), range(4), 0)))
