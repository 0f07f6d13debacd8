"""The memory estimate of `plan`, compared with ZeRO's own table, real optimisers and real students."""

from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError, ModelError
from tests.support.models import tiny_causal_lm, tiny_llava
from train.choices import Precision
from train.config import MoEConfig, TrainConfig
from train.memory_estimate import ParameterCounts, estimate_training_memory, memory_bytes
from train.model.student import load_student, set_trainable
from train.moe.upcycle import upcycle, upcycle_directory


def make_config(path: Path, **changes: Any) -> TrainConfig:
    tables: dict[str, Any] = {
        "stage": "dense-to-dense",
        "output": path / "run",
        "model": {"path": path},
        "data": {"shards": path / "scores"},
        "loss": {"distillation": 1.0},
        "optim": {"learning_rate": 1e-3},
    }
    return TrainConfig.model_validate({**tables, **changes})


def remove_weights(path: Path) -> Path:
    for file in path.glob("*.safetensors"):
        file.unlink()
    return path


def test_memory_equals_the_figure_of_the_zero_paper() -> None:
    # arXiv 1910.02054, figure 1: 7.5 billion parameters on 64 GPUs, in 10^9 bytes.
    counts = ParameterCounts(7_500_000_000, 7_500_000_000)
    for zero_stage, expected in enumerate([120, 31.4, 16.6, 1.9]):
        assert memory_bytes(zero_stage, 64, counts, "bf16") / 1e9 == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(("precision", "weight", "gradient", "optimiser"), [("bf16", 2, 2, 12), ("fp32", 4, 4, 8)])
@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8])
def test_a_frozen_parameter_takes_no_more_than_its_weight(
    precision: Precision, weight: int, gradient: int, optimiser: int, num_gpus: int
) -> None:
    total, trained = 1000, 300
    expected = [
        weight * total + (gradient + optimiser) * trained,
        weight * total + gradient * trained + optimiser * trained / num_gpus,
        weight * total + (gradient + optimiser) * trained / num_gpus,
        (weight * total + (gradient + optimiser) * trained) / num_gpus,
    ]
    counts = ParameterCounts(total, trained)
    assert [memory_bytes(zero_stage, num_gpus, counts, precision) for zero_stage in range(4)] == expected


def test_in_float32_it_equals_the_memory_of_a_real_optimiser(tmp_path: Path) -> None:
    model = load_student(tiny_llava(tmp_path), dtype=torch.float32)
    num_trained = set_trainable(model, frozenset({"adapter", "language_model"}))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    num_bytes += sum(parameter.grad.nbytes for parameter in trained if parameter.grad is not None)
    num_bytes += sum(state[name].nbytes for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq"))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert memory_bytes(0, 1, ParameterCounts(num_parameters, num_trained), "fp32") == num_bytes


@pytest.mark.parametrize(
    ("name", "groups"),
    [("init", {"adapter"}), ("dense-to-dense", {"adapter", "language_model"})],
)
def test_trained_parameters_follow_from_the_stage(tmp_path: Path, name: str, groups: set[str]) -> None:
    path = tiny_llava(tmp_path)
    model = load_student(path, dtype=torch.float32)
    num_trained = set_trainable(model, frozenset(groups))
    found = estimate_training_memory(remove_weights(path), 10, config=make_config(path, stage=name))
    shown = {figure.name: figure.value for figure in found.parameters.estimates}
    assert shown["trained"] == num_trained
    assert shown["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_a_dense_student_is_counted_after_upcycling(tmp_path: Path) -> None:
    path = tiny_llava(tmp_path)
    moe = MoEConfig(num_experts=4, top_k=2)
    model = upcycle(load_student(path, dtype=torch.float32), moe, seed=0)
    num_trained = set_trainable(model, frozenset({"adapter", "experts", "router"}))
    config = make_config(path, stage="dense-to-sparse", moe=moe.model_dump())
    found = {
        figure.name: figure
        for figure in estimate_training_memory(remove_weights(path), 10, config=config).parameters.estimates
    }
    assert found["parameters"].value == sum(parameter.numel() for parameter in model.parameters())
    assert found["trained"].value == num_trained
    assert "4 experts" in found["parameters"].how
    with pytest.raises(ConfigError, match="indices from 0 to 3"):
        estimate_training_memory(path, 10, config=make_config(path, moe={"layers": [9]}))


def test_a_sparse_student_is_counted_with_all_experts(tmp_path: Path) -> None:
    dense = tiny_causal_lm(tmp_path / "dense")
    num_parameters = upcycle_directory(dense, tmp_path / "sparse", MoEConfig(), seed=0)
    found = estimate_training_memory(remove_weights(tmp_path / "sparse"), 10)
    assert found.parameters.estimates[0].value == num_parameters


def test_the_teacher_adds_its_weights_to_every_gpu_and_only_zero_3_divides_them(tmp_path: Path) -> None:
    found = estimate_training_memory(remove_weights(tiny_llava(tmp_path)), 7_000_000, gpus=(1, 8))
    assert [(row.stage, row.num_gpus) for row in found.memory] == [
        (zero_stage, n) for zero_stage in range(4) for n in (1, 8)
    ]
    for row in found.memory:
        split = row.num_gpus if row.stage == 3 else 1
        assert row.with_teacher - row.num_bytes == pytest.approx(14_000_000 / split)
        assert row.ratio == row.with_teacher / row.num_bytes
        assert eval(row.how.replace(" x ", " * ").replace(",", "")) == pytest.approx(row.num_bytes)


def test_expert_parallel_gpus_hold_a_part_of_the_experts(tmp_path: Path) -> None:
    path = tiny_llava(tmp_path)
    moe = MoEConfig(num_experts=4, top_k=2)
    model = upcycle(load_student(path, dtype=torch.float32), moe, seed=0)
    set_trainable(model, frozenset({"adapter", "experts", "router"}))
    run = {"expert_parallel_size": 2, "zero_stage": 2}
    config = make_config(path, stage="dense-to-sparse", moe=moe.model_dump(), run=run)
    found = estimate_training_memory(remove_weights(path), 10, config=config, gpus=(1, 2, 4))
    assert [(row.stage, row.num_gpus) for row in found.memory] == [
        (zero_stage, n) for zero_stage in (1, 2, 3) for n in (2, 4)
    ]
    assert any("expert_parallel_size 2" in note for note in found.notes)

    # Counted for each of 4 GPUs, which are two pairs; in each pair a GPU holds one half of the experts.
    experts = {name: p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name}
    others = {name: p for name, p in model.named_parameters() if name not in experts}
    num_experts, num_others = sum(experts.values()), sum(p.numel() for p in others.values())
    num_trained = sum(p.numel() for p in others.values() if p.requires_grad)
    half = num_experts // 2
    sharded = 14 * (num_trained / 4 + half / 2)
    expected = {
        1: 2 * (num_others + half) + 2 * (num_trained + half) + 12 * (num_trained / 4 + half / 2),
        2: 2 * (num_others + half) + sharded,
        3: 2 * (num_others / 4 + half / 2) + sharded,
    }
    for row in found.memory:
        if row.num_gpus == 4:
            assert row.num_bytes == pytest.approx(expected[row.stage])
        assert eval(row.how.replace(" x ", " * ").replace(",", "")) == pytest.approx(row.num_bytes)


@pytest.mark.slow
def test_the_configured_stage_is_marked(tmp_path: Path) -> None:
    path = remove_weights(tiny_llava(tmp_path))
    found = estimate_training_memory(path, 10, config=make_config(path, run={"zero_stage": 1, "precision": "fp32"}))
    assert {row.stage for row in found.memory if row.chosen} == {1}
    assert not any(row.chosen for row in estimate_training_memory(path, 10).memory)


def test_a_directory_without_a_student_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="makes no student"):
        estimate_training_memory(tmp_path, 10)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="makes no student"):
        estimate_training_memory(tmp_path, 10)
    text = remove_weights(tiny_causal_lm(tmp_path / "text"))
    with pytest.raises(ModelError, match="takes no images, so it has no adapter"):
        estimate_training_memory(text, 10, config=make_config(text, stage="init"))
