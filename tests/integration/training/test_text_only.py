"""A text-only teacher and student need neither torchvision nor a processor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli import __file__ as cli_file
from tests.support.models import tiny_causal_lm
from tests.support.training import stage

pytestmark = pytest.mark.slow

BLOCKED = """
import importlib.util
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torchvision", "num2words"):
            raise ModuleNotFoundError(name, name=name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else find_spec(name, *rest)
sys.meta_path.insert(0, Blocked())
import transformers

def refuse(*_, **__):
    raise AssertionError("a processor was loaded")

transformers.AutoProcessor.from_pretrained = transformers.AutoImageProcessor.from_pretrained = refuse
"""
RUN = """
import json
from common.data.model_images import find_model_images
from precompute.config import PrecomputeConfig
from precompute.logits.job import prepare_job
from train.config import TrainConfig
from train.run.stage import train_stage

capture, training = json.loads(sys.argv[1])
job = prepare_job(PrecomputeConfig.model_validate(capture))
assert job.images is None and job.manifest.image is None and not job.scorer_settings.probes
assert job.load_encoded(0).num_tokens > 0
train_stage(TrainConfig.model_validate(training))
"""


def test_text_only_capture_and_training_load_no_processor(tmp_path: Path) -> None:
    model = tiny_causal_lm(tmp_path / "model", num_layers=1)
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "A red square."}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": str(n), "conversations": turns} for n in range(8)]))
    capture = {"teacher": str(model), "dataset": str(data), "output": str(tmp_path / "scores"), "top_k": 4}
    changes = {"data": {"dataset": str(data)}, "loss": {"cross_entropy": 1.0}, "optim": {"max_steps": 1}}
    training = stage(tmp_path / "run", model, **changes)
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + RUN, json.dumps([capture, training])],
        cwd=Path(cli_file).parent,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
