"""Stages in bfloat16 from a feature cache have the losses and weights of a live vision tower, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from common.shards.manifest import FeatureForm
from demo.families import FAMILIES, build_model
from precompute.features.run import FeatureSettings, run_features
from tests.support.models import tiny_llava
from tests.support.training import LiveTeacher, launch, losses, run_stages, stage, weights, write_mixed_dataset
from train.model.compose import compose_student
from train.model.export import export_student
from train.model.student import load_student

# Each case is trained twice, with the tower and from the cache. Every other sample has no image, so there are dummy
# images in micro-batches of one sample.
CASES: dict[str, dict[str, Any]] = {
    "zero-1": {"run": {"zero_stage": 1}},
    "zero-2, one sample at a time, workers": {
        "run": {"zero_stage": 2},
        "optim": {"micro_batch_size": 1},
        "data": {"num_workers": 1},
    },
    # Under ZeRO-3 DeepSpeed replaces linear layers by its own, in a live tower too. These round the product before they
    # add the bias; this setting keeps torch's.
    "zero-3": {"run": {"zero_stage": 3, "deepspeed": "plain-linear.json"}},
    "packed, activation checkpointing": {
        "run": {"zero_stage": 1, "activation_checkpointing": True},
        "data": {"batching": "packed"},
    },
    "sparse": {
        "stage": "dense-to-sparse",
        "run": {"zero_stage": 1},
        "optim": {"micro_batch_size": 1},
        "moe": {"num_experts": 4, "top_k": 2},
        "loss": {"balance": 0.01},
    },
    "pairs": {
        "stage": "preference",
        "trainable": ["adapter", "language_model"],
        "run": {"zero_stage": 1},
        "loss": {"cross_entropy": 0.0, "preference": 1.0},
    },
    # Two self-attention blocks of the adapter stand between the cached features and the projector.
    "attention adapter": {"trainable": ["adapter", "language_model"], "run": {"zero_stage": 2}},
    "validated": {"run": {"zero_stage": 1, "eval_steps": 2}, "data": {"validation_fraction": 0.2}},
    # Images of several sizes: the tower's layers are skipped, and its mergers get what the cache holds.
    "qwen3-vl": {"run": {"zero_stage": 2}, "optim": {"micro_batch_size": 1}, "data": {"num_workers": 1}},
    # In slices.
    "llava-next": {
        "stage": "dense-to-sparse",
        "run": {"zero_stage": 3, "deepspeed": "plain-linear.json"},
        "moe": {"num_experts": 4, "top_k": 2},
    },
}
FAMILY_CASES = ("qwen3-vl", "llava-next")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stages")
    student, data = tiny_llava(root / "student", num_layers=2), root / "data"
    compose_student(student, student, root / "attention", seed=0, adapter="attention")
    for kind in ("kd", "dpo"):
        write_mixed_dataset(data, 20, kind)
        LiveTeacher(student, data).write_output(root / f"{kind}-scores", data / f"{kind}.json", kind)
    caches: list[tuple[Path, str, FeatureForm]] = [
        (student, "bf16", "bf16"),
        (student, "q8", "q8"),
        (root / "attention", "attention-bf16", "bf16"),
    ]
    for model, name, form in caches:
        run_features(FeatureSettings(model, data / "kd.json", data, root / name, form, "pad", 3, 4), progress=False)
    for name in FAMILY_CASES:
        build_model(FAMILIES[name], root / name, [(data / "kd.json").read_text()], seed=0)
        run_features(FeatureSettings(root / name, data / "kd.json", data, root / f"cache-{name}-bf16"), progress=False)
    (root / "plain-linear.json").write_text(json.dumps({"zero_optimization": {"memory_efficient_linear": False}}))
    return root


def make_stage(root: Path, name: str, source: str, output: str | None = None) -> dict[str, Any]:
    """Makes a stage of six steps; `source` is "live", or the form of a cache."""
    changes = json.loads(json.dumps(CASES[name]))
    changes["run"] = {"precision": "bf16"} | changes["run"]
    if "deepspeed" in changes["run"]:
        changes["run"]["deepspeed"] = str(root / changes["run"]["deepspeed"])
    changes["loss"] = {"cross_entropy": 1.0} | changes.get("loss", {})
    changes["optim"] = {"max_steps": 6, "global_batch_size": 4} | changes.get("optim", {})
    student, prefix = ("attention", "attention-") if name == "attention adapter" else ("student", "")
    scored = {"shards": str(root / ("dpo-scores" if name == "pairs" else "kd-scores"))}
    if name in FAMILY_CASES:
        student, prefix, scored = name, f"cache-{name}-", {"dataset": str(root / "data" / "kd.json")}
    images = {"image_root": str(root / "data")} if source == "live" else {"features": str(root / (prefix + source))}
    changes["data"] = scored | images | changes.get("data", {})
    return stage(root / (output or f"{name}-{source}"), root / student, **changes)


@pytest.fixture(scope="module")
def trained(root: Path) -> Path:
    run_stages([make_stage(root, name, source) for name in CASES for source in ("live", "bf16")], root / "scratch")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_those_of_a_live_tower_bit_for_bit(trained: Path, name: str) -> None:
    live, cached = (trained / f"{name}-{source}" for source in ("live", "bf16"))
    assert losses(live) == losses(cached)
    assert len(set(losses(cached))) == 6
    expected, found = weights(live), weights(cached)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) and expected[key].dtype == found[key].dtype for key in expected)
    if name not in FAMILY_CASES:
        # The attention adapter has two blocks in the place of the tower's last one.
        assert sum("vision_tower.vision_model" in key for key in found) == (71 if name == "attention adapter" else 55)
    for path in (live / "final").iterdir():
        if path.suffix == ".json":
            assert json.loads(path.read_text()) == json.loads((cached / "final" / path.name).read_text())
    if name == "validated":
        lines = [[json.loads(line) for line in (out / "metrics.jsonl").open()] for out in (live, cached)]
        validated = [[line["eval_cross_entropy"] for line in run if "eval_cross_entropy" in line] for run in lines]
        assert validated[0] == validated[1] != []


@pytest.mark.slow
def test_the_8_bit_form_and_float32_differ_by_their_rounding(trained: Path) -> None:
    exact = make_stage(trained, "zero-1", "live", "fp32-live")
    cached = make_stage(trained, "zero-1", "bf16", "fp32-bf16")
    for settings in (exact, cached):
        settings["run"] |= {"precision": "fp32", "zero_stage": 0}
    ((code, shown),) = launch([make_stage(trained, "zero-1", "q8"), exact, cached], trained / "scratch-close")
    assert code == 0, shown[-3000:]
    assert losses(trained / "zero-1-q8") == pytest.approx(losses(trained / "zero-1-live"), rel=2e-3)
    assert losses(trained / "fp32-bf16") == pytest.approx(losses(trained / "fp32-live"), rel=1e-3)
    assert losses(trained / "fp32-bf16") != losses(trained / "fp32-live")


@pytest.mark.slow
def test_a_run_continues_from_its_checkpoint_which_holds_the_tower(trained: Path) -> None:
    name = "zero-2, one sample at a time, workers"
    settings = [make_stage(trained, name, "bf16", output) for output in ("whole", "resumed")]
    for config in settings:
        config["run"] |= {"save_steps": 3}
    run_stages(settings, trained / "scratch-whole")
    resumed = trained / "resumed"
    checkpoint = resumed / "checkpoints" / "checkpoint-3"
    assert (checkpoint / "model.safetensors").stat().st_size > 0
    shutil.rmtree(resumed / "checkpoints" / "checkpoint-6")
    shutil.rmtree(resumed / "final")
    run_stages(settings[1:], trained / "scratch-resumed")
    assert json.loads((resumed / "starts.json").read_text())[-1]["step"] == 3
    expected, found = weights(trained / "whole"), weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    export_student(checkpoint, trained / "exported")
    tower = load_student(trained / "exported", dtype=torch.bfloat16).model.vision_tower.state_dict()
    original = load_student(trained / "student", dtype=torch.bfloat16).model.vision_tower.state_dict()
    assert all(torch.equal(tower[key], original[key]) for key in original)


@pytest.mark.slow
def test_two_ranks_train_from_a_cache_even_if_one_has_no_image(trained: Path) -> None:
    settings = [make_stage(trained, "zero-3", source, f"two-ranks-{source}") for source in ("live", "bf16")]
    for config in settings:
        config["optim"] |= {"micro_batch_size": 1, "max_steps": 4}
    run_stages(settings, trained / "scratch-two", num_ranks=2)
    live, cached = (trained / f"two-ranks-{source}" for source in ("live", "bf16"))
    assert losses(live) == losses(cached)
    expected, found = weights(live), weights(cached)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
