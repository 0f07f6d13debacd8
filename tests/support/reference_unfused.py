"""Losses from whole logits with plain autograd, the reference for the pass that never holds whole logits.

R scored tokens, K kept teacher entries, V student's output layer, J gathered ids.
"""

import torch
from torch import Tensor


def gather_logits(logits_RV: Tensor, ids_RJ: Tensor, masked_RJ: Tensor, vocab_size: int) -> Tensor:
    """Returns [R, J + 1]: the gathered logits, and the logsumexp of all that are not masked."""
    logits_RV = logits_RV[:, :vocab_size]
    masked_RV = torch.zeros_like(logits_RV, dtype=torch.int64).scatter_add(1, ids_RJ, masked_RJ.long()).bool()
    rest_R1 = logits_RV.masked_fill(masked_RV, -1e30).logsumexp(1, keepdim=True)
    return torch.cat([logits_RV.gather(1, ids_RJ), rest_R1], 1)


def distillation_loss(  # noqa: PLR0913 - the arguments of the loss that it is the reference of
    logits_RV: Tensor,
    topk_ids_RK: Tensor,
    topk_logprobs_RK: Tensor,
    rest_mass_R: Tensor,
    *,
    vocab_size: int,
    divergence: str = "forward_kl",
    tail: str = "bucket",
    temperature: float = 1.0,
) -> Tensor:
    """Returns the divergence of each row from probabilities over all ids; every slot must be filled, and K < V."""
    student_RV = logits_RV[:, :vocab_size].float() if logits_RV.dtype != torch.float64 else logits_RV[:, :vocab_size]
    p = topk_logprobs_RK.to(student_RV.dtype).exp()
    q_RV = student_RV.softmax(1)
    q = q_RV.gather(1, topk_ids_RK)
    if tail == "renormalise":
        p = p ** (1 / temperature) / (p ** (1 / temperature)).sum(1, keepdim=True)
        q = q ** (1 / temperature) / (q ** (1 / temperature)).sum(1, keepdim=True)
    if tail == "bucket":
        p = torch.cat([p, rest_mass_R[:, None].to(p.dtype)], 1)
        q = torch.cat([q, q_RV.scatter(1, topk_ids_RK, 0.0).sum(1, keepdim=True)], 1)
    m = (p + q) / 2
    terms = {
        "forward_kl": lambda: p * (p / q).log(),
        "reverse_kl": lambda: q * (q / p).log(),
        "jensen_shannon": lambda: (p * (p / m).log() + q * (q / m).log()) / 2,
        "total_variation": lambda: (p - q).abs() / 2,
    }
    return temperature**2 * terms[divergence]().sum(1)


def own_logprobs(logits_RV: Tensor, ids_R: Tensor, *, vocab_size: int) -> Tensor:
    """Returns the log-probability of one id of each row."""
    return (
        logits_RV[:, :vocab_size]
        .log_softmax(1, dtype=torch.promote_types(logits_RV.dtype, torch.float32))
        .gather(1, ids_R[:, None])[:, 0]
    )
