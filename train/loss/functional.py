"""Training losses as pure functions; each returns one value a row, sequence or pair, and the caller normalises.

Axes: R scored tokens, K kept teacher entries, S kept entries and rest, B sequences, P preference pairs,
L mixture-of-experts layers, T positions, E experts. Only train.loss.fused_output sees the student's output over the
whole vocabulary.

Everything is accumulated in float32, whatever the input dtype, except that float64 input stays float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from train.choices import Divergence, PreferenceLossType, Tail

# A logit whose exponential is 0 beside that of any real one. Unlike -inf it leaves no NaN in the gradient of logsumexp
# when a row has no other logits.
NEGLIGIBLE_LOGIT = -1e30

# Captures store a smaller rest mass as 0.
_MIN_REST_MASS = 2e-6


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Returns float64 for a float64 tensor and float32 for any other."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class RowLogits:
    """Values of the student's output at R rows that losses need; float32 (float64 from float64 models).

    kept_RK       logits at the teacher's kept ids, NEGLIGIBLE_LOGIT in an empty slot; K = 0 if none were gathered
    own_R         logits of the scored tokens
    rest_lse_R    logsumexp over the ids below the tokenizer's size that are not kept
    """

    kept_RK: Tensor
    own_R: Tensor
    rest_lse_R: Tensor

    @property
    def full_lse(self) -> Tensor:
        """Returns the logsumexp over all ids below the tokenizer's size, [R]."""
        return torch.logaddexp(self.kept_RK.logsumexp(1), self.rest_lse_R) if self.kept_RK.shape[1] else self.rest_lse_R

    @property
    def own_logprobs(self) -> Tensor:
        """Returns log p_S of each scored token, [R] in nats; its negative is the cross-entropy."""
        return self.own_R - self.full_lse


def distillation_loss(  # noqa: PLR0913 - a pure function of its mathematical arguments
    logits: RowLogits,
    topk_logprobs_RK: Tensor,
    rest_mass_R: Tensor,
    *,
    vocab_size: int,
    divergence: Divergence = "forward_kl",
    tail: Tail = "bucket",
    temperature: float = 1.0,
) -> Tensor:
    """Returns the divergence of each row between teacher and student over the teacher's kept entries, in nats.

    With the kept ids A, the teacher's p_T and its rest mass rest_T = 1 - sum_A p_T, the student's p_S over
    the ids below `vocab_size`, and rest_S = the sum of p_S outside A, `tail` chooses what is compared:

        bucket:       p_T, rest_T and p_S, rest_S: A and "any other id"
        renormalise:  q_T and q_S over A, where q = p^(1/t) / sum_A p^(1/t) with the temperature t
        ignore:       p_T and p_S over A

    and `divergence` how, each sum being over the compared entries:

        forward_kl:       sum p_T (log p_T - log p_S)
        reverse_kl:       sum p_S (log p_S - log p_T)
        jensen_shannon:   sum p_T (log p_T - log m) / 2 + sum p_S (log p_S - log m) / 2,  m = (p_T + p_S) / 2
        total_variation:  sum |p_T - p_S| / 2, a probability, not in nats

    "bucket" compares two distributions. It is never negative, is zero with a zero gradient where the student agrees,
    and is a lower bound of the divergence over all ids; it equals that divergence when A is the whole vocabulary.
    "renormalise" ignores the mass outside A. "ignore" is a
    divergence only if rest_T = 0: otherwise it can be negative, and its minimum puts all of the student's mass on A.
    It is defined for the forward KL only.

    Temperature (Hinton et al., arXiv 1503.02531): p^(1/t) normalised is the softmax of the logits over t, and the loss
    is multiplied by t^2, so that gradients keep their size. The teacher's rest mass at a temperature other than 1
    cannot be computed from its mass at 1, so such a temperature needs "renormalise", which is exact, and which is the
    divergence over all ids if every id is kept.

    The reverse KL of a bucket is infinite where the teacher has no rest. Rests below 2e-6 are stored as 0, because they
    cannot be told from rounding, so the logarithm of the teacher's rest is taken of at least 2e-6.

    Entries that were drawn from the teacher's distribution with replacement, id i in draws_i of n draws, need "ignore"
    with log p_T(i) = log(draws_i / n): -sum_A draws_i / n log p_S is then an unbiased estimate of the cross-entropy of
    p_S under p_T, and its gradient an unbiased estimate of the KL's (Sparse Logit Sampling, arXiv 2503.16870). The
    added constant makes the value the KL of the observed frequencies, which on average is larger than that of p_T.

    This is the word-level distillation of Kim & Rush (arXiv 1606.07947), with the forward KL over response tokens as
    in LLaVA-MoD (arXiv 2408.15881), and the other divergences as in GKD (arXiv 2306.13649) and f-distill (arXiv
    2307.15190).

    Args:
        logits: the student's.
        topk_logprobs_RK: [R, K] float, in nats at temperature 1 over the ids below `vocab_size`, or the logarithm
            of an id's share of the draws; -inf in an empty slot.
        rest_mass_R: [R] float, the teacher's mass outside the kept ids; rounding below 0 counts as 0.
        vocab_size: the number of ids that the tokenizer knows.
        divergence, tail, temperature: see above.

    Returns:
        [R] in the dtype of `logits`, differentiable in them.
    """
    # train.config raises errors with a reason for these.
    assert temperature == 1.0 or tail == "renormalise"
    assert divergence == "forward_kl" or tail != "ignore"
    kept_RK = topk_logprobs_RK > -torch.inf
    teacher_RK = topk_logprobs_RK.to(logits.kept_RK.dtype).masked_fill(~kept_RK, NEGLIGIBLE_LOGIT)
    if tail == "renormalise":
        teacher_RK, student_RK = teacher_RK / temperature, logits.kept_RK / temperature
        teacher_RK = teacher_RK - teacher_RK.logsumexp(1, keepdim=True)
        student_RK = student_RK - student_RK.logsumexp(1, keepdim=True)
        return temperature**2 * _divergence(teacher_RK, student_RK, divergence)
    full_lse_R = logits.full_lse
    student_RK = logits.kept_RK - full_lse_R[:, None]
    if tail == "ignore":
        return _divergence(teacher_RK, student_RK, divergence)
    # With every id kept the student has no rest, and any rest of the teacher, by rounding, would cost 1e30 nats, so in
    # such a row the teacher is normalised over the kept ids.
    has_rest_R = kept_RK.sum(1) < vocab_size
    teacher_lse_R = teacher_RK.logsumexp(1).masked_fill(has_rest_R, 0.0)
    floor = _MIN_REST_MASS if divergence == "reverse_kl" else 0.0
    rest_R = rest_mass_R.to(teacher_RK.dtype).clamp(min=floor).log().clamp(min=NEGLIGIBLE_LOGIT)
    # log(1 - sum) would be -inf as soon as the kept ids hold all but 6e-8 of the student's mass.
    student_rest_R = logits.rest_lse_R - full_lse_R
    return _divergence(
        torch.cat([teacher_RK - teacher_lse_R[:, None], rest_R.masked_fill(~has_rest_R, NEGLIGIBLE_LOGIT)[:, None]], 1),
        torch.cat([student_RK, student_rest_R.masked_fill(~has_rest_R, NEGLIGIBLE_LOGIT)[:, None]], 1),
        divergence,
    )


def sequence_logprobs(own_logprobs_R: Tensor, sequence_R: Tensor, num_sequences: int) -> Tensor:
    """Returns the sum of the tokens' log-probabilities of each sequence, in nats.

    Args:
        own_logprobs_R: [R] float, nats.
        sequence_R: [R] int64 in [0, num_sequences), the sequence that each token belongs to, in any order.
        num_sequences: B.

    Returns:
        [B] float32 (float64 for float64 input); 0 for a sequence without tokens.
    """
    dtype = accumulation_dtype(own_logprobs_R)
    sums_B = own_logprobs_R.new_zeros(num_sequences, dtype=dtype)
    return sums_B.index_add(0, sequence_R, own_logprobs_R.to(dtype))


def preference_loss(  # noqa: PLR0913 - a pure function of its mathematical arguments
    policy_chosen_P: Tensor,
    policy_rejected_P: Tensor,
    reference_chosen_P: Tensor,
    reference_rejected_P: Tensor,
    *,
    loss_type: PreferenceLossType,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the preference loss of each pair from the log-probabilities of its two responses, in nats.

    With c and r the log-ratios policy - reference of the chosen and the rejected response, and d = c - r:

        sigmoid:   -(1 - e) log sigma(beta d) - e log sigma(-beta d), e the label smoothing: DPO (arXiv
                   2305.18290), conservative DPO for e > 0
        ipo:       (d - 1 / (2 beta))^2, equation 17 of arXiv 2310.12036 with its tau = beta
        hinge:     max(0, 1 - beta d): SLiC (arXiv 2305.10425), normalised as in RSO (arXiv 2309.06657)
        kto_pair:  [sigma(-beta (c - max(0, mean r))) + sigma(-beta (max(0, mean c) - r))] / 2: KTO (arXiv
                   2402.01306) on pairs, as TRL had it up to 0.9

    The caller passes log-probabilities summed over each response or, for policy and reference alike, such sums divided
    by the number of tokens of the response. With the latter a longer response counts no more than a short one:
    "sigmoid" becomes TRL's sigmoid_norm, "ipo" TRL's ipo. The IPO paper's equation has the sums, but TRL says that its
    authors confirmed the means.

    kto_pair: TRL returned the two halves as 2P losses; one mean a pair makes the mean over P pairs equal to
    TRL's over 2P. Each half is measured against the mean log-ratio of the other responses, an estimate of
    KL(policy || reference). As in TRL this mean is taken over the pairs of the call, so that the loss depends on the
    size of the micro-batch, and the gradient passes through the mean where it is positive. The KTO paper stops the
    gradient there; TRL's form is kept because LLaVA-MoD's scripts train with it.

    Args:
        policy_chosen_P, policy_rejected_P: [P] float, nats, from the model in training.
        reference_chosen_P, reference_rejected_P: [P] float, nats, from the frozen reference.
        loss_type: see above.
        beta: strength of the pull to the reference, positive; "ipo" calls it tau.
        label_smoothing: probability that a preference is the wrong way round, in [0, 0.5); "sigmoid" only.

    Returns:
        [P] float32 (float64 for float64 input).

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
    dtype = accumulation_dtype(policy_chosen_P)
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
    return loss_P


def load_balancing_loss(router_logits_LTE: Sequence[Tensor], mask_T: Tensor, *, top_k: int) -> Tensor:
    """Returns the auxiliary loss that rewards routers for spreading tokens evenly over the experts.

        E * sum_e f_e P_e

    f_e is the fraction of tokens that have expert e among their first `top_k`, P_e the mean router probability of e,
    both over the unmasked tokens of all layers together. Even routing gives `top_k`; all mass on one expert gives E.

    This is the loss of Switch Transformer (arXiv 2101.03961, equations 4 to 6), with `top_k` experts a token as in
    Mixtral; the value is that of transformers' `load_balancing_loss_func`.

    Args:
        router_logits_LTE: one [T, E] float tensor a layer.
        mask_T: [T] bool or 0/1; 0 for positions that are padding.
        top_k: experts a token is sent to.

    Returns:
        Scalar float32 (float64 for float64 logits); 0 if every position is masked.
    """
    logits_LTE = torch.stack(list(router_logits_LTE))
    probs_LTE = logits_LTE.softmax(-1, dtype=accumulation_dtype(logits_LTE))
    num_layers, _, num_experts = probs_LTE.shape
    chosen_LTE = torch.zeros_like(probs_LTE).scatter(-1, probs_LTE.topk(top_k).indices, 1.0)
    mask_T = mask_T.to(probs_LTE.dtype)
    num_routed = (num_layers * mask_T.sum()).clamp(min=1)  # 0 / 1 rather than 0 / 0 when all is masked
    frequency_E = torch.einsum("lte,t->e", chosen_LTE, mask_T) / num_routed
    mean_prob_E = torch.einsum("lte,t->e", probs_LTE, mask_T) / num_routed
    return num_experts * (frequency_E * mean_prob_E).sum()


def router_z_loss(router_logits_LTE: Sequence[Tensor]) -> Tensor:
    """Returns the penalty of each position on large router logits, which suffer from rounding and slow learning.

        mean_l (log sum_e exp x_le)^2

    with the logit x_le of expert e in layer l. Equation 5 of ST-MoE (arXiv 2202.08906) is the mean of this over the
    tokens of one layer. The paper adds the layers up; here their mean is taken, so that the effect of a weight does not
    depend on the number of sparse layers. The paper's weight is 0.001.

    Args:
        router_logits_LTE: one [T, E] float tensor a layer.

    Returns:
        [T] float32 (float64 for float64 logits).
    """
    logits_LTE = torch.stack(list(router_logits_LTE))
    return logits_LTE.to(accumulation_dtype(logits_LTE)).logsumexp(-1).square().mean(0)


def router_entropy(router_logits_LTE: Sequence[Tensor]) -> Tensor:
    """Returns the entropy of the router's softmax over the experts at each position, mean over layers, in nats.

        mean_l -sum_e p_le log p_le

    The value is between 0, where one expert has all mass, and log(E), where all are equal.

    Args:
        router_logits_LTE: one [T, E] float tensor a layer.

    Returns:
        [T] float32 (float64 for float64 logits).
    """
    logits_LTE = torch.stack(list(router_logits_LTE))
    logprobs_LTE = logits_LTE.log_softmax(-1, dtype=accumulation_dtype(logits_LTE))
    return -(logprobs_LTE.exp() * logprobs_LTE).sum(-1).mean(0)


def _divergence(teacher_RS: Tensor, student_RS: Tensor, divergence: Divergence) -> Tensor:
    """Returns the divergence of each row from log-probabilities [R, S]; in an empty slot both must be finite."""
    match divergence:
        case "forward_kl":
            terms_RS = teacher_RS.exp() * (teacher_RS - student_RS)
        case "reverse_kl":
            terms_RS = student_RS.exp() * (student_RS - teacher_RS)
        case "jensen_shannon":
            mean_RS = torch.logaddexp(teacher_RS, student_RS) - math.log(2)
            terms_RS = (teacher_RS.exp() * (teacher_RS - mean_RS) + student_RS.exp() * (student_RS - mean_RS)) / 2
        case "total_variation":
            terms_RS = (teacher_RS.exp() - student_RS.exp()).abs() / 2
        case _:
            assert_never(divergence)
    return terms_RS.sum(1)
