"""The samples that a configuration names, and the loss that fits them."""

from pathlib import Path
from typing import Any

import pytest

from common.data.chat_encoding import ChatEncoder
from common.errors import ConfigError
from tests.support.models import tiny_causal_lm
from tests.support.training import stage, write_mixed_dataset
from train.config import TrainConfig
from train.data.sampling import GlobalBatchSampler, SampleSet
from train.data.sources import Example, ExampleSource
from train.run.training_data import DataSplit, DataSplits, choose_tail, open_data_splits


class ScoredSource:
    """Source that says what its scores are, and has nothing else."""

    sha256 = "0" * 64

    def __init__(self, sampled: bool) -> None:
        self.sampled = sampled

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        raise AssertionError

    def length(self, index: int, tokens_per_image: int) -> int:  # noqa: ARG002 - the protocol's signature
        raise AssertionError


def make_splits(train: ExampleSource, validation: ExampleSource | None = None) -> DataSplits:
    sampler = GlobalBatchSampler([SampleSet([0])], 1, 1, seed=0, window=1)
    return DataSplits(DataSplit(train, sampler), None if validation is None else DataSplit(validation, sampler))


def make_config(root: Path, loss: dict[str, Any], **data: Any) -> TrainConfig:
    return TrainConfig.model_validate(stage(root / "run", root, data=data, loss=loss))


BEST, DRAWN = ScoredSource(sampled=False), ScoredSource(sampled=True)


@pytest.mark.parametrize(("source", "expected"), [(BEST, "bucket"), (DRAWN, "ignore")])
def test_the_default_tail_depends_on_the_teachers_entries(tmp_path: Path, source: ExampleSource, expected: str) -> None:
    config = make_config(tmp_path, {"distillation": 1.0}, shards="scores")
    assert choose_tail(config, make_splits(source)).tail == expected


@pytest.mark.parametrize(
    ("loss", "train", "validation", "problem"),
    [
        ({"tail": "bucket"}, DRAWN, None, 'data.shards holds ids drawn .* loss.tail "bucket"'),
        ({"tail": "renormalise"}, DRAWN, None, 'data.shards holds ids drawn .* loss.tail "renormalise"'),
        ({"divergence": "reverse_kl"}, DRAWN, None, 'data.shards .* found loss.divergence "reverse_kl"'),
        ({}, BEST, DRAWN, 'data.validation holds ids drawn .* loss.tail "bucket"'),
    ],
)
def test_a_loss_that_drawn_entries_would_bias_is_an_error(
    tmp_path: Path, loss: dict[str, Any], train: ExampleSource, validation: ExampleSource | None, problem: str
) -> None:
    config = make_config(tmp_path, {"distillation": 1.0, **loss}, shards="scores")
    with pytest.raises(ConfigError, match=problem):
        choose_tail(config, make_splits(train, validation))


def test_a_validation_step_has_one_micro_batch_for_each_rank(tmp_path: Path) -> None:
    dataset = str(write_mixed_dataset(tmp_path / "data", 20))
    encoder = ChatEncoder.load(tiny_causal_lm(tmp_path / "model", num_layers=1))
    config = make_config(tmp_path, {"cross_entropy": 1.0}, dataset=dataset, validation=dataset)
    splits = open_data_splits(config, encoder, num_ranks=2)
    assert splits.validation is not None
    sampler = splits.validation.sampler
    assert sampler.micro_batches_per_step == 2
    validated = [i for step in range(sampler.steps_per_epoch) for n in range(2) for i in sampler.micro_batch(step, n)]
    assert sorted(validated) == list(range(20))
    assert splits.train.sampler.steps_per_epoch == -(-20 // config.optim.global_batch_size)
