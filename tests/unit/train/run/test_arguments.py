"""The configuration as DeepSpeed's and Hugging Face's settings."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError
from tests.support.training import stage
from train.config import TrainConfig
from train.run.arguments import build_deepspeed_config, build_training_arguments
from train.run.stage import train_stage


def make_config(root: Path, **run: Any) -> TrainConfig:
    settings = stage(root / "run", root, data={"dataset": "data.json"}, loss={"cross_entropy": 1.0}, run=run)
    return TrainConfig.model_validate(settings)


def test_the_users_deepspeed_file_overrides_single_keys_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"overlap_comm": True}, "steps_per_print": 7}))
    built = build_deepspeed_config(make_config(tmp_path, zero_stage=3, deepspeed=str(file)))
    assert built["zero_optimization"]["stage"] == 3
    assert built["zero_optimization"]["overlap_comm"] is True
    assert built["steps_per_print"] == 7


def test_a_deepspeed_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as DeepSpeed JSON"):
        build_deepspeed_config(make_config(tmp_path, deepspeed=str(tmp_path / "none.json")))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[1, 2]", r"expected a JSON object of DeepSpeed's settings, found '\[1, 2\]'"),
        ('{"zero_optimization": 3}', "zero_optimization: expected an object whose stage is 0, 1, 2 or 3, found '3'"),
        ('{"zero_optimization": {"stage": "2"}}', "zero_optimization: expected an object"),
        ('{"zero_optimization": {"stage": true}}', "zero_optimization: expected an object"),
        ('{"zero_optimization": {"stage": 4}}', "zero_optimization: expected an object"),
        ("[" * 100_000, "cannot be read as DeepSpeed JSON"),
    ],
)
def test_a_deepspeed_file_of_another_form_is_an_error(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "deepspeed.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        build_deepspeed_config(make_config(tmp_path, deepspeed=str(file)))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"learning_rate": 1.0, "seed": 1}, "learning_rate, seed follow from other settings of this file"),
        ({"no_such_argument": 1}, "no_such_argument"),
        ({"metric_for_best_model": True}, "run.training_arguments: 'bool' object has no attribute"),
        ({"lr_scheduler_kwargs": "{"}, "run.training_arguments: "),
    ],
)
def test_training_arguments_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], problem: str
) -> None:
    # It is set as a side effect; this restores it.
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    config = make_config(tmp_path, training_arguments=arguments)
    with pytest.raises(ConfigError, match=problem):
        build_training_arguments(config, {}, accumulation=1, max_steps=1)


def test_a_missing_metrics_package_is_named_before_anything_is_read(tmp_path: Path) -> None:
    config = stage(
        tmp_path / "run",
        tmp_path / "no-such-student",
        data={"dataset": str(tmp_path / "no-such-file.json")},
        loss={"cross_entropy": 1.0},
        run={"report_to": ["tensorboard", "wandb", "trackio"]},
    )
    with pytest.raises(ConfigError, match=r"wandb, trackio is not installed.*pip install wandb trackio"):
        train_stage(TrainConfig.model_validate(config))
    assert not (tmp_path / "run").exists()
