"""The samples that a configuration names, and the loss that fits them."""

from pathlib import Path
from typing import Any

import pytest

from common.config import load_config
from common.data.chat_encoding import ChatEncoder
from common.errors import ConfigError, DataError
from tests.support.models import tiny_causal_lm
from tests.support.training import ROOT, stage, write_mixed_dataset
from train.config import TrainConfig
from train.data.sampling import GlobalBatchSampler, SampleSet
from train.data.sources import Example, ExampleSource
from train.run.training_data import DataSplit, DataSplits, choose_tail, open_data_splits


class ScoredSource:
    """Source that says what its scores are, and has nothing else."""

    sha256 = "0" * 64

    def __init__(self, sampled: bool, num_samples: int = 1) -> None:
        self.sampled = sampled
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

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


RECIPES = [path for path in sorted((ROOT / "configs").rglob("*.toml")) if "validation_fraction" in path.read_text()]


@pytest.mark.parametrize("num_samples", [1, 2, 10, 250])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_deals_and_validates_a_trial_set_or_says_what_to_change(
    path: Path, num_samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ScoredSource(sampled=False, num_samples=num_samples)
    monkeypatch.setattr("train.run.training_data.open_source", lambda *_: source)
    config = load_config(TrainConfig, path)
    encoder = object.__new__(ChatEncoder)
    if num_samples == 1:
        with pytest.raises(ConfigError, match=r"validation_fraction = 0.0\d+: 1 of 1 sample\(s\) of .*; set it to 0"):
            open_data_splits(config, encoder, num_ranks=1)
        return
    splits = open_data_splits(config, encoder, num_ranks=1)
    assert splits.validation is not None
    trained, validated = epoch_samples(splits.train.sampler), epoch_samples(splits.validation.sampler)
    assert len(validated) == max(1, round(num_samples * config.data.validation_fraction))
    assert sorted(trained + validated) == list(range(num_samples))
    assert splits.train.sampler.steps_per_epoch == -(-len(trained) // config.optim.global_batch_size)


def epoch_samples(sampler: GlobalBatchSampler) -> list[int]:
    """Returns the positions of an epoch in the order of training; the batches at its end are short or empty."""
    numbers = range(sampler.micro_batches_per_step)
    return [int(i) for step in range(sampler.steps_per_epoch) for n in numbers for i in sampler.micro_batch(step, n)]


@pytest.mark.parametrize("key", ["shards", "validation"])
def test_a_set_without_a_sample_is_named(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"shards": 1, "validation": 1, key: 0}
    monkeypatch.setattr(
        "train.run.training_data.open_source",
        lambda member, *_: ScoredSource(sampled=False, num_samples=sizes[str(member.location)]),
    )
    config = make_config(tmp_path, {"distillation": 1.0}, shards="shards", validation="validation")
    with pytest.raises(DataError, match=f"{key}: holds no sample, expected at least one"):
        open_data_splits(config, object.__new__(ChatEncoder), num_ranks=1)
