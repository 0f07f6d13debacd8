"""Tests of the distillation loss, log-probabilities and router losses. Axes as in train/loss/functional.py."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import reference_losses as reference
from tests.support.accumulation import DTYPES, assert_accumulated
from tests.support.fused_rows import distillation_loss, own_logprobs
from train.loss.functional import load_balancing_loss, sequence_logprobs

TAILS = ["bucket", "renormalise", "ignore"]
FORMS = [
    *(("forward_kl", tail, 1.0) for tail in TAILS),
    *((other, tail, 1.0) for other in ("reverse_kl", "jensen_shannon", "total_variation") for tail in TAILS[:2]),
    ("forward_kl", "renormalise", 2.5),
    ("reverse_kl", "renormalise", 0.5),
    ("jensen_shannon", "renormalise", 4.0),
]
NUM_ROWS, VOCAB, OUTPUT, KEPT = 6, 23, 29, 5


def teacher_topk(probs_RV: Tensor, num_kept: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs_RK, ids_RK = probs_RV.log().topk(num_kept)
    outside_RV = probs_RV.scatter(1, ids_RK, 0.0)
    return ids_RK, logprobs_RK, outside_RV.sum(1)


def random_rows(
    *, num_kept: int = KEPT, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns student logits over a padded output layer, the teacher's probabilities, its kept entries and rest."""
    generator = torch.Generator().manual_seed(seed)
    logits_RV = torch.randn(NUM_ROWS, OUTPUT, generator=generator, dtype=torch.float64).mul(2).to(dtype)
    probs_RV = torch.randn(NUM_ROWS, VOCAB, generator=generator, dtype=torch.float64).mul(2).softmax(1)
    teacher_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    ids_RK, logprobs_RK, rest_R = teacher_topk(probs_RV, num_kept)
    return logits_RV, probs_RV, ids_RK, logprobs_RK.to(teacher_dtype), rest_R.to(teacher_dtype)


def empty_slots(ids_RK: Tensor, logprobs_RK: Tensor, rest_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the same rows with the last r slots of row r emptied, up to all of them."""
    slots_K = torch.arange(ids_RK.shape[1])
    empty_RK = slots_K >= ids_RK.shape[1] - torch.arange(ids_RK.shape[0])[:, None]
    dropped_R = (logprobs_RK.exp() * empty_RK).sum(1)
    return ids_RK.masked_fill(empty_RK, 0), logprobs_RK.masked_fill(empty_RK, -torch.inf), rest_R + dropped_R


# Distillation


@pytest.mark.parametrize(("divergence", "tail", "temperature"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distillation_agrees_with_the_float64_reference(
    dtype: torch.dtype, divergence: str, tail: str, temperature: float
) -> None:
    logits_RV, _, *teacher = random_rows(dtype=dtype)
    teacher = [*empty_slots(*teacher)]
    form: dict[str, Any] = {"divergence": divergence, "tail": tail, "temperature": temperature}
    expected_R = reference.distillation(logits_RV.double(), *teacher, vocab_size=VOCAB, **form)
    loss_R = distillation_loss(logits_RV, *teacher, vocab_size=VOCAB, **form)
    assert_accumulated(loss_R, expected_R, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("divergence", "tail", "temperature"), FORMS)
@pytest.mark.parametrize("num_kept", [1, KEPT, VOCAB])
def test_distillation_gradient_agrees_with_finite_differences(
    divergence: str, tail: str, temperature: float, num_kept: int
) -> None:
    logits_RV, _, *teacher = random_rows(num_kept=num_kept, dtype=torch.float64)
    teacher = [*empty_slots(*teacher)]
    logits_RV.requires_grad_()
    form = {"divergence": divergence, "tail": tail, "temperature": temperature}
    assert torch.autograd.gradcheck(lambda z_RV: distillation_loss(z_RV, *teacher, vocab_size=VOCAB, **form), logits_RV)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", "total_variation"])
@pytest.mark.parametrize("tail", TAILS[:2])
def test_the_student_that_equals_the_teacher_has_no_loss_by_any_divergence(divergence: str, tail: str) -> None:
    _, probs_RV, *teacher = random_rows(dtype=torch.float64)
    loss_R = distillation_loss(probs_RV.log() + 3.0, *teacher, vocab_size=VOCAB, tail=tail, divergence=divergence)
    torch.testing.assert_close(loss_R, torch.zeros_like(loss_R), rtol=0, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_with_every_id_kept_a_temperature_is_that_of_both_softmaxes(temperature: float) -> None:
    logits_RV, probs_RV, *teacher = random_rows(num_kept=VOCAB, dtype=torch.float64)
    student_RV = (logits_RV[:, :VOCAB] / temperature).log_softmax(1)
    teacher_RV = (probs_RV.log() / temperature).log_softmax(1)
    expected_R = temperature**2 * torch.nn.functional.kl_div(student_RV, teacher_RV, reduction="none", log_target=True)
    loss_R = distillation_loss(logits_RV, *teacher, vocab_size=VOCAB, tail="renormalise", temperature=temperature)
    torch.testing.assert_close(loss_R, expected_R.sum(1))


def test_a_reverse_kl_against_a_teacher_without_rest_is_finite() -> None:
    """The teacher's rest counts as 2e-6, because captures store a smaller one as 0."""
    logits_RV, _, ids_RK, logprobs_RK, rest_R = random_rows(dtype=torch.float64)
    logprobs_RK = logprobs_RK.log_softmax(1)
    loss_R = distillation_loss(logits_RV, ids_RK, logprobs_RK, rest_R * 0, vocab_size=VOCAB, divergence="reverse_kl")
    expected_R = reference.distillation(
        logits_RV, ids_RK, logprobs_RK, rest_R * 0 + 2e-6, vocab_size=VOCAB, tail="bucket", divergence="reverse_kl"
    )
    np.testing.assert_allclose(loss_R, expected_R, rtol=1e-12)


@pytest.mark.parametrize("tail", TAILS)
def test_with_every_id_kept_each_tail_is_the_full_kl(tail: str) -> None:
    logits_RV, probs_RV, *teacher = random_rows(num_kept=VOCAB)
    student_RV = [reference.softmax(row) for row in logits_RV[:, :VOCAB]]
    expected_R = [reference.full_kl(p, q) for p, q in zip(probs_RV, student_RV, strict=True)]
    loss_R = distillation_loss(logits_RV, *teacher, vocab_size=VOCAB, tail=tail)
    np.testing.assert_allclose(loss_R, expected_R, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("num_kept", "rest"), [(VOCAB, 0.0), (VOCAB, 1e-7), (KEPT, 0.0), (KEPT, -1e-7)])
def test_rest_mass_left_by_rounding_adds_nothing(num_kept: int, rest: float) -> None:
    """If every id is kept, any rest is rounding; otherwise only a negative rest is."""
    logits_RV, _, ids_RK, logprobs_RK, rest_R = random_rows(num_kept=num_kept)
    logits_RV.requires_grad_()
    rounded_R = torch.full_like(rest_R, rest)
    loss_R = distillation_loss(logits_RV, ids_RK, logprobs_RK, rounded_R, vocab_size=VOCAB)
    exact_R = distillation_loss(logits_RV, ids_RK, logprobs_RK, rest_R, vocab_size=VOCAB, tail="ignore")
    torch.testing.assert_close(loss_R, exact_R)
    gradients = [torch.autograd.grad(loss.sum(), logits_RV) for loss in (loss_R, exact_R)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_padding_mass_of_the_teacher_is_divided_out_where_every_id_is_kept() -> None:
    """Otherwise a student that agrees on every real token would have a loss below zero."""
    logits_RV, _, *_ = random_rows()
    student_RV = logits_RV[:, :VOCAB].double().log_softmax(1).float()
    ids_RK = torch.arange(VOCAB).expand(NUM_ROWS, VOCAB)
    padding_R = torch.full((NUM_ROWS,), 0.1)
    teacher_RK = student_RV + math.log(0.9)
    loss_R = distillation_loss(logits_RV, ids_RK, teacher_RK, padding_R, vocab_size=VOCAB)
    np.testing.assert_allclose(loss_R, 0.0, atol=1e-6)


@pytest.mark.parametrize(("teacher_0", "student_0"), [(0.0, 4.0), (0.0, -1e4), (0.9, 4.0)])
@pytest.mark.parametrize("tail", TAILS)
def test_empty_slots_contribute_nothing(tail: str, teacher_0: float, student_0: float) -> None:
    """Empty slots have the id 0, here one that the teacher keeps or not, with a high or a low logit of the student."""
    logits_RV, probs_RV, *_ = random_rows()
    probs_RV[:, 0] = teacher_0
    teacher = teacher_topk(probs_RV / probs_RV.sum(1, keepdim=True), KEPT)
    logits_RV[:, 0] = student_0
    ids_RK, logprobs_RK, rest_R = empty_slots(*teacher)
    expected_R = reference.distillation(logits_RV, ids_RK, logprobs_RK, rest_R, vocab_size=VOCAB, tail=tail)
    logits_RV.requires_grad_()
    loss_R = distillation_loss(logits_RV, ids_RK, logprobs_RK, rest_R, vocab_size=VOCAB, tail=tail)
    np.testing.assert_allclose(loss_R.detach(), expected_R, rtol=2e-6, atol=1e-6)
    (gradient_RV,) = torch.autograd.grad(loss_R.sum(), logits_RV)
    for row in range(KEPT):
        compact_RK = ids_RK[row : row + 1, : KEPT - row], logprobs_RK[row : row + 1, : KEPT - row]
        alone_R = distillation_loss(
            logits_RV[row : row + 1], *compact_RK, rest_R[row : row + 1], vocab_size=VOCAB, tail=tail
        )
        torch.testing.assert_close(gradient_RV[row], torch.autograd.grad(alone_R, logits_RV)[0][row])
    torch.testing.assert_close(gradient_RV[KEPT], torch.zeros(OUTPUT), atol=1e-6, rtol=0)


@pytest.mark.parametrize("tail", TAILS)
def test_no_rows_give_no_losses(tail: str) -> None:
    empty_RK = torch.zeros(0, 0)
    loss_R = distillation_loss(
        torch.zeros(0, OUTPUT), empty_RK.long(), empty_RK, torch.zeros(0), vocab_size=VOCAB, tail=tail
    )
    assert loss_R.shape == (0,)


@pytest.mark.parametrize("tail", TAILS)
def test_padding_of_the_output_layer_takes_no_part(tail: str) -> None:
    logits_RV, _, *teacher = random_rows()
    logits_RV[:, VOCAB:] = 50.0
    logits_RV.requires_grad_()
    loss_R = distillation_loss(logits_RV, *teacher, vocab_size=VOCAB, tail=tail)
    unpadded_R = distillation_loss(logits_RV[:, :VOCAB], *teacher, vocab_size=VOCAB, tail=tail)
    torch.testing.assert_close(loss_R, unpadded_R, rtol=0, atol=0)
    loss_R.sum().backward()
    assert logits_RV.grad is not None
    assert (logits_RV.grad[:, VOCAB:] == 0).all()
    assert (logits_RV.grad[:, :VOCAB] != 0).any()


@pytest.mark.parametrize("tail", ["bucket", "ignore"])
def test_a_teacher_sure_of_one_id_gives_its_cross_entropy(tail: str) -> None:
    logits_RV, _, ids_RK, logprobs_RK, rest_R = random_rows()
    logprobs_RK = torch.full_like(logprobs_RK, -torch.inf)
    logprobs_RK[:, 0] = 0.0
    loss_R = distillation_loss(logits_RV, ids_RK, logprobs_RK, rest_R * 0, vocab_size=VOCAB, tail=tail)
    expected_R = torch.nn.functional.cross_entropy(logits_RV[:, :VOCAB], ids_RK[:, 0], reduction="none")
    torch.testing.assert_close(loss_R, expected_R)


def test_the_student_that_equals_the_teacher_has_no_bucket_loss_and_no_gradient() -> None:
    _, probs_RV, *teacher = random_rows(dtype=torch.float64)
    logits_RV = (probs_RV.log() + 3.0).requires_grad_()
    loss_R = distillation_loss(logits_RV, *teacher, vocab_size=VOCAB, tail="bucket")
    loss_R.sum().backward()
    torch.testing.assert_close(loss_R.detach(), torch.zeros_like(loss_R), rtol=0, atol=1e-14)
    torch.testing.assert_close(logits_RV.grad, torch.zeros_like(logits_RV), rtol=0, atol=1e-14)


def test_a_student_rest_below_float32_rounding_keeps_its_logarithm() -> None:
    """One kept id at logit 60, the others at 0: rest_S is (VOCAB - 1) exp(-60), but 1 - p_S rounds to 0."""
    logits_RV = torch.zeros(1, VOCAB)
    logits_RV[0, 7] = 60.0
    logits_RV.requires_grad_()
    teacher = torch.tensor([[7]]), torch.tensor([[math.log(0.75)]]), torch.tensor([0.25])
    loss_R = distillation_loss(logits_RV, *teacher, vocab_size=VOCAB)
    expected = 0.75 * math.log(0.75) + 0.25 * (math.log(0.25) - math.log(VOCAB - 1) + 60.0)
    assert loss_R.item() == pytest.approx(expected, rel=1e-6)
    loss_R.sum().backward()
    assert logits_RV.grad[0, 7].item() == pytest.approx(0.25, rel=1e-6)
    assert logits_RV.grad[0, 0].item() == pytest.approx(-0.25 / (VOCAB - 1), rel=1e-6)


def test_an_output_layer_smaller_than_the_tokenizer_is_refused() -> None:
    logits_RV, _, *teacher = random_rows()
    with pytest.raises(ValueError, match=f"{OUTPUT} ids, the tokenizer {OUTPUT + 1}"):
        distillation_loss(logits_RV, *teacher, vocab_size=OUTPUT + 1, tail="renormalise")
    with pytest.raises(ValueError, match=f"{OUTPUT} ids, the tokenizer {OUTPUT + 1}"):
        own_logprobs(logits_RV, teacher[0][:, 0], vocab_size=OUTPUT + 1)


# Log-probabilities


@pytest.mark.parametrize("dtype", DTYPES)
def test_own_logprobs_agree_with_the_float64_reference(dtype: torch.dtype) -> None:
    logits_RV, _, ids_RK, _, _ = random_rows(dtype=dtype)
    logits_RV[:, VOCAB:] = 50.0  # padding, which must take no part
    ids_R = ids_RK[:, 2]
    logprobs_R = own_logprobs(logits_RV, ids_R, vocab_size=VOCAB)
    assert_accumulated(logprobs_R, reference.own_logprobs(logits_RV.double(), ids_R, VOCAB), dtype)


def test_own_logprobs_gradient_agrees_with_finite_differences() -> None:
    logits_RV, _, ids_RK, _, _ = random_rows(dtype=torch.float64)
    ids_R = ids_RK[:, 0]
    logits_RV.requires_grad_()
    assert torch.autograd.gradcheck(lambda z_RV: own_logprobs(z_RV, ids_R, vocab_size=VOCAB), logits_RV)


def test_tokens_in_any_order_are_summed_by_sequence() -> None:
    logprobs_R = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0], requires_grad=True)
    sums_B = sequence_logprobs(logprobs_R, torch.tensor([3, 0, 3, 1, 0]), 4)
    assert sums_B.tolist() == [-18.0, -8.0, 0.0, -5.0]
    (sums_B * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert logprobs_R.grad.tolist() == [1000.0, 1.0, 1000.0, 10.0, 1.0]


def test_bf16_tokens_are_summed_in_float32() -> None:
    """In bf16 the sum of a thousand -1s would stop at -256."""
    sums_B = sequence_logprobs(torch.full((1000,), -1.0, dtype=torch.bfloat16), torch.zeros(1000).long(), 1)
    assert sums_B.dtype == torch.float32
    assert sums_B.tolist() == [-1000.0]


# Router balance


def random_router(num_layers: int = 3, num_tokens: int = 11, num_experts: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(num_tokens, num_experts, generator=generator) for _ in range(num_layers)]


MASKS = {"all": torch.ones(11), "some": torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1]).bool()}


@pytest.mark.parametrize("mask_T", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_load_balancing_agrees_with_the_float64_reference(dtype: torch.dtype, top_k: int, mask_T: Tensor) -> None:
    router = [layer.to(dtype) for layer in random_router()]
    expected = reference.load_balancing([layer.double().numpy() for layer in router], mask_T, top_k)
    assert_accumulated(load_balancing_loss(router, mask_T, top_k=top_k), expected, dtype)


@pytest.mark.slow  # importing transformers' model code
@pytest.mark.parametrize("top_k", [1, 2])
def test_load_balancing_agrees_with_transformers(top_k: int) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    router = [layer.requires_grad_() for layer in random_router(num_tokens=12)]
    mask_T = torch.tensor([1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0])
    for ours, theirs in [(torch.ones(12), None), (mask_T, mask_T.reshape(2, 6))]:
        loss = load_balancing_loss(router, ours, top_k=top_k)
        expected = load_balancing_loss_func(tuple(router), 5, top_k, theirs)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        gradients = torch.autograd.grad(loss, router)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, router), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("top_k", [1, 2])
def test_even_routing_costs_top_k_and_collapse_costs_the_number_of_experts(top_k: int) -> None:
    even = torch.zeros(8, 4)
    assert load_balancing_loss([even], torch.ones(8), top_k=top_k).item() == pytest.approx(top_k)
    collapsed = torch.tensor([100.0, 0.0, 0.0, 0.0]).expand(8, 4)
    assert load_balancing_loss([collapsed], torch.ones(8), top_k=top_k).item() == pytest.approx(4.0)


def test_load_balancing_counts_the_layers_together() -> None:
    """Two layers that collapse onto different ones of two experts are even together: 2 (1/4 + 1/4) = 1."""
    left, right = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])
    assert load_balancing_loss([left, right], torch.ones(1), top_k=1).item() == pytest.approx(1.0)
    assert load_balancing_loss([left, left], torch.ones(1), top_k=1).item() == pytest.approx(2.0)


def test_load_balancing_of_padding_alone_is_zero_with_a_zero_gradient() -> None:
    router = [layer.requires_grad_() for layer in random_router()]
    loss = load_balancing_loss(router, torch.zeros(11), top_k=2)
    assert loss.item() == 0.0
    loss.backward()
    assert all((layer.grad == 0).all() for layer in router)


def test_load_balancing_gradient_agrees_with_finite_differences() -> None:
    router = [layer.double().requires_grad_() for layer in random_router()]
    assert torch.autograd.gradcheck(lambda *layers: load_balancing_loss(layers, MASKS["some"], top_k=2), tuple(router))
