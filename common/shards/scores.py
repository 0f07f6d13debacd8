"""The teacher's scores of a conversation: log-probs, kept entries and rest masses. codec.py packs them into bytes.

Legend: R scored tokens, N kept entries of all rows, K kept entries of one row, D draws of one row.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_VOCAB_SIZE = 1 << 20
# A number of draws is stored in two bytes.
MAX_DRAWS = 1 << 16


@dataclass(frozen=True)
class TeacherScores:
    """The teacher's distribution at each scored token, at temperature 1 over the tokenizer's ids.

    `own_logprobs` float32 [R]: log-prob of the scored token itself. `counts` int32 [R]: kept entries of each row.
    `ids` int32 [N] and `logprobs` float32 [N]: the kept entries, row after row, within a row by descending log-prob,
    ties by ascending id. `rest_mass` float32 [R]: probability of all ids that were not kept.

    `draws` int32 [N] is None where the best entries are kept. Where ids were drawn from the distribution with
    replacement it has the number of draws of each, `logprobs` is ln(draws / number of draws) and `rest_mass` is 0
    (Sparse Logit Sampling, arXiv 2503.16870).

    `codes` uint8 [N] are the codes that `logprobs` were decoded from (precisions q8 and q6), or None. Stored again they
    give the same log-probs to the bit; coding the decoded log-probs instead could change some by a step.
    """

    own_logprobs: npt.NDArray[np.float32]
    rest_mass: npt.NDArray[np.float32]
    counts: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    draws: npt.NDArray[np.int32] | None = None
    codes: npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        num_rows, num_entries = len(self.own_logprobs), int(self.counts.sum())
        assert len(self.rest_mass) == len(self.counts) == num_rows
        assert len(self.ids) == len(self.logprobs) == num_entries
        assert self.draws is None or len(self.draws) == num_entries
        assert self.codes is None or len(self.codes) == num_entries

    @property
    def num_rows(self) -> int:
        """Number of scored tokens, R."""
        return len(self.own_logprobs)

    @property
    def total_logprob(self) -> float:
        """Log-prob of the whole response, summed in float64; DPO's reference term."""
        return float(self.own_logprobs.astype(np.float64).sum())

    def topk(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Returns the kept entries as rectangles [R, max K]; unused slots hold id 0 and log-prob -inf."""
        width = int(self.counts.max(initial=0))
        is_used_RK = np.arange(width) < self.counts[:, None]
        ids_RK = np.zeros(is_used_RK.shape, np.int64)
        logprobs_RK = np.full(is_used_RK.shape, -np.inf, np.float32)
        ids_RK[is_used_RK] = self.ids
        logprobs_RK[is_used_RK] = self.logprobs
        return ids_RK, logprobs_RK


NO_SCORES = TeacherScores(*(np.zeros(0, np.float32),) * 2, *(np.zeros(0, np.int32),) * 2, np.zeros(0, np.float32))


def scores_from_topk(
    own_logprobs: npt.NDArray[np.floating],
    ids_RK: npt.NDArray[np.integer],
    logprobs_RK: npt.NDArray[np.floating],
    *,
    top_p: float | None = None,
    min_k: int = 1,
) -> TeacherScores:
    """Makes scores from the best entries: rectangles [R, K] in any order; unused slots have log-prob -inf.

    With `top_p` a row keeps its best entries up to and including the one at which their mass, summed in float64,
    reaches `top_p`; at least `min_k`, if it has that many.
    """
    ids_RK, logprobs_RK = _sort_rows(ids_RK, logprobs_RK)
    kept_RK = np.isfinite(logprobs_RK)
    probs_RK = np.exp(logprobs_RK, dtype=np.float64)
    if top_p is not None:
        reached_RK = np.cumsum(probs_RK, axis=1) >= top_p
        kept_RK[:, min_k:] &= ~reached_RK[:, min_k - 1 : -1]
        probs_RK *= kept_RK
    return TeacherScores(
        own_logprobs=own_logprobs.astype(np.float32),
        rest_mass=rest_mass(probs_RK),
        counts=kept_RK.sum(axis=1, dtype=np.int32),
        ids=ids_RK[kept_RK],
        logprobs=logprobs_RK[kept_RK],
    )


def scores_from_draws(own_logprobs: npt.NDArray[np.floating], drawn_RD: npt.NDArray[np.integer]) -> TeacherScores:
    """Makes scores from D ids a row, drawn with replacement."""
    num_rows, num_draws = drawn_RD.shape
    sorted_RD = np.sort(drawn_RD.astype(np.int32), axis=1)
    is_first_RD = np.ones(sorted_RD.shape, bool)
    is_first_RD[:, 1:] = sorted_RD[:, 1:] != sorted_RD[:, :-1]
    starts = np.flatnonzero(is_first_RD)
    draws = np.diff(starts, append=sorted_RD.size)
    ids = sorted_RD.reshape(-1)[starts]
    rows = starts // num_draws
    # A stable sort, so that ids with equal numbers of draws stay in ascending order.
    order = np.argsort(rows * MAX_DRAWS - draws, kind="stable")
    rows, ids, draws = rows[order], ids[order], draws[order].astype(np.int32)
    return TeacherScores(
        own_logprobs=own_logprobs.astype(np.float32),
        rest_mass=np.zeros(num_rows, np.float32),
        counts=np.bincount(rows, minlength=num_rows).astype(np.int32),
        ids=ids,
        logprobs=empirical_logprobs(draws, num_draws),
        draws=draws,
    )


def rest_mass(probs_RK: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Returns 1 - the sum of the kept probabilities of each row, float32 [R]; 0 where that is below 2e-6.

    Float32 log-probs cannot tell so small a rest from rounding, and a spurious one would make the student put mass
    outside of the kept ids, which may be the whole vocabulary.
    """
    rest = 1.0 - probs_RK.sum(axis=1)
    return np.where(rest < 2e-6, 0.0, rest).astype(np.float32)


def empirical_logprobs(draws: npt.NDArray[np.integer], num_draws: int) -> npt.NDArray[np.float32]:
    """Returns ln(draws / num_draws), computed in float64 and rounded to float32; -inf for an id that was not drawn."""
    with np.errstate(divide="ignore"):
        return np.log(draws / num_draws).astype(np.float32)


def _sort_rows(
    ids_RK: npt.NDArray[np.integer], logprobs_RK: npt.NDArray[np.floating]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Sorts each row by descending log-prob, ties by ascending id.

    It is one sort of 64-bit keys, the log-prob's bits above the id, which is ten times as fast as a sort by two keys.
    All rows are sorted, because logits of half precision tie in most rows, so few rows are in order already.
    """
    keys = descending_keys(logprobs_RK.astype(np.float32)).astype(np.uint64) << 32 | ids_RK.astype(np.uint32)
    keys.sort(axis=1)
    return keys.astype(np.uint32).view(np.int32), from_descending_keys((keys >> 32).astype(np.uint32))


def descending_keys(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Returns integers that ascend as float32 `values` descend.

    The bits of a negative float have this order already; those of another float have it once all but the sign bit are
    flipped.
    """
    # Adding 0 turns -0.0 into 0.0, so that both have the same bits.
    bits = (values + np.float32(0)).view(np.uint32)
    return np.where(bits >> 31, bits, bits ^ 0x7FFF_FFFF)


def from_descending_keys(keys: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """Inverts `descending_keys`."""
    return np.where(keys >> 31, keys, keys ^ 0x7FFF_FFFF).view(np.float32)
