"""Reference losses in float64, one row, pair or token at a time, with probabilities instead of log-sum-exps."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def softmax(logits: ArrayLike) -> Array:
    values: Array = np.asarray(logits, dtype=np.float64)
    powers: Array = np.exp(values - values.max())
    probs: Array = powers / powers.sum()
    return probs


def full_kl(teacher_probs: ArrayLike, student_probs: ArrayLike) -> float:
    """Returns sum p (log p - log q) over all ids, in nats."""
    pairs = zip(np.asarray(teacher_probs).tolist(), np.asarray(student_probs).tolist(), strict=True)
    return math.fsum(p * math.log(p / q) for p, q in pairs if p > 0)


def full_divergence(p: Sequence[float], q: Sequence[float], divergence: str) -> float:
    """Returns the divergence between two distributions over the same entries, in nats."""
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    match divergence:
        case "forward_kl":
            return full_kl(p, q)
        case "reverse_kl":
            return full_kl(q, p)
        case "jensen_shannon":
            return (full_kl(p, middle) + full_kl(q, middle)) / 2
        case "total_variation":
            return (
                math.fsum(max(a - b, 0.0) for a, b in zip(p, q, strict=True)) / 2
                + math.fsum(max(b - a, 0.0) for a, b in zip(p, q, strict=True)) / 2
            )
    raise AssertionError(divergence)


def distillation(  # noqa: PLR0913 - the arguments of the loss that it is the reference of
    logits: ArrayLike,
    ids: ArrayLike,
    logprobs: ArrayLike,
    rest_mass: ArrayLike,
    *,
    vocab_size: int,
    tail: str,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
) -> Array:
    """Returns the distillation loss of each row; empty slots have a log-prob of -inf."""
    rows = zip(*(np.asarray(column) for column in (logits, ids, logprobs, rest_mass)), strict=True)
    losses = []
    for row_logits, row_ids, row_logprobs, rest in rows:
        student = softmax(row_logits[:vocab_size])
        slots = zip(row_ids, row_logprobs, strict=True)
        teacher = {int(i): math.exp(lp) for i, lp in slots if lp != -math.inf}
        p = list(teacher.values())
        q = [student[i] for i in teacher]
        if tail == "renormalise":
            p, q = [value ** (1 / temperature) for value in p], [value ** (1 / temperature) for value in q]
            p = [value / math.fsum(p) for value in p]
            q = [value / math.fsum(q) for value in q]
        if tail == "bucket" and rest > 0:
            p.append(float(rest))
            q.append(math.fsum(student[i] for i in range(vocab_size) if i not in teacher))
        losses.append(temperature**2 * full_divergence(p, q, divergence))
    return np.array(losses)


def sampled(logits: ArrayLike, draws: Sequence[Mapping[int, int]], num_draws: int, vocab_size: int) -> Array:
    """Returns each row's cross-entropy under the shares of its draws, minus the entropy of the shares."""
    losses = []
    for row_logits, counts in zip(np.asarray(logits), draws, strict=True):
        student = softmax(row_logits[:vocab_size])
        shares = {i: count / num_draws for i, count in counts.items()}
        losses.append(math.fsum(p * math.log(p) for p in shares.values()))
        losses[-1] -= math.fsum(p * math.log(student[i]) for i, p in shares.items())
    return np.array(losses)


def kl_gradient(teacher_probs: ArrayLike, logits: ArrayLike) -> Array:
    """Returns the gradient of sum p_T (log p_T - log p_S) with respect to the student's logits.

    `teacher_probs` may add up to less than 1.
    """
    probs = np.asarray(teacher_probs, np.float64)
    gradient: Array = probs.sum() * softmax(logits) - probs
    return gradient


def own_logprobs(logits: ArrayLike, ids: ArrayLike, vocab_size: int) -> Array:
    """Returns the log-probability of one id of each row."""
    rows = zip(np.asarray(logits), np.asarray(ids), strict=True)
    return np.array([math.log(softmax(row[:vocab_size])[i]) for row, i in rows])


def preference(  # noqa: PLR0913 - the arguments of the loss that it is the reference of
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float = 0.0,
) -> Array:
    """Returns one loss a pair; for "kto_pair" 2P losses, those of the chosen half first."""
    chosen = np.asarray(policy_chosen, np.float64) - np.asarray(reference_chosen, np.float64)
    rejected = np.asarray(policy_rejected, np.float64) - np.asarray(reference_rejected, np.float64)
    if loss_type == "kto_pair":
        chosen_kl, rejected_kl = max(0.0, float(chosen.mean())), max(0.0, float(rejected.mean()))
        desirable = [1 - 1 / (1 + math.exp(-beta * (c - rejected_kl))) for c in chosen]
        undesirable = [1 - 1 / (1 + math.exp(-beta * (chosen_kl - r))) for r in rejected]
        return np.array(desirable + undesirable)
    losses = []
    for c, r in zip(chosen, rejected, strict=True):
        if loss_type == "sigmoid":
            # The Bradley-Terry probability that the chosen response wins, from the two implicit rewards.
            wins = math.exp(beta * c) / (math.exp(beta * c) + math.exp(beta * r))
            losses.append(-(1 - label_smoothing) * math.log(wins) - label_smoothing * math.log(1 - wins))
        elif loss_type == "ipo":
            losses.append((c - r - 0.5 / beta) ** 2)
        elif loss_type == "hinge":
            losses.append(1 - beta * (c - r) if beta * (c - r) < 1 else 0.0)
        else:
            raise AssertionError(loss_type)
    return np.array(losses)


def load_balancing(router_logits: list[Array], mask: ArrayLike, top_k: int) -> float:
    """Returns the load-balancing loss over the unmasked tokens of all layers together."""
    num_experts = router_logits[0].shape[1]
    keep = np.asarray(mask).astype(bool)
    tokens = [row for layer in router_logits for row in layer[keep]]
    if not tokens:
        return 0.0
    loss = 0.0
    for expert in range(num_experts):
        routed = [sum(row > row[expert]) < top_k for row in tokens]
        mean_prob = math.fsum(softmax(row)[expert] for row in tokens) / len(tokens)
        loss += num_experts * sum(routed) / len(tokens) * mean_prob
    return loss


def router_z(router_logits: list[Array]) -> Array:
    """Returns the squared logsumexp of each token's router logits, mean over layers."""
    squares = [
        [math.log(math.fsum(math.exp(x) for x in row)) ** 2 for row in layer.tolist()] for layer in router_logits
    ]
    return np.array([math.fsum(column) / len(router_logits) for column in zip(*squares, strict=True)])


def router_entropy(router_logits: list[Array]) -> Array:
    """Returns the entropy of each token's routing distribution, mean over layers, in nats."""
    layers = [[-math.fsum(p * math.log(p) for p in softmax(row)) for row in layer] for layer in router_logits]
    return np.array([math.fsum(column) / len(router_logits) for column in zip(*layers, strict=True)])
