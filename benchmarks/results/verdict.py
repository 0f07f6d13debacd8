"""Verdicts on a claim, from differences between runs of the same seed.

A claim's difference has the sign that makes it positive where the claim is right. With n seeds, mean m, and standard
deviation s (n - 1 in its denominator), the interval m +- t s / sqrt(n) with Student's t of n - 1 degrees of freedom
decides: if it is above 0 the direction holds, if it is below 0 it does not, if it contains 0 it is within noise.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from scipy.stats import t as student_t

Outcome = Literal["holds", "does not hold", "within noise", "one seed"]


@dataclass(frozen=True)
class Comparison:
    """A claim about two runs of one half: `better` has more of `metric` than `worse` (sign 1), or less (sign -1)."""

    half: Literal["demo", "text"]
    better: str
    worse: str
    metric: str
    sign: Literal[1, -1]


@dataclass(frozen=True)
class Claim:
    """Sentence of the paper, and the comparisons that test it; `key` is that of the paper's number, if it has one."""

    key: str
    text: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Verdict:
    """Outcome of a comparison; `mean` and `stdev` are those of metric(better) - metric(worse), whatever the sign."""

    outcome: Outcome
    mean: float
    stdev: float
    num_agreeing: int
    num_seeds: int


CLAIMS = (
    Claim(
        "distillation",
        "Distillation beats cross-entropy alone",
        (
            Comparison("demo", "full", "ce", "accuracy", 1),
            Comparison("demo", "full", "ce", "nll", -1),
            Comparison("demo", "full", "ce", "ece", -1),
            Comparison("text", "full", "ce", "top1", 1),
            Comparison("text", "full", "ce", "nll", -1),
            Comparison("text", "full", "ce", "ece", -1),
        ),
    ),
    Claim(
        "response",
        "Distilling the response alone beats distilling all tokens",
        (
            Comparison("demo", "full", "all-tokens", "accuracy", 1),
            Comparison("demo", "full", "all-tokens", "nll", -1),
            Comparison("demo", "full", "all-tokens", "kl", -1),
        ),
    ),
    Claim(
        "sparse",
        "A mixture of experts beats the dense student",
        (
            Comparison("demo", "sparse", "dense", "accuracy", 1),
            Comparison("demo", "sparse", "dense", "nll", -1),
            Comparison("demo", "sparse", "dense", "kl", -1),
        ),
    ),
    Claim(
        "hallucination",
        "Preference distillation lowers hallucination",
        (Comparison("demo", "preference", "sparse", "wrong", -1),),
    ),
    Claim(
        "comprehension",
        "Preference distillation raises comprehension too (the paper: not always)",
        (
            Comparison("demo", "preference", "sparse", "accuracy", 1),
            Comparison("demo", "preference", "sparse", "nll", -1),
        ),
    ),
)


def values(results: Mapping[str, Any], half: str, run: str, metric: str) -> list[float]:
    """Returns a metric of each seed's run, in the order of the seeds; one value for a run without seeds."""
    metrics = results[half]["metrics"]
    if run in metrics:
        return [metrics[run][metric]]
    return [metrics[f"{run}@{seed}"][metric] for seed in range(results["seeds"])]


def stdev(numbers: Sequence[float]) -> float:
    """Returns the standard deviation with n - 1 in its denominator; 0 for a single number."""
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def differences(results: Mapping[str, Any], half: str, one: str, other: str, metric: str) -> list[float]:
    """Returns metric(one) - metric(other), seed by seed."""
    pairs = zip(values(results, half, one, metric), values(results, half, other, metric), strict=True)
    return [a - b for a, b in pairs]


def compute_verdict(numbers: Sequence[float], sign: Literal[1, -1], confidence: float) -> Verdict:
    """Returns the verdict on a claim that these differences, one for each seed, have this sign."""
    n, mean, deviation = len(numbers), statistics.fmean(numbers), stdev(numbers)
    num_agreeing = sum(sign * number > 0 for number in numbers)
    outcome: Outcome = "one seed"
    if n > 1:
        margin = float(student_t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n)
        lowest, highest = sign * mean - margin, sign * mean + margin
        outcome = "holds" if lowest > 0 else "does not hold" if highest < 0 else "within noise"
    return Verdict(outcome, mean, deviation, num_agreeing, n)


def evaluate_comparison(results: Mapping[str, Any], comparison: Comparison) -> Verdict:
    """Returns the verdict on one comparison."""
    c = comparison
    return compute_verdict(differences(results, c.half, c.better, c.worse, c.metric), c.sign, results["confidence"])
