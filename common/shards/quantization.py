"""Precisions of stored log-probs, and the largest error of each.

Legend: R scored tokens, N kept entries of all of them.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.shards.scores import TeacherScores

Precision = Literal["fp32", "fp16", "q8", "q6"]

# Precisions of stored log-probs; None if entries were drawn, because then their numbers of draws are stored instead.
StoredPrecision = Precision | None

# The value used for a kept mass that float32 rounds to 0: half the distance from 1 to the next smaller float32.
MIN_MASS = 2.0**-25

# Beside codes rest masses are rounded: this number of float32's 24 significant bits become 0.
_ZERO_BITS = 12
# The largest relative error of that rounding.
REST_ROUNDING = 2.0 ** (_ZERO_BITS - 24)


@dataclass(frozen=True)
class Quantizer:
    """Quantization of an output's kept entries: the best `top_k`, or `num_draws` draws of a row if that is not None."""

    precision: StoredPrecision
    top_k: int
    num_draws: int | None

    @property
    def levels(self) -> int | None:
        """Number of steps of sqrt(p) from 0 to 1, which codes of q8 and q6 count; None for other precisions.

        k codes with n steps add about k / (6 n^2) nats of KL divergence to a row. q8 has the number of steps that keeps
        this below 3.1e-4, but at least 127 and at most the 255 that fit into a byte (enough for 120 entries).
        """
        if self.precision == "q6":
            return 63
        return min(max(math.isqrt(540 * self.top_k), 127), 255) if self.precision == "q8" else None

    def stored_rest(self, rest_mass_R: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Returns rest masses as they are stored, float32 [R]: to 12 significant bits beside codes, else exact."""
        if self.levels is None:
            return rest_mass_R
        bits_R = rest_mass_R.view(np.uint32) + np.uint32(1 << _ZERO_BITS - 1)
        return (bits_R >> _ZERO_BITS << _ZERO_BITS).view(np.float32)


def max_probability_error(scores: TeacherScores, quantizer: Quantizer) -> npt.NDArray[np.float64]:
    """Returns the largest error of each kept entry's probability after it was stored and read, float64 [N].

    fp32 and draws are exact. fp16 rounds log-probs to 11 significant bits. q8 and q6 round u = sqrt(p) to a root
    within half a step of it, then scale a row's roots by one factor so that the kept mass m = sum u^2 is right; with
    a = step sum(u) / m and b = K step^2 / (4 m) that factor is between (-a + sqrt(a^2 + 4 (1 - b))) / 2 and
    (a + sqrt(a^2 + 4 (1 + b))) / 2, which follows from |sum w^2 - sum r^2| <= sum |w - r| (w + r).
    """
    logprobs_N = scores.logprobs.astype(np.float64)
    probs_N = np.exp(logprobs_N)
    if quantizer.precision == "fp16":
        relative_N: npt.NDArray[np.float64] = np.expm1(np.maximum(np.abs(logprobs_N) * 2.0**-11, 2.0**-25))
        return probs_N * relative_N
    if quantizer.levels is None:
        return np.zeros_like(probs_N)
    step = 1 / quantizer.levels
    roots_N = np.sqrt(probs_N)
    mass_R = np.maximum(_row_sums(probs_N, scores.counts), MIN_MASS)
    a_R = step * _row_sums(roots_N, scores.counts) / mass_R
    b_R = scores.counts * step**2 / (4 * mass_R)
    growth_R = (a_R + np.sqrt(a_R**2 + 4 * (1 + b_R))) / 2 - 1
    shrinkage_R = 1 - np.maximum(-a_R + np.sqrt(np.maximum(a_R**2 + 4 * (1 - b_R), 0)), 0) / 2
    error_N = step / 2 + roots_N * np.repeat(np.maximum(growth_R, shrinkage_R), scores.counts)
    # The error of the kept mass itself, which is 1 minus a float32 rest mass.
    rest_error_R = scores.rest_mass * REST_ROUNDING + 2.0**-24
    total_N: npt.NDArray[np.float64] = error_N * (2 * roots_N + error_N) + np.repeat(rest_error_R, scores.counts)
    return total_N


def _row_sums(values_N: npt.NDArray[np.float64], counts_R: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    rows_N = np.repeat(np.arange(len(counts_R)), counts_R)
    return np.bincount(rows_N, values_N, minlength=len(counts_R)).astype(np.float64)
