"""Tests of upcycled students: equal logits, sparse layers, frozen parts, noise, and settings that are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeModel,
    Qwen3MoeModel,
)

from common.errors import ConfigError, ModelError
from tests.support.forward import logits
from tests.support.models import TextFamily, tiny_causal_lm, tiny_llava
from train.config import MoEConfig
from train.model.student import language_model, load_student, save_student, set_trainable, stored_dtype, text_config
from train.moe.upcycle import sparse_layers, upcycle, upcycle_directory

F32 = torch.float32


@pytest.fixture(scope="module")
def dense_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava"), "qwen2", tied=True)


@pytest.fixture(scope="module")
def dense_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_lm(tmp_path_factory.mktemp("lm"), "qwen2")


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (tiny_llava, "qwen2"),
        (tiny_llava, "qwen3"),
        (tiny_llava, "llama"),
        (tiny_causal_lm, "qwen2"),
        (tiny_causal_lm, "qwen3"),
        (tiny_causal_lm, "llama"),
        (tiny_causal_lm, "mistral"),
    ],
)
def test_upcycled_logits_equal_the_dense_ones_also_after_saving(
    make: Any, text: TextFamily, tied: bool, tmp_path: Path
) -> None:
    dense = load_student(make(tmp_path / "dense", text, tied=tied), dtype=F32)
    sparse = upcycle(dense, MoEConfig(), seed=0)
    expected, found = logits(dense), logits(sparse)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert isinstance(language_model(sparse), Qwen3MoeModel if text == "qwen3" else Qwen2MoeModel)

    save_student(sparse, tmp_path / "dense", tmp_path / "sparse")
    loaded = load_student(tmp_path / "sparse", dtype=F32)
    assert type(loaded) is type(sparse)
    assert torch.equal(logits(loaded), found)
    weights = loaded.state_dict()
    assert weights.keys() == sparse.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in sparse.state_dict().items())


@pytest.mark.parametrize(
    ("layers", "num_experts", "top_k"),
    [("first-half", 4, 2), ("second-half", 2, 1), ("all", 3, 3), ((0, 3), 4, 1)],
)
def test_any_pattern_and_any_number_of_experts_is_exact(
    dense_llava: Path, layers: Any, num_experts: int, top_k: int
) -> None:
    dense = load_student(dense_llava, dtype=F32)
    sparse = upcycle(dense, MoEConfig(num_experts=num_experts, top_k=top_k, layers=layers), seed=0)
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=0, atol=1e-5)
    found = tuple(i for i, layer in enumerate(language_model(sparse).layers) if hasattr(layer.mlp, "experts"))
    assert found == sparse_layers(layers, 4)


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rms_norm_eps": 1e-3}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}}),
        ("qwen3", {"head_dim": 64, "rms_norm_eps": 1e-3}),
    ],
)
def test_settings_of_the_dense_model_are_copied(text: TextFamily, overrides: dict[str, Any], tmp_path: Path) -> None:
    dense = load_student(tiny_causal_lm(tmp_path, text, **overrides), dtype=F32)
    torch.testing.assert_close(logits(upcycle(dense, MoEConfig(), seed=0)), logits(dense), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "overrides", "named"),
    [
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("mistral", {"sliding_window": 16}, "sliding_window is 16"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
            "sliding_window",
        ),
        ("llama", {"head_dim": 64}, "head_dim is 64, expected 32"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type is 'dynamic'",
        ),
    ],
)
def test_settings_without_an_exact_counterpart_are_refused(
    text: TextFamily, overrides: dict[str, Any], named: str, tmp_path: Path
) -> None:
    dense = load_student(tiny_causal_lm(tmp_path, text, **overrides), dtype=F32)
    with pytest.raises(ModelError, match=named):
        upcycle(dense, MoEConfig(), seed=0)


def test_a_sparse_model_is_not_upcycled_again(dense_lm: Path) -> None:
    sparse = upcycle(load_student(dense_lm, dtype=F32), MoEConfig(), seed=0)
    with pytest.raises(ModelError, match="qwen2_moe: cannot be upcycled"):
        upcycle(sparse, MoEConfig(), seed=0)


def test_a_partitioned_model_is_refused(dense_lm: Path) -> None:
    dense = load_student(dense_lm, dtype=F32)
    setattr(dense.lm_head.weight, "ds_id", 0)  # noqa: B010 - the attribute by which ZeRO-3 marks a parameter
    with pytest.raises(ModelError, match="is partitioned by ZeRO-3"):
        upcycle(dense, MoEConfig(), seed=0)


def test_experts_are_copies_with_storage_of_their_own(dense_lm: Path) -> None:
    dense = load_student(dense_lm, dtype=F32)
    sparse = upcycle(dense, MoEConfig(), seed=0)
    ffn, experts = dense.model.layers[1].mlp, sparse.model.layers[1].mlp.experts
    width = ffn.gate_proj.out_features
    for expert in range(4):
        assert torch.equal(experts.gate_up_proj[expert, :width], ffn.gate_proj.weight)
        assert torch.equal(experts.gate_up_proj[expert, width:], ffn.up_proj.weight)
        assert torch.equal(experts.down_proj[expert], ffn.down_proj.weight)
    with torch.no_grad():
        experts.down_proj[0] += 1
        sparse.model.norm.weight += 1
    assert torch.equal(experts.down_proj[1], ffn.down_proj.weight)
    assert torch.equal(dense.model.norm.weight, load_student(dense_lm, dtype=F32).model.norm.weight)


def test_the_router_is_normal_and_depends_on_the_seed_alone(tmp_path: Path) -> None:
    dense = load_student(tiny_causal_lm(tmp_path, hidden_size=256, num_layers=2), dtype=F32)
    routers = []
    for seed in (5, 5, 6):
        torch.rand(3)
        routers.append(upcycle(dense, MoEConfig(num_experts=16), seed=seed).model.layers[1].mlp.gate.weight)
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    assert routers[0].mean().abs() < 0.02 * 4 / 4096**0.5
    assert abs(routers[0].std() - 0.02) < 0.02 * 4 / (2 * 4096) ** 0.5


def test_the_dtype_stays(dense_lm: Path) -> None:
    dense = load_student(dense_lm, dtype=torch.bfloat16)
    assert {p.dtype for p in upcycle(dense, MoEConfig(), seed=0).parameters()} == {torch.bfloat16}


def test_the_generation_settings_stay(dense_llava: Path) -> None:
    dense = load_student(dense_llava, dtype=F32)
    sparse = upcycle(dense, MoEConfig(), seed=0)
    assert dense.generation_config.eos_token_id is not None
    assert sparse.generation_config.eos_token_id == dense.generation_config.eos_token_id


def test_experts_run_on_the_grouped_kernel(dense_llava: Path) -> None:
    config = text_config(upcycle(load_student(dense_llava, dtype=F32), MoEConfig(), seed=0))
    assert config._experts_implementation == "grouped_mm"  # noqa: SLF001 - transformers has no public name for it


@pytest.mark.parametrize(
    ("pattern", "num_layers", "expected"),
    [
        ("every-second", 4, (1, 3)),
        ("every-second", 5, (1, 3)),
        # `list(range(num_layers))[::2]` in MoE-LLaVA's and LLaVA-MoD's initialize_moe_modules.
        ("sparse", 4, (0, 2)),
        ("sparse", 5, (0, 2, 4)),
        ("first-half", 5, (0, 1)),
        ("second-half", 5, (2, 3, 4)),
        ("all", 3, (0, 1, 2)),
        ((2, 0), 3, (0, 2)),
    ],
)
def test_patterns_name_layers(pattern: Any, num_layers: int, expected: tuple[int, ...]) -> None:
    assert sparse_layers(pattern, num_layers) == expected


@pytest.mark.parametrize(("pattern", "num_layers"), [((3,), 3), ((-1,), 3), ((1, 1), 3), ((), 3), ("every-second", 1)])
def test_impossible_layers_are_refused(pattern: Any, num_layers: int) -> None:
    with pytest.raises(ConfigError, match=r"moe\.layers"):
        sparse_layers(pattern, num_layers)


def test_a_top_k_above_the_number_of_experts_is_refused() -> None:
    with pytest.raises(ValidationError, match="top_k = 5 exceeds num_experts = 4; lower top_k"):
        MoEConfig(top_k=5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_upcycled_directory_holds_the_upcycled_model(tmp_path: Path, dtype: torch.dtype) -> None:
    dense = tiny_llava(tmp_path / "dense", dtype=dtype)
    num_parameters = upcycle_directory(dense, tmp_path / "sparse", MoEConfig(), seed=3)
    found = load_student(tmp_path / "sparse", dtype=dtype)
    expected = upcycle(load_student(dense, dtype=dtype), MoEConfig(), seed=3).state_dict()
    assert num_parameters == sum(p.numel() for p in found.parameters())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert stored_dtype(tmp_path / "sparse") == dtype


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def sparse_llava(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    dense = load_student(tiny_llava(tmp_path_factory.mktemp("sparse"), request.param), dtype=F32)
    return upcycle(dense, MoEConfig(), seed=0)


@pytest.mark.parametrize(
    ("groups", "patterns"),
    [
        ({"experts"}, (".mlp.experts.",)),
        ({"router"}, (".mlp.gate.",)),
        ({"experts", "router", "adapter"}, (".mlp.experts.", ".mlp.gate.", ".multi_modal_projector.")),
        ({"language_model"}, (".language_model.", "lm_head")),
    ],
)
def test_exactly_the_named_groups_of_a_sparse_student_train(
    sparse_llava: PreTrainedModel, groups: set[str], patterns: tuple[str, ...]
) -> None:
    num_trainable = set_trainable(sparse_llava, frozenset(groups))
    expected = {
        name: p.numel()
        for name, p in sparse_llava.named_parameters()
        if any(pattern in name for pattern in patterns) and "shared_expert" not in name
    }
    assert {name for name, p in sparse_llava.named_parameters() if p.requires_grad} == set(expected)
    assert num_trainable == sum(expected.values())


def test_the_shared_expert_stays_zero_and_frozen_after_loading(dense_llava: Path, tmp_path: Path) -> None:
    save_student(upcycle(load_student(dense_llava, dtype=F32), MoEConfig(), seed=0), dense_llava, tmp_path)
    sparse = load_student(tmp_path, dtype=F32)
    set_trainable(sparse, frozenset({"language_model", "experts"}))
    shared = [p for name, p in sparse.named_parameters() if "shared_expert" in name]
    assert len(shared) == 2 * 4
    assert not any(p.any() or p.requires_grad for p in shared)


# Noise


def expert_noise(dense: PreTrainedModel, sparse: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the difference of each expert's matrices from the dense ones, in the latter's standard deviations."""
    noise = {}
    for number in (1, 3):
        ffn, experts = dense.model.layers[number].mlp, sparse.model.layers[number].mlp.experts
        gates, ups = experts.gate_up_proj.chunk(2, 1)
        for name, copies in (("gate_proj", gates), ("up_proj", ups), ("down_proj", experts.down_proj)):
            exact = getattr(ffn, name).weight
            noise[f"{number}.{name}"] = ((copies - exact) / exact.std()).detach()
    return noise


def test_noise_has_the_configured_size_in_every_matrix_of_every_expert(tmp_path: Path) -> None:
    dense = load_student(tiny_causal_lm(tmp_path, hidden_size=128), dtype=F32)
    # The matrices have different scales, so that noise relative to the wrong matrix would be noticed.
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.mlp.up_proj.weight.mul_(5)
            layer.mlp.down_proj.weight.mul_(0.1)
    sparse = upcycle(dense, MoEConfig(noise=0.02), seed=0)
    for copies in expert_noise(dense, sparse).values():
        assert copies.shape == (4, *copies.shape[1:])
        count = copies[0].numel()
        for noise in copies:
            assert abs(float(noise.mean())) < 0.02 * 5 / count**0.5
            assert float(noise.std()) == pytest.approx(0.02, rel=5 / (2 * count) ** 0.5)
            # A normal distribution has 68.27% within one standard deviation.
            assert float((noise.abs() < 0.02).float().mean()) == pytest.approx(0.6827, abs=5 * (0.22 / count) ** 0.5)


def test_each_expert_and_each_matrix_has_noise_of_its_own(dense_lm: Path) -> None:
    dense = load_student(dense_lm, dtype=F32)
    found = expert_noise(dense, upcycle(dense, MoEConfig(noise=0.1), seed=0))
    draws = torch.stack([noise.flatten() for copies in found.values() for noise in copies])
    correlations = torch.corrcoef(draws).fill_diagonal_(0.0)
    assert correlations.abs().max() < 6 / draws.shape[1] ** 0.5


def test_noise_depends_on_the_seed_alone_and_leaves_the_routers(dense_lm: Path) -> None:
    dense = load_student(dense_lm, dtype=F32)
    exact = upcycle(dense, MoEConfig(), seed=5).state_dict()
    noisy = []
    for seed in (5, 5, 6):
        torch.rand(3)
        noisy.append(upcycle(dense, MoEConfig(noise=0.01), seed=seed).state_dict())
    assert all(torch.equal(noisy[0][name], noisy[1][name]) for name in exact)
    for name, tensor in exact.items():
        assert torch.equal(noisy[0][name], tensor) == (".mlp.experts." not in name), name
        assert torch.equal(noisy[0][name], noisy[2][name]) == (".mlp.experts." not in name and ".mlp.gate." not in name)


def test_little_noise_changes_the_logits_little(dense_llava: Path) -> None:
    dense = load_student(dense_llava, dtype=F32)
    differences = [
        float((logits(upcycle(dense, MoEConfig(noise=noise), seed=0)) - logits(dense)).abs().max())
        for noise in (1e-4, 1e-2)
    ]
    assert 1e-5 < differences[0] < 0.05 * differences[1]


def test_noise_is_rounded_once_to_the_dtype_of_the_student(dense_lm: Path) -> None:
    dense = load_student(dense_lm, dtype=torch.bfloat16)
    noisy = upcycle(dense, MoEConfig(noise=0.1), seed=0)
    assert {p.dtype for p in noisy.parameters()} == {torch.bfloat16}
    wide = upcycle(dense.float(), MoEConfig(noise=0.1), seed=0)
    for name, tensor in noisy.state_dict().items():
        if ".mlp.experts." in name:
            assert torch.equal(tensor, wide.state_dict()[name].bfloat16())


def test_an_upcycled_directory_has_the_same_noise(dense_lm: Path, tmp_path: Path) -> None:
    upcycle_directory(dense_lm, tmp_path / "sparse", MoEConfig(noise=0.1), seed=3)
    expected = upcycle(load_student(dense_lm, dtype=F32), MoEConfig(noise=0.1), seed=3).state_dict()
    found = load_student(tmp_path / "sparse", dtype=F32).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_student_without_weights_is_upcycled_with_noise_for_its_size() -> None:
    """The command `plan` upcycles on the meta device."""
    with torch.device("meta"):
        dense = Qwen2ForCausalLM(Qwen2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=2))
        sparse = upcycle(dense, MoEConfig(noise=0.1), seed=0)
    assert sparse.model.layers[1].mlp.experts.down_proj.is_meta
