"""Token ids by how often they are kept: the orders in which shards store what a row keeps.

After like words a teacher keeps like ids. So a shard has several tables of frequencies, and each row the one that fits
it best: its ids are then among the first of that table, close together.

Legend: M tables, V vocabulary, R rows, S rows of a sample, U ids that occur, J ids by which a row is known.
"""

import base64
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import zstandard

from common.errors import ShardError
from common.shards.byte_streams import split_rows
from common.shards.scores import TeacherScores

MAX_TABLES = 64
# What fits into half a byte.
MAX_CLASS = 15

# A table takes about a byte for each id in it, which so many entries have to make up for.
ENTRIES_A_TABLE = 1 << 17
# Rows are known by their best ids, tables are found on so many rows each.
_BEST = 32
_ROWS_A_TABLE = 128
_ROUNDS = 5
# Logarithms are counted in steps of 1/32: those of a row's best ids, each below 20, then add up to less than 2^15.
_SCALE = 32
# Rows whose scores are in memory together.
_ROWS_AT_ONCE = 2048


class TokenOrder:
    """Token ids by falling class of frequency, ties by ascending id, in each table.

    The ids of table m by rank are `ids[starts[m] : starts[m + 1]]`, int32: those whose class is not 0.
    """

    def __init__(self, classes_MV: npt.NDArray[np.uint8]) -> None:
        self.num_tables, self.vocab_size = classes_MV.shape
        tables = [_by_class(classes_V) for classes_V in classes_MV]
        self.ids = np.concatenate(tables).astype(np.int32)
        self.starts = np.cumsum([0, *map(len, tables)]).astype(np.int32)

    @cached_property
    def ranks(self) -> npt.NDArray[np.int32]:
        """Rank of each id, int32 [M, V]; without meaning where the class is 0. Only who writes needs them."""
        ranks_MV = np.zeros((self.num_tables, self.vocab_size), np.int32)
        for ranks_V, start, stop in zip(ranks_MV, self.starts[:-1], self.starts[1:], strict=True):
            ranks_V[self.ids[start:stop]] = np.arange(stop - start)
        return ranks_MV


def find_classes(
    scores: Sequence[TeacherScores], vocab_size: int
) -> tuple[npt.NDArray[np.uint8], list[npt.NDArray[np.uint8]]]:
    """Classes of each table's ids, uint8 [M, V], and the table of each row, uint8 [R] for each of `scores`.

    A class is the number of binary digits of how many rows of the table keep the id, 15 if there are more.
    """
    ids_N = np.concatenate([np.zeros(0, np.int32), *(each.ids for each in scores)])
    counts_R = np.concatenate([np.zeros(0, np.int32), *(each.counts for each in scores)])
    num_tables = min(1 << max((len(ids_N) // ENTRIES_A_TABLE).bit_length() - 1, 0), MAX_TABLES)
    tables_R = _tables(ids_N, counts_R, num_tables, vocab_size)
    of_tables = split_rows(ids_N, counts_R, tables_R, num_tables)
    rows_MV = np.stack([np.bincount(ids, minlength=vocab_size) for ids in of_tables])
    tables = np.split(tables_R, np.cumsum([each.num_rows for each in scores]))[:-1]
    return np.minimum(np.frexp(rows_MV)[1], MAX_CLASS).astype(np.uint8), tables


def classes_to_text(classes_MV: npt.NDArray[np.uint8]) -> str:
    """Base64 of a zstd frame with a checksum: each id's highest class, then its class in each table, 4 bits each.

    The latter of ids that have one, by falling highest class: like numbers stand together then.
    """
    highest_V = classes_MV.max(axis=0)
    classes_UM = classes_MV[:, _by_class(highest_V)].T
    pairs = classes_UM[:, 0::2] | classes_UM[:, 1::2] << 4 if len(classes_MV) > 1 else classes_UM[:0]
    frame = zstandard.ZstdCompressor(9, write_checksum=True).compress(highest_V.tobytes() + pairs.tobytes())
    return base64.b64encode(frame).decode()


def classes_from_text(text: bytes, vocab_size: int, where: str) -> npt.NDArray[np.uint8]:
    """Inverse of `classes_to_text`, uint8 [M, V].

    Raises:
        ShardError: damaged, or of another vocabulary.
    """
    try:
        frame = base64.b64decode(text, validate=True)
        data = zstandard.ZstdDecompressor().decompress(frame, (1 + MAX_TABLES // 2) * vocab_size)
    except (ValueError, zstandard.ZstdError) as error:
        raise ShardError(f"{where}: its token classes cannot be read ({error}); the file is damaged") from error
    highest_V, pairs = np.split(np.frombuffer(data, np.uint8), [vocab_size])
    used = _by_class(highest_V)
    pairs_each, left = divmod(len(pairs), max(len(used), 1))
    if len(highest_V) < vocab_size or left or pairs_each > MAX_TABLES // 2:
        raise ShardError(
            f"{where}: has {len(data):,} bytes of token classes, expected one for each of {vocab_size:,} tokens and up "
            f"to {MAX_TABLES // 2} more for each that is kept"
        )
    if not len(pairs):
        return highest_V[None, :]
    pairs_PU = np.ascontiguousarray(pairs.reshape(len(used), pairs_each).T)
    classes_MV = np.zeros((2 * pairs_each, vocab_size), np.uint8)
    for lower_V, upper_V, pairs_U in zip(classes_MV[0::2], classes_MV[1::2], pairs_PU, strict=True):
        lower_V[used], upper_V[used] = pairs_U & 15, pairs_U >> 4
    return classes_MV


def _by_class(classes_V: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Ids whose class is not 0 by falling class, ties by ascending id."""
    # Of booleans in half the time.
    ids = np.flatnonzero(classes_V != 0)
    return ids[np.argsort(~classes_V[ids], kind="stable")]


def _tables(
    ids_N: npt.NDArray[np.int32], counts_R: npt.NDArray[np.int32], num_tables: int, vocab_size: int
) -> npt.NDArray[np.uint8]:
    """A table for each row, uint8 [R]: classes of a mixture of frequencies, by rounds of hard assignment."""
    num_rows = len(counts_R)
    if num_tables == 1:
        return np.zeros(num_rows, np.uint8)
    starts_R = np.cumsum(counts_R) - counts_R
    sample_S = np.linspace(0, num_rows - 1, min(num_rows, _ROWS_A_TABLE * num_tables)).astype(np.int64)
    best_SJ = _best(ids_N, counts_R, starts_R, sample_S, vocab_size)
    used_U = np.unique(best_SJ[best_SJ < vocab_size])
    # What does not occur in the sample says nothing of a table, as an empty place.
    places = np.full(vocab_size + 1, len(used_U))
    places[used_U] = np.arange(len(used_U))
    places_SJ = places[best_SJ]
    size = len(used_U) + 1
    share_U1 = np.bincount(places_SJ.reshape(-1), minlength=size) / len(sample_S)

    weights_U1M = np.zeros((size, num_tables), np.int16)
    seeds = np.linspace(0, len(sample_S) - 1, num_tables).astype(np.int64)
    weights_U1M[places_SJ[seeds], np.arange(num_tables)[:, None]] = 1
    weights_U1M[-1] = 0
    log_prior_M = np.zeros(num_tables, np.int16)
    for _ in range(_ROUNDS):
        tables_S = _best_table(places_SJ, weights_U1M, log_prior_M)
        cells = (places_SJ * num_tables + tables_S[:, None]).reshape(-1)
        rows_U1M = np.bincount(cells, minlength=size * num_tables).reshape(size, num_tables)
        rows_M = np.bincount(tables_S, minlength=num_tables)
        expected_U1M = share_U1[:, None] * (rows_M + 2)
        # Whole numbers, whose sums are exact: a last bit of another CPU's logarithm chooses no other table.
        weights_U1M[:-1] = np.rint(_SCALE * np.log((rows_U1M + 2 * share_U1[:, None])[:-1] / expected_U1M[:-1]))
        log_prior_M = np.rint(_SCALE * np.log((rows_M + 1) / len(sample_S))).astype(np.int16)

    tables_R = np.empty(num_rows, np.uint8)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, num_rows))
        places_RJ = places[_best(ids_N, counts_R, starts_R, rows, vocab_size)]
        tables_R[rows] = _best_table(places_RJ, weights_U1M, log_prior_M)
    return tables_R


def _best_table(
    places_RJ: npt.NDArray[np.int64], weights_U1M: npt.NDArray[np.int16], log_prior_M: npt.NDArray[np.int16]
) -> npt.NDArray[np.intp]:
    """The table under which a row's ids are the most probable, int [R]."""
    log_odds_RM = np.tile(log_prior_M, (len(places_RJ), 1))
    for places_R in places_RJ.T:
        log_odds_RM += weights_U1M.take(places_R, axis=0)
    tables_R: npt.NDArray[np.intp] = log_odds_RM.argmax(1)
    return tables_R


def _best(
    ids_N: npt.NDArray[np.int32],
    counts_R: npt.NDArray[np.int32],
    starts_R: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    vocab_size: int,
) -> npt.NDArray[np.int32]:
    """The first ids of some rows, int32 [rows, J], with V where a row has no more."""
    entries = starts_R[rows, None] + np.arange(_BEST)
    has = np.arange(_BEST) < counts_R[rows, None]
    return np.where(has, ids_N.take(entries, mode="clip"), vocab_size).astype(np.int32)
