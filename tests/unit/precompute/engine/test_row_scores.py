"""Scores of rows against float64, exact counts and torch's own top-k."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precompute.engine import row_scores
from precompute.engine.row_scores import best_entries, draw, score_rows


def make_layer(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns hidden rows [R, H] and an output layer [V, H]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, 16, generator=generator)
    return hidden, torch.randn(vocab_size, 16, generator=generator) * scale / 4


@pytest.mark.parametrize("chunk_bytes", [1, 40_000, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_a_float64_softmax_whatever_the_chunk(
    chunk_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(row_scores.CHUNK_BYTES, "cpu", chunk_bytes)
    hidden, weight = (tensor.to(dtype) for tensor in make_layer(75, 1000))
    targets = torch.arange(75) * 13
    scores = score_rows(hidden, targets, lambda rows: rows @ weight.T, vocab_size=len(weight), top_k=7)
    assert scores is not None
    logprobs_RV = torch.log_softmax((hidden @ weight.T).double(), dim=1)
    torch.testing.assert_close(scores.own, logprobs_RV[torch.arange(75), targets].float(), atol=4e-6, rtol=0)
    torch.testing.assert_close(scores.logprobs, logprobs_RV.topk(7).values.float(), atol=4e-6, rtol=0)
    picked = logprobs_RV.gather(1, scores.ids.long()).float()
    torch.testing.assert_close(scores.logprobs, picked, atol=4e-6, rtol=0)
    assert scores.drawn.shape == (75, 0)


def test_without_kept_entries_the_own_logprobs_remain() -> None:
    hidden, weight = make_layer(5, 100)
    scores = score_rows(hidden, torch.arange(5), lambda rows: rows @ weight.T, vocab_size=len(weight), top_k=0)
    assert scores is not None
    assert scores.ids.shape == scores.logprobs.shape == (5, 0)
    expected = torch.log_softmax((hidden @ weight.T).double(), dim=1)[torch.arange(5), torch.arange(5)]
    torch.testing.assert_close(scores.own, expected.float(), atol=4e-6, rtol=0)


def test_a_rank_without_logits_scores_nothing() -> None:
    hidden, targets = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    assert score_rows(hidden, targets, lambda _: None, vocab_size=9, top_k=2) is None


def test_the_memory_of_logits_is_bounded_by_the_chunk() -> None:
    hidden, weight = make_layer(5000, 2000)
    sizes = []

    def logits(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows) * 2000 * 4)
        return rows @ weight.T

    score_rows(hidden, torch.zeros(5000, dtype=torch.int64), logits, vocab_size=2000, top_k=1)
    assert sum(sizes) == 5000 * 2000 * 4
    assert max(sizes) <= row_scores.CHUNK_BYTES["cpu"]
    assert len(sizes) == 2


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 2000), st.data())
def test_best_entries_are_those_of_topk(num_rows: int, size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, min(size, 70)))
    coarse = data.draw(st.booleans())
    values = torch.randn(num_rows, size, generator=torch.Generator().manual_seed(size + k))
    values = (values * 4).round() if coarse else values
    best, ids = best_entries(values, k)
    assert torch.equal(best, values.topk(k, dim=1).values)
    assert torch.equal(best, values.gather(1, ids))
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 64, 1000])
def test_draws_follow_the_distribution(size: int) -> None:
    """A chi-squared test of 200,000 draws, which one in a million correct programs would fail."""
    from scipy.stats import chi2

    generator = torch.Generator().manual_seed(size)
    weights = torch.rand(1, size, generator=generator) ** 3
    weights[0, size // 2] = 0.0
    uniforms = torch.rand(1, 200_000, dtype=torch.float64, generator=generator)
    drawn = draw(weights, uniforms)[0]
    counts = np.bincount(drawn.numpy(), minlength=size)
    expected = (weights[0].double() / weights[0].double().sum()).numpy() * 200_000
    assert counts[size // 2] == 0
    common = expected > 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert statistic < chi2.ppf(1 - 1e-6, common.sum())
    rare = ~common
    assert abs(counts[rare].sum() - expected[rare].sum()) <= 5 * np.sqrt(expected[rare].sum() + 1)


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]])
    uniforms = torch.tensor([[0.0, 0.2499, 0.25, 0.99, 1 - 2**-53]], dtype=torch.float64)
    assert draw(weights, uniforms).tolist() == [[1, 1, 3, 3, 3]]


def test_draws_do_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = make_layer(80, 500)
    uniforms = torch.rand(80, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.zeros(80, dtype=torch.int64)
    drawn = []
    for chunk_bytes in (1, 1 << 24):
        monkeypatch.setitem(row_scores.CHUNK_BYTES, "cpu", chunk_bytes)
        scores = score_rows(
            hidden, targets, lambda rows: rows @ weight.T, vocab_size=len(weight), top_k=0, uniforms_RD=uniforms
        )
        assert scores is not None
        drawn.append(scores.drawn)
    assert torch.equal(*drawn)
