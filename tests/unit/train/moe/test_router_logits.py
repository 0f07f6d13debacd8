"""Tests that router logits are those of the model's own forward pass, with their gradient, without side effects."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import ModelError
from tests.support.forward import inputs, logits
from tests.support.models import randomise, tiny_causal_lm, tiny_llava
from train.config import MoEConfig
from train.model.student import language_model, load_student, save_student, set_trainable, text_config
from train.moe.router_monitor import RouterMonitor
from train.moe.upcycle import upcycle

F32 = torch.float32


@pytest.fixture(scope="module")
def dense_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava"), "qwen2", tied=True)


@pytest.fixture(scope="module")
def dense_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_lm(tmp_path_factory.mktemp("lm"), "qwen2")


def perturbed(path: Path) -> PreTrainedModel:
    sparse = upcycle(load_student(path, dtype=F32), MoEConfig(), seed=0)
    redrawn = [(n, p) for n, p in sparse.named_parameters() if ".mlp.experts." in n or ".mlp.gate." in n]
    randomise(redrawn, seed=1)
    return sparse


def test_router_logits_are_those_that_transformers_returns(dense_lm: Path) -> None:
    sparse = perturbed(dense_lm)
    with torch.no_grad():
        expected = sparse(**inputs(sparse), output_router_logits=True).router_logits
    monitor = RouterMonitor(sparse)
    logits(sparse)
    found = monitor.pop_router_logits()
    assert len(found) == len(expected) == 2
    for layer, expected_layer in zip(found, expected, strict=True):
        assert layer.shape == (2 * 40, 4)
        assert torch.equal(layer, expected_layer)


def test_router_logits_of_a_llava_come_from_the_input_of_each_router(dense_llava: Path) -> None:
    sparse = perturbed(dense_llava)
    monitor = RouterMonitor(sparse)
    seen: list[Tensor] = []
    for layer in (1, 3):
        gate = language_model(sparse).layers[layer].mlp.gate
        gate.register_forward_pre_hook(lambda module, args: seen.append(args[0] @ module.weight.T))
    logits(sparse)
    for found, expected in zip(monitor.pop_router_logits(), seen, strict=True):
        torch.testing.assert_close(found, expected)


def test_nothing_is_added_to_the_language_model_loss(dense_lm: Path) -> None:
    sparse = perturbed(dense_lm)
    monitor = RouterMonitor(sparse)
    ids = inputs(sparse)["input_ids"]
    output = sparse(input_ids=ids, labels=ids)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert len(monitor.pop_router_logits()) == 2


def test_the_saved_config_is_that_without_the_hook(dense_llava: Path, tmp_path: Path) -> None:
    sparse = perturbed(dense_llava)
    RouterMonitor(sparse)
    save_student(sparse, dense_llava, tmp_path)
    assert text_config(load_student(tmp_path, dtype=F32)).output_router_logits is False


@pytest.mark.slow
@pytest.mark.parametrize("groups", [{"router"}, {"experts", "router", "adapter"}])
def test_router_logits_have_the_same_gradient_under_activation_checkpointing(
    dense_llava: Path, groups: set[str]
) -> None:
    gradients = []
    for checkpointing in (False, True):
        sparse = perturbed(dense_llava).train()
        set_trainable(sparse, frozenset(groups))
        if checkpointing:
            sparse.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        monitor = RouterMonitor(sparse)
        lm_loss = sparse(**inputs(sparse), use_cache=False).logits.logsumexp(-1).mean()
        layers = monitor.pop_router_logits()
        assert len(layers) == 2
        (lm_loss + sum(layer.softmax(-1).square().mean() for layer in layers)).backward()
        gradients.append({n: p.grad for n, p in sparse.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert gradient.any()
        torch.testing.assert_close(gradient, gradients[1][name])


def test_checkpointing_that_detaches_router_logits_is_refused(dense_llava: Path) -> None:
    sparse = perturbed(dense_llava).train()
    set_trainable(sparse, frozenset({"router", "adapter"}))
    sparse.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    RouterMonitor(sparse)
    with pytest.raises(ModelError, match="use_reentrant"):
        sparse(**inputs(sparse), use_cache=False)


def test_removed_hooks_collect_nothing(dense_lm: Path) -> None:
    sparse = perturbed(dense_lm)
    monitor = RouterMonitor(sparse)
    monitor.remove()
    logits(sparse)
    with pytest.raises(AssertionError, match="no forward pass"):
        monitor.pop_router_logits()


def test_a_dense_model_has_no_router_logits(dense_lm: Path) -> None:
    with pytest.raises(ModelError, match="has no router"):
        RouterMonitor(load_student(dense_lm, dtype=F32))
