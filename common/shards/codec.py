"""Codec of kept entries: ids and log-probs to bytes, and back; docs/shard-format.md specifies every bit.

    ids ─ TokenOrder ─> ranks, ascending in a row ─> differences ─> one symbol each, in a stream for each quarter of the
                        rows, and two streams of what a symbol cannot hold
    log-probs ─ precision ─> codes, in a stream for each bucket of rest masses, or byte planes of floats
    draws ─> a bit for each number above 1, and byte planes of those numbers

Log-probs and draws are in the order of the ranks. Ids are exact. A rank is an id's position in its row's table, which
is sorted by how many rows of the table keep the id. Most ids that a row keeps are frequent there, so their ranks are
close together and the differences small. Each stream is a Parquet column of its own, so that zstd compresses bytes of
one kind together.

Legend: R scored tokens, N kept entries of all rows, K kept entries of the longest row, V vocabulary. `ends` has 0 and
the index after the last entry of each conversation.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import ShardError
from common.shards.byte_streams import (
    NUM_BUCKETS,
    NUM_QUARTERS,
    expand_draws,
    join_buckets,
    join_quarters,
    num_packed_bytes,
    pack_bits,
    quarter_widths,
    rest_mass_buckets,
    row_indices,
    split_by_label,
    split_quarters,
)
from common.shards.quantization import MIN_MASS, Quantizer, StoredPrecision
from common.shards.scores import (
    MAX_VOCAB_SIZE,
    TeacherScores,
    descending_keys,
    empirical_logprobs,
    from_descending_keys,
)
from common.shards.token_order import TokenOrder

_SYMBOL_COLUMNS = tuple(f"topk_ids_{quarter}" for quarter in range(NUM_QUARTERS))
ID_COLUMNS = (*_SYMBOL_COLUMNS, "topk_ids_low", "topk_ids_high")
ROOT_COLUMNS = tuple(f"topk_roots_{bucket}" for bucket in range(NUM_BUCKETS))
_VALUE_COLUMNS: dict[StoredPrecision, tuple[str, ...]] = {
    "fp32": tuple(f"topk_logprobs_{plane}" for plane in range(4)),
    "fp16": ("topk_logprobs_0", "topk_logprobs_1"),
    "q8": ROOT_COLUMNS,
    "q6": ROOT_COLUMNS,
    None: ("topk_repeated", "topk_draws_0", "topk_draws_1"),
}

# Probability of each code in sixteenths of a squared step: 16 code^2. Code 0 counts as a quarter of a step, so that no
# kept entry has probability 0.
_WEIGHTS = np.maximum(16 * np.arange(256) ** 2, 1).astype(np.float32)
_LOG_WEIGHTS = np.log(_WEIGHTS.astype(np.float64)).astype(np.float32)

_VALUE_BYTES: dict[StoredPrecision, int] = {"fp32": 4, "fp16": 2, "q8": 1, "q6": 1, None: 2}
_ID_BITS = (MAX_VOCAB_SIZE - 1).bit_length()

# A difference below this is its own symbol. A larger one is 192 + 256 h + a low byte and has the symbol 192 + h; h from
# 63 on has the symbol 255 and is written to a stream of its own.
_NUM_LITERALS = 192
_MAX_H = 63

# Conversations are coded in batches of about this many entries: few NumPy calls, and arrays that fit into the cache.
_MAX_BATCH_ENTRIES = 1 << 17

# A rectangle may have so many times as many slots as entries.
_MAX_PADDING = 4


@dataclass(frozen=True)
class BinaryColumn:
    """Binary column: `data` uint8 [bytes]; conversation i has the bytes `offsets[i]` to `offsets[i + 1]` - 1."""

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def slice(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Returns the bytes of conversations `start` to `stop` - 1."""
        return self.data[self.offsets[start] : self.offsets[stop]]


class RowColumns(NamedTuple):
    """Native columns of one or more conversations, arrays [R].

    `rest_mass` is rounded as it is stored (`Quantizer.stored_rest`); `tables` has the number of each row's table.
    """

    counts: npt.NDArray[np.int32]
    rest_mass: npt.NDArray[np.float32]
    tables: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CodecSettings:
    """Token order and quantizer of a shard; with `keep_codes`, `unpack` returns the codes of q8 and q6, too."""

    order: TokenOrder
    quantizer: Quantizer
    keep_codes: bool = False


class KeptEntries(NamedTuple):
    """Kept entries, arrays [N] as in `TeacherScores`."""

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    draws: npt.NDArray[np.int32] | None
    codes: npt.NDArray[np.uint8] | None


def column_names(precision: StoredPrecision) -> tuple[str, ...]:
    """Returns the names of a conversation's binary columns, without the prefix of a preference pair."""
    return ID_COLUMNS + _VALUE_COLUMNS[precision]


def pack(
    scores: Sequence[TeacherScores], tables: Sequence[npt.NDArray[np.uint8]], settings: CodecSettings
) -> dict[str, BinaryColumn]:
    """Packs the kept entries of conversations into binary columns; `tables` has the table of each row, [R] each.

    Scores with `codes` are stored by their codes, not by their log-probs.
    """
    sizes = [len(each.ids) for each in scores]
    batches = [_pack_batch(scores[a:b], np.concatenate(tables[a:b]), settings) for a, b in _batches(sizes)]
    packed = {}
    for name in column_names(settings.quantizer.precision):
        lengths = np.concatenate([np.zeros(1, np.int64), *(batch[name][1] for batch in batches)])
        data = np.concatenate([np.zeros(0, np.uint8), *(batch[name][0] for batch in batches)])
        packed[name] = BinaryColumn(data, np.cumsum(lengths))
    return packed


def unpack(
    columns: Mapping[str, BinaryColumn],
    rows: Sequence[RowColumns],
    settings: CodecSettings,
    where: str,
) -> Iterator[KeptEntries]:
    """Yields the kept entries of each conversation, in the order of `TeacherScores`; each array owns its memory.

    `rows` has the native columns of each conversation.

    Raises:
        ShardError: the streams do not belong together, or name a token past the vocabulary.
    """
    sizes = [int(each.counts.sum()) for each in rows]
    for start, stop in _batches(sizes):
        together = RowColumns(*map(np.concatenate, zip(*rows[start:stop], strict=True)))
        _check_rows(together, settings.order.num_tables, where)
        ends = np.cumsum([0, *sizes[start:stop]])
        parts = {name: column.slice(start, stop) for name, column in columns.items()}
        kept = _unpack_batch(parts, ends, together, settings, where)
        for entries in map(slice, ends[:-1], ends[1:]):
            yield KeptEntries(
                kept.ids[entries].copy(),
                kept.logprobs[entries].copy(),
                None if kept.draws is None else kept.draws[entries].copy(),
                None if kept.codes is None else kept.codes[entries].copy(),
            )


def _check_rows(rows: RowColumns, num_tables: int, where: str) -> None:
    if rows.counts.min(initial=0) < 0:
        raise ShardError(f"{where}: a row keeps {rows.counts.min()} entries; the shard is damaged")
    if rows.tables.max(initial=0) >= num_tables:
        raise ShardError(f"{where}: names table {rows.tables.max()}, there are {num_tables}; the shard is damaged")


def _pack_batch(
    scores: Sequence[TeacherScores], tables_R: npt.NDArray[np.uint8], settings: CodecSettings
) -> dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Returns the bytes of each column, and the number of bytes of each conversation."""
    order, quantizer = settings.order, settings.quantizer
    precision = quantizer.precision
    counts_R = np.concatenate([each.counts for each in scores])
    ends = np.cumsum([0, *(len(each.ids) for each in scores)])
    num_bytes = _VALUE_BYTES[precision]
    ids_N = np.concatenate([each.ids for each in scores])
    cells_N = np.repeat(tables_R * np.int64(order.vocab_size), counts_R)
    cells_N += ids_N
    keys_N = order.ranks.reshape(-1).take(cells_N, mode="clip").astype(_key_type(precision))
    keys_N <<= 8 * num_bytes
    keys_N |= np.concatenate([_quantize(each, quantizer) for each in scores])
    sort = functools.partial(_sort_ranks, num_value_bits=8 * num_bytes)
    keys_N, steps_N = _in_bands(sort, (counts_R,), (keys_N,))
    assert steps_N.min(initial=0) >= 0, "a row keeps an id twice"

    escaped = np.flatnonzero(steps_N >= _NUM_LITERALS)
    excess = steps_N[escaped] - _NUM_LITERALS
    h = excess >> 8
    high = np.flatnonzero(h >= _MAX_H)
    symbols_N = steps_N.astype(np.uint8)
    symbols_N[escaped] = _NUM_LITERALS + np.minimum(h, _MAX_H)
    escaped_ends = np.searchsorted(escaped, ends)
    high_ends = np.searchsorted(high, escaped_ends)
    row_ends = np.cumsum([0, *(each.num_rows for each in scores)])
    quarters_R4 = np.cumsum(quarter_widths(counts_R), axis=0)
    quarter_ends = np.concatenate([np.zeros((1, NUM_QUARTERS), np.int64), quarters_R4])[row_ends]
    streams = [
        *zip(split_quarters(symbols_N, counts_R), np.diff(quarter_ends, axis=0).T, strict=True),
        (excess.astype(np.uint8), np.diff(escaped_ends)),
        (h[high].astype("<u2").view(np.uint8), 2 * np.diff(high_ends)),
    ]
    values, value_ends = keys_N, ends
    if precision is None:
        # Most ids are drawn once, so a bit for each costs less than two bytes.
        draws_N = values & ((1 << 8 * num_bytes) - 1)
        assert draws_N.min(initial=1) >= 1
        is_repeated_N = draws_N > 1
        values, value_ends = values[is_repeated_N], np.concatenate([[0], np.cumsum(is_repeated_N)])[ends]
        streams.append((pack_bits(is_repeated_N, ends), num_packed_bytes(np.diff(ends))))
    if quantizer.levels is not None:
        buckets_R = rest_mass_buckets(quantizer.stored_rest(np.concatenate([each.rest_mass for each in scores])))
        cells_R = np.repeat(np.arange(len(scores)), np.diff(row_ends)) * NUM_BUCKETS + buckets_R
        sizes = np.bincount(cells_R, counts_R, minlength=len(scores) * NUM_BUCKETS).astype(np.int64)
        parts = split_by_label(values.astype(np.uint8), counts_R, buckets_R, NUM_BUCKETS)
        streams += zip(parts, sizes.reshape(-1, NUM_BUCKETS).T, strict=True)
        return dict(zip(column_names(precision), streams, strict=True))
    streams += [((values >> 8 * plane).astype(np.uint8), np.diff(value_ends)) for plane in range(num_bytes)]
    return dict(zip(column_names(precision), streams, strict=True))


def _unpack_batch(
    columns: Mapping[str, npt.NDArray[np.uint8]],
    ends: npt.NDArray[np.int64],
    rows: RowColumns,
    settings: CodecSettings,
    where: str,
) -> KeptEntries:
    """Returns the entries of all rows, in a row by descending log-prob, ties by ascending id."""
    counts_R, rest_R, tables_R = rows
    quantizer = settings.quantizer
    precision = quantizer.precision
    symbols_N = join_quarters([columns[name] for name in _SYMBOL_COLUMNS], counts_R, where)
    low, high, *planes = (columns[name] for name in column_names(precision)[NUM_QUARTERS:])
    num_entries = int(counts_R.sum())
    if precision is None:
        planes = expand_draws(planes, ends, where)
    elif quantizer.levels is not None:
        planes = [join_buckets(planes, counts_R, rest_mass_buckets(rest_R), where)]
    escaped = np.flatnonzero(symbols_N >= _NUM_LITERALS)
    h = symbols_N[escaped].astype(np.int32) - _NUM_LITERALS
    is_high = h == _MAX_H
    found = [len(low), len(high), *map(len, planes)]
    expected = [len(escaped), 2 * int(is_high.sum()), *[num_entries] * len(planes)]
    if found != expected:
        raise ShardError(
            f"{where}: streams of {found} bytes for {num_entries:,} kept entries, expected {expected}; the shard is "
            "damaged"
        )
    h[is_high] = np.frombuffer(high.tobytes(), "<u2")
    # Ranks are counted from 1 here, so that each difference is one more than its symbol says.
    steps_N = np.add(symbols_N, 1, dtype=np.int32)
    # Limited, because a damaged h may be larger than that of any difference.
    steps_N[escaped] = _NUM_LITERALS + (np.minimum(h, MAX_VOCAB_SIZE >> 8) << 8) + low + 1
    keys_N = _sort_keys(planes, quantizer, where)

    decode = functools.partial(_decode_rows, settings=settings, where=where)
    ids_N, logprobs_N, *others = _in_bands(decode, (counts_R, rest_R, tables_R), (steps_N, keys_N))
    draws_N = others[0] if precision is None else None
    codes_N = others[0] if settings.keep_codes and quantizer.levels is not None else None
    return KeptEntries(ids_N, logprobs_N, draws_N, codes_N)


def _sort_ranks(
    counts_R: npt.NDArray[np.int32], keys_N: npt.NDArray[np.unsignedinteger], *, num_value_bits: int
) -> tuple[npt.NDArray[Any], ...]:
    """Returns the keys of rows in ascending order, and how many ranks each skips; ranks are above the value's bits."""
    keys_RK = _to_rectangle(keys_N, counts_R, np.iinfo(keys_N.dtype).max)
    keys_RK.sort(axis=1)
    ranks_RK = (keys_RK >> num_value_bits).astype(np.int32)
    steps_N = _from_rectangle(np.diff(ranks_RK, axis=1, prepend=np.int32(-1)), counts_R) - 1
    return _from_rectangle(keys_RK, counts_R), steps_N


def _decode_rows(  # noqa: PLR0913 - the columns of rows, and what is common to all
    counts_R: npt.NDArray[np.int32],
    rest_R: npt.NDArray[np.float32],
    tables_R: npt.NDArray[np.uint8],
    steps_N: npt.NDArray[np.int32],
    keys_N: npt.NDArray[np.unsignedinteger],
    *,
    settings: CodecSettings,
    where: str,
) -> tuple[npt.NDArray[Any], ...]:
    """Returns ids and log-probs of rows, and their draws or codes if there are any, in the order of `TeacherScores`."""
    order, quantizer = settings.order, settings.quantizer
    precision = quantizer.precision
    # In 64 bits, so that even damaged differences do not overflow.
    ranks_RK = np.cumsum(_to_rectangle(steps_N, counts_R, 0), axis=1, dtype=np.int64)
    starts_R = order.starts[tables_R]
    # Ranks ascend, so the last of a row is its largest.
    if (ranks_RK[:, -1:] > (order.starts[1:][tables_R] - starts_R)[:, None]).any():
        raise ShardError(f"{where}: names an id past the last one of its row's table; the shard is damaged")
    ranks_RK += starts_R[:, None] - 1

    keys_N <<= _ID_BITS
    keys_RK = _to_rectangle(keys_N, counts_R, np.iinfo(keys_N.dtype).max)
    keys_RK |= order.ids.take(ranks_RK, mode="clip").astype(keys_N.dtype)
    keys_RK.sort(axis=1)
    keys_N = _from_rectangle(keys_RK, counts_R)
    # No copy if keys have 32 bits: the masked key is the id already.
    ids_N = (keys_N & ((1 << _ID_BITS) - 1)).astype(np.uint32, copy=False).view(np.int32)
    keys_N >>= _ID_BITS
    if precision in ("fp32", "fp16"):
        return ids_N, from_descending_keys(keys_N.astype(np.uint32))
    if quantizer.levels is None:
        assert quantizer.num_draws is not None
        draws_N = quantizer.num_draws - keys_N.astype(np.int32)
        return ids_N, empirical_logprobs(draws_N, quantizer.num_draws), draws_N
    codes_RK = _to_rectangle(np.subtract(quantizer.levels, keys_N, dtype=np.intp), counts_R, 0)
    # Weights and their sums are integers below 2^24, so float32 is exact. The fill of a short row weighs 1 each.
    sums_R = np.einsum("rk->r", _WEIGHTS.take(codes_RK, mode="clip")).astype(np.float64)
    sums_R -= codes_RK.shape[1] - counts_R
    mass_R = np.maximum(1.0 - rest_R.astype(np.float64), MIN_MASS)
    scale_R = np.log(mass_R) - np.log(np.maximum(sums_R, 1))
    logprobs_RK = _LOG_WEIGHTS.take(codes_RK, mode="clip")
    logprobs_RK += scale_R.astype(np.float32)[:, None]
    logprobs_N = _from_rectangle(logprobs_RK, counts_R)
    if settings.keep_codes:
        return ids_N, logprobs_N, _from_rectangle(codes_RK, counts_R).astype(np.uint8)
    return ids_N, logprobs_N


def _sort_keys(
    planes: Sequence[npt.NDArray[np.uint8]], quantizer: Quantizer, where: str
) -> npt.NDArray[np.unsignedinteger]:
    """Returns integers that ascend as values descend: keys of floats, or the largest code or number minus each.

    Raises:
        ShardError: a value is larger than the largest that is possible.
    """
    precision = quantizer.precision
    values_N = planes[0].astype(_key_type(precision))
    for plane, data in enumerate(planes[1:], 1):
        values_N |= data.astype(values_N.dtype) << 8 * plane
    if precision == "fp32":
        return descending_keys(values_N.astype(np.uint32).view(np.float32)).astype(values_N.dtype)
    if precision == "fp16":
        return descending_keys(values_N.astype(np.uint16).view(np.float16).astype(np.float32)).astype(values_N.dtype)
    max_value = quantizer.num_draws if precision is None else quantizer.levels
    assert max_value is not None
    if values_N.max(initial=0) > max_value:
        raise ShardError(f"{where}: a value of {values_N.max()}, expected at most {max_value}; the shard is damaged")
    return np.subtract(max_value, values_N, out=values_N)


def _quantize(scores: TeacherScores, quantizer: Quantizer) -> npt.NDArray[np.uint32]:
    """Returns what is stored of each entry, [N]: its number of draws, the bits of its log-prob, or its code.

    A code is the one in `scores`, or else the nearest number of steps to sqrt(p).
    """
    precision = quantizer.precision
    if precision is None:
        assert scores.draws is not None
        return scores.draws.astype(np.uint32)
    if precision == "fp32":
        return scores.logprobs.view(np.uint32)
    if precision == "fp16":
        return scores.logprobs.astype(np.float16).view(np.uint16).astype(np.uint32)
    assert quantizer.levels is not None
    if scores.codes is not None:
        assert scores.codes.max(initial=0) <= quantizer.levels
        return scores.codes.astype(np.uint32)
    assert np.isfinite(scores.logprobs).all()
    levels = np.float32(quantizer.levels)
    roots_N = np.exp(scores.logprobs * np.float32(0.5))
    codes_N: npt.NDArray[np.float32] = np.minimum(np.rint(roots_N * levels), levels)
    return codes_N.astype(np.uint32)


def _key_type(precision: StoredPrecision) -> type[np.unsignedinteger]:
    """Returns the type of keys of an id or rank and a value; the narrower one sorts twice as fast."""
    return np.uint32 if precision in ("q8", "q6") else np.uint64


def _batches(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yields ranges of conversations with up to `_MAX_BATCH_ENTRIES` entries together, or of a single larger one."""
    start, total = 0, 0
    for stop, size in enumerate(sizes):
        if stop > start and total + size > _MAX_BATCH_ENTRIES:
            yield start, stop
            start, total = stop, 0
        total += size
    if sizes:
        yield start, len(sizes)


def _in_bands(
    function: Callable[..., tuple[npt.NDArray[Any], ...]],
    of_rows: tuple[npt.NDArray[Any], ...],
    of_entries: tuple[npt.NDArray[Any], ...],
) -> list[npt.NDArray[Any]]:
    """Applies a function of independent rows to bands of rows of about the same length.

    A rectangle of all rows would take memory for as many entries as if all were as long as the longest.

    Args:
        function: takes the arrays of some rows, then those of their entries, and gives arrays [N].
        of_rows: arrays [R], the first of which has the number of entries of each row.
        of_entries: arrays [N].

    Returns:
        The arrays that the function gives, for all rows.
    """
    counts_R = of_rows[0]
    num_entries, num_rows = int(counts_R.sum()), len(counts_R)
    padded = int(counts_R.max(initial=0)) * num_rows
    if padded <= max(_MAX_PADDING * num_entries, _MAX_BATCH_ENTRIES):
        return list(function(*of_rows, *of_entries))
    results: list[npt.NDArray[Any]] = []
    # Rows of a band are at most twice as long as others.
    bands_R = np.frexp(counts_R)[1]
    for band in np.unique(bands_R):
        rows = np.flatnonzero(bands_R == band)
        entries = row_indices(counts_R, rows)
        parts = *(array[rows] for array in of_rows), *(array[entries] for array in of_entries)
        for number, found in enumerate(function(*parts)):
            if number == len(results):
                results.append(np.empty(num_entries, found.dtype))
            results[number][entries] = found
    return results


def _to_rectangle(values_N: npt.NDArray[Any], counts_R: npt.NDArray[np.int32], fill: int) -> npt.NDArray[Any]:
    """Returns entries as a rectangle [R, K], with `fill` after the last of a row; a view if all rows have K entries."""
    width = int(counts_R.max(initial=0))
    if len(values_N) == width * len(counts_R):
        return values_N.reshape(len(counts_R), width)
    rows_RK = np.full((len(counts_R), width), fill, values_N.dtype)
    rows_RK[np.arange(width) < counts_R[:, None]] = values_N
    return rows_RK


def _from_rectangle(rows_RK: npt.NDArray[Any], counts_R: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """Inverts `_to_rectangle`; returns the entries [N]."""
    width = rows_RK.shape[1]
    return rows_RK.reshape(-1) if counts_R.sum() == rows_RK.size else rows_RK[np.arange(width) < counts_R[:, None]]
