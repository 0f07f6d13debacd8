"""Metrics of a student's predictions on held-out text, against the text itself and against its teacher.

Legend: R scored tokens, V vocabulary.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_BINS = 15


def calibration_error(
    confidence_R: npt.NDArray[np.floating], correct_R: npt.NDArray[np.bool_], num_bins: int = NUM_BINS
) -> float:
    """Returns the expected calibration error of the likeliest token, in [0, 1].

        sum_b n_b / R |accuracy_b - confidence_b|

    over `num_bins` bins of equal width of (0, 1]: equation 3 of Guo et al., arXiv 1706.04599.

    Args:
        confidence_R: probability of the likeliest token.
        correct_R: True where that token is the text's.
    """
    bin_R = np.clip(np.ceil(confidence_R * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    # The sum of correct - confidence over a bin is n_b (accuracy_b - confidence_b).
    gaps_B = np.bincount(bin_R, correct_R - confidence_R.astype(np.float64), minlength=num_bins)
    return float(np.abs(gaps_B).sum() / len(bin_R))


def token_metrics(logprobs_RV: Tensor, targets_R: Tensor) -> dict[str, float]:
    """Returns `nll` in nats a token, `top1`, the share of tokens that were the likeliest, and `ece` of the likeliest.

    Args:
        logprobs_RV: float, normalised over V.
        targets_R: int64.
    """
    best_R = logprobs_RV.max(1)
    correct_R = best_R.indices == targets_R
    own_R = logprobs_RV.gather(1, targets_R[:, None])
    return {
        "nll": -float(own_R.double().mean()),
        "top1": float(correct_R.double().mean()),
        "ece": calibration_error(best_R.values.exp().numpy(), correct_R.numpy()),
    }


def mean_divergence(teacher_RV: Tensor, student_RV: Tensor) -> float:
    """Returns KL(teacher || student) over all V, in nats a token; both arguments are float log-probs."""
    total = 0.0
    for teacher, student in zip(teacher_RV.split(256), student_RV.split(256), strict=True):
        total += float(torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True).double())
    return total / len(teacher_RV)
