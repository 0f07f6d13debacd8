"""Training losses as pure functions; each gives one value a row, sequence or pair, and the caller normalises.

Axes: R scored tokens, K kept teacher entries, V student's output layer, B sequences, P preference pairs,
L mixture-of-experts layers, T positions, E experts.

Everything is accumulated in float32, whatever the input dtype, except that float64 input stays float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Tail = Literal["bucket", "renormalise", "ignore"]
PreferenceLossType = Literal["sigmoid", "ipo", "hinge", "kto_pair"]

# A logit that is nothing beside any real one. Unlike -inf it leaves no NaN in the gradient of logsumexp when
# a row consists of nothing else.
NEGLIGIBLE_LOGIT = -1e30


def distillation_loss(
    logits_RV: Tensor,
    topk_ids_RK: Tensor,
    topk_logprobs_RK: Tensor,
    rest_mass_R: Tensor,
    *,
    vocab_size: int,
    tail: Tail = "bucket",
) -> Tensor:
    """Forward KL(p_T || p_S) of each row from the teacher's kept entries, in nats.

    With the kept ids A, the teacher's p_T and its rest mass rest_T = 1 - sum_A p_T, the student's p_S over
    the ids below `vocab_size`, and rest_S = the sum of p_S outside A:

        bucket:       sum_A p_T (log p_T - log p_S) + rest_T (log rest_T - log rest_S)
        renormalise:  sum_A q_T (log q_T - log q_S),  q = p / sum_A p, on both sides over the same A
        ignore:       sum_A p_T (log p_T - log p_S)

    "bucket" is the KL between two distributions over A and "any other id": never negative, zero with a zero
    gradient where the student agrees, and the full KL when A is the whole vocabulary (mass that the teacher gives to
    padding ids is then divided out). "renormalise" says
    nothing of the mass outside A. "ignore" is no KL unless rest_T = 0: it can be negative, and its minimum
    puts all of the student's mass on A.

    Entries drawn from the teacher's distribution with replacement, id i in draws_i of n draws, want "ignore" with
    log p_T(i) = log(draws_i / n): -sum_A draws_i / n log p_S is then an unbiased estimate of the cross-entropy of
    p_S under p_T, and its gradient one of the KL's (Sparse Logit Sampling, arXiv 2503.16870). The constant beside it
    makes the value the KL of the observed frequencies, on average larger than that of p_T.

    The word-level distillation of Hinton et al. (arXiv 1503.02531) and Kim & Rush (arXiv 1606.07947) at
    temperature 1, as the forward KL over response tokens of LLaVA-MoD (arXiv 2408.15881).

    Args:
        logits_RV: [R, V] float, the student's; columns from `vocab_size` on are padding and take no part.
        topk_ids_RK: [R, K] int64, below `vocab_size` and distinct within a row; 0 in an empty slot.
        topk_logprobs_RK: [R, K] float, at temperature 1 over the teacher's whole vocabulary, or the logarithm of
            an id's share of the draws; -inf in an empty slot.
        rest_mass_R: [R] float, the teacher's mass outside the kept ids; below 0, by rounding, counts as 0.
        vocab_size: the number of ids that the tokenizer knows, at most V.
        tail: what becomes of the rest mass, see above.

    Returns:
        [R] float32 (float64 for float64 logits), differentiable in `logits_RV`. For "bucket" and "ignore" the
        backward pass holds one [R, vocab_size] copy in that dtype.

    Raises:
        ValueError: `vocab_size` exceeds V.
    """
    logits_RV = _without_padding(logits_RV, vocab_size)
    dtype = _accumulation_dtype(logits_RV)
    kept_RK = topk_logprobs_RK > -torch.inf
    teacher_RK = topk_logprobs_RK.to(dtype).masked_fill(~kept_RK, NEGLIGIBLE_LOGIT)
    student_RK = logits_RV.gather(1, topk_ids_RK).to(dtype).masked_fill(~kept_RK, NEGLIGIBLE_LOGIT)
    kept_lse_R = student_RK.logsumexp(1)
    if tail == "renormalise":
        teacher_RK = teacher_RK - teacher_RK.logsumexp(1, keepdim=True)
        return _divergence(teacher_RK, student_RK, kept_lse_R)

    # An empty slot adds 0 to id 0. Overwriting instead of adding would strike out id 0 where it is not kept.
    suppression_RK = kept_RK.to(dtype) * NEGLIGIBLE_LOGIT
    rest_lse_R = logits_RV.to(dtype).scatter_add(1, topk_ids_RK, suppression_RK).logsumexp(1)
    full_lse_R = torch.logaddexp(kept_lse_R, rest_lse_R)
    if tail == "ignore":
        return _divergence(teacher_RK, student_RK, full_lse_R)
    if tail == "bucket":
        # With every id kept the student has no rest, and what the teacher has left, by rounding or on padding ids
        # that the student lacks, would cost 1e30 nats: such a row compares the teacher over the kept ids alone.
        has_rest_R = kept_RK.sum(1) < vocab_size
        teacher_lse_R = teacher_RK.logsumexp(1).masked_fill(has_rest_R, 0.0)
        rest_R = rest_mass_R.to(dtype).clamp(min=0) * has_rest_R
        kept_terms_R = _divergence(teacher_RK - teacher_lse_R[:, None], student_RK, full_lse_R)
        # log(1 - sum) would be -inf as soon as the kept ids hold all but 6e-8 of the student's mass.
        return kept_terms_R + torch.xlogy(rest_R, rest_R) - rest_R * (rest_lse_R - full_lse_R)
    assert_never(tail)


def own_logprobs(logits_RV: Tensor, ids_R: Tensor, *, vocab_size: int) -> Tensor:
    """Log-probability log p_S of one given id per row, in nats; its negative is the cross-entropy.

    Args:
        logits_RV: [R, V] float; columns from `vocab_size` on are padding and take no part.
        ids_R: [R] int64, below `vocab_size`.
        vocab_size: the number of ids that the tokenizer knows, at most V.

    Returns:
        [R] float32 (float64 for float64 logits).

    Raises:
        ValueError: `vocab_size` exceeds V.
    """
    logits_RV = _without_padding(logits_RV, vocab_size)
    dtype = _accumulation_dtype(logits_RV)
    return logits_RV.gather(1, ids_R[:, None]).squeeze(1).to(dtype) - logits_RV.to(dtype).logsumexp(1)


def sequence_logprobs(own_logprobs_R: Tensor, sequence_R: Tensor, num_sequences: int) -> Tensor:
    """Sum the tokens' log-probabilities over each sequence.

    Args:
        own_logprobs_R: [R] float, nats.
        sequence_R: [R] int64 in [0, num_sequences), the sequence each token belongs to, in any order.
        num_sequences: B.

    Returns:
        [B] float32 (float64 for float64 input); 0 for a sequence without tokens.
    """
    dtype = _accumulation_dtype(own_logprobs_R)
    sums_B = own_logprobs_R.new_zeros(num_sequences, dtype=dtype)
    return sums_B.index_add(0, sequence_R, own_logprobs_R.to(dtype))


@dataclass(frozen=True)
class PreferenceLoss:
    """What one micro-batch of P preference pairs gives; each [P] float32 (float64 for float64 input).

    `loss_P` carries the gradient. The rewards, beta (log p_S - log p_T) of each response, are detached.
    """

    loss_P: Tensor
    chosen_reward_P: Tensor
    rejected_reward_P: Tensor


def preference_loss(
    policy_chosen_P: Tensor,
    policy_rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    *,
    loss_type: PreferenceLossType,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Preference loss of each pair from the log-probabilities of its two responses, in nats.

    With c and r the log-ratios policy - reference of the chosen and the rejected response, and d = c - r:

        sigmoid:   -(1 - e) log sigma(beta d) - e log sigma(-beta d), e the label smoothing: DPO (arXiv
                   2305.18290), conservative DPO for e > 0
        ipo:       (d - 1 / (2 beta))^2, equation 17 of arXiv 2310.12036 with its tau = beta
        hinge:     max(0, 1 - beta d): SLiC (arXiv 2305.10425), normalised as in RSO (arXiv 2309.06657)
        kto_pair:  [sigma(-beta (c - max(0, mean r))) + sigma(-beta (max(0, mean c) - r))] / 2: KTO (arXiv
                   2402.01306) on pairs, as TRL had it up to 0.9

    What to pass: log-probabilities summed over each response. To get the "ipo" of TRL 1.x, pass instead, for
    policy and reference alike, the sum divided by the response's number of tokens, which is not known here.
    The paper's equation has the sums, but with them the loss grows with the response's length, and TRL says
    that the paper's authors confirmed the means. The rewards are then per token too; TRL logs them summed.

    kto_pair: TRL returned the two halves as 2P losses; one mean a pair makes the mean over P pairs equal to
    TRL's over 2P. Each half is measured against the mean log-ratio of the other responses, an estimate of
    KL(policy || reference). As in TRL it is taken over the pairs given here, so that the loss depends on the
    size of the micro-batch, and the gradient passes through it where it is positive. The KTO paper stops the
    gradient there; TRL's form is kept because LLaVA-MoD's scripts train with it.

    Args:
        policy_chosen_P, policy_rejected_P: [P] float, from the model in training.
        reference_chosen_P, reference_rejected_P: [P] float, from the frozen reference.
        loss_type: see above.
        beta: strength of the pull to the reference, positive; "ipo" calls it tau.
        label_smoothing: probability that a preference is the wrong way round, in [0, 0.5); "sigmoid" only.

    Raises:
        ValueError: `label_smoothing` is out of range, or not 0 with another loss than "sigmoid".
    """
    if not 0.0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a number in [0, 0.5)")
    if label_smoothing > 0.0 and loss_type != "sigmoid":
        raise ValueError(
            f"label_smoothing is {label_smoothing} with the loss {loss_type!r}, which does not define it: "
            "set it to 0 or choose the loss 'sigmoid'"
        )
    dtype = _accumulation_dtype(policy_chosen_P)
    chosen_P = policy_chosen_P.to(dtype) - reference_chosen_P.to(dtype)
    rejected_P = policy_rejected_P.to(dtype) - reference_rejected_P.to(dtype)
    margin_P = chosen_P - rejected_P
    match loss_type:
        case "sigmoid":
            loss_P = -(1 - label_smoothing) * logsigmoid(beta * margin_P)
            loss_P = loss_P - label_smoothing * logsigmoid(-beta * margin_P)
        case "ipo":
            loss_P = (margin_P - 1 / (2 * beta)).square()
        case "hinge":
            loss_P = (1 - beta * margin_P).relu()
        case "kto_pair":
            chosen_half_P = torch.sigmoid(-beta * (chosen_P - rejected_P.mean().clamp(min=0)))
            rejected_half_P = torch.sigmoid(-beta * (chosen_P.mean().clamp(min=0) - rejected_P))
            loss_P = (chosen_half_P + rejected_half_P) / 2
        case _:
            assert_never(loss_type)
    return PreferenceLoss(loss_P, beta * chosen_P.detach(), beta * rejected_P.detach())


def load_balancing_loss(router_logits_LTE: Sequence[Tensor], mask_T: Tensor, *, top_k: int) -> Tensor:
    """Auxiliary loss that rewards routers for spreading tokens evenly over the experts.

        E * sum_e f_e P_e

    f_e: how often expert e is among a token's first `top_k`, P_e: its mean router probability, both over the
    unmasked tokens of all layers together. Even routing gives `top_k`; all mass on one expert gives E.

    Switch Transformer (arXiv 2101.03961, equations 4 to 6), with `top_k` experts a token as Mixtral has it;
    the value is that of transformers' `load_balancing_loss_func`.

    Args:
        router_logits_LTE: one [T, E] float tensor a layer.
        mask_T: [T] bool or 0/1; 0 for positions that are padding.
        top_k: experts a token is sent to.

    Returns:
        Scalar float32 (float64 for float64 logits); 0 if every position is masked.
    """
    logits_LTE = torch.stack(list(router_logits_LTE))
    probs_LTE = logits_LTE.softmax(-1, dtype=_accumulation_dtype(logits_LTE))
    num_layers, _, num_experts = probs_LTE.shape
    chosen_LTE = torch.zeros_like(probs_LTE).scatter(-1, probs_LTE.topk(top_k).indices, 1.0)
    mask_T = mask_T.to(probs_LTE.dtype)
    num_routed = (num_layers * mask_T.sum()).clamp(min=1)  # 0 / 1 rather than 0 / 0 when all is masked
    frequency_E = torch.einsum("lte,t->e", chosen_LTE, mask_T) / num_routed
    mean_prob_E = torch.einsum("lte,t->e", probs_LTE, mask_T) / num_routed
    return num_experts * (frequency_E * mean_prob_E).sum()


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _without_padding(logits_RV: Tensor, vocab_size: int) -> Tensor:
    if vocab_size > logits_RV.shape[1]:
        raise ValueError(
            f"the student's output layer has {logits_RV.shape[1]} ids, the tokenizer {vocab_size}: "
            "the student belongs to another tokenizer, or its output layer has to be resized"
        )
    return logits_RV[:, :vocab_size]


def _divergence(teacher_RK: Tensor, student_RK: Tensor, student_lse_R: Tensor) -> Tensor:
    """Sum of p_T (log p_T - log p_S) over the slots; an empty one has p_T = 0 and finite logarithms."""
    return (teacher_RK.exp() * (teacher_RK - student_RK + student_lse_R[:, None])).sum(1)
