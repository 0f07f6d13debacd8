"""Tests that draws from the teacher's distribution give the gradient of the whole distribution on average.

Axes as in train/loss/functional.py; D draws of one row.
"""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.shards.scores import TeacherScores, scores_from_draws, scores_from_topk
from tests.support import reference_losses as reference
from tests.support.accumulation import assert_accumulated
from tests.support.fused_rows import distillation_loss

VOCAB, STUDENT_OUTPUT = 23, 29
NUM_DRAWS, NUM_TRIALS = 12, 40_000

Array = NDArray[Any]


@pytest.fixture(scope="module")
def teacher_V() -> Array:
    """Returns float64 probabilities of the teacher; half of the mass is outside the best four."""
    return reference.softmax(1.5 * np.random.default_rng(0).normal(size=VOCAB))


@pytest.fixture(scope="module")
def student_V() -> Tensor:
    """Returns one row of the student's logits, float64."""
    return torch.from_numpy(1.5 * np.random.default_rng(1).normal(size=STUDENT_OUTPUT))


def draw_ids(probs_V: Array, num_rows: int) -> Array:
    return np.random.default_rng(2).choice(len(probs_V), (num_rows, NUM_DRAWS), p=probs_V)


def gradients(student_V: Tensor, scores: TeacherScores, tail: str) -> Array:
    """Returns the gradient of each row's loss with respect to the same student logits, float64 [R, VOCAB]."""
    logits_RV = student_V.repeat(scores.num_rows, 1).requires_grad_()
    ids_RK, logprobs_RK = (torch.from_numpy(array) for array in scores.topk())
    rest_R = torch.from_numpy(scores.rest_mass)
    loss_R = distillation_loss(logits_RV, ids_RK, logprobs_RK.double(), rest_R, vocab_size=VOCAB, tail=tail)
    loss_R.sum().backward()
    assert logits_RV.grad is not None
    gradient_RV: Array = logits_RV.grad[:, :VOCAB].numpy()
    return gradient_RV


def max_standard_errors(samples_RV: Array, expected_V: Array) -> float:
    """Returns the largest distance of a coordinate's mean from the expected value, in standard errors."""
    error_V = samples_RV.std(axis=0, ddof=1) / math.sqrt(len(samples_RV))
    assert error_V.max() < 1e-3
    return float((np.abs(samples_RV.mean(axis=0) - expected_V) / error_V).max())


def test_the_gradient_of_draws_is_on_average_that_of_the_full_kl(teacher_V: Array, student_V: Tensor) -> None:
    scores = scores_from_draws(np.zeros(NUM_TRIALS), draw_ids(teacher_V, NUM_TRIALS))
    expected_V = reference.kl_gradient(teacher_V[:VOCAB], student_V[:VOCAB])
    assert max_standard_errors(gradients(student_V, scores, "ignore"), expected_V) < 4.5


def test_the_gradient_of_multinomial_counts_is_on_average_that_of_the_full_kl(
    teacher_V: Array, student_V: Tensor
) -> None:
    """The counts come from another generator, and the test computes the shares itself."""
    probs_V = teacher_V[:VOCAB] / teacher_V[:VOCAB].sum()
    counts_RV = np.random.default_rng(3).multinomial(NUM_DRAWS, probs_V, NUM_TRIALS)
    with np.errstate(divide="ignore"):
        logprobs_RV = torch.from_numpy(np.log(counts_RV / NUM_DRAWS))
    logits_RV = student_V.repeat(NUM_TRIALS, 1).requires_grad_()
    ids_RV = torch.arange(VOCAB).repeat(NUM_TRIALS, 1).masked_fill(logprobs_RV == -torch.inf, 0)
    rest_R = torch.zeros(NUM_TRIALS)
    distillation_loss(logits_RV, ids_RV, logprobs_RV, rest_R, vocab_size=VOCAB, tail="ignore").sum().backward()
    assert logits_RV.grad is not None
    expected_V = reference.kl_gradient(probs_V, student_V[:VOCAB])
    assert max_standard_errors(logits_RV.grad[:, :VOCAB].numpy(), expected_V) < 4.5


@pytest.mark.parametrize("tail", ["ignore", "renormalise"])
def test_the_gradient_of_the_best_entries_is_not_that_of_the_full_kl(
    teacher_V: Array, student_V: Tensor, tail: str
) -> None:
    """With as many best entries as are drawn on average the gradient is biased, which is why entries are drawn."""
    num_kept = round(float(np.mean(scores_from_draws(np.zeros(500), draw_ids(teacher_V, 500)).counts)))
    order_K = np.argsort(-teacher_V[:VOCAB])[:num_kept]
    scores = scores_from_topk(np.zeros(1), order_K[None], np.log(teacher_V[order_K])[None])
    (gradient_V,) = gradients(student_V, scores, tail)
    error_V = np.abs(gradient_V - reference.kl_gradient(teacher_V[:VOCAB], student_V[:VOCAB]))
    assert error_V.max() > 0.01, "ten times what the mean over draws is allowed"


def test_dividing_by_the_drawn_mass_biases_the_gradient(teacher_V: Array, student_V: Tensor) -> None:
    scores = scores_from_draws(np.zeros(NUM_TRIALS), draw_ids(teacher_V, NUM_TRIALS))
    expected_V = reference.kl_gradient(teacher_V[:VOCAB], student_V[:VOCAB])
    assert max_standard_errors(gradients(student_V, scores, "renormalise"), expected_V) > 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_of_draws_agrees_with_the_float64_reference(teacher_V: Array, dtype: torch.dtype) -> None:
    drawn_RD = draw_ids(teacher_V, 8)
    scores = scores_from_draws(np.zeros(8), drawn_RD)
    logits_RV = torch.randn(8, STUDENT_OUTPUT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits_RV = logits_RV.mul(2).to(dtype)
    counts = [Counter(i for i in row if i < VOCAB) for row in drawn_RD.tolist()]
    expected_R = reference.sampled(logits_RV.double(), counts, NUM_DRAWS, VOCAB)
    ids_RK, logprobs_RK = (torch.from_numpy(array) for array in scores.topk())
    rest_R = torch.from_numpy(scores.rest_mass)
    loss_R = distillation_loss(logits_RV, ids_RK, logprobs_RK, rest_R, vocab_size=VOCAB, tail="ignore")
    assert_accumulated(loss_R, expected_R, dtype)
