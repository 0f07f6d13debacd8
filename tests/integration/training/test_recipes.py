"""The recipes without a teacher run from their own configuration files."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from precompute.features.run import FeatureSettings, run_features
from tests.support.models import tiny_causal_lm, tiny_llava, tiny_siglip
from tests.support.training import ROOT, losses, run_stages, write_mixed_dataset
from train.model.adapter import is_adapter_block
from train.model.compose import compose_student
from train.model.student import load_student

pytestmark = pytest.mark.slow

RECIPES = {
    "llava": ("pretrain", "finetune"),
    "moe-llava": ("stage1", "stage2", "stage3"),
    "llama3-v": ("pretrain", "finetune"),
}
TRAINED = {
    "pretrain": {"adapter"},
    "finetune": {"adapter", "language_model"},
    "stage1": {"adapter"},
    "stage2": {"adapter", "language_model"},
    "stage3": {"experts", "router"},
}
# The students of the first stages.
FIRST = {"llava": "models/student", "moe-llava": "models/student", "llama3-v": "models/siglip-llama"}
NUM_STEPS = 8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipes")
    dataset = write_mixed_dataset(root / "data", 20)
    tiny_llava(root / "models" / "student", num_layers=2)
    language = tiny_causal_lm(root / "llama", "llama", num_layers=2, image_token=False)
    compose_student(tiny_siglip(root / "siglip"), language, root / FIRST["llama3-v"], seed=0, adapter="attention")
    features = FeatureSettings(root / FIRST["llama3-v"], dataset, dataset.parent, root / "features")
    run_features(features, progress=False)
    configs = []
    for recipe, names in RECIPES.items():
        for name in names:
            config = tomllib.loads((ROOT / "configs" / recipe / f"{name}.toml").read_text())
            is_first_stage = config["model"]["path"] == "models/student"
            config["model"]["path"] = str(root / (FIRST[recipe] if is_first_stage else config["model"]["path"]))
            config["output"] = str(root / config["output"])
            images = ("features", root / "features") if "features" in config["data"] else ("image_root", dataset.parent)
            config["data"] |= {"dataset": str(dataset), images[0]: str(images[1]), "num_workers": 0}
            # The share of the recipe itself rounds to nothing of so few samples, of which one is then held out.
            # A tiny student needs a higher learning rate to learn in so few steps.
            config["optim"] |= {"learning_rate": 3e-3, "global_batch_size": 8, "micro_batch_size": 4}
            config["optim"]["max_steps"] = NUM_STEPS
            config["run"]["precision"] = "fp32"
            configs.append(config)
    run_stages(configs, root / "scratch")
    return root


@pytest.mark.parametrize(("recipe", "name"), [(recipe, name) for recipe in RECIPES for name in RECIPES[recipe]])
def test_each_stage_of_a_recipe_learns_and_changes_the_groups_that_it_trains(
    root: Path, recipe: str, name: str
) -> None:
    output = root / "runs" / recipe / name
    found = losses(output)
    assert len(found) == NUM_STEPS
    assert '"eval_cross_entropy"' in (output / "metrics.jsonl").read_text()
    assert sum(found[-2:]) < sum(found[:2])

    names = RECIPES[recipe]
    before = names.index(name) - 1
    start = root / FIRST[recipe] if before < 0 else root / "runs" / recipe / names[before] / "final"
    old = load_student(start, dtype=torch.float32).state_dict()
    model = load_student(output / "final", dtype=torch.float32)
    changed = set()
    for key, tensor in model.state_dict().items():
        if name == "stage3" and is_upcycled(key):
            changed.add("experts" if ".experts." in key else "router")
        elif not torch.equal(tensor, old[key]):
            changed.add("adapter" if is_adapter_block(key, model.config) else find_group(key))
    assert changed == TRAINED[name]
    if name == "stage3":
        assert_experts_differ(model.state_dict())


def test_a_trial_set_of_two_samples_trains_with_the_batches_of_the_recipe(tmp_path: Path) -> None:
    dataset = write_mixed_dataset(tmp_path / "data", 2)
    config = tomllib.loads((ROOT / "configs" / "llava" / "pretrain.toml").read_text())
    config["model"]["path"] = str(tiny_llava(tmp_path / "student", num_layers=1))
    config["output"] = str(tmp_path / "run")
    config["data"] |= {"dataset": str(dataset), "image_root": str(dataset.parent), "num_workers": 0}
    run_stages([config], tmp_path / "scratch")
    # One sample is held out; the step has the other one, and micro-batches without any.
    assert len(losses(tmp_path / "run")) == 1
    assert '"eval_cross_entropy"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert (tmp_path / "run" / "final" / "config.json").is_file()


def is_upcycled(key: str) -> bool:
    return ".mlp.experts." in key or ".mlp.gate." in key or ".mlp.shared_expert" in key


def find_group(key: str) -> str:
    for part, group in ((".vision_tower.", "vision_tower"), (".multi_modal_projector.", "adapter")):
        if part in f".{key}":
            return group
    return "language_model"


def assert_experts_differ(state: dict[str, Any]) -> None:
    """Asserts that the four copies of one network differ, because different tokens trained them."""
    stacked = [tensor for key, tensor in state.items() if ".mlp.experts.gate_up_proj" in key]
    assert len(stacked) == 1, "one of the two layers is sparse"
    assert len(stacked[0]) == 4
    assert all(not torch.equal(stacked[0][0], stacked[0][expert]) for expert in range(1, 4))
    assert not any(tensor.any() for key, tensor in state.items() if ".mlp.shared_expert." in key)
