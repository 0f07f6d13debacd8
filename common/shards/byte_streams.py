"""Byte streams of kept entries that are split by quarters, buckets or bits; docs/shard-format.md specifies them.

Legend: R scored tokens, N kept entries of all rows, row after row. `ends` has 0 and the index after the last entry of
each conversation.
"""

import itertools
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from common.errors import ShardError

_Value = TypeVar("_Value", bound=np.generic)

NUM_QUARTERS = 4
NUM_BUCKETS = 16


def quarter_widths(counts_R: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Returns the number of entries in each quarter of each row, int64 [R, 4].

    Quarter q of a row with c entries ends before entry floor(c (q + 1) / 4).
    """
    edges_R5 = counts_R.astype(np.int64)[:, None] * np.arange(NUM_QUARTERS + 1) // NUM_QUARTERS
    return np.diff(edges_R5, axis=1)


def split_quarters(values_N: npt.NDArray[np.uint8], counts_R: npt.NDArray[np.int32]) -> list[npt.NDArray[np.uint8]]:
    """Returns the values of the first quarters of all rows, those of the second quarters, and so on."""
    if not _is_uniform(counts_R):
        widths_R4 = quarter_widths(counts_R)
        return np.split(values_N[_quarter_indices(widths_R4)], np.cumsum(widths_R4.sum(0))[:-1])
    rows_RK = values_N.reshape(len(counts_R), -1)
    edges = np.cumsum([0, *quarter_widths(counts_R[:1])[0]])
    return [rows_RK[:, a:b].reshape(-1) for a, b in itertools.pairwise(edges)]


def join_quarters(
    quarters: Sequence[npt.NDArray[np.uint8]], counts_R: npt.NDArray[np.int32], where: str
) -> npt.NDArray[np.uint8]:
    """Inverts `split_quarters`.

    Raises:
        ShardError: a quarter has another number of values than its rows have entries.
    """
    is_uniform = _is_uniform(counts_R)
    widths_R4 = quarter_widths(counts_R[:1] if is_uniform else counts_R)
    found = [len(quarter) for quarter in quarters]
    expected = (widths_R4.sum(0) * (len(counts_R) if is_uniform else 1)).tolist()
    if found != expected:
        raise ShardError(f"{where}: {found} symbols in quarters of rows, expected {expected}; the shard is damaged")
    values_N = np.empty(sum(expected), np.uint8)
    if not is_uniform:
        values_N[_quarter_indices(widths_R4)] = np.concatenate(quarters)
        return values_N
    rows_RK = values_N.reshape(len(counts_R), -1)
    for quarter, (a, b) in zip(quarters, itertools.pairwise(np.cumsum([0, *widths_R4[0]])), strict=True):
        rows_RK[:, a:b] = quarter.reshape(len(counts_R), b - a)
    return values_N


def rest_mass_buckets(rest_R: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Returns the bucket of each row's codes, uint8 [R]: b < 15 for a rest mass from 2^-(b + 1) to 2^-b, else 15.

    Rows with about the same rest mass have similar codes, which compress better together.
    """
    exponents_R = np.frexp(rest_R)[1]
    return np.where(rest_R > 0, np.clip(-exponents_R, 0, NUM_BUCKETS - 1), NUM_BUCKETS - 1).astype(np.uint8)


def split_by_label(
    values_N: npt.NDArray[_Value], counts_R: npt.NDArray[np.int32], labels_R: npt.NDArray[np.integer], num_labels: int
) -> list[npt.NDArray[_Value]]:
    """Returns the values of the rows of each label, from 0 to `num_labels` - 1."""
    order_R = np.argsort(labels_R, kind="stable")
    if _is_uniform(counts_R):
        values_N = values_N.reshape(len(counts_R), -1)[order_R].reshape(-1)
    else:
        values_N = values_N[row_indices(counts_R, order_R)]
    return np.split(values_N, np.cumsum(_entries_per_label(counts_R, labels_R, num_labels))[:-1])


def join_buckets(
    buckets: Sequence[npt.NDArray[np.uint8]],
    counts_R: npt.NDArray[np.int32],
    buckets_R: npt.NDArray[np.uint8],
    where: str,
) -> npt.NDArray[np.uint8]:
    """Inverts `split_by_label` for buckets.

    Raises:
        ShardError: a bucket has another number of codes than its rows have entries.
    """
    found, expected = [len(codes) for codes in buckets], _entries_per_label(counts_R, buckets_R, NUM_BUCKETS).tolist()
    if found != expected:
        raise ShardError(
            f"{where}: {found} codes of rows by their rest mass, expected {expected}; the shard is damaged"
        )
    order_R = np.argsort(buckets_R, kind="stable")
    codes_N = np.concatenate(buckets)
    joined_N = np.empty_like(codes_N)
    if _is_uniform(counts_R):
        joined_N.reshape(len(counts_R), -1)[order_R] = codes_N.reshape(len(counts_R), -1)
    else:
        joined_N[row_indices(counts_R, order_R)] = codes_N
    return joined_N


def _is_uniform(counts_R: npt.NDArray[np.int32]) -> bool:
    """Returns True if all rows have the same number of entries, which is not 0."""
    return bool(len(counts_R) and counts_R[0] and (counts_R == counts_R[0]).all())


def _quarter_indices(widths_R4: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the indices of the values of all first quarters, then of all second ones, and so on, [N]."""
    widths = widths_R4.reshape(-1)
    starts_4R = (np.cumsum(widths) - widths).reshape(widths_R4.shape).T
    return _range_indices(starts_4R.reshape(-1), widths_R4.T.reshape(-1))


def row_indices(counts_R: npt.NDArray[np.int32], order_R: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
    """Returns the indices of the values of the rows `order_R`, in their order, [N]."""
    starts_R = np.cumsum(counts_R, dtype=np.int64) - counts_R
    return _range_indices(starts_R[order_R], counts_R[order_R])


def _range_indices(starts: npt.NDArray[np.int64], widths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Returns the indices start, start + 1, ..., start + width - 1 of each start and width, one after the other."""
    ends = np.cumsum(widths, dtype=np.int64)
    return np.repeat(starts - ends + widths, widths) + np.arange(ends[-1] if len(ends) else 0)


def _entries_per_label(
    counts_R: npt.NDArray[np.int32], labels_R: npt.NDArray[np.integer], num_labels: int
) -> npt.NDArray[np.int64]:
    """Returns the number of entries of all rows of each label, int64 [labels]."""
    return np.bincount(labels_R, counts_R, minlength=num_labels).astype(np.int64)


def expand_draws(
    columns: Sequence[npt.NDArray[np.uint8]], ends: npt.NDArray[np.int64], where: str
) -> list[npt.NDArray[np.uint8]]:
    """Returns the byte planes of all numbers of draws, from the bits and the byte planes of the numbers above 1.

    Raises:
        ShardError: bits and planes do not belong together, or a number in the planes is not above 1.
    """
    bits, *planes = columns
    if len(bits) != num_packed_bytes(np.diff(ends)).sum():
        raise ShardError(f"{where}: {len(bits):,} bytes of bits for {ends[-1]:,} drawn entries; the shard is damaged")
    repeated = np.flatnonzero(np.unpackbits(bits, bitorder="little")[_bit_indices(ends)])
    if any(len(plane) != len(repeated) for plane in planes):
        raise ShardError(
            f"{where}: {[len(plane) for plane in planes]} bytes of draws for {len(repeated):,} entries that were drawn "
            "more than once; the shard is damaged"
        )
    low, high = planes
    if ((low < 2) & (high == 0)).any():
        raise ShardError(f"{where}: fewer than 2 draws of what was drawn more than once; the shard is damaged")
    expanded = [np.full(ends[-1], value, np.uint8) for value in (1, 0)]
    for full_plane, plane in zip(expanded, planes, strict=True):
        full_plane[repeated] = plane
    return expanded


def pack_bits(flags_N: npt.NDArray[np.bool_], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Packs a bit for each entry, lowest bit first; each conversation begins with a new byte."""
    bits = np.zeros(8 * num_packed_bytes(np.diff(ends)).sum(), np.uint8)
    bits[_bit_indices(ends)] = flags_N
    return np.packbits(bits, bitorder="little")


def _bit_indices(ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the index of each entry's bit among all bits, [N]."""
    sizes = np.diff(ends)
    skipped = 8 * np.cumsum([0, *num_packed_bytes(sizes)])[:-1] - ends[:-1]
    return np.arange(ends[-1]) + np.repeat(skipped, sizes)


def num_packed_bytes(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Returns the number of bytes that hold `sizes` bits."""
    return -(-sizes // 8)
