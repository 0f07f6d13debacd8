"""Streams of kept entries that do not have one byte for each, row after row; docs/shard-format.md says them to the bit.

Legend: R scored tokens, N kept entries of all of them.
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
    """Entries of each quarter of a row, int64 [R, 4]: quarter q of c entries ends before entry floor(c (q + 1) / 4)."""
    edges_R5 = counts_R.astype(np.int64)[:, None] * np.arange(NUM_QUARTERS + 1) // NUM_QUARTERS
    return np.diff(edges_R5, axis=1)


def split_quarters(values_N: npt.NDArray[np.uint8], counts_R: npt.NDArray[np.int32]) -> list[npt.NDArray[np.uint8]]:
    """The first quarters of all rows, the second ones and so on; from values that stand row after row."""
    if not _equally_long(counts_R):
        widths_R4 = quarter_widths(counts_R)
        return np.split(values_N[_places_of_quarters(widths_R4)], np.cumsum(widths_R4.sum(0))[:-1])
    rows_RK = values_N.reshape(len(counts_R), -1)
    edges = np.cumsum([0, *quarter_widths(counts_R[:1])[0]])
    return [rows_RK[:, a:b].reshape(-1) for a, b in itertools.pairwise(edges)]


def join_quarters(
    quarters: Sequence[npt.NDArray[np.uint8]], counts_R: npt.NDArray[np.int32], where: str
) -> npt.NDArray[np.uint8]:
    """Inverse of `split_quarters`.

    Raises:
        ShardError: a quarter has not the values of its rows.
    """
    alike = _equally_long(counts_R)
    widths_R4 = quarter_widths(counts_R[:1] if alike else counts_R)
    found = [len(quarter) for quarter in quarters]
    expected = (widths_R4.sum(0) * (len(counts_R) if alike else 1)).tolist()
    if found != expected:
        raise ShardError(f"{where}: {found} symbols in quarters of rows, expected {expected}; the shard is damaged")
    values_N = np.empty(sum(expected), np.uint8)
    if not alike:
        values_N[_places_of_quarters(widths_R4)] = np.concatenate(quarters)
        return values_N
    rows_RK = values_N.reshape(len(counts_R), -1)
    for quarter, (a, b) in zip(quarters, itertools.pairwise(np.cumsum([0, *widths_R4[0]])), strict=True):
        rows_RK[:, a:b] = quarter.reshape(len(counts_R), b - a)
    return values_N


def buckets_of(rest_R: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Which bucket has a row's codes, uint8 [R]; b < 15: a rest mass from 2^-(b + 1) to 2^-b, 15: a smaller one.

    Codes of rows with about the same rest mass are alike.
    """
    exponents_R = np.frexp(rest_R)[1]
    return np.where(rest_R > 0, np.clip(-exponents_R, 0, NUM_BUCKETS - 1), NUM_BUCKETS - 1).astype(np.uint8)


def split_rows(
    values_N: npt.NDArray[_Value], counts_R: npt.NDArray[np.int32], labels_R: npt.NDArray[np.integer], num_labels: int
) -> list[npt.NDArray[_Value]]:
    """The values of the rows of each label; from values that stand row after row."""
    order_R = np.argsort(labels_R, kind="stable")
    if _equally_long(counts_R):
        values_N = values_N.reshape(len(counts_R), -1)[order_R].reshape(-1)
    else:
        values_N = values_N[_places_of_rows(counts_R, order_R)]
    return np.split(values_N, np.cumsum(_sizes(counts_R, labels_R, num_labels))[:-1])


def join_buckets(
    buckets: Sequence[npt.NDArray[np.uint8]],
    counts_R: npt.NDArray[np.int32],
    buckets_R: npt.NDArray[np.uint8],
    where: str,
) -> npt.NDArray[np.uint8]:
    """Inverse of `split_rows` by buckets.

    Raises:
        ShardError: a bucket has not the codes of its rows.
    """
    found, expected = [len(codes) for codes in buckets], _sizes(counts_R, buckets_R, NUM_BUCKETS).tolist()
    if found != expected:
        raise ShardError(
            f"{where}: {found} codes of rows by their rest mass, expected {expected}; the shard is damaged"
        )
    order_R = np.argsort(buckets_R, kind="stable")
    codes_N = np.concatenate(buckets)
    joined_N = np.empty_like(codes_N)
    if _equally_long(counts_R):
        joined_N.reshape(len(counts_R), -1)[order_R] = codes_N.reshape(len(counts_R), -1)
    else:
        joined_N[_places_of_rows(counts_R, order_R)] = codes_N
    return joined_N


def _equally_long(counts_R: npt.NDArray[np.int32]) -> bool:
    """Whether all rows have as many entries, and have some."""
    return bool(len(counts_R) and counts_R[0] and (counts_R == counts_R[0]).all())


def _places_of_quarters(widths_R4: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where values of all first quarters stand, then those of all second ones and so on, [N]."""
    widths = widths_R4.reshape(-1)
    starts_4R = (np.cumsum(widths) - widths).reshape(widths_R4.shape).T
    return _places(starts_4R.reshape(-1), widths_R4.T.reshape(-1))


def _places_of_rows(counts_R: npt.NDArray[np.int32], order_R: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
    """Where values of the rows stand in this order of them, [N]."""
    starts_R = np.cumsum(counts_R, dtype=np.int64) - counts_R
    return _places(starts_R[order_R], counts_R[order_R])


def _places(starts: npt.NDArray[np.int64], widths: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    """Places from each start on, so many as its width, one start after the other."""
    ends = np.cumsum(widths, dtype=np.int64)
    return np.repeat(starts - ends + widths, widths) + np.arange(ends[-1] if len(ends) else 0)


def _sizes(
    counts_R: npt.NDArray[np.int32], labels_R: npt.NDArray[np.integer], num_labels: int
) -> npt.NDArray[np.int64]:
    """Entries of the rows of each label."""
    return np.bincount(labels_R, counts_R, minlength=num_labels).astype(np.int64)


def with_single_draws(
    columns: Sequence[npt.NDArray[np.uint8]], ends: npt.NDArray[np.int64], where: str
) -> list[npt.NDArray[np.uint8]]:
    """Byte planes of all numbers of draws, from the bits and the planes of those above 1.

    Raises:
        ShardError: they do not fit together.
    """
    bits, *planes = columns
    if len(bits) != bytes_of_bits(np.diff(ends)).sum():
        raise ShardError(f"{where}: {len(bits):,} bytes of bits for {ends[-1]:,} drawn entries; the shard is damaged")
    repeated = np.flatnonzero(np.unpackbits(bits, bitorder="little")[_places_of_bits(ends)])
    if any(len(plane) != len(repeated) for plane in planes):
        raise ShardError(
            f"{where}: {[len(plane) for plane in planes]} bytes of draws for {len(repeated):,} entries that were drawn "
            "more than once; the shard is damaged"
        )
    low, high = planes
    if ((low < 2) & (high == 0)).any():
        raise ShardError(f"{where}: fewer than 2 draws of what was drawn more than once; the shard is damaged")
    whole = [np.full(ends[-1], value, np.uint8) for value in (1, 0)]
    for one, plane in zip(whole, planes, strict=True):
        one[repeated] = plane
    return whole


def pack_bits(flags_N: npt.NDArray[np.bool_], ends: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """A bit an entry, the lowest first; each conversation begins with a byte of its own."""
    bits = np.zeros(8 * bytes_of_bits(np.diff(ends)).sum(), np.uint8)
    bits[_places_of_bits(ends)] = flags_N
    return np.packbits(bits, bitorder="little")


def _places_of_bits(ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where the bit of each entry stands among all bits."""
    sizes = np.diff(ends)
    skipped = 8 * np.cumsum([0, *bytes_of_bits(sizes)])[:-1] - ends[:-1]
    return np.arange(ends[-1]) + np.repeat(skipped, sizes)


def bytes_of_bits(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bytes that so many bits take."""
    return -(-sizes // 8)
