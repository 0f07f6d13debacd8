"""The objective of a micro-batch: a weighted sum of terms, each a sum and a count.

    RowLogits, router logits, Batch ── compute_terms ──> {name: Term}
    {name: Term}, counts over the whole global step ── step_loss ──> scalar to differentiate

No term is averaged here: the sums of all micro-batches and ranks are divided once by the count of the whole step, so
that 1 rank x 8 accumulated micro-batches equals 8 ranks x 1. This module does not depend on the trainer.

Legend: R scored rows, B sequences, P preference pairs, T positions of all sequences.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.config import LossConfig
from train.data.collator import Batch
from train.loss.functional import (
    RowLogits,
    distillation_loss,
    load_balancing_loss,
    preference_loss,
    router_entropy,
    router_z_loss,
    sequence_logprobs,
)

# The units that terms are counted in.
UNITS = ("rows", "pairs", "tokens", "positions")


@dataclass(frozen=True)
class Term:
    """A term of the objective, or a metric.

    total     float32 scalar, the sum over a micro-batch
    unit      what `total` is a sum over, one of UNITS
    weight    factor in the loss; 0 for a metric
    """

    total: Tensor
    unit: str
    weight: float = 0.0


def unit_counts(batch: Batch) -> dict[str, int]:
    """Returns the number of scored rows, preference pairs, real tokens and positions of a micro-batch."""
    return {
        "rows": batch.num_rows,
        "pairs": batch.num_pairs,
        "tokens": batch.num_tokens,
        "positions": batch.input_ids.numel(),
    }


def compute_terms(  # noqa: PLR0913 - a pure function of one forward pass; a record would serve this call alone
    logits: RowLogits,
    batch: Batch,
    config: LossConfig,
    *,
    vocab_size: int,
    router_logits: Sequence[Tensor] = (),
    router_top_k: int = 1,
) -> dict[str, Term]:
    """Returns all terms and metrics of a micro-batch.

    The balance loss is not a sum over tokens. A micro-batch's value is weighted with its number of tokens, so that the
    step's value is the token-weighted mean over micro-batches. A micro-batch without samples has the same terms, all 0,
    because every rank needs the same names and a graph that reaches every parameter.

    Args:
        logits: the student's at `batch.rows`, with the teacher's kept ids if `config` has a distillation term.
        router_logits: one [B * T, E] tensor a sparse layer; none for a dense student.
        router_top_k: experts a token is sent to.
        vocab_size: the tokenizer's size; the student's ids from there on are padding.
    """
    terms = {"padding_fraction": Term(batch.num_padding, "positions")}
    if config.preference:
        terms |= _preference_terms(logits.own_logprobs, batch, config)
    else:
        terms["cross_entropy"] = Term(-logits.own_logprobs.sum(), "rows", config.cross_entropy)
    if config.distillation:
        assert batch.topk_logprobs is not None
        assert batch.rest_mass is not None
        loss_R = distillation_loss(
            logits,
            batch.topk_logprobs,
            batch.rest_mass,
            vocab_size=vocab_size,
            divergence=config.divergence,
            tail=config.tail or "bucket",
            temperature=config.temperature,
        )
        terms["distillation"] = Term(loss_R.sum(), "rows", config.distillation)
    if router_logits:
        token_mask = batch.token_mask.flatten()
        balance = load_balancing_loss(router_logits, token_mask, top_k=router_top_k)
        terms["balance"] = Term(balance * token_mask.sum(), "tokens", config.balance)
        z_T = router_z_loss(router_logits).masked_fill(~token_mask, 0.0)
        terms["router_z"] = Term(z_T.sum(), "tokens", config.router_z)
        with torch.no_grad():
            entropy_T = router_entropy(router_logits).masked_fill(~token_mask, 0.0)
        terms["router/entropy"] = Term(entropy_T.sum(), "tokens")
    return terms


def step_loss(terms: Mapping[str, Term], counts: Mapping[str, float]) -> Tensor:
    """Returns the weighted sum of the terms, each divided by its count over the whole global step.

    A term with a count of 0 stays in the graph, so that every parameter gets a gradient on every rank.
    """
    weighted = [term.weight * term.total / max(counts[term.unit], 1) for term in terms.values() if term.weight]
    return torch.stack(weighted).sum()


def _preference_terms(own_R: Tensor, batch: Batch, config: LossConfig) -> dict[str, Term]:
    """Returns the loss of the pairs, and the metrics under TRL's names."""
    assert batch.reference_logprobs is not None
    policy_B = sequence_logprobs(own_R, batch.row_sequence, batch.num_sequences)
    reference_B = batch.reference_logprobs.to(policy_B.dtype)
    pairs_2P = slice(2 * batch.num_pairs)
    # As in TRL, metrics are sums over whole responses, also where the loss compares means over tokens.
    rewards_2P = config.beta * (policy_B - reference_B).detach()[pairs_2P]
    logps_2P = policy_B.detach()[pairs_2P]
    if config.length_normalised or config.preference_type == "ipo":
        lengths_B = torch.bincount(batch.row_sequence, minlength=batch.num_sequences).clamp(min=1)
        policy_B, reference_B = policy_B / lengths_B, reference_B / lengths_B
    loss_P = preference_loss(
        *policy_B[pairs_2P].chunk(2),
        *reference_B[pairs_2P].chunk(2),
        loss_type=config.preference_type,
        beta=config.beta,
        label_smoothing=config.label_smoothing,
    )
    chosen_reward_P, rejected_reward_P = rewards_2P.chunk(2)
    chosen_logp_P, rejected_logp_P = logps_2P.chunk(2)
    margin_P = chosen_reward_P - rejected_reward_P
    return {
        "preference": Term(loss_P.sum(), "pairs", config.preference),
        "rewards/chosen": Term(chosen_reward_P.sum(), "pairs"),
        "rewards/rejected": Term(rejected_reward_P.sum(), "pairs"),
        "rewards/margins": Term(margin_P.sum(), "pairs"),
        "rewards/accuracies": Term((margin_P > 0).to(margin_P.dtype).sum(), "pairs"),
        "logps/chosen": Term(chosen_logp_P.sum(), "pairs"),
        "logps/rejected": Term(rejected_logp_P.sum(), "pairs"),
    }
