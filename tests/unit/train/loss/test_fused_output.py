"""Tests of the fused pass against autograd on whole logits. Axes as in train/loss/fused_output.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import reference_unfused as unfused
from tests.support.models import tiny_llava
from train.config import LossConfig
from train.data.collator import Batch
from train.loss.functional import distillation_loss
from train.loss.fused_output import FusedOutput, gather_logits, ids_to_gather, to_row_logits
from train.loss.objective import compute_terms, step_loss, unit_counts
from train.model.student import load_student

VOCAB, OUTPUT, HIDDEN, ROWS, KEPT = 37, 41, 12, 9, 5


class Layer:
    """Operands of the fused pass: float64 leaves, and distinct ids of which some are masked."""

    def __init__(
        self, rows: int = ROWS, hidden: int = HIDDEN, *, vocab: int = VOCAB, kept: int = KEPT, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden_RH, self.weight_VH = normal(rows, hidden), normal(vocab + 4, hidden)
        self.bias_V = normal(vocab + 4)
        self.ids_RJ = torch.rand(rows, vocab, generator=generator).argsort(1)[:, :kept]
        self.masked_RJ = torch.rand(rows, kept, generator=generator) < 0.7
        # The scored token may be one of the kept ones.
        own_R1 = torch.randint(vocab, (rows, 1), generator=generator)
        self.ids_RJ = torch.cat([self.ids_RJ, own_R1], 1)
        self.masked_RJ = torch.cat([self.masked_RJ, torch.zeros(rows, 1).bool()], 1)
        self.cotangent_RJ1 = normal(rows, kept + 2)
        self.vocab = vocab

    def leaves(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, bias = (
            each.to(dtype).requires_grad_() for each in (self.hidden_RH, self.weight_VH, self.bias_V)
        )
        return hidden, weight, bias

    def fused(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *, chunk: int | None = 7) -> Tensor:
        ids = self.ids_RJ, self.masked_RJ
        return gather_logits(hidden, weight, bias, *ids, vocab_size=self.vocab, chunk_ids=chunk)

    def unfused(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits_RV = nn.functional.linear(hidden, weight, bias)
        return unfused.gather_logits(logits_RV, self.ids_RJ, self.masked_RJ, self.vocab)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 6),
    hidden=st.integers(1, 5),
    vocab=st.integers(1, 23),
    chunk=st.integers(1, 30),
    data=st.data(),
)
def test_values_and_gradients_are_those_of_whole_logits_for_any_chunks(
    rows: int, hidden: int, vocab: int, chunk: int, data: st.DataObject
) -> None:
    layer = Layer(rows, hidden, vocab=vocab, kept=data.draw(st.integers(0, vocab)), seed=data.draw(st.integers(0, 99)))
    leaves = layer.leaves()
    found, expected = layer.fused(*leaves, chunk=chunk), layer.unfused(*leaves)
    # The logsumexp is about -1e30 if all ids are masked, and is then neither compared nor differentiated.
    is_finite_RJ1 = expected > -1e29
    torch.testing.assert_close(found[is_finite_RJ1], expected[is_finite_RJ1])
    assert (found[~is_finite_RJ1] < -1e29).all()
    cotangent_RJ1 = layer.cotangent_RJ1 * is_finite_RJ1
    for f, e in zip(
        torch.autograd.grad(found, leaves, cotangent_RJ1),
        torch.autograd.grad(expected, leaves, cotangent_RJ1),
        strict=True,
    ):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_gradients_agree_with_finite_differences(chunk: int) -> None:
    layer = Layer(rows=3, hidden=4, vocab=11, kept=3)
    assert torch.autograd.gradcheck(lambda *leaves: layer.fused(*leaves, chunk=chunk), layer.leaves())


def test_padding_of_the_output_layer_takes_no_part() -> None:
    layer = Layer()
    hidden, weight, _ = layer.leaves()
    with torch.no_grad():
        weight[VOCAB:] = 50.0
    found = layer.fused(hidden, weight, None)
    torch.testing.assert_close(found, layer.fused(hidden, weight[:VOCAB], None), rtol=0, atol=0)
    found.sum().backward()
    assert weight.grad is not None
    assert not weight.grad[VOCAB:].any()
    assert weight.grad[:VOCAB].any()


def test_only_trained_operands_get_a_gradient() -> None:
    layer = Layer()
    hidden, weight, bias = layer.leaves()
    layer.fused(hidden, weight.detach(), bias.detach()).sum().backward()
    layer.fused(hidden.detach(), weight, None).sum().backward()
    assert bias.grad is None
    expected = torch.autograd.grad(layer.unfused(hidden, weight, None).sum(), (hidden, weight))
    torch.testing.assert_close(weight.grad, expected[1])
    with torch.no_grad():
        assert not layer.fused(hidden, weight, bias).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_are_no_further_from_float64_than_those_of_whole_logits(dtype: torch.dtype) -> None:
    """The loss is the bucketed KL and the scored token's cross-entropy together."""
    layer = Layer(rows=64, hidden=48, vocab=997, kept=16)
    layer.masked_RJ[:, :-1] = True
    narrow = [leaf.detach().to(dtype) for leaf in (layer.hidden_RH, layer.weight_VH / 7)]
    teacher_RK = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)).log_softmax(1) - 0.3
    rest_R = 1 - teacher_RK.exp().sum(1)

    def gradients(of_dtype: torch.dtype, *, fused: bool) -> tuple[Tensor, ...]:
        hidden, weight = (each.to(of_dtype).requires_grad_() for each in narrow)
        if fused:
            rows = to_row_logits(layer.fused(hidden, weight, None, chunk=100), layer.masked_RJ)
            kl_R = distillation_loss(rows, teacher_RK, rest_R, vocab_size=layer.vocab)
            own_R = rows.own_logprobs
        else:
            logits_RV = hidden @ weight.T
            kept = layer.ids_RJ[:, :-1], teacher_RK, rest_R
            kl_R = unfused.distillation_loss(logits_RV, *kept, vocab_size=layer.vocab)
            own_R = unfused.own_logprobs(logits_RV, layer.ids_RJ[:, -1], vocab_size=layer.vocab)
        hidden_gradient, weight_gradient = torch.autograd.grad((kl_R - own_R).mean(), (hidden, weight))
        return hidden_gradient, weight_gradient

    exact = gradients(torch.float64, fused=False)
    for found, unfused_found, truth in zip(
        gradients(dtype, fused=True), gradients(dtype, fused=False), exact, strict=True
    ):
        assert found.dtype == dtype
        error, unfused_error = ((each.double() - truth).norm() / truth.norm() for each in (found, unfused_found))
        # In float32 both errors are rounding, and the order of the sums decides which is larger.
        assert error <= (unfused_error if dtype == torch.bfloat16 else 2 * unfused_error)


def test_autocast_does_not_narrow_the_pass() -> None:
    layer = Layer()
    leaves = layer.leaves(torch.float32)
    expected = layer.fused(*leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.fused(*leaves)
        gradients = torch.autograd.grad(found.sum(), leaves)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), leaves), rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.numel())
        return result


@pytest.mark.slow
def test_no_operation_makes_a_tensor_of_tokens_by_vocabulary() -> None:
    layer = Layer(rows=300, hidden=8, vocab=1000)
    leaves = layer.leaves(torch.bfloat16)
    with LargestTensor() as fused:
        layer.fused(*leaves, chunk=64).sum().backward()
    with LargestTensor() as unfused_pass:
        layer.unfused(*leaves).sum().backward()
    assert unfused_pass.largest >= 300 * 1000
    assert fused.largest == 300 * 64


@pytest.mark.slow
def test_the_default_chunk_bounds_logits_and_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.loss.fused_output._CHUNK_ENTRIES", {"cpu": 6000})
    monkeypatch.setattr("train.loss.fused_output._MIN_CHUNK_IDS", 2)
    for rows, hidden in ((300, 8), (8, 300)):
        layer = Layer(rows, hidden, vocab=1000, kept=1)
        ids = layer.ids_RJ, layer.masked_RJ
        hidden_RH, weight_VH = layer.hidden_RH.float(), layer.weight_VH.bfloat16()
        with LargestTensor() as fused:
            gather_logits(hidden_RH, weight_VH, None, *ids, vocab_size=1000)
        assert fused.largest == max(6000, rows * hidden)


@pytest.mark.slow  # tracing
def test_a_compiled_caller_gets_the_same_values_and_gradients() -> None:
    layer = Layer()
    leaves = layer.leaves(torch.float32)
    expected = layer.fused(*leaves)
    found = torch.compile(layer.fused, backend="aot_eager")(*leaves)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, leaves, layer.cotangent_RJ1.float())
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, leaves, layer.cotangent_RJ1.float()))


# In a model


def make_batch(vocab_size: int, num_pairs: int = 0) -> Batch:
    """Returns four text sequences of 10 tokens; rows are given, ids and kept entries are drawn at random."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocab_size, (4, 10), generator=generator)
    rows = torch.tensor([2, 3, 4, 11, 12, 25, 26, 27, 28, 33, 38])
    ids = torch.rand(len(rows), vocab_size, generator=generator).argsort(1)[:, :6]
    logprobs = torch.randn(len(rows), 6, generator=generator).log_softmax(1) - 0.2
    return Batch(
        sample_ids=(),
        num_pairs=num_pairs,
        input_ids=input_ids,
        num_sequences=len(input_ids),
        attention_mask=torch.ones_like(input_ids),
        token_mask=torch.ones_like(input_ids).bool(),
        image_mask=torch.zeros_like(input_ids).bool(),
        rows=rows,
        targets=input_ids.flatten()[rows + 1],
        row_sequence=rows // 10,
        topk_ids=ids,
        topk_logprobs=logprobs,
        rest_mass=1 - logprobs.exp().sum(1),
        reference_logprobs=torch.tensor([-17.0, -8.0, -23.0, -12.0], dtype=torch.float64),
    )


OBJECTIVES = [
    LossConfig(distillation=1.0, cross_entropy=0.5),
    LossConfig(distillation=1.0, divergence="jensen_shannon"),
    LossConfig(cross_entropy=1.0),
    LossConfig(preference=1.0, beta=0.3),
    LossConfig(preference=1.0, preference_type="kto_pair"),
    LossConfig(preference=1.0, length_normalised=True),
]


@pytest.mark.slow
@pytest.mark.parametrize("config", OBJECTIVES, ids=range(len(OBJECTIVES)))
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_gets_the_gradient_of_whole_logits(tmp_path: Path, tied: bool, config: LossConfig) -> None:
    """The model's layers are recomputed in the backward pass, and its output layer is tied or not."""
    model = load_student(tiny_llava(tmp_path, num_layers=2, tied=tied), dtype=torch.float32)
    model.train()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.gradient_checkpointing_enable({"use_reentrant": False})
    vocab_size = 250
    batch = make_batch(vocab_size, num_pairs=2 if config.preference else 0)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    kept = config.distillation > 0

    def gradients(rows: Any) -> dict[str, Tensor]:
        model.zero_grad()
        terms = compute_terms(rows, batch, config, vocab_size=vocab_size)
        step_loss(terms, unit_counts(batch)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    ids_RJ, masked_RJ = ids_to_gather(batch, kept=kept)
    whole_RV = model(**inputs).logits.flatten(0, 1)[batch.rows]
    expected = gradients(to_row_logits(unfused.gather_logits(whole_RV, ids_RJ, masked_RJ, vocab_size), masked_RJ))
    output = FusedOutput(model, vocab_size)
    with output.scoring(batch, kept=kept):
        model(**inputs)
        rows = output.read()
    found = gradients(rows)
    assert "lm_head.weight" in found or tied
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_outside_of_scoring_the_output_layer_is_unchanged(tmp_path: Path) -> None:
    model = load_student(tiny_llava(tmp_path, num_layers=2), dtype=torch.float32)
    input_ids = torch.arange(10, 18)[None]
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(input_ids=input_ids).logits
        output = FusedOutput(model, 250)
        batch = make_batch(250)
        with output.scoring(batch, kept=True):
            assert model(input_ids=batch.input_ids).logits.shape == (batch.num_rows, 8)
        with pytest.raises(RuntimeError, match="stop"), output.scoring(batch, kept=True):
            raise RuntimeError("stop")
        assert torch.equal(model(input_ids=input_ids).logits, expected)
    assert list(model.state_dict()) == names


def test_an_output_layer_smaller_than_the_tokenizer_is_refused() -> None:
    layer = Layer()
    layer.vocab = OUTPUT + 1
    with pytest.raises(ValueError, match=f"{OUTPUT} ids, the tokenizer {OUTPUT + 1}"):
        layer.fused(layer.hidden_RH, layer.weight_VH, None)


# Configuration


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"distillation": 1.0, "temperature": 2.0}, 'temperature 2.0.*add tail = "renormalise"'),
        ({"distillation": 1.0, "temperature": 2.0, "tail": "ignore"}, "temperature 2.0"),
        ({"distillation": 1.0, "divergence": "reverse_kl", "tail": "ignore"}, '"reverse_kl" with tail "ignore"'),
        ({"preference": 1.0, "preference_type": "ipo", "label_smoothing": 0.1}, 'found "ipo"'),
    ],
)
def test_settings_without_a_meaning_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossConfig.model_validate(table)


def test_settings_with_a_meaning_are_accepted() -> None:
    LossConfig.model_validate({"distillation": 1.0, "temperature": 2.0, "tail": "renormalise"})
    LossConfig.model_validate({"distillation": 1.0, "divergence": "total_variation", "tail": "bucket"})
    LossConfig.model_validate({"preference": 1.0, "label_smoothing": 0.1, "length_normalised": True})
