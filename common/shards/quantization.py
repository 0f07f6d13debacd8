"""How kept entries may be stored, and how far what is read may then be from what was written.

Legend: R scored tokens, N kept entries of all of them.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.shards.scores import TeacherScores

Precision = Literal["fp32", "fp16", "q8", "q6"]

# How log-probs are stored; None where entries were drawn, of which the numbers of draws are.
StoredPrecision = Precision | None

# What a kept mass is taken for that float32 rounds to 0: half the distance from 1 to the float32 below it.
MIN_MASS = 2.0**-25

# Beside codes rest masses are rounded: so many of the 24 significant bits of float32 are 0.
_ZERO_BITS = 12
# That changes them at most by so much of themselves.
REST_ROUNDING = 2.0 ** (_ZERO_BITS - 24)


@dataclass(frozen=True)
class Quantizer:
    """How an output stores kept entries: `num_draws` a row were drawn, or they are the best `top_k` if that is None."""

    precision: StoredPrecision
    top_k: int
    num_draws: int | None

    @property
    def levels(self) -> int | None:
        """A code of q8 or q6 counts steps of sqrt(p), of which there are so many from 0 to 1; else None.

        k codes with n steps add about k / (6 n^2) nats of KL divergence to a row: q8 has as many as keep that below
        3.1e-4, from 127 to the 255 that fit into a byte (enough for 120 entries).
        """
        if self.precision == "q6":
            return 63
        return min(max(math.isqrt(540 * self.top_k), 127), 255) if self.precision == "q8" else None

    def stored_rest(self, rest_mass_R: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Rest masses as they are stored, float32 [R]: beside codes rounded to 12 significant bits, else exact."""
        if self.levels is None:
            return rest_mass_R
        bits_R = rest_mass_R.view(np.uint32) + np.uint32(1 << _ZERO_BITS - 1)
        return (bits_R >> _ZERO_BITS << _ZERO_BITS).view(np.float32)


def probability_error(scores: TeacherScores, coding: Quantizer) -> npt.NDArray[np.float64]:
    """How far the probability of each kept entry as it is read may be from that written, float64 [N].

    fp32 and draws are exact. fp16 rounds log-probs to 11 significant bits. q8 and q6 round u = sqrt(p) to a root
    within half a step of it, then scale a row's roots by one factor so that the kept mass m = sum u^2 is right; with
    a = step sum(u) / m and b = K step^2 / (4 m) that factor is between (-a + sqrt(a^2 + 4 (1 - b))) / 2 and
    (a + sqrt(a^2 + 4 (1 + b))) / 2, which follows from |sum w^2 - sum r^2| <= sum |w - r| (w + r).
    """
    logprobs_N = scores.logprobs.astype(np.float64)
    probs_N = np.exp(logprobs_N)
    if coding.precision == "fp16":
        relative_N: npt.NDArray[np.float64] = np.expm1(np.maximum(np.abs(logprobs_N) * 2.0**-11, 2.0**-25))
        return probs_N * relative_N
    if coding.levels is None:
        return np.zeros_like(probs_N)
    step = 1 / coding.levels
    roots_N = np.sqrt(probs_N)
    mass_R = np.maximum(_sums(probs_N, scores.counts), MIN_MASS)
    a_R = step * _sums(roots_N, scores.counts) / mass_R
    b_R = scores.counts * step**2 / (4 * mass_R)
    most_R = (a_R + np.sqrt(a_R**2 + 4 * (1 + b_R))) / 2 - 1
    least_R = 1 - np.maximum(-a_R + np.sqrt(np.maximum(a_R**2 + 4 * (1 - b_R), 0)), 0) / 2
    error_N = step / 2 + roots_N * np.repeat(np.maximum(most_R, least_R), scores.counts)
    # The last terms: what the kept mass itself may be off, float32 as the rest is.
    rest_error_R = scores.rest_mass * REST_ROUNDING + 2.0**-24
    total_N: npt.NDArray[np.float64] = error_N * (2 * roots_N + error_N) + np.repeat(rest_error_R, scores.counts)
    return total_N


def _sums(values_N: npt.NDArray[np.float64], counts_R: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    rows_N = np.repeat(np.arange(len(counts_R)), counts_R)
    return np.bincount(rows_N, values_N, minlength=len(counts_R)).astype(np.float64)
