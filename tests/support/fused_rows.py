"""Losses of given logits, which an identity as the output layer passes to the fused pass unchanged."""

from typing import Any

import torch
from torch import Tensor

from train.loss import functional
from train.loss.functional import RowLogits
from train.loss.fused_output import gather_logits, to_row_logits


def row_logits(
    logits_RV: Tensor, targets_R: Tensor, ids_RK: Tensor | None = None, filled_RK: Tensor | None = None, **sizes: Any
) -> RowLogits:
    """Returns the inputs of the losses for given logits; `sizes` are `vocab_size` and `chunk_ids` of `gather_logits`.

    Products with 0 and 1 are exact, so the logits are not rounded.
    """
    layer = torch.eye(logits_RV.shape[1], dtype=logits_RV.dtype)
    own_R1 = targets_R[:, None]
    ids_RJ, masked_RJ = own_R1, torch.zeros_like(own_R1, dtype=torch.bool)
    if ids_RK is not None:
        assert filled_RK is not None
        ids_RJ, masked_RJ = torch.cat([ids_RK, own_R1], 1), torch.cat([filled_RK, masked_RJ], 1)
    return to_row_logits(gather_logits(logits_RV, layer, None, ids_RJ, masked_RJ, **sizes), masked_RJ)


def distillation_loss(
    logits_RV: Tensor, topk_ids_RK: Tensor, topk_logprobs_RK: Tensor, rest_mass_R: Tensor, **settings: Any
) -> Tensor:
    """Returns the loss of `train.loss.functional` for given logits, [R], computed with seven ids a chunk."""
    targets_R = torch.zeros(len(logits_RV), dtype=torch.int64)
    filled_RK = topk_logprobs_RK > -torch.inf
    rows = row_logits(logits_RV, targets_R, topk_ids_RK, filled_RK, vocab_size=settings["vocab_size"], chunk_ids=7)
    return functional.distillation_loss(rows, topk_logprobs_RK, rest_mass_R, **settings)


def own_logprobs(logits_RV: Tensor, ids_R: Tensor, *, vocab_size: int) -> Tensor:
    """Returns the log-probability of one id of each row, [R]."""
    return row_logits(logits_RV, ids_R, vocab_size=vocab_size, chunk_ids=7).own_logprobs
