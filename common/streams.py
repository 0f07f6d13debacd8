"""Streams of kept entries that do not have one byte for each, row after row; docs/shard-format.md says them to the bit.

Legend: R scored tokens, N kept entries of all of them.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.errors import ShardError

# Codes of rows with about the same rest mass are alike: each bucket has the rows from one edge to the next.
REST_EDGES = np.array([0.0025, 0.01, 0.025, 0.05, 0.09, 0.15, 0.25], np.float32)
NUM_BUCKETS = len(REST_EDGES) + 1


def buckets_of(rest_R: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """Which bucket has a row's codes, by its rest mass: int [R]."""
    return np.searchsorted(REST_EDGES, rest_R, side="right")


def join_buckets(
    buckets: Sequence[npt.NDArray[np.uint8]],
    counts_R: npt.NDArray[np.int32],
    buckets_R: npt.NDArray[np.intp],
    where: str,
) -> npt.NDArray[np.uint8]:
    """Codes [N] in the order of the rows, from those of each bucket.

    Raises:
        ShardError: a bucket has not the codes of its rows.
    """
    found = [len(codes) for codes in buckets]
    expected = np.bincount(buckets_R, counts_R, minlength=len(buckets)).astype(np.int64).tolist()
    if found != expected:
        raise ShardError(
            f"{where}: {found} codes of rows by their rest mass, expected {expected}; the shard is damaged"
        )
    codes_N = np.concatenate(buckets)
    # Rows in the order in which their codes follow each other there.
    order_R = np.argsort(buckets_R, kind="stable")
    width = int(counts_R.max(initial=0))
    if len(codes_N) == width * len(counts_R):
        rows_RK = np.empty((len(counts_R), width), np.uint8)
        rows_RK[order_R] = codes_N.reshape(-1, width) if width else rows_RK
        return rows_RK.reshape(-1)
    starts_R = np.empty(len(counts_R), np.int64)
    sizes_R = counts_R[order_R]
    starts_R[order_R] = np.cumsum(sizes_R) - sizes_R
    shifts_R = starts_R - (np.cumsum(counts_R) - counts_R)
    return codes_N[np.repeat(shifts_R, counts_R) + np.arange(len(codes_N))]


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
