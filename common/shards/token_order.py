"""Token ids sorted by how many rows keep them, in several tables; the codec stores ids by their ranks there.

After similar words a teacher keeps similar ids. So a shard has several tables of frequencies, and each row names the
one that fits it best: the row's ids are then among the first of that table and close together.

Legend: M tables, V vocabulary, R rows, S sampled rows, U used ids, J first ids of a row, by which tables are chosen.
"""

import base64
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import zstandard

from common.errors import ShardError
from common.shards.byte_streams import split_by_label
from common.shards.scores import TeacherScores

MAX_TABLES = 64
# The largest number in half a byte.
MAX_CLASS = 15

# Entries for each table: a table costs about a byte for each id in it, which fewer entries would not save.
ENTRIES_PER_TABLE = 1 << 17
# Tables are found by rounds of clustering a sample of the rows by their best ids.
_NUM_BEST = 32
_SAMPLE_ROWS_PER_TABLE = 128
_NUM_ROUNDS = 5
# Logarithms are integers in steps of 1/32. Each is below 20, so the sum over a row's best ids stays below 2^15.
_SCALE = 32
# Rows that are assigned to tables at once, which bounds memory.
_BATCH_ROWS = 2048


class TokenOrder:
    """Token ids of each table, by descending class of frequency, ties by ascending id.

    The ids of table m by rank are `ids[starts[m] : starts[m + 1]]`, int32; ids of class 0 are in no table.
    """

    def __init__(self, classes_MV: npt.NDArray[np.uint8]) -> None:
        self.num_tables, self.vocab_size = classes_MV.shape
        tables = [_by_class(classes_V) for classes_V in classes_MV]
        self.ids = np.concatenate(tables).astype(np.int32)
        self.starts = np.cumsum([0, *map(len, tables)]).astype(np.int32)

    @cached_property
    def ranks(self) -> npt.NDArray[np.int32]:
        """Rank of each id, int32 [M, V]; 0 where the class is 0. Computed on first use, as only writers need it."""
        ranks_MV = np.zeros((self.num_tables, self.vocab_size), np.int32)
        for ranks_V, start, stop in zip(ranks_MV, self.starts[:-1], self.starts[1:], strict=True):
            ranks_V[self.ids[start:stop]] = np.arange(stop - start)
        return ranks_MV


def find_classes(
    scores: Sequence[TeacherScores], vocab_size: int
) -> tuple[npt.NDArray[np.uint8], list[npt.NDArray[np.uint8]]]:
    """Returns the classes of each table's ids, uint8 [M, V], and the table of each row, uint8 [R] for each of `scores`.

    A class is the number of binary digits of the number of the table's rows that keep the id, at most 15.
    """
    ids_N = np.concatenate([np.zeros(0, np.int32), *(each.ids for each in scores)])
    counts_R = np.concatenate([np.zeros(0, np.int32), *(each.counts for each in scores)])
    num_tables = min(1 << max((len(ids_N) // ENTRIES_PER_TABLE).bit_length() - 1, 0), MAX_TABLES)
    tables_R = _assign_tables(ids_N, counts_R, num_tables, vocab_size)
    ids_by_table = split_by_label(ids_N, counts_R, tables_R, num_tables)
    rows_MV = np.stack([np.bincount(ids, minlength=vocab_size) for ids in ids_by_table])
    tables = np.split(tables_R, np.cumsum([each.num_rows for each in scores]))[:-1]
    return np.minimum(np.frexp(rows_MV)[1], MAX_CLASS).astype(np.uint8), tables


def classes_to_text(classes_MV: npt.NDArray[np.uint8]) -> str:
    """Returns the Base64 of a zstd frame with a checksum: each id's highest class, then its class in each table.

    The latter have 4 bits each and are there only for ids that are in a table, by descending highest class, so that
    similar numbers stand together.
    """
    highest_V = classes_MV.max(axis=0)
    classes_UM = classes_MV[:, _by_class(highest_V)].T
    pairs = classes_UM[:, 0::2] | classes_UM[:, 1::2] << 4 if len(classes_MV) > 1 else classes_UM[:0]
    frame = zstandard.ZstdCompressor(9, write_checksum=True).compress(highest_V.tobytes() + pairs.tobytes())
    return base64.b64encode(frame).decode()


def classes_from_text(text: bytes, vocab_size: int, where: str) -> npt.NDArray[np.uint8]:
    """Inverts `classes_to_text`; returns uint8 [M, V].

    Raises:
        ShardError: the text is damaged, or belongs to another vocabulary.
    """
    try:
        frame = base64.b64decode(text, validate=True)
        limit = (1 + MAX_TABLES // 2) * vocab_size
        # A frame that names its size has that much allocated, whatever the limit is.
        if zstandard.frame_content_size(frame) > limit:
            raise ValueError(f"it claims {zstandard.frame_content_size(frame):,} bytes, expected at most {limit:,}")
        data = zstandard.ZstdDecompressor().decompress(frame, limit)
    except (ValueError, zstandard.ZstdError) as error:
        raise ShardError(f"{where}: its token classes cannot be read ({error}); the file is damaged") from error
    highest_V, pairs = np.split(np.frombuffer(data, np.uint8), [vocab_size])
    used_U = _by_class(highest_V)
    pairs_each, remainder = divmod(len(pairs), max(len(used_U), 1))
    if len(highest_V) < vocab_size or remainder or pairs_each > MAX_TABLES // 2:
        raise ShardError(
            f"{where}: has {len(data):,} bytes of token classes, expected one for each of {vocab_size:,} tokens and up "
            f"to {MAX_TABLES // 2} more for each that is kept"
        )
    if not len(pairs):
        return highest_V[None, :]
    pairs_PU = np.ascontiguousarray(pairs.reshape(len(used_U), pairs_each).T)
    classes_MV = np.zeros((2 * pairs_each, vocab_size), np.uint8)
    for lower_V, upper_V, pairs_U in zip(classes_MV[0::2], classes_MV[1::2], pairs_PU, strict=True):
        lower_V[used_U], upper_V[used_U] = pairs_U & 15, pairs_U >> 4
    return classes_MV


def _by_class(classes_V: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """Returns the ids whose class is not 0, by descending class, ties by ascending id."""
    # flatnonzero takes half the time for booleans.
    ids = np.flatnonzero(classes_V != 0)
    return ids[np.argsort(~classes_V[ids], kind="stable")]


def _assign_tables(
    ids_N: npt.NDArray[np.int32], counts_R: npt.NDArray[np.int32], num_tables: int, vocab_size: int
) -> npt.NDArray[np.uint8]:
    """Returns a table for each row, uint8 [R], found by rounds of hard clustering of a mixture of id frequencies."""
    num_rows = len(counts_R)
    if num_tables == 1:
        return np.zeros(num_rows, np.uint8)
    starts_R = np.cumsum(counts_R) - counts_R
    sample_S = np.linspace(0, num_rows - 1, min(num_rows, _SAMPLE_ROWS_PER_TABLE * num_tables)).astype(np.int64)
    best_SJ = _first_ids(ids_N, counts_R, starts_R, sample_S, vocab_size)
    used_U = np.unique(best_SJ[best_SJ < vocab_size])
    # Ids that the sample lacks and empty slots share the last index, whose weights are 0: they favour no table.
    index_V1 = np.full(vocab_size + 1, len(used_U))
    index_V1[used_U] = np.arange(len(used_U))
    indices_SJ = index_V1[best_SJ]
    size = len(used_U) + 1
    share_U1 = np.bincount(indices_SJ.reshape(-1), minlength=size) / len(sample_S)

    weights_U1M = np.zeros((size, num_tables), np.int16)
    seeds = np.linspace(0, len(sample_S) - 1, num_tables).astype(np.int64)
    weights_U1M[indices_SJ[seeds], np.arange(num_tables)[:, None]] = 1
    weights_U1M[-1] = 0
    log_prior_M = np.zeros(num_tables, np.int16)
    for _ in range(_NUM_ROUNDS):
        tables_S = _find_likeliest_tables(indices_SJ, weights_U1M, log_prior_M)
        cells = (indices_SJ * num_tables + tables_S[:, None]).reshape(-1)
        rows_U1M = np.bincount(cells, minlength=size * num_tables).reshape(size, num_tables)
        rows_M = np.bincount(tables_S, minlength=num_tables)
        expected_U1M = share_U1[:, None] * (rows_M + 2)
        # Integers, whose sums are exact, so that the last bit of another CPU's logarithm does not change a table.
        weights_U1M[:-1] = np.rint(_SCALE * np.log((rows_U1M + 2 * share_U1[:, None])[:-1] / expected_U1M[:-1]))
        log_prior_M = np.rint(_SCALE * np.log((rows_M + 1) / len(sample_S))).astype(np.int16)

    tables_R = np.empty(num_rows, np.uint8)
    for start in range(0, num_rows, _BATCH_ROWS):
        rows = np.arange(start, min(start + _BATCH_ROWS, num_rows))
        indices_RJ = index_V1[_first_ids(ids_N, counts_R, starts_R, rows, vocab_size)]
        tables_R[rows] = _find_likeliest_tables(indices_RJ, weights_U1M, log_prior_M)
    return tables_R


def _find_likeliest_tables(
    indices_RJ: npt.NDArray[np.int64], weights_U1M: npt.NDArray[np.int16], log_prior_M: npt.NDArray[np.int16]
) -> npt.NDArray[np.intp]:
    """Returns the table under which each row's ids are most probable, int [R]."""
    log_odds_RM = np.tile(log_prior_M, (len(indices_RJ), 1))
    for indices_R in indices_RJ.T:
        log_odds_RM += weights_U1M.take(indices_R, axis=0)
    tables_R: npt.NDArray[np.intp] = log_odds_RM.argmax(1)
    return tables_R


def _first_ids(
    ids_N: npt.NDArray[np.int32],
    counts_R: npt.NDArray[np.int32],
    starts_R: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    vocab_size: int,
) -> npt.NDArray[np.int32]:
    """Returns the first ids of some rows, int32 [rows, J], with V where a row has fewer."""
    entries = starts_R[rows, None] + np.arange(_NUM_BEST)
    has_entry = np.arange(_NUM_BEST) < counts_R[rows, None]
    return np.where(has_entry, ids_N.take(entries, mode="clip"), vocab_size).astype(np.int32)
