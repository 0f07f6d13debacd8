"""Scores of chosen rows of the output layer, from one bounded chunk of logits at a time.

Legend: R rows, H hidden size, V the output layer's entries, K entries kept, D draws, B ids of a block, C blocks.

One pass over a chunk gives everything: the K best logits, the log of the sum of exponentials, the own token's logit,
and draws. No array of size R x V is ever made.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Float32 logits of one chunk. Each chunk reads the output layer's weights, so few chunks are better; but glibc takes
# larger ones than this from fresh pages each time, which costs as much as the top-k.
CHUNK_BYTES = {"cpu": 24 << 20}
CHUNK_BYTES_ELSEWHERE = 256 << 20

# Numbers of ids in a block, outermost first.
_BLOCKS = (64, 8)
_BLOCK = _BLOCKS[0]

LogitsFunction = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class RowScores:
    """Scores of R rows, on the engine's device or on the host; K or D may be 0.

    `own` float32 [R]: log-prob of each row's target. `ids` int32, `logprobs` float32 [R, K]: the best entries in
    descending order. `drawn` int32 [R, D]: ids drawn with replacement.
    """

    own: Tensor
    ids: Tensor
    logprobs: Tensor
    drawn: Tensor


def score_rows(  # noqa: PLR0913 - a pure function of arrays and sizes
    hidden_RH: Tensor,
    targets_R: Tensor,
    compute_logits: LogitsFunction,
    *,
    vocab_size: int,
    top_k: int,
    uniforms_RD: Tensor | None = None,
) -> RowScores | None:
    """Scores rows under the softmax of `compute_logits(hidden)`, [., H] -> [., V], in float32.

    Args:
        hidden_RH: the rows, on the engine's device.
        targets_R: int64, on that device.
        compute_logits: the output layer; gives None on a tensor-parallel rank that the logits are not gathered on.
        vocab_size: V, by which the size of a chunk is chosen.
        top_k: K, at most V.
        uniforms_RD: float64 in [0, 1), on that device: one for each draw from the row's distribution.

    Returns:
        Scores on the device of `hidden_RH`, or None where there are no logits.
    """
    chunk_bytes = CHUNK_BYTES.get(hidden_RH.device.type, CHUNK_BYTES_ELSEWHERE)
    total, num_draws = len(hidden_RH), 0 if uniforms_RD is None else uniforms_RD.shape[1]
    # Allocated before the chunks, because small results kept between them would fragment the memory.
    result = RowScores(
        own=hidden_RH.new_empty(total, dtype=torch.float32),
        ids=hidden_RH.new_empty(total, top_k, dtype=torch.int32),
        logprobs=hidden_RH.new_empty(total, top_k, dtype=torch.float32),
        drawn=hidden_RH.new_empty(total, num_draws, dtype=torch.int32),
    )
    num_chunks = -(-total * vocab_size * 4 // chunk_bytes)
    # Chunks are of equal size, because a short last one would read all weights for a few rows.
    for rows in torch.arange(total).tensor_split(min(max(num_chunks, 1), max(total, 1))):
        chunk = slice(int(rows[0]), int(rows[-1]) + 1) if total else slice(0)
        logits_RV = compute_logits(hidden_RH[chunk])
        if logits_RV is None:
            return None
        uniforms = None if uniforms_RD is None else uniforms_RD[chunk]
        scores = score_logits(logits_RV.float(), targets_R[chunk], top_k=top_k, uniforms_RD=uniforms)
        for name, part in vars(scores).items():
            getattr(result, name)[chunk] = part
        # Deleted, because this chunk's logits would otherwise live until the next chunk's are made.
        del logits_RV, scores
    return result


def score_logits(logits_RV: Tensor, targets_R: Tensor, *, top_k: int, uniforms_RD: Tensor | None = None) -> RowScores:
    """Scores one chunk of float32 logits, which it overwrites."""
    own_R1 = logits_RV.gather(1, targets_R[:, None])
    values_RK, ids_RK = best_entries(logits_RV, top_k)
    peak_R1 = values_RK[:, :1] if top_k else logits_RV.amax(1, keepdim=True)
    place_R1 = ids_RK[:, :1] if top_k else logits_RV.argmax(1, keepdim=True)
    # In place, because a second array of this size would cost more than all the rest.
    probs_RV = torch.softmax(logits_RV, 1, out=logits_RV)
    # The largest probability is at least 1 / V, so its logarithm is exact to float32.
    log_sum_R1 = peak_R1 - probs_RV.gather(1, place_R1).log()
    drawn_RD = ids_RK[:, :0] if uniforms_RD is None else draw(probs_RV, uniforms_RD)
    return RowScores(
        own=(own_R1 - log_sum_R1).squeeze(1),
        ids=ids_RK.to(torch.int32),
        logprobs=values_RK - log_sum_R1,
        drawn=drawn_RD.to(torch.int32),
    )


def best_entries(values_RV: Tensor, k: int, blocks: tuple[int, ...] = _BLOCKS) -> tuple[Tensor, Tensor]:
    """Returns the k largest values of each row and their positions, int64 [R, K], in descending order.

    Equals `torch.topk` but for ties, at about half its cost: the k largest values lie in the k blocks whose maxima
    are largest, because k blocks with larger maxima would hold k larger values. The same is done again within these
    blocks, with smaller ones.
    """
    size = values_RV.shape[1]
    num_blocks = size // blocks[0] if blocks else 0
    if num_blocks <= 2 * k or k == 0:
        best = values_RV.topk(k, dim=1)
        return best.values, best.indices
    block = blocks[0]
    blocks_RCB = values_RV[:, : num_blocks * block].unflatten(1, (num_blocks, block))
    chosen_RK = blocks_RCB.amax(2).topk(k, dim=1, sorted=False).indices
    rows_R1 = torch.arange(len(values_RV), device=values_RV.device)[:, None]
    candidates = blocks_RCB[rows_R1, chosen_RK].flatten(1)
    if tail := size - num_blocks * block:
        # The ids past the last whole block form one more block, shorter than the others.
        candidates = torch.cat([candidates, values_RV[:, size - tail :]], dim=1)
        chosen_RK = torch.nn.functional.pad(chosen_RK, (0, 1), value=num_blocks)
    best_RK, places_RK = best_entries(candidates, k, blocks[1:])
    return best_RK, chosen_RK.gather(1, places_RK // block) * block + places_RK % block


def draw(weights_RV: Tensor, uniforms_RD: Tensor) -> Tensor:
    """Draws ids with replacement, int64 [R, D]: id v with probability weights[v] / sum of the row's weights.

    Inverts the cumulative distribution at each uniform, in two steps so that V float64 sums are never held: first the
    block of ids, then the id within it. Sums are float64; rounding changes a probability by less than 1e-7.
    """
    size = weights_RV.shape[1]
    num_blocks = -(-size // _BLOCK)
    if padding := num_blocks * _BLOCK - size:
        weights_RV = torch.nn.functional.pad(weights_RV, (0, padding))
    blocks_RCB = weights_RV.unflatten(1, (num_blocks, _BLOCK))
    cumsum_RC = blocks_RCB.sum(2, dtype=torch.float64).cumsum(1)
    point_RD = uniforms_RD * cumsum_RC[:, -1:]
    block_RD = torch.searchsorted(cumsum_RC, point_RD, right=True).clamp_(max=num_blocks - 1)
    before_RD = torch.where(block_RD > 0, cumsum_RC.gather(1, (block_RD - 1).clamp(min=0)), 0.0)
    inside_RDB = blocks_RCB.gather(1, block_RD[:, :, None].expand(-1, -1, _BLOCK)).double()
    # Where the rounding of the two sums would lead past the block, its last id of positive weight is taken.
    last_RD = _BLOCK - 1 - (inside_RDB > 0).flip(2).byte().argmax(2)
    within_RD = (inside_RDB.cumsum(2) <= (point_RD - before_RD)[:, :, None]).sum(2)
    return block_RD * _BLOCK + torch.minimum(within_RD, last_RD)
