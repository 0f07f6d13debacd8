import math
from collections import Counter
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.shards.scores import (
    MAX_DRAWS,
    TeacherScores,
    empirical_logprobs,
    rest_mass,
    scores_from_draws,
    scores_from_topk,
)


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Draws distinct ids [R, K] and log-probs [R, K] with ties and empty slots; K from 0 to the vocabulary size."""
    num_rows, vocab_size = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    top_k = draw(st.integers(0, vocab_size))
    rows = st.permutations(range(vocab_size)).map(lambda ids: ids[:top_k])
    ids = np.array([draw(rows) for _ in range(num_rows)], np.int64).reshape(num_rows, top_k)
    few_values = st.sampled_from([-np.inf, -0.5, -1.0, -1.5, -30.0])
    return ids, draw(hnp.arrays(np.float32, (num_rows, top_k), elements=few_values))


@given(rectangles())
def test_rows_are_ordered_by_logprob_then_id_whatever_the_order_of_input(
    rectangle: tuple[np.ndarray, np.ndarray],
) -> None:
    ids, logprobs = rectangle
    scores = scores_from_topk(np.zeros(len(ids), np.float32), ids, logprobs)
    kept = [
        sorted(((-float(p), int(i)) for i, p in zip(*row, strict=True) if p > -math.inf))
        for row in zip(ids, logprobs, strict=True)
    ]
    assert scores.counts.tolist() == [len(row) for row in kept]
    assert scores.ids.tolist() == [i for row in kept for _, i in row]
    assert scores.logprobs.tolist() == [-p for row in kept for p, _ in row]
    assert scores.ids.dtype == scores.counts.dtype == np.int32
    assert scores.logprobs.dtype == np.float32


@given(rectangles())
def test_topk_spreads_the_rows_over_a_rectangle(rectangle: tuple[np.ndarray, np.ndarray]) -> None:
    scores = scores_from_topk(np.zeros(len(rectangle[0]), np.float32), *rectangle)
    width = max(scores.counts.tolist())
    entries = iter(zip(scores.ids.tolist(), scores.logprobs.tolist(), strict=True))
    expected = []
    for count in scores.counts.tolist():
        row = [next(entries) for _ in range(count)]
        expected.append(row + [(0, -math.inf)] * (width - count))
    ids_RK, logprobs_RK = scores.topk()
    assert ids_RK.dtype == np.int64
    assert logprobs_RK.dtype == np.float32
    assert ids_RK.shape == (len(expected), width)
    for row, ids, logprobs in zip(expected, ids_RK.tolist(), logprobs_RK.tolist(), strict=True):
        assert list(zip(ids, logprobs, strict=True)) == row


@given(rectangles())
def test_a_rectangle_made_of_topk_gives_the_same_scores(rectangle: tuple[np.ndarray, np.ndarray]) -> None:
    once = scores_from_topk(np.zeros(len(rectangle[0]), np.float32), *rectangle)
    twice = scores_from_topk(once.own_logprobs, *once.topk())
    for name in ("own_logprobs", "rest_mass", "counts", "ids", "logprobs"):
        np.testing.assert_array_equal(getattr(once, name), getattr(twice, name))


def test_zeros_of_either_sign_tie_and_ids_of_empty_slots_are_ignored() -> None:
    ids = np.array([[9, -1, 5, 7, 2**24 - 1]], np.int64)
    scores = scores_from_topk(np.zeros(1, np.float32), ids, np.array([[0.0, -np.inf, -0.0, 1e-6, -200.0]]))
    assert scores.ids.tolist() == [7, 5, 9, 2**24 - 1]
    assert scores.logprobs.tolist() == [np.float32(1e-6), 0.0, 0.0, -200.0]
    assert scores.rest_mass.tolist() == [0.0]


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(0, 12)), elements=st.floats(-20, -0.5, width=32)),
    st.sampled_from([0.0, 0.3]),
    st.floats(1e-3, 1.0),
    st.integers(1, 14),
)
def test_top_p_keeps_the_fewest_best_entries_that_hold_the_mass(
    logprobs: np.ndarray, share_empty: float, top_p: float, min_k: int
) -> None:
    num_rows, top_k = logprobs.shape
    logprobs[np.random.default_rng(0).random(logprobs.shape) < share_empty] = -np.inf
    ids = np.tile(np.arange(top_k), (num_rows, 1))
    own = np.zeros(num_rows, np.float32)
    whole, scores = scores_from_topk(own, ids, logprobs), scores_from_topk(own, ids, logprobs, top_p=top_p, min_k=min_k)
    ends, whole_ends = np.cumsum(scores.counts), np.cumsum(whole.counts)
    for row, (count, available) in enumerate(zip(scores.counts, whole.counts, strict=True)):
        kept = slice(ends[row] - count, ends[row])
        best = slice(whole_ends[row] - available, whole_ends[row] - available + count)
        assert scores.ids[kept].tolist() == whole.ids[best].tolist()
        assert scores.logprobs[kept].tolist() == whole.logprobs[best].tolist()
        probs = [math.exp(logprob) for logprob in scores.logprobs[kept]]
        assert min(min_k, available) <= count <= available
        assert math.fsum(probs) >= top_p - 1e-12 or count == available
        assert math.fsum(probs[:-1]) < top_p + 1e-12 or count <= min_k
        assert scores.rest_mass[row] == pytest.approx(max(0.0, 1 - math.fsum(probs)), abs=2.1e-6)


def test_the_entry_that_reaches_the_mass_exactly_is_the_last() -> None:
    logprobs = np.log(np.array([[0.5, 0.25, 0.125]], np.float32))
    reached = float(np.exp(logprobs[0, 0], dtype=np.float64))
    for top_p, count in ((reached, 1), (math.nextafter(reached, 1), 2)):
        scores = scores_from_topk(np.zeros(1, np.float32), np.arange(3)[None], logprobs, top_p=top_p)
        assert scores.counts.tolist() == [count]


@given(hnp.arrays(np.int64, st.tuples(st.integers(0, 5), st.integers(1, 30)), elements=st.integers(0, 9)))
def test_draws_are_counted_row_by_row(drawn: np.ndarray) -> None:
    num_draws = drawn.shape[1]
    own = -np.arange(len(drawn), dtype=np.float64)
    scores = scores_from_draws(own, drawn)
    expected = [Counter(row) for row in drawn.tolist()]
    rows = [sorted(counter.items(), key=lambda entry: (-entry[1], entry[0])) for counter in expected]
    assert scores.draws is not None
    assert list(zip(scores.ids.tolist(), scores.draws.tolist(), strict=True)) == [
        entry for row in rows for entry in row
    ]
    assert scores.counts.tolist() == [len(row) for row in rows]
    # Not exactly equal, because math.log may differ from NumPy's in the last digit.
    logs = [math.log(draws / num_draws) for row in rows for _, draws in row]
    np.testing.assert_allclose(scores.logprobs, logs, rtol=1.2e-7)
    assert scores.rest_mass.tolist() == [0.0] * len(drawn)
    assert scores.own_logprobs.tolist() == own.tolist()
    dtypes = [
        getattr(scores, name).dtype for name in ("own_logprobs", "rest_mass", "counts", "ids", "logprobs", "draws")
    ]
    assert dtypes == [np.float32, np.float32, np.int32, np.int32, np.float32, np.int32]


def test_topk_of_draws_holds_their_shares() -> None:
    scores = scores_from_draws(np.zeros(2, np.float32), np.array([[3, 3, 1, 3], [2, 2, 2, 2]]))
    ids_RK, logprobs_RK = scores.topk()
    assert ids_RK.tolist() == [[3, 1], [2, 0]]
    np.testing.assert_allclose(np.exp(logprobs_RK), [[0.75, 0.25], [1.0, 0.0]], rtol=1e-6)


def test_the_largest_number_of_draws_of_one_id_is_kept() -> None:
    scores = scores_from_draws(np.zeros(1, np.float32), np.full((1, MAX_DRAWS - 1), 5))
    assert scores.draws is not None
    assert scores.draws.tolist() == [MAX_DRAWS - 1]
    assert (scores.logprobs.tolist(), scores.rest_mass.tolist()) == ([0.0], [0.0])


def test_an_id_that_was_not_drawn_has_log_prob_minus_infinity() -> None:
    assert empirical_logprobs(np.array([0, 4], np.int32), 4).tolist() == [-math.inf, 0.0]


def probs(logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.exp(logprobs.astype(np.float64))


@pytest.mark.parametrize("vocab_size", [2, 10, 1_000, 151_936])
def test_rest_mass_of_a_uniform_distribution_is_the_share_left_out(vocab_size: int) -> None:
    logprobs_V = np.full(vocab_size, -math.log(vocab_size), np.float32)
    for top_k in (0, 1, vocab_size // 2):
        share = float(1 - Fraction(top_k, vocab_size))
        np.testing.assert_allclose(rest_mass(probs(logprobs_V[None, :top_k])), [share], atol=2e-6)
    assert rest_mass(probs(logprobs_V[None])) == [0.0]


def test_rest_mass_of_a_geometric_distribution_is_its_tail() -> None:
    # p(i) = 2^-(i+1), so the first k sum to 1 - 2^-k.
    logprobs = (-np.arange(1, 31) * math.log(2)).astype(np.float32)
    for top_k in range(31):
        tail = 2.0**-top_k
        assert rest_mass(probs(logprobs[None, :top_k]))[0] == pytest.approx(tail if tail > 2e-6 else 0.0, abs=5e-7)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.01, 20.0), st.integers(1, 40_000))
def test_rest_mass_of_the_whole_vocabulary_is_zero(seed: int, spread: float, vocab_size: int) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, vocab_size)
    logprobs = logits - logits.max()
    logprobs -= math.log(math.fsum(np.exp(logprobs)))
    assert rest_mass(probs(logprobs.astype(np.float32)[None])) == [0.0]


def test_rest_mass_leaves_empty_slots_out_and_is_never_negative() -> None:
    rows = np.array([[-np.inf, -np.inf], [math.log(0.5), -np.inf], [0.0, math.log(1e-3)]], np.float32)
    np.testing.assert_allclose(rest_mass(probs(rows)), [1.0, 0.5, 0.0], atol=1e-7)


def test_total_logprob_is_summed_in_float64() -> None:
    own = np.full(100_000, -0.1, np.float32)
    none = np.zeros(0, np.float32)
    scores = TeacherScores(own, np.ones_like(own), np.zeros(len(own), np.int32), none.astype(np.int32), none)
    assert scores.total_logprob == pytest.approx(-100_000 * float(np.float32(0.1)), rel=1e-12)
