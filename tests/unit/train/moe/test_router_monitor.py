"""Tests of the losses, counts and gradients of routers, each against another way to compute the number."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedModel

from common.errors import ModelError
from tests.support import reference_losses as reference
from tests.support.accumulation import DTYPES, assert_accumulated
from tests.support.models import TOKENS_PER_IMAGE, randomise, tiny_causal_lm, tiny_llava
from train.config import LossConfig, MoEConfig
from train.data.collator import Batch
from train.loss.functional import RowLogits, router_entropy, router_z_loss
from train.loss.objective import Term, compute_terms, step_loss
from train.model.student import language_model, load_student, set_trainable
from train.moe.router_monitor import RouterMonitor, check_no_dropped_tokens, count_assignments
from train.moe.upcycle import upcycle

F32 = torch.float32


def random_logits(num_layers: int = 3, num_tokens: int = 11, num_experts: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [3 * torch.randn(num_tokens, num_experts, generator=generator) + 1 for _ in range(num_layers)]


# Losses


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_z_loss_agrees_with_the_float64_reference(dtype: torch.dtype) -> None:
    router = [layer.to(dtype) for layer in random_logits()]
    assert_accumulated(router_z_loss(router), reference.router_z([layer.double().numpy() for layer in router]), dtype)


def test_the_z_loss_has_its_gradient_in_closed_form() -> None:
    """The gradient of the squared logsumexp z is 2 z softmax; the mean over layers divides it by their number."""
    router = [layer.double().requires_grad_() for layer in random_logits()]
    gradients = torch.autograd.grad(router_z_loss(router).sum(), router)
    for layer, gradient in zip(router, gradients, strict=True):
        log_sums = [math.log(math.fsum(map(math.exp, row))) for row in layer.tolist()]
        for row, z, found in zip(layer.detach().numpy(), log_sums, gradient, strict=True):
            np.testing.assert_allclose(found, 2 * z * reference.softmax(row) / 3, rtol=1e-12)


def test_the_z_loss_of_one_logit_is_its_square_and_large_logits_do_not_overflow() -> None:
    assert router_z_loss([torch.tensor([[-3.0], [1000.0]])]).tolist() == [9.0, 1e6]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_entropy_agrees_with_the_float64_reference(dtype: torch.dtype) -> None:
    router = [layer.to(dtype) for layer in random_logits()]
    expected = reference.router_entropy([layer.double().numpy() for layer in router])
    assert_accumulated(router_entropy(router), expected, dtype)


def test_the_entropy_is_between_zero_and_the_log_of_the_number_of_experts() -> None:
    even, sure = torch.full((1, 8), 7.0), torch.tensor([[500.0] + 7 * [0.0]])
    assert router_entropy([even]).item() == pytest.approx(math.log(8))
    assert router_entropy([sure]).item() == 0.0
    assert router_entropy([even, sure]).item() == pytest.approx(math.log(8) / 2)


def make_batch(input_ids: Tensor, token_mask: Tensor, image_token_id: int = -1) -> Batch:
    """Returns a batch without scored rows, whose tokens only routers use."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(
        sample_ids=(),
        num_pairs=0,
        num_sequences=len(input_ids),
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        token_mask=token_mask,
        image_mask=input_ids == image_token_id,
        rows=nothing,
        targets=nothing,
        row_sequence=nothing,
    )


def router_terms(router: list[Tensor], token_mask: Tensor) -> dict[str, Term]:
    empty = torch.zeros(0)
    batch = make_batch(torch.zeros_like(token_mask, dtype=torch.int64), token_mask)
    logits = RowLogits(torch.zeros(0, 0), empty, empty)
    config = LossConfig(cross_entropy=1.0, router_z=0.5)
    return compute_terms(logits, batch, config, vocab_size=1, router_logits=router, router_top_k=2)


def test_the_z_loss_of_a_step_is_the_mean_over_its_real_tokens_for_any_micro_batches() -> None:
    router = random_logits(num_tokens=12)
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 0]).bool()
    expected = 0.5 * reference.router_z([layer.double().numpy() for layer in router])[mask.numpy()].mean()
    for cuts in ([12], [3, 9], [4, 2, 6]):
        counts = {"rows": 1, "pairs": 0, "tokens": 7}
        parts = zip(zip(*(layer.split(cuts) for layer in router), strict=True), mask.split(cuts), strict=True)
        terms = [router_terms(list(layers), part[None]) for layers, part in parts]
        found = sum(step_loss({"router_z": each["router_z"]}, counts) for each in terms)
        assert float(found) == pytest.approx(expected, rel=1e-6)
        entropy = sum(float(each["router/entropy"].total) for each in terms) / 7
        by_token = reference.router_entropy([layer.double().numpy() for layer in router])
        assert entropy == pytest.approx(by_token[mask.numpy()].mean(), rel=1e-6)
        assert all(each["router/entropy"].weight == 0 for each in terms)


# Counts


def test_assignments_are_counted_by_layer_expert_and_modality() -> None:
    generator = torch.Generator().manual_seed(0)
    selected = torch.stack([torch.rand(40, 6, generator=generator).topk(2).indices for _ in range(3)])
    image, mask = torch.rand(2, 40, generator=generator) > 0.4
    expected = np.zeros((3, 7, 2), np.int64)
    for token in range(40):
        if mask[token]:
            for layer in range(3):
                for expert in selected[layer, token].tolist():
                    expected[layer, expert, int(image[token])] += 1
                expected[layer, 6, int(image[token])] += 1
    found = count_assignments(selected, image, mask, 6)
    assert np.array_equal(found, expected)
    check_no_dropped_tokens(found, 2, [1, 3, 5])


@pytest.mark.parametrize("no_expert", [-1, 6])
def test_the_layer_of_a_dropped_token_is_named(no_expert: int) -> None:
    selected = torch.tensor([[0, 1], [2, 3], [4, 5]]).repeat(2, 1, 1)
    selected[1, 2, 1] = no_expert
    counts = count_assignments(selected, torch.tensor([False, False, True]), torch.ones(3).bool(), 6)
    with pytest.raises(ModelError, match=r"layer 7: tokens were dropped: 4 text and 1 image .* expected 4 and 2"):
        check_no_dropped_tokens(counts, 2, [5, 7])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava"))


def sparse(path: Path) -> PreTrainedModel:
    model = upcycle(load_student(path, dtype=F32), MoEConfig(), seed=0)
    randomise(((n, p) for n, p in model.named_parameters() if ".mlp.experts." in n or ".mlp.gate." in n), seed=1)
    return model


def mixed_batch(model: PreTrainedModel) -> tuple[Batch, Tensor]:
    """Returns a sequence with an image and padding, one of text, and a dummy with a dummy image; and the images."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 280, (3, 40), generator=generator)
    token_mask = torch.ones(3, 40, dtype=torch.bool)
    ids[0, 3 : 3 + TOKENS_PER_IMAGE] = ids[2, :TOKENS_PER_IMAGE] = model.config.image_token_index
    token_mask[0, 30:] = False
    token_mask[2] = False
    return make_batch(ids, token_mask, model.config.image_token_index), torch.randn(2, 3, 56, 56, generator=generator)


def count_from_router_inputs(model: PreTrainedModel, batch: Batch, pixels: Tensor) -> np.ndarray[Any, Any]:
    """Returns the counts [L, E, 2] of the two experts with the largest products of router inputs and weights."""
    inputs: list[Tensor] = []
    blocks = [layer.mlp for layer in language_model(model).layers if hasattr(layer.mlp, "gate")]
    handles = [b.gate.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for b in blocks]
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=pixels, use_cache=False)
    for handle in handles:
        handle.remove()
    counts = np.zeros((len(blocks), 4, 2), np.int64)
    tokens = zip(batch.input_ids.flatten().tolist(), batch.token_mask.flatten().tolist(), strict=True)
    for position, (token, counted) in enumerate(tokens):
        for number, block in enumerate(blocks):
            scores = inputs[number].flatten(0, -2)[position] @ block.gate.weight.detach().T
            for expert in sorted(range(4), key=lambda e: -float(scores[e]))[:2]:
                counts[number, expert, int(token == model.config.image_token_index)] += counted
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_pass_counts_the_experts_that_its_real_tokens_were_sent_to(dense: Path, checkpointing: bool) -> None:
    model = sparse(dense).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch, pixels = mixed_batch(model)
    expected = count_from_router_inputs(model, batch, pixels)
    monitor = RouterMonitor(model)
    for _ in range(2):
        output = model(**batch.model_inputs, pixel_values=pixels)
        monitor.pop_router_logits()
        # As in validation, whose logits are read but not counted.
        model(**batch.model_inputs, pixel_values=pixels)
        monitor.pop_router_logits()
        model(**batch.model_inputs, pixel_values=pixels)
        monitor.pop_router_logits()
        monitor.count_batch(batch)
        output.logits.sum().backward()
    metrics = monitor.metrics(lambda t: t, 1)
    load = monitor.pop_expert_load(lambda t: t, 7, 5)
    assert load.layers == (1, 3)
    assert np.array_equal(np.stack([load.text_LE, load.image_LE], 2), 2 * expected)
    assert load.image_LE.sum() == 2 * 2 * 2 * TOKENS_PER_IMAGE
    assert load.text_LE.sum() == 2 * 2 * 2 * (40 + 30 - TOKENS_PER_IMAGE)
    shares = [4 * row.sum(1) / row.sum() for row in expected]
    assert metrics["router/largest_load"] == pytest.approx(max(share.max() for share in shares))
    assert metrics["router/smallest_load"] == pytest.approx(min(share.min() for share in shares))
    assert json.dumps(load.to_dict())


def test_a_model_that_drops_a_token_stops_the_run(dense: Path) -> None:
    model = sparse(dense)
    batch, pixels = mixed_batch(model)

    def without_the_first(_module: Any, _args: Any, output: Any) -> Any:
        selected = output[2].clone()
        # In transformers a number past the experts means that no expert of this rank gets the token.
        selected[0, 0] = 4
        return *output[:2], selected

    language_model(model).layers[3].mlp.gate.register_forward_hook(without_the_first)
    language_model(model).set_experts_implementation("eager")
    monitor = RouterMonitor(model)
    with torch.no_grad():
        model(**batch.model_inputs, pixel_values=pixels)
    monitor.count_batch(batch)
    with pytest.raises(ModelError, match="layer 3: tokens were dropped"):
        monitor.metrics(lambda t: t, 1)
    with pytest.raises(ModelError, match="layer 3: tokens were dropped"):
        monitor.pop_expert_load(lambda t: t, 1, 0)


# Gradients


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_routers_gradient_is_that_of_the_latest_step(dense: Path, checkpointing: bool) -> None:
    model = sparse(dense).train()
    set_trainable(model, frozenset({"router", "adapter"}))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch, pixels = mixed_batch(model)
    monitor = RouterMonitor(model)
    for _ in range(3):
        monitor.clear_gradients()
        model.zero_grad()
        for scale in (1.0, 2.0):
            output = model(**batch.model_inputs, pixel_values=scale * pixels)
            (scale * output.logits.logsumexp(-1).mean()).backward()
    routers = [p.grad for n, p in model.named_parameters() if ".mlp.gate." in n]
    expected = math.sqrt(sum(float(grad.double().square().sum()) for grad in routers))
    assert expected > 0
    assert monitor.metrics(lambda t: t, 1)["router/grad_norm"] == pytest.approx(expected, rel=1e-5)
    # With the same batch on two ranks: the sum over ranks is divided by their number.
    assert monitor.metrics(lambda t: 2 * t, 2)["router/grad_norm"] == pytest.approx(expected, rel=1e-5)


def test_frozen_routers_have_no_gradient_metric(dense: Path) -> None:
    model = sparse(dense).train()
    set_trainable(model, frozenset({"adapter"}))
    batch, pixels = mixed_batch(model)
    monitor = RouterMonitor(model)
    model(**batch.model_inputs, pixel_values=pixels).logits.sum().backward()
    monitor.count_batch(batch)
    assert monitor.metrics(lambda t: t, 1).keys() == {"router/largest_load", "router/smallest_load"}


def test_a_text_student_has_only_text_tokens(tmp_path: Path) -> None:
    model = upcycle(load_student(tiny_causal_lm(tmp_path, "qwen3"), dtype=F32), MoEConfig(), seed=0)
    monitor = RouterMonitor(model)
    batch = make_batch(torch.arange(20).reshape(2, 10), torch.ones(2, 10, dtype=torch.bool))
    model(**batch.model_inputs)
    monitor.count_batch(batch)
    load = monitor.pop_expert_load(lambda t: t, 1, 0)
    assert not load.image_LE.any()
    assert load.text_LE.sum(1).tolist() == [40, 40]


def test_the_routers_of_gpt_oss_are_monitored() -> None:
    """Its gate is called router and has a bias; the logits are those of transformers' own output."""
    config = GptOssConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        attn_implementation="eager",
    )
    model = AutoModelForCausalLM.from_config(config).train()
    randomise(model.named_parameters(), seed=3)
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(0))
    batch = make_batch(ids, torch.ones(1, 12, dtype=torch.bool))
    with torch.no_grad():
        expected = model(input_ids=ids, output_router_logits=True).router_logits
    monitor = RouterMonitor(model)
    output = model(**batch.model_inputs)
    for found, layer in zip(monitor.pop_router_logits(), expected, strict=True):
        torch.testing.assert_close(found, layer)
    monitor.count_batch(batch)
    output.logits.sum().backward()
    assert monitor.metrics(lambda t: t, 1)["router/grad_norm"] > 0
    load = monitor.pop_expert_load(lambda t: t, 1, 0)
    chosen = torch.stack([layer.topk(2).indices for layer in expected])
    assert load.text_LE.tolist() == [torch.bincount(layer.flatten(), minlength=4).tolist() for layer in chosen]
