"""Activation checkpointing changes no loss, and bfloat16 changes losses by no more than its rounding."""

from pathlib import Path

import pytest

from tests.support.models import tiny_llava
from tests.support.training import losses, run_stages, stage, write_mixed_dataset

pytestmark = pytest.mark.slow

RUNS = {
    "fp32": {"precision": "fp32", "zero_stage": 1},
    "fp32-recomputed": {"precision": "fp32", "zero_stage": 1, "activation_checkpointing": True},
    "bf16-1": {"precision": "bf16", "zero_stage": 1, "activation_checkpointing": True},
    "bf16-3": {"precision": "bf16", "zero_stage": 3, "activation_checkpointing": True},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("precision")
    dataset = write_mixed_dataset(root / "data", 16)
    student = tiny_llava(root / "student")
    configs = [
        stage(
            root / name,
            student,
            stage="dense-to-sparse",
            data={"dataset": str(dataset), "image_root": str(root / "data")},
            moe={"num_experts": 4},
            loss={"cross_entropy": 1.0, "balance": 0.01},
            optim={"max_steps": 4},
            run=settings,
        )
        for name, settings in RUNS.items()
    ]
    run_stages(configs, root / "scratch")
    return root


def test_activation_checkpointing_changes_no_loss(runs: Path) -> None:
    assert losses(runs / "fp32-recomputed") == pytest.approx(losses(runs / "fp32"), rel=1e-6)


@pytest.mark.parametrize("name", ["bf16-1", "bf16-3"])
def test_bfloat16_follows_float32(runs: Path, name: str) -> None:
    assert losses(runs / name) == pytest.approx(losses(runs / "fp32"), rel=0.03)
    assert losses(runs / name) != losses(runs / "fp32")
    assert losses(runs / name)[-1] < losses(runs / name)[0]
