"""Tests of models that change their logits after the output layer, against their own whole logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PreTrainedModel, Qwen2Config

from common.errors import ModelError
from tests.support import reference_unfused as unfused
from tests.support.models import randomise, tiny_llava, tiny_tokenizer
from tests.unit.train.loss.test_fused_output import make_batch
from train.config import LossConfig
from train.loss.fused_output import FusedOutput, ids_to_gather, to_row_logits
from train.loss.objective import compute_terms, step_loss, unit_counts
from train.model.compose import compose_student
from train.model.logit_transform import LogitTransform, find_logit_transform

VOCAB, OUTPUT = 250, 260
SIZES: dict[str, Any] = {
    "vocab_size": OUTPUT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Of each class the settings, and the transform that they stand for.
MODELS = {
    "granite": (GraniteConfig(**SIZES, logits_scaling=6.0), LogitTransform(1 / 6)),
    "gemma2": (Gemma2Config(**SIZES, final_logit_softcapping=3.0), LogitTransform(1.0, 3.0)),
    "cohere": (CohereConfig(**SIZES, logit_scale=0.3), LogitTransform(0.3)),
    "qwen2": (Qwen2Config(**SIZES), LogitTransform()),
}


def make_model(name: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(MODELS[name][0]).eval()
    # Logits of a few units, so that a cap of 3 bends them.
    randomise(model.named_parameters(), seed=1, std=0.3)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_transform_is_the_one_of_the_configuration(name: str) -> None:
    found, expected = find_logit_transform(make_model(name)), MODELS[name][1]
    assert found.scale == pytest.approx(expected.scale, rel=1e-7)
    assert found.cap == (None if expected.cap is None else pytest.approx(expected.cap, rel=1e-7))
    assert found.is_identity == (name == "qwen2")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    model = make_model(name).train()
    batch, config = make_batch(VOCAB), LossConfig(distillation=1.0, cross_entropy=0.5)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    ids_RJ, masked_RJ = ids_to_gather(batch, kept=True)

    def loss_and_gradients(rows: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = step_loss(compute_terms(rows, batch, config, vocab_size=VOCAB), unit_counts(batch))
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole_RV = model(**inputs).logits.flatten(0, 1)[batch.rows]
    rows = to_row_logits(unfused.gather_logits(whole_RV, ids_RJ, masked_RJ, VOCAB), masked_RJ)
    expected_loss, expected = loss_and_gradients(rows)
    output = FusedOutput(model, VOCAB)
    with output.scoring(batch, kept=True):
        model(**inputs)
        rows = output.read()
    found_loss, found = loss_and_gradients(rows)
    torch.testing.assert_close(found_loss, expected_loss, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[parameter], gradient, rtol=2e-4, atol=1e-6 + 1e-5 * scale)


def test_another_change_of_the_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen2")
    original = type(model).forward

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits = output.logits.abs().sqrt()
        return output

    monkeypatch.setattr(type(model), "forward", shifted)
    with pytest.raises(ModelError, match=r"Qwen2ForCausalLM: makes .* of the logit .*cannot be trained"):
        FusedOutput(model, VOCAB)


def test_a_layer_whose_rows_are_not_the_models_logits_is_refused() -> None:
    model = make_model("qwen2")
    layer = model.get_output_embeddings()
    original = layer.forward
    # Something between the weight and the logits that the fused pass does not know.
    layer.forward = lambda hidden: original(hidden * 1.01)
    with pytest.raises(ModelError, match=r"differ by .* from the model's own, expected at most"):
        FusedOutput(model, VOCAB)


@pytest.mark.slow
def test_a_llava_over_a_model_that_scales_its_logits_is_not_composed(tmp_path: Path) -> None:
    vision = tiny_llava(tmp_path / "vision")
    language = tmp_path / "granite"
    tokenizer = tiny_tokenizer(language)
    config = GraniteConfig(**{**SIZES, "vocab_size": len(tokenizer)}, logits_scaling=6.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(language)
    with pytest.raises(ModelError, match=r"GraniteForCausalLM changes its logits .*scale 0\.166667, cap None"):
        compose_student(vision, language, tmp_path / "out", seed=0)
    assert not (tmp_path / "out").exists()
