"""A killed run continues from its checkpoint and ends as an uninterrupted one."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ProvenanceError
from tests.support.models import tiny_llava
from tests.support.training import ROOT, environment, losses, stage, weights, write_mixed_dataset
from train.config import TrainConfig
from train.run.checkpoint import find_latest_complete
from train.run.stage import train_stage


def start_worker(config: dict[str, Any], path: Path) -> subprocess.Popen[bytes]:
    path.write_text(json.dumps([config]))
    command = [sys.executable, "-m", "tests.support.training_worker", str(path)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=(path.parent / "stderr").open("wb")
    )


def wait_for_success(process: subprocess.Popen[bytes], path: Path) -> None:
    assert process.wait(timeout=300) == 0, (path.parent / "stderr").read_text()[-3000:]


@pytest.mark.slow
def test_a_run_killed_between_checkpoints_ends_with_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    dataset = write_mixed_dataset(tmp_path / "data", 20)
    # With dropout the weights depend on the random state as well.
    student = tiny_llava(tmp_path / "student", attention_dropout=0.2)
    configs = {
        name: stage(
            tmp_path / name,
            student,
            trainable=["adapter", "language_model"],
            data={"dataset": str(dataset), "image_root": str(dataset.parent), "num_workers": 1},
            loss={"cross_entropy": 1.0},
            optim={"max_steps": 12, "scheduler": "cosine"},
            run={"save_steps": 3, "zero_stage": 2},
        )
        for name in ("whole", "killed")
    }
    wait_for_success(start_worker(configs["whole"], tmp_path / "whole.json"), tmp_path / "whole.json")

    process = start_worker(configs["killed"], tmp_path / "killed.json")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.exists() and '"step": 4' in metrics.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    checkpoint = find_latest_complete(tmp_path / "killed")
    assert checkpoint is not None
    assert 3 <= checkpoint.step < 12
    assert not (tmp_path / "killed" / "final").exists()

    wait_for_success(start_worker(configs["killed"], tmp_path / "killed.json"), tmp_path / "killed.json")
    expected, resumed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")

    changed = json.loads(json.dumps(configs["killed"]))
    changed["optim"]["learning_rate"] = 5e-4
    with pytest.raises(ProvenanceError, match=r"optim\.learning_rate"):
        train_stage(TrainConfig.model_validate(changed))
