"""Kept entries through the codec and back, for anything that a capture may keep."""

import tracemalloc
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.errors import ShardError
from common.shards.codec import BinaryColumn, CodecSettings, RowColumns, column_names, pack, unpack
from common.shards.quantization import Precision, Quantizer, StoredPrecision, max_probability_error
from common.shards.scores import MAX_DRAWS, MAX_VOCAB_SIZE, TeacherScores, scores_from_draws, scores_from_topk
from common.shards.token_order import TokenOrder, classes_from_text, classes_to_text, find_classes

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "q8", "q6")
# Determines the number of q8's steps.
TOP_K = 64


@st.composite
def conversations(draw: st.DrawFn, max_vocab: int = 3000) -> tuple[list[TeacherScores], int]:
    """Draws conversations and a vocabulary size: k from 1 to V, flat and peaked rows, ties, empty slots.

    Some conversations have one row; the kept mass is anything from nearly 0 to 1.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vocab_size = draw(st.sampled_from([1, 2, 5, 193, 300, max_vocab]))
    top_k = draw(st.sampled_from([1, 2, 64, vocab_size]).filter(lambda k: k <= vocab_size))
    scores = []
    for _ in range(draw(st.integers(1, 4))):
        num_rows = draw(st.sampled_from([1, 2, 7]))
        sharpness = draw(st.sampled_from([0.0, 1.0, 30.0, 1000.0]))
        logits = rng.normal(0, 1, (num_rows, vocab_size)) * sharpness
        if draw(st.booleans()):
            logits = np.round(logits)
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        # Half of the time the worst entries, so that the kept mass is nearly 0.
        ids = np.argsort(-logprobs if draw(st.booleans()) else logprobs, axis=1, kind="stable")[:, :top_k]
        kept = np.take_along_axis(logprobs, ids, 1).astype(np.float32)
        kept[rng.random(kept.shape) < draw(st.sampled_from([0.0, 0.0, 0.5]))] = -np.inf
        own = -rng.exponential(1, num_rows).astype(np.float32)
        top_p = draw(st.sampled_from([None, None, 0.5, 0.99]))
        scores.append(scores_from_topk(own, ids, kept, top_p=top_p))
    return scores, vocab_size


def store_and_read(
    scores: list[TeacherScores],
    vocab_size: int,
    form: StoredPrecision,
    num_draws: int | None = None,
    entries_per_table: int = 1 << 18,
) -> list[TeacherScores]:
    with patch("common.shards.token_order.ENTRIES_PER_TABLE", entries_per_table):
        classes, tables = find_classes(scores, vocab_size)
    order = TokenOrder(classes_from_text(classes_to_text(classes).encode(), vocab_size, "here"))
    codec = CodecSettings(order, Quantizer(form, TOP_K, num_draws))
    columns = pack(scores, tables, codec)
    assert tuple(columns) == column_names(form)
    rows = row_columns(scores, tables, codec.quantizer)
    read = unpack(columns, rows, codec, "here")
    return [
        TeacherScores(each.own_logprobs, row.rest_mass, each.counts, *kept)
        for each, row, kept in zip(scores, rows, read, strict=True)
    ]


def row_columns(
    scores: list[TeacherScores], tables: list[npt.NDArray[np.uint8]], quantizer: Quantizer
) -> list[RowColumns]:
    return [
        RowColumns(each.counts, quantizer.stored_rest(each.rest_mass), tables_R)
        for each, tables_R in zip(scores, tables, strict=True)
    ]


def by_id(scores: TeacherScores) -> tuple[np.ndarray, np.ndarray]:
    """Returns the entries' ids in ascending order within each row, and the index of each entry."""
    order = np.lexsort((scores.ids, np.repeat(np.arange(scores.num_rows), scores.counts)))
    return scores.ids[order], order


@settings(max_examples=150, deadline=None)
@given(conversations(), st.sampled_from(PRECISIONS), st.sampled_from([1, 30, 1 << 18]))
def test_ids_come_back_exactly_and_probabilities_within_the_stated_error(
    case: tuple[list[TeacherScores], int], precision: Precision, entries_per_table: int
) -> None:
    written, vocab_size = case
    read = store_and_read(written, vocab_size, precision, entries_per_table=entries_per_table)
    for before, after in zip(written, read, strict=True):
        ids, order = by_id(before)
        found_ids, found_order = by_id(after)
        np.testing.assert_array_equal(found_ids, ids)
        p, q = (np.exp(s.logprobs[o], dtype=np.float64) for s, o in ((before, order), (after, found_order)))
        allowed = max_probability_error(after, Quantizer(precision, TOP_K, None))[found_order]
        # Below the smallest normal float64, p and q themselves are rounded by more than the bound's share of them.
        assert (np.abs(p - q) <= allowed * (1 + 1e-6) + 1e-7 * p + np.finfo(np.float64).tiny).all()
        assert (after.logprobs <= 0).all() or precision == "fp32"
        assert np.isfinite(after.logprobs).all()
        # Entries are sorted by descending log-prob, ties by ascending id.
        rows = np.repeat(np.arange(after.num_rows), after.counts)
        np.testing.assert_array_equal(np.lexsort((after.ids, -after.logprobs, rows)), np.arange(len(rows)))
        if precision == "fp32":
            assert after.logprobs.tobytes() == before.logprobs.tobytes()
        if precision in ("q8", "q6"):
            np.testing.assert_allclose(after.rest_mass, before.rest_mass, rtol=2.0**-12)
            mass = np.bincount(rows, np.exp(after.logprobs, dtype=np.float64), minlength=after.num_rows)
            kept = after.counts > 0
            np.testing.assert_allclose(mass[kept], 1.0 - after.rest_mass[kept], rtol=3e-6, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([1, 2, 37, 500, MAX_DRAWS - 1]), st.sampled_from([1, 300, MAX_VOCAB_SIZE])
)
def test_draws_come_back_exactly(seed: int, num_draws: int, vocab_size: int) -> None:
    rng = np.random.default_rng(seed)
    # A few ids are drawn often.
    written = [
        scores_from_draws(
            np.zeros(num_rows, np.float32),
            (vocab_size * rng.random((num_rows, num_draws)) ** rng.integers(1, 30)).astype(np.int64),
        )
        for num_rows in (1, 4)
    ]
    for before, after in zip(written, store_and_read(written, vocab_size, None, num_draws), strict=True):
        for name in ("ids", "logprobs", "draws"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


def test_streams_of_draws_that_do_not_fit_are_named() -> None:
    scores = scores_from_draws(np.zeros(1, np.float32), np.array([[3, 3, 3, 5]]))
    order, tables = TokenOrder(np.ones((1, 9), np.uint8)), [np.zeros(1, np.uint8)]
    codec = CodecSettings(order, Quantizer(None, 0, 4))
    columns = pack([scores], tables, codec)
    rows = row_columns([scores], tables, codec.quantizer)
    assert [columns[name].data.tolist() for name in column_names(None)[-3:]] == [[1], [3], [0]]
    for name, data, found in (
        ("topk_repeated", [], "0 bytes of bits for 2 drawn"),
        ("topk_repeated", [3], "for 2 entries that were drawn more than once"),
        ("topk_draws_1", [0, 0], "for 1 entries"),
        ("topk_draws_0", [5], "value of 5, expected at most 4"),
        ("topk_draws_0", [1], "fewer than 2 draws"),
    ):
        changed = BinaryColumn(np.array(data, np.uint8), np.array([0, len(data)]))
        with pytest.raises(ShardError, match=f"here.*{found}"):
            list(unpack({**columns, name: changed}, rows, codec, "here"))


@pytest.mark.parametrize("gap", [0, 191, 192, 193, 192 + 255, 192 + 256, 192 + 63 * 256 - 1, 192 + 63 * 256, 2**20 - 2])
def test_every_kind_of_difference_comes_back(gap: int) -> None:
    vocab_size = MAX_VOCAB_SIZE
    order, tables = TokenOrder(np.ones((1, vocab_size), np.uint8)), [np.zeros(1, np.uint8)]
    assert order.ids.tolist() == list(range(vocab_size))
    ids = np.array([[0, gap + 1]]) if gap < vocab_size - 1 else np.array([[0, 0]])
    scores = scores_from_topk(np.zeros(1, np.float32), ids, np.log(np.array([[0.25, 0.5]])).astype(np.float32))
    codec = CodecSettings(order, Quantizer("fp32", 2, None))
    rows = row_columns([scores], tables, codec.quantizer)
    ((found, *_),) = unpack(pack([scores], tables, codec), rows, codec, "here")
    assert found.tolist() == [gap + 1, 0]


def test_the_mean_divergence_of_codes_is_that_of_rounding_square_roots() -> None:
    # To second order KL(p || q) = 2 sum (sqrt p - sqrt q)^2; rounding to steps s has a mean squared error of s^2 / 12.
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(32, 5.0), 4000)
    ids = np.tile(np.arange(32), (4000, 1))
    written = scores_from_topk(np.zeros(4000, np.float32), ids, np.log(p).astype(np.float32))
    precisions: tuple[Precision, ...] = ("q8", "q6")
    for precision in precisions:
        (read,) = store_and_read([written], 32, precision)
        (_, a), (_, b) = by_id(written), by_id(read)
        log_p, log_q = written.logprobs[a].astype(np.float64), read.logprobs[b].astype(np.float64)
        kl = (np.exp(log_p) * (log_p - log_q)).sum() / 4000
        # 31 rather than 32, because the scaling to the row's mass takes a degree of freedom.
        levels = Quantizer(precision, TOP_K, None).levels
        assert levels is not None
        assert kl == pytest.approx(31 / (6 * levels**2), rel=0.1)


def test_q8_has_as_many_steps_as_its_entries_need_and_a_byte_holds() -> None:
    levels = {k: Quantizer("q8", k, None).levels for k in (1, 29, 30, 50, 64, 120, 121, 49_152)}
    assert levels == {1: 127, 29: 127, 30: 127, 50: 164, 64: 185, 120: 254, 121: 255, 49_152: 255}
    others: tuple[Quantizer, ...] = (Quantizer("q6", 9, None), Quantizer("fp16", 9, None), Quantizer("fp32", 9, None))
    assert [quantizer.levels for quantizer in (*others, Quantizer(None, 0, 9))] == [63, None, None, None]


def test_rest_masses_beside_codes_have_12_significant_bits() -> None:
    rng = np.random.default_rng(3)
    rest = np.concatenate([[0, 1, 2e-6], rng.random(1000) ** 8]).astype(np.float32)
    stored = Quantizer("q8", 50, None).stored_rest(rest)
    mantissas, exponents = np.frexp(rest.astype(np.float64))
    # rint and the codec round ties differently, but there are no ties among these numbers.
    np.testing.assert_array_equal(stored, np.ldexp(np.rint(mantissas * 4096), exponents - 12))
    np.testing.assert_array_equal(Quantizer("q6", 50, None).stored_rest(stored), stored)
    for form in ("fp32", "fp16", None):
        np.testing.assert_array_equal(Quantizer(form, 50, None).stored_rest(rest), rest)


@pytest.mark.parametrize("num_tables", [1, 2, 64])
def test_tables_come_back_from_the_footer(num_tables: int) -> None:
    rng = np.random.default_rng(num_tables)
    classes = (rng.integers(0, 16, (num_tables, 999)) * (rng.random((num_tables, 999)) < 0.2)).astype(np.uint8)
    found = classes_from_text(classes_to_text(classes).encode(), 999, "here")
    np.testing.assert_array_equal(found, classes)


def test_a_class_is_at_most_15() -> None:
    scores = scores_from_topk(np.zeros(1 << 16, np.float32), np.zeros((1 << 16, 1), int), np.zeros((1 << 16, 1)))
    classes, _ = find_classes([scores], 2)
    assert classes.tolist() == [[15, 0]]


def test_the_same_scores_give_the_same_bytes_whatever_they_are_batched_with() -> None:
    rng = np.random.default_rng(1)
    many = [
        scores_from_topk(
            np.zeros(40, np.float32),
            np.stack([rng.choice(5000, 64, replace=False) for _ in range(40)]),
            np.log(rng.dirichlet(np.ones(64), 40)).astype(np.float32),
        )
        for _ in range(80)
    ]
    with patch("common.shards.token_order.ENTRIES_PER_TABLE", 1 << 15):
        classes, tables = find_classes(many, 5000)
    order = TokenOrder(classes)
    assert order.num_tables == 4
    codec = CodecSettings(order, Quantizer("q8", 64, None))
    together = pack(many, tables, codec)
    assert sum(len(each.ids) for each in many) > 1 << 17, "more than one batch"
    for number in (0, 41, 79):
        alone = pack([many[number]], [tables[number]], codec)
        for name, column in together.items():
            assert column.slice(number, number + 1).tobytes() == alone[name].data.tobytes()


def test_rows_of_alike_ids_share_a_table() -> None:
    rng = np.random.default_rng(2)
    # Rows of four topics in random order; each topic has ids of its own, and two ids are in every row.
    topics = rng.integers(0, 4, 400)
    ids = np.stack(
        [rng.permutation(np.concatenate([100 * t + rng.choice(60, 20, replace=False), [900, 901]])) for t in topics]
    )
    scores = scores_from_topk(
        np.zeros(400, np.float32), ids, np.log(rng.dirichlet(np.ones(22), 400)).astype(np.float32)
    )
    with patch("common.shards.token_order.ENTRIES_PER_TABLE", len(scores.ids) // 4):
        classes, (tables,) = find_classes([scores], 1000)
    assert len(classes) == 4
    assert len({*zip(topics.tolist(), tables.tolist(), strict=True)}) == len({*topics.tolist()})
    # Each table's classes count its own rows alone.
    for topic, table in {*zip(topics.tolist(), tables.tolist(), strict=True)}:
        counts = np.bincount(ids[topics == topic].ravel(), minlength=1000)
        assert classes[table].tolist() == [int(count).bit_length() for count in counts]


def test_few_entries_have_one_table() -> None:
    classes, tables = find_classes([], 7)
    assert (classes.shape, tables) == ((1, 7), [])
    scores = scores_from_topk(np.zeros(2, np.float32), np.array([[3], [5]]), np.zeros((2, 1), np.float32))
    classes, tables = find_classes([scores, scores], 7)
    assert classes.tolist() == [[0, 0, 0, 2, 0, 2, 0]]
    assert [each.tolist() for each in tables] == [[0, 0], [0, 0]]


@pytest.mark.parametrize("text", [b"", b"!", b"AAAA", b"KLUv/SAAAQAA"])
def test_a_damaged_table_is_named(text: bytes) -> None:
    with pytest.raises(ShardError, match="here"):
        classes_from_text(text, 10, "here")


def test_streams_that_do_not_fit_are_named() -> None:
    scores = scores_from_topk(np.zeros(1, np.float32), np.array([[500, 3]]), np.array([[-1.0, -2.0]], np.float32))
    classes = np.ones((2, 1000), np.uint8)
    classes[:, 900:] = 0
    codec = CodecSettings(TokenOrder(classes), Quantizer("q6", 2, None))
    columns = pack([scores], [np.ones(1, np.uint8)], codec)

    def read(changed: dict[str, bytes], table: int = 1) -> object:
        replaced = {name: np.frombuffer(data, np.uint8) for name, data in changed.items()}
        parts = {name: replaced.get(name, column.data) for name, column in columns.items()}
        packed = {name: BinaryColumn(data, np.array([0, len(data)])) for name, data in parts.items()}
        rows = row_columns([scores], [np.array([table], np.uint8)], codec.quantizer)
        return list(unpack(packed, rows, codec, "here"))

    read({})
    with pytest.raises(ShardError, match=r"here.*names table 2, there are 2"):
        read({}, table=2)
    for name, data, found in (
        ("topk_ids_1", b"\x00\x00", "symbols in quarters"),
        ("topk_ids_0", b"\x00", "symbols in quarters"),
        ("topk_ids_low", b"", "expected"),
        ("topk_ids_high", b"\x01\x02", "expected"),
        ("topk_roots_1", b"\x01\x02\x03", "expected"),
        ("topk_roots_0", b"\x01", "expected"),
        ("topk_roots_1", b"\x01\x40", "value of 64, expected at most 63"),
        ("topk_ids_3", b"\xc4", "past the last one of its row's table"),
    ):
        with pytest.raises(ShardError, match=f"here.*{found}"):
            read({name: data})


@settings(max_examples=50, deadline=None)
@given(conversations(), st.sampled_from(["q6", "q8"]))
def test_codes_are_written_again_as_they_are(case: tuple[list[TeacherScores], int], precision: Precision) -> None:
    """Codes move to another token order as they are; coding the decoded log-probs again could change some by a step."""
    first, vocab_size = case
    quantizer = Quantizer(precision, TOP_K, None)
    classes, tables = find_classes(first, vocab_size)
    rows = row_columns(first, tables, quantizer)

    def read(scores: list[TeacherScores], order: TokenOrder) -> list[TeacherScores]:
        codec = CodecSettings(order, quantizer, keep_codes=True)
        kept = unpack(pack(scores, tables, codec), rows, codec, "here")
        return [
            TeacherScores(each.own_logprobs, row.rest_mass, each.counts, *entries)
            for each, row, entries in zip(scores, rows, kept, strict=True)
        ]

    before = read(first, TokenOrder(classes))
    after = read(before, TokenOrder(1 + np.arange(vocab_size, dtype=np.uint8)[None, :] % 7))
    for a, b in zip(before, after, strict=True):
        for name in ("ids", "logprobs", "codes"):
            assert getattr(a, name).tobytes() == getattr(b, name).tobytes()


# Two rows with two entries and none: an array's length does not tell whether it is of rows or of entries.
AS_MANY_ROWS_AS_ENTRIES = scores_from_topk(
    np.array([-0.5, -0.6], np.float32),
    np.array([[0, 1], [0, 1]]),
    np.array([[-0.7, -0.7], [-np.inf, -np.inf]], np.float32),
)


@settings(max_examples=25, deadline=None)
@given(conversations(max_vocab=400), st.sampled_from(PRECISIONS))
@example(([AS_MANY_ROWS_AS_ENTRIES], 2), "fp32")
@example(([AS_MANY_ROWS_AS_ENTRIES], 2), "q8")
def test_rows_in_bands_of_their_lengths_have_the_same_bytes(
    drawn: tuple[list[TeacherScores], int], form: StoredPrecision
) -> None:
    scores, vocab_size = drawn
    classes, tables = find_classes(scores, vocab_size)
    codec = CodecSettings(TokenOrder(classes), Quantizer(form, TOP_K, None))
    whole = pack(scores, tables, codec)
    with patch("common.shards.codec._MAX_PADDING", 0), patch("common.shards.codec._MAX_BATCH_ENTRIES", 1):
        banded = pack(scores, tables, codec)
        found = store_and_read(scores, vocab_size, form)
    for name, column in whole.items():
        np.testing.assert_array_equal(banded[name].data, column.data)
        np.testing.assert_array_equal(banded[name].offsets, column.offsets)
    for before, after in zip(store_and_read(scores, vocab_size, form), found, strict=True):
        for name in ("counts", "ids", "logprobs"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))


@pytest.mark.parametrize("precision", ["fp32", "q8", None])
def test_one_long_row_takes_no_memory_for_all_rows(precision: StoredPrecision) -> None:
    """A rectangle of 2,000 rows of 4 entries beside one of 150,000 would take gigabytes."""
    rng = np.random.default_rng(0)
    vocab_size, counts_R = 160_000, np.full(2001, 4, np.int32)
    counts_R[1000] = 150_000
    rows_N = np.repeat(np.arange(2001), counts_R)
    ids_N = np.concatenate([rng.choice(vocab_size, count, replace=False) for count in counts_R]).astype(np.int32)
    logprobs_N = np.log(rng.random(len(ids_N)) / counts_R[rows_N]).astype(np.float32)
    order = np.lexsort((ids_N, np.zeros(len(ids_N)) if precision is None else -logprobs_N, rows_N))
    draws_N = np.ones(len(ids_N), np.int32) if precision is None else None
    rest_R = np.full(2001, 0.0 if precision is None else 0.5, np.float32)
    scores = TeacherScores(np.zeros(2001, np.float32), rest_R, counts_R, ids_N[order], logprobs_N[order], draws_N)
    tracemalloc.start()
    (found,) = store_and_read([scores], vocab_size, precision, 4 if precision is None else None)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100 << 20
    if precision != "q8":
        np.testing.assert_array_equal(found.ids, scores.ids)
    if precision == "fp32":
        np.testing.assert_array_equal(found.logprobs, scores.logprobs)
