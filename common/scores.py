"""What the teacher says about a conversation, and its packed form.

Legend: R scored tokens, N kept entries of all rows, K kept entries of one row.

Packed form, per conversation (all little-endian; docs/shard-format.md has the bits):
    topk_counts    int32 [R]   as a Parquet list column
    topk_ids       the N ids in row order as three planes of N bytes: bits 0-7, 8-15, 16-23
    topk_logprobs  the N float32 log-probs in row order as four planes of N bytes, lowest byte first
Planes put bytes of one significance side by side, which is what makes zstd find their redundancy.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.errors import ShardError

MAX_VOCAB_SIZE = 1 << 24


@dataclass(frozen=True)
class TeacherScores:
    """The teacher's distribution at each scored token, at temperature 1 over its whole vocabulary.

    `own_logprobs` float32 [R]: log-prob of the token that stands there. `rest_mass` float32 [R]: probability of
    everything not kept. `counts` int32 [R]: kept entries a row. `ids` int32 [N] and `logprobs` float32 [N]: the
    kept entries, rows one after the other, in a row by descending log-prob, ties by ascending id.
    """

    own_logprobs: npt.NDArray[np.float32]
    rest_mass: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        num_rows, num_entries = len(self.own_logprobs), int(self.counts.sum())
        assert len(self.rest_mass) == len(self.counts) == num_rows
        assert len(self.ids) == len(self.logprobs) == num_entries

    @property
    def num_rows(self) -> int:
        """R, the number of scored tokens."""
        return len(self.own_logprobs)

    @property
    def total_logprob(self) -> float:
        """Log-prob of the whole response, summed in float64: DPO's reference term."""
        return float(self.own_logprobs.astype(np.float64).sum())

    def topk(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Kept entries as rectangles [R, max K]; empty slots hold id 0 and log-prob -inf."""
        width = int(self.counts.max(initial=0))
        filled = np.arange(width) < self.counts[:, None]
        ids_RK = np.zeros(filled.shape, np.int64)
        logprobs_RK = np.full(filled.shape, -np.inf, np.float32)
        ids_RK[filled] = self.ids
        logprobs_RK[filled] = self.logprobs
        return ids_RK, logprobs_RK


def rest_mass(logprobs_RK: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """1 - sum of the kept probabilities of each row, float32 [R]; entries of -inf count nothing.

    Below 2e-6 it is 0: float32 log-probs cannot tell such a rest from rounding, and a spurious one would ask the
    student for mass outside a set that may be the whole vocabulary.
    """
    rest = 1.0 - np.exp(logprobs_RK.astype(np.float64)).sum(axis=1)
    return np.where(rest < 2e-6, 0.0, rest).astype(np.float32)


def from_rectangle(
    own_logprobs: npt.NDArray[np.float32],
    ids_RK: npt.NDArray[np.integer],
    logprobs_RK: npt.NDArray[np.float32],
) -> TeacherScores:
    """Scores from rectangles [R, K] whose unused slots have log-prob -inf; sorts each row."""
    order = np.lexsort((ids_RK, -logprobs_RK), axis=1)
    ids_RK = np.take_along_axis(ids_RK, order, axis=1)
    logprobs_RK = np.take_along_axis(logprobs_RK, order, axis=1)
    kept = np.isfinite(logprobs_RK)
    return TeacherScores(
        own_logprobs=own_logprobs.astype(np.float32),
        rest_mass=rest_mass(logprobs_RK),
        counts=kept.sum(axis=1).astype(np.int32),
        ids=ids_RK[kept].astype(np.int32),
        logprobs=logprobs_RK[kept].astype(np.float32),
    )


def pack_ids(ids: npt.NDArray[np.int32]) -> bytes:
    """Ids below 2^24 as three byte planes."""
    assert not ids.size or (ids.min() >= 0 and ids.max() < MAX_VOCAB_SIZE)
    return _planes(ids.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3])


def unpack_ids(data: bytes, num_entries: int, where: str) -> npt.NDArray[np.int32]:
    """Inverse of `pack_ids`."""
    planes = _columns(data, num_entries, 3, where)
    full = np.zeros((num_entries, 4), np.uint8)
    full[:, :3] = planes
    return full.view("<u4").reshape(-1).astype(np.int32)


def pack_logprobs(logprobs: npt.NDArray[np.float32]) -> bytes:
    """Float32 values, exact, as four byte planes."""
    return _planes(np.ascontiguousarray(logprobs, "<f4").view(np.uint8).reshape(-1, 4))


def unpack_logprobs(data: bytes, num_entries: int, where: str) -> npt.NDArray[np.float32]:
    """Inverse of `pack_logprobs`."""
    columns = np.ascontiguousarray(_columns(data, num_entries, 4, where))
    return columns.view("<f4").reshape(-1).astype(np.float32)


def _planes(columns: npt.NDArray[np.uint8]) -> bytes:
    return np.ascontiguousarray(columns.T).tobytes()


def _columns(data: bytes, num_entries: int, num_planes: int, where: str) -> npt.NDArray[np.uint8]:
    if len(data) != num_entries * num_planes:
        raise ShardError(
            f"{where}: {len(data):,} bytes for {num_entries:,} kept entries, expected {num_entries * num_planes:,}; "
            "the shard is damaged"
        )
    return np.frombuffer(data, np.uint8).reshape(num_planes, num_entries).T
