"""Training on drawn entries: losses that they would bias are refused, and the student approaches the teacher."""

import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from tests.support.models import tiny_llava
from tests.support.training import LiveTeacher, losses, run_stages, stage, write_mixed_dataset
from train.config import TrainConfig
from train.run.stage import train_stage


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes draws, and every entry of the same distributions. The teacher's output layer has no padding."""
    root = tmp_path_factory.mktemp("sampled")
    teacher = LiveTeacher(tiny_llava(root / "teacher", seed=1, padded_rows=0), root / "data")
    tiny_llava(root / "student", seed=2, num_layers=2)
    dataset = write_mixed_dataset(root / "data", 24)
    teacher.write_output(root / "drawn", dataset, "kd", num_draws=50)
    teacher.write_output(root / "whole", dataset, "kd", top_k=teacher.encoder.vocab_size)
    return root


def settings(root: Path, name: str, **data: str) -> dict[str, object]:
    return stage(
        root / name,
        root / "student",
        stage="dense-to-dense",
        data={"image_root": str(root / "data"), **data},
        loss={"distillation": 1.0},
        optim={"max_steps": 15},
        run={"eval_steps": 5},
    )


@pytest.mark.slow
def test_training_from_draws_lowers_their_loss_and_the_kl_to_the_teacher(root: Path) -> None:
    drawn, whole = str(root / "drawn"), str(root / "whole")
    run_stages([settings(root, "run", shards=drawn, validation=whole)], root / "scratch")
    found = losses(root / "run")
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    lines = [json.loads(line) for line in (root / "run" / "metrics.jsonl").read_text().splitlines()]
    kl = [line["eval_distillation"] for line in lines if "eval_distillation" in line]
    assert kl == sorted(kl, reverse=True)
    assert kl[-1] < 0.95 * kl[0]


@pytest.mark.slow
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_a_loss_that_draws_would_bias_is_refused_before_training(
    root: Path, monkeypatch: pytest.MonkeyPatch, tail: str
) -> None:
    single_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in single_rank.items():
        monkeypatch.setenv(name, value)
    config = settings(root, tail, shards=str(root / "drawn"))
    config["loss"] = {"distillation": 1.0, "tail": tail}
    with pytest.raises(ConfigError, match=rf'data\.shards holds ids drawn .* loss\.tail "{tail}" does not fit'):
        train_stage(TrainConfig.model_validate(config))
    config["loss"] = {"distillation": 1.0, "divergence": "reverse_kl"}
    with pytest.raises(ConfigError, match=r'data\.shards holds ids drawn .* found loss\.divergence "reverse_kl"'):
        train_stage(TrainConfig.model_validate(config))
    other = settings(root, tail, shards=str(root / "whole"), validation=str(root / "drawn"))
    with pytest.raises(ConfigError, match=r'data\.validation holds ids drawn .* loss\.tail "bucket"'):
        train_stage(TrainConfig.model_validate(other))
    assert not (root / tail).exists()
