"""How kept entries become bytes, and back; docs/shard-format.md says it to the bit.

    ids ─ TokenOrder ─> ranks, ascending in a row ─> differences ─> a symbol each, a row's first quarter apart from the
                        second and so on, and what does not fit into symbols
    log-probs ─ precision ─> codes, rows of like rest mass together, or byte planes of floats; in the order of the ranks
    draws ─ in the order of the ranks ─> a bit for more than one, and byte planes of those

Ids are exact. A rank is an id's place in its row's table, by how often rows of this table keep it: what a row keeps is
mostly frequent there, so its ranks lie close together and differ by little. Each stream is a Parquet column of its own:
zstd then sees bytes of one kind.

Legend: R scored tokens, N kept entries of all of them, K kept entries of the longest row, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from common.errors import ShardError
from common.shards.byte_streams import (
    NUM_BUCKETS,
    NUM_QUARTERS,
    buckets_of,
    bytes_of_bits,
    join_buckets,
    join_quarters,
    pack_bits,
    quarter_widths,
    split_quarters,
    split_rows,
    with_single_draws,
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

# p of a code in sixteenths of a squared step: its square, but code 0 stands for a quarter of a step.
_WEIGHTS = np.maximum(16 * np.arange(256) ** 2, 1).astype(np.float32)
_LOG_WEIGHTS = np.log(_WEIGHTS.astype(np.float64)).astype(np.float32)

_VALUE_BYTES: dict[StoredPrecision, int] = {"fp32": 4, "fp16": 2, "q8": 1, "q6": 1, None: 2}
_ID_BITS = (MAX_VOCAB_SIZE - 1).bit_length()

# Differences below this are their own symbols; above, symbol 192 + h stands for 192 + 256 h + a low byte.
_LITERALS = 192
_MOST_H = 63

# Conversations are coded together until they have so many entries: few calls, and arrays that stay in the cache.
_BATCH_ENTRIES = 1 << 17


@dataclass(frozen=True)
class BinaryColumn:
    """A binary column: `data` uint8 [bytes]; conversation i has those from `offsets[i]` to `offsets[i + 1]`."""

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def part(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes of the conversations from `start` to `stop`."""
        return self.data[self.offsets[start] : self.offsets[stop]]


class RowColumns(NamedTuple):
    """What a shard says of each row in native columns: arrays [R].

    `rest_mass` as it is stored (`Quantizer.stored_rest`); `tables` are numbers of the token order's tables.
    """

    counts: npt.NDArray[np.int32]
    rest_mass: npt.NDArray[np.float32]
    tables: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class CodecSettings:
    """How a shard's kept entries are stored. With `keep_codes` those of a quantised precision are read with codes."""

    order: TokenOrder
    quantizer: Quantizer
    keep_codes: bool = False


class KeptEntries(NamedTuple):
    """Arrays [N] of entries as `TeacherScores` has them."""

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    draws: npt.NDArray[np.int32] | None
    codes: npt.NDArray[np.uint8] | None


def column_names(form: StoredPrecision) -> tuple[str, ...]:
    """Names of a conversation's binary columns."""
    return ID_COLUMNS + _VALUE_COLUMNS[form]


def pack(
    scores: Sequence[TeacherScores], tables: Sequence[npt.NDArray[np.uint8]], settings: CodecSettings
) -> dict[str, BinaryColumn]:
    """The binary columns of these conversations, whose rows have these `tables` of the order, [R] each.

    Scores with `codes` are stored by them, not by their log-probs.
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
        ShardError: the streams do not fit together, or name a token past the vocabulary.
    """
    sizes = [int(each.counts.sum()) for each in rows]
    for start, stop in _batches(sizes):
        together = RowColumns(*map(np.concatenate, zip(*rows[start:stop], strict=True)))
        _check_rows(together, settings.order.num_tables, where)
        ends = np.cumsum([0, *sizes[start:stop]])
        parts = {name: column.part(start, stop) for name, column in columns.items()}
        kept = _unpack_batch(parts, ends, together, settings, where)
        for part in map(slice, ends[:-1], ends[1:]):
            yield KeptEntries(
                kept.ids[part].copy(),
                kept.logprobs[part].copy(),
                None if kept.draws is None else kept.draws[part].copy(),
                None if kept.codes is None else kept.codes[part].copy(),
            )


def _check_rows(rows: RowColumns, num_tables: int, where: str) -> None:
    if rows.counts.min(initial=0) < 0:
        raise ShardError(f"{where}: a row keeps {rows.counts.min()} entries; the shard is damaged")
    if rows.tables.max(initial=0) >= num_tables:
        raise ShardError(f"{where}: names table {rows.tables.max()}, there are {num_tables}; the shard is damaged")


def _pack_batch(
    scores: Sequence[TeacherScores], tables_R: npt.NDArray[np.uint8], settings: CodecSettings
) -> dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Bytes of each column, and how many of them each conversation has."""
    order, coding = settings.order, settings.quantizer
    form = coding.precision
    counts_R = np.concatenate([each.counts for each in scores])
    ends = np.cumsum([0, *(len(each.ids) for each in scores)])
    num_bytes = _VALUE_BYTES[form]
    ids_N = np.concatenate([each.ids for each in scores])
    cells_N = np.repeat(tables_R * np.int64(order.vocab_size), counts_R)
    cells_N += ids_N
    keys_N = order.ranks.reshape(-1).take(cells_N, mode="clip").astype(_key_type(form))
    keys_N <<= 8 * num_bytes
    keys_N |= np.concatenate([_values(each, coding) for each in scores])
    keys_RK = _rows(keys_N, counts_R, np.iinfo(keys_N.dtype).max)
    keys_RK.sort(axis=1)
    ranks_RK = (keys_RK >> 8 * num_bytes).astype(np.int32)
    steps_N = _entries(np.diff(ranks_RK, axis=1, prepend=np.int32(-1)), counts_R) - 1
    assert steps_N.min(initial=0) >= 0, "a row keeps an id twice"

    far = np.flatnonzero(steps_N >= _LITERALS)
    beyond = steps_N[far] - _LITERALS
    h = beyond >> 8
    high = np.flatnonzero(h >= _MOST_H)
    symbols_N = steps_N.astype(np.uint8)
    symbols_N[far] = _LITERALS + np.minimum(h, _MOST_H)
    far_ends = np.searchsorted(far, ends)
    high_ends = np.searchsorted(high, far_ends)
    row_ends = np.cumsum([0, *(each.num_rows for each in scores)])
    quarters_R4 = np.cumsum(quarter_widths(counts_R), axis=0)
    quarter_ends = np.concatenate([np.zeros((1, NUM_QUARTERS), np.int64), quarters_R4])[row_ends]
    streams = [
        *zip(split_quarters(symbols_N, counts_R), np.diff(quarter_ends, axis=0).T, strict=True),
        (beyond.astype(np.uint8), np.diff(far_ends)),
        (h[high].astype("<u2").view(np.uint8), 2 * np.diff(high_ends)),
    ]
    values, value_ends = _entries(keys_RK, counts_R), ends
    if form is None:
        # Most ids are drawn once.
        draws_N = values & ((1 << 8 * num_bytes) - 1)
        assert draws_N.min(initial=1) >= 1
        is_repeated_N = draws_N > 1
        values, value_ends = values[is_repeated_N], np.concatenate([[0], np.cumsum(is_repeated_N)])[ends]
        streams.append((pack_bits(is_repeated_N, ends), bytes_of_bits(np.diff(ends))))
    if coding.levels is not None:
        buckets_R = buckets_of(coding.stored_rest(np.concatenate([each.rest_mass for each in scores])))
        cells_R = np.repeat(np.arange(len(scores)), np.diff(row_ends)) * NUM_BUCKETS + buckets_R
        sizes = np.bincount(cells_R, counts_R, minlength=len(scores) * NUM_BUCKETS).astype(np.int64)
        parts = split_rows(values.astype(np.uint8), counts_R, buckets_R, NUM_BUCKETS)
        streams += zip(parts, sizes.reshape(-1, NUM_BUCKETS).T, strict=True)
        return dict(zip(column_names(form), streams, strict=True))
    streams += [((values >> 8 * plane).astype(np.uint8), np.diff(value_ends)) for plane in range(num_bytes)]
    return dict(zip(column_names(form), streams, strict=True))


def _unpack_batch(
    columns: Mapping[str, npt.NDArray[np.uint8]],
    ends: npt.NDArray[np.int64],
    rows: RowColumns,
    settings: CodecSettings,
    where: str,
) -> KeptEntries:
    """The entries of all rows, each row by descending log-prob, ties by ascending id; `ends` are conversations'."""
    counts_R, rest_R, tables_R = rows
    order, coding = settings.order, settings.quantizer
    form = coding.precision
    symbols_N = join_quarters([columns[name] for name in _SYMBOL_COLUMNS], counts_R, where)
    low, high, *planes = (columns[name] for name in column_names(form)[NUM_QUARTERS:])
    num_entries = int(counts_R.sum())
    if form is None:
        planes = with_single_draws(planes, ends, where)
    elif coding.levels is not None:
        planes = [join_buckets(planes, counts_R, buckets_of(rest_R), where)]
    far = np.flatnonzero(symbols_N >= _LITERALS)
    h = symbols_N[far].astype(np.int32) - _LITERALS
    is_high = h == _MOST_H
    found = [len(low), len(high), *map(len, planes)]
    expected = [len(far), 2 * int(is_high.sum()), *[num_entries] * len(planes)]
    if found != expected:
        raise ShardError(
            f"{where}: streams of {found} bytes for {num_entries:,} kept entries, expected {expected}; the shard is "
            "damaged"
        )
    h[is_high] = np.frombuffer(high.tobytes(), "<u2")
    # From here on a rank is counted from 1, and a difference is one more.
    steps_N = np.add(symbols_N, 1, dtype=np.int32)
    # What is damaged may be larger than any difference.
    steps_N[far] = _LITERALS + (np.minimum(h, MAX_VOCAB_SIZE >> 8) << 8) + low + 1
    # 64 bits, which damaged ones cannot exceed.
    ranks_RK = np.cumsum(_rows(steps_N, counts_R, 0), axis=1, dtype=np.int64)
    starts_R = order.starts[tables_R]
    # Ranks ascend.
    if (ranks_RK[:, -1:] > (order.starts[1:][tables_R] - starts_R)[:, None]).any():
        raise ShardError(f"{where}: names an id past the last one of its row's table; the shard is damaged")
    ranks_RK += starts_R[:, None] - 1

    keys_N = _sort_keys(planes, coding, where)
    keys_N <<= _ID_BITS
    keys_RK = _rows(keys_N, counts_R, np.iinfo(keys_N.dtype).max)
    keys_RK |= order.ids.take(ranks_RK, mode="clip").astype(keys_N.dtype)
    keys_RK.sort(axis=1)
    keys_N = _entries(keys_RK, counts_R)
    # Where a key has 32 bits, an id's bits are those of its int32 already.
    ids_N = (keys_N & ((1 << _ID_BITS) - 1)).astype(np.uint32, copy=False).view(np.int32)
    keys_N >>= _ID_BITS
    if form in ("fp32", "fp16"):
        return KeptEntries(ids_N, from_descending_keys(keys_N.astype(np.uint32)), None, None)
    if coding.levels is None:
        assert coding.num_draws is not None
        draws_N = coding.num_draws - keys_N.astype(np.int32)
        return KeptEntries(ids_N, empirical_logprobs(draws_N, coding.num_draws), draws_N, None)
    codes_RK = _rows(np.subtract(coding.levels, keys_N, dtype=np.intp), counts_R, 0)
    # Integers below 2^24, and so are their sums: float32 is exact. What fills a row up weighs 1.
    sums_R = np.einsum("rk->r", _WEIGHTS.take(codes_RK, mode="clip")).astype(np.float64)
    sums_R -= codes_RK.shape[1] - counts_R
    mass_R = np.maximum(1.0 - rest_R.astype(np.float64), MIN_MASS)
    scale_R = np.log(mass_R) - np.log(np.maximum(sums_R, 1))
    logprobs_RK = _LOG_WEIGHTS.take(codes_RK, mode="clip")
    logprobs_RK += scale_R.astype(np.float32)[:, None]
    codes_N = _entries(codes_RK, counts_R).astype(np.uint8) if settings.keep_codes else None
    return KeptEntries(ids_N, _entries(logprobs_RK, counts_R), None, codes_N)


def _sort_keys(
    planes: Sequence[npt.NDArray[np.uint8]], coding: Quantizer, where: str
) -> npt.NDArray[np.unsignedinteger]:
    """Integers that ascend as values descend: keys of floats, or what a code or a number of draws lacks to the highest.

    Raises:
        ShardError: a value above the highest.
    """
    form = coding.precision
    values_N = planes[0].astype(_key_type(form))
    for plane, data in enumerate(planes[1:], 1):
        values_N |= data.astype(values_N.dtype) << 8 * plane
    if form == "fp32":
        return descending_keys(values_N.astype(np.uint32).view(np.float32)).astype(values_N.dtype)
    if form == "fp16":
        return descending_keys(values_N.astype(np.uint16).view(np.float16).astype(np.float32)).astype(values_N.dtype)
    highest = coding.num_draws if form is None else coding.levels
    assert highest is not None
    if values_N.max(initial=0) > highest:
        raise ShardError(f"{where}: a value of {values_N.max()}, expected at most {highest}; the shard is damaged")
    return np.subtract(highest, values_N, out=values_N)


def _values(scores: TeacherScores, coding: Quantizer) -> npt.NDArray[np.uint32]:
    """Numbers of draws, bits of the float, or steps of sqrt(p): those given, or else the nearest; entry by entry."""
    form = coding.precision
    if form is None:
        assert scores.draws is not None
        return scores.draws.astype(np.uint32)
    if form == "fp32":
        return scores.logprobs.view(np.uint32)
    if form == "fp16":
        return scores.logprobs.astype(np.float16).view(np.uint16).astype(np.uint32)
    assert coding.levels is not None
    if scores.codes is not None:
        assert scores.codes.max(initial=0) <= coding.levels
        return scores.codes.astype(np.uint32)
    assert np.isfinite(scores.logprobs).all()
    levels = np.float32(coding.levels)
    roots_N = np.exp(scores.logprobs * np.float32(0.5))
    codes_N: npt.NDArray[np.float32] = np.minimum(np.rint(roots_N * levels), levels)
    return codes_N.astype(np.uint32)


def _key_type(form: StoredPrecision) -> type[np.unsignedinteger]:
    """Holds an id or rank beside a value; sorting the narrower is twice as fast."""
    return np.uint32 if form in ("q8", "q6") else np.uint64


def _batches(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours with up to `_BATCH_ENTRIES` entries together, or of one that has more."""
    start, total = 0, 0
    for stop, size in enumerate(sizes):
        if stop > start and total + size > _BATCH_ENTRIES:
            yield start, stop
            start, total = stop, 0
        total += size
    if sizes:
        yield start, len(sizes)


def _rows(values_N: npt.NDArray[Any], counts_R: npt.NDArray[np.int32], fill: int) -> npt.NDArray[Any]:
    """Entries as a rectangle [R, K], `fill` after the last of a row. A view if all rows are equally long."""
    width = int(counts_R.max(initial=0))
    if len(values_N) == width * len(counts_R):
        return values_N.reshape(len(counts_R), width)
    rows_RK = np.full((len(counts_R), width), fill, values_N.dtype)
    rows_RK[np.arange(width) < counts_R[:, None]] = values_N
    return rows_RK


def _entries(rows_RK: npt.NDArray[Any], counts_R: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """Inverse of `_rows`."""
    width = rows_RK.shape[1]
    return rows_RK.reshape(-1) if counts_R.sum() == rows_RK.size else rows_RK[np.arange(width) < counts_R[:, None]]
