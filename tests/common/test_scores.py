import math
import struct
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import ShardError
from common.scores import (
    MAX_VOCAB_SIZE,
    TeacherScores,
    from_rectangle,
    pack_ids,
    pack_logprobs,
    rest_mass,
    unpack_ids,
    unpack_logprobs,
)

any_ids = hnp.arrays(np.int32, st.integers(0, 50), elements=st.integers(0, MAX_VOCAB_SIZE - 1))
any_float_bits = hnp.arrays(np.uint32, st.integers(0, 50))


@st.composite
def rectangles(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids [R, K] and log-probs [R, K] with ties and empty slots; K from 0 to the whole vocabulary."""
    num_rows, vocab_size = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    top_k = draw(st.integers(0, vocab_size))
    rows = st.permutations(range(vocab_size)).map(lambda ids: ids[:top_k])
    ids = np.array([draw(rows) for _ in range(num_rows)], np.int64).reshape(num_rows, top_k)
    few_values = st.sampled_from([-np.inf, -0.5, -1.0, -1.5, -30.0])
    return ids, draw(hnp.arrays(np.float32, (num_rows, top_k), elements=few_values))


@given(any_ids)
def test_ids_survive_packing(ids: np.ndarray) -> None:
    packed = pack_ids(ids)
    assert len(packed) == 3 * len(ids)
    unpacked = unpack_ids(packed, len(ids), "here")
    assert unpacked.dtype == np.int32
    np.testing.assert_array_equal(unpacked, ids)


@given(any_float_bits)
def test_logprobs_survive_packing_bit_for_bit(bits: np.ndarray) -> None:
    unpacked = unpack_logprobs(pack_logprobs(bits.view(np.float32)), len(bits), "here")
    assert unpacked.dtype == np.float32
    np.testing.assert_array_equal(unpacked.view(np.uint32), bits)


@given(any_ids, any_float_bits)
def test_plane_p_holds_byte_p_of_each_entry(ids: np.ndarray, bits: np.ndarray) -> None:
    for packed, values, width in ((pack_ids(ids), ids, 3), (pack_logprobs(bits.view(np.float32)), bits, 4)):
        whole = [struct.pack("<I", int(value)) for value in values]
        assert packed == bytes(entry[plane] for plane in range(width) for entry in whole)


def test_ids_that_do_not_fit_are_a_defect_of_the_caller() -> None:
    for bad in (-1, MAX_VOCAB_SIZE):
        with pytest.raises(AssertionError):
            pack_ids(np.array([bad], np.int32))


@pytest.mark.parametrize("num_entries", [-1, 0, 1, 3])
def test_planes_of_another_length_are_refused(num_entries: int) -> None:
    with pytest.raises(ShardError, match="here: 6 bytes"):
        unpack_ids(bytes(6), num_entries, "here")
    with pytest.raises(ShardError, match="here: 8 bytes"):
        unpack_logprobs(bytes(8), num_entries, "here")


@given(rectangles(), st.randoms(use_true_random=False))
def test_rows_are_ordered_by_logprob_then_id_whatever_the_order_of_input(
    rectangle: tuple[np.ndarray, np.ndarray], random: object
) -> None:
    ids, logprobs = rectangle
    scores = from_rectangle(np.zeros(len(ids), np.float32), ids, logprobs)
    kept = [
        sorted(((-float(p), int(i)) for i, p in zip(*row, strict=True) if p > -math.inf))
        for row in zip(ids, logprobs, strict=True)
    ]
    assert scores.counts.tolist() == [len(row) for row in kept]
    assert scores.ids.tolist() == [i for row in kept for _, i in row]
    assert scores.logprobs.tolist() == [-p for row in kept for p, _ in row]
    assert (scores.ids.dtype, scores.counts.dtype, scores.logprobs.dtype) == (np.int32, np.int32, np.float32)


@given(rectangles())
def test_topk_spreads_the_rows_over_a_rectangle(rectangle: tuple[np.ndarray, np.ndarray]) -> None:
    scores = from_rectangle(np.zeros(len(rectangle[0]), np.float32), *rectangle)
    width = max(scores.counts.tolist())
    entries = iter(zip(scores.ids.tolist(), scores.logprobs.tolist(), strict=True))
    expected = []
    for count in scores.counts.tolist():
        row = [next(entries) for _ in range(count)]
        expected.append(row + [(0, -math.inf)] * (width - count))
    ids_RK, logprobs_RK = scores.topk()
    assert (ids_RK.dtype, logprobs_RK.dtype, ids_RK.shape) == (np.int64, np.float32, (len(expected), width))
    for row, ids, logprobs in zip(expected, ids_RK.tolist(), logprobs_RK.tolist(), strict=True):
        assert list(zip(ids, logprobs, strict=True)) == row


@given(rectangles())
def test_a_rectangle_made_of_topk_gives_the_same_scores(rectangle: tuple[np.ndarray, np.ndarray]) -> None:
    once = from_rectangle(np.zeros(len(rectangle[0]), np.float32), *rectangle)
    twice = from_rectangle(once.own_logprobs, *once.topk())
    for name in TeacherScores.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(once, name), getattr(twice, name))


@pytest.mark.parametrize("vocab_size", [2, 10, 1_000, 151_936])
def test_rest_mass_of_a_uniform_distribution_is_the_share_left_out(vocab_size: int) -> None:
    logprobs_V = np.full(vocab_size, -math.log(vocab_size), np.float32)
    for top_k in (0, 1, vocab_size // 2):
        share = float(1 - Fraction(top_k, vocab_size))
        np.testing.assert_allclose(rest_mass(logprobs_V[None, :top_k]), [share], atol=2e-6)
    assert rest_mass(logprobs_V[None]) == [0.0]


def test_rest_mass_of_a_geometric_distribution_is_its_tail() -> None:
    # p(i) = 2^-(i+1): the first k sum to 1 - 2^-k.
    logprobs = (-np.arange(1, 31) * math.log(2)).astype(np.float32)
    for top_k in range(31):
        tail = 2.0**-top_k
        assert rest_mass(logprobs[None, :top_k])[0] == pytest.approx(tail if tail > 2e-6 else 0.0, abs=5e-7)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 20.0), st.integers(1, 40_000))
def test_rest_mass_of_the_whole_vocabulary_is_zero(seed: int, spread: float, vocab_size: int) -> None:
    logits = np.random.default_rng(seed).normal(0, spread, vocab_size)
    logprobs = logits - logits.max()
    logprobs -= math.log(math.fsum(np.exp(logprobs)))
    assert rest_mass(logprobs.astype(np.float32)[None]) == [0.0]


def test_rest_mass_leaves_empty_slots_out_and_is_never_negative() -> None:
    rows = np.array([[-np.inf, -np.inf], [math.log(0.5), -np.inf], [0.0, math.log(1e-3)]], np.float32)
    np.testing.assert_allclose(rest_mass(rows), [1.0, 0.5, 0.0], atol=1e-7)


def test_total_logprob_is_summed_in_float64() -> None:
    own = np.full(100_000, -0.1, np.float32)
    none = np.zeros(0, np.float32)
    scores = TeacherScores(own, np.ones_like(own), np.zeros(len(own), np.int32), none.astype(np.int32), none)
    assert scores.total_logprob == pytest.approx(-100_000 * float(np.float32(0.1)), rel=1e-12)
