"""Every configuration in configs/ loads, and the recipes have the published settings."""

from pathlib import Path

import pytest

from common.config import load_config
from precompute.config import PrecomputeConfig
from train.config import TrainConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_configuration_loads(path: Path) -> None:
    load_config(PrecomputeConfig if path.name.startswith("precompute-") else TrainConfig, path)


# LLaVA-MoD, arXiv 2408.15881, table of training hyperparameters: batch size, learning rate, trained groups.
PAPER = {
    "init": (512, 1e-4, frozenset({"adapter"})),
    "dense-to-dense": (256, 2e-5, frozenset({"adapter", "language_model"})),
    "dense-to-sparse": (256, 2e-5, frozenset({"adapter", "experts", "router"})),
    "preference": (256, 2e-6, frozenset({"adapter", "experts", "router"})),
}


@pytest.mark.parametrize("stage", PAPER)
def test_the_stages_of_the_paper_have_its_settings(stage: str) -> None:
    config = load_config(TrainConfig, CONFIGS / "llava-mod" / f"{stage}.toml")
    batch, rate, trained = PAPER[stage]
    assert config.stage == stage
    assert (config.optim.global_batch_size, config.optim.learning_rate, config.groups) == (batch, rate, trained)
    assert (config.optim.scheduler, config.optim.warmup_ratio, config.optim.weight_decay) == ("cosine", 0.03, 0.0)
    assert (config.optim.epochs, config.data.max_tokens, config.run.precision) == (1, 2048, "bf16")
    # LLaVA's default, which other students that learn by these stages do not have.
    assert config.data.image_aspect_ratio is None
    if stage == "dense-to-sparse":
        assert config.moe is not None
        assert (config.moe.num_experts, config.moe.top_k, config.moe.layers) == (4, 2, "sparse")
        assert (config.loss.distillation, config.loss.cross_entropy, config.loss.balance) == (1.0, 1.0, 0.01)


# LLaVA-1.5, arXiv 2310.03744, and MoE-LLaVA, arXiv 2401.15947: batch size, learning rate, trained groups.
RECIPES = {
    "llava/pretrain": (256, 1e-3, frozenset({"adapter"})),
    "llava/finetune": (128, 2e-5, frozenset({"adapter", "language_model"})),
    "bakllava/pretrain": (256, 1e-3, frozenset({"adapter"})),
    "bakllava/finetune": (128, 2e-5, frozenset({"adapter", "language_model"})),
    "moe-llava/stage1": (256, 1e-3, frozenset({"adapter"})),
    "moe-llava/stage2": (128, 2e-5, frozenset({"adapter", "language_model"})),
    "moe-llava/stage3": (128, 2e-5, frozenset({"experts", "router"})),
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_without_a_teacher_have_the_published_settings(name: str) -> None:
    config = load_config(TrainConfig, CONFIGS / f"{name}.toml")
    batch, rate, trained = RECIPES[name]
    assert (config.optim.global_batch_size, config.optim.learning_rate, config.groups) == (batch, rate, trained)
    assert (config.optim.scheduler, config.optim.warmup_ratio, config.optim.weight_decay) == ("cosine", 0.03, 0.0)
    assert (config.optim.epochs, config.data.max_tokens, config.run.precision) == (1, 2048, "bf16")
    assert config.data.image_aspect_ratio == "pad"
    assert not config.data.has_scores
    assert (config.loss.cross_entropy, config.loss.distillation, config.loss.preference) == (1.0, 0.0, 0.0)
    assert config.loss.balance == (0.01 if name == "moe-llava/stage3" else 0.0)
    if name == "moe-llava/stage3":
        assert config.moe is not None
        assert (config.moe.num_experts, config.moe.top_k, config.moe.layers) == (4, 2, "sparse")
    else:
        assert config.moe is None


@pytest.mark.parametrize("recipe", [("pretrain", "finetune"), ("stage1", "stage2", "stage3")])
def test_each_stage_of_a_recipe_starts_from_the_student_of_the_one_before(recipe: tuple[str, ...]) -> None:
    folder = CONFIGS / ("llava" if recipe[0] == "pretrain" else "moe-llava")
    stages = [load_config(TrainConfig, folder / f"{name}.toml") for name in recipe]
    assert [config.model.path for config in stages[1:]] == [config.output / "final" for config in stages[:-1]]
