"""Diverged steps are detected and reported."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from train.run.divergence import DivergedStep, DivergenceDetector, RankLoss


def find_problems(losses: list[float], max_ratio: float) -> list[str | None]:
    detector = DivergenceDetector(max_ratio)
    return [detector.find_problem(loss, finite_gradient=True) for loss in losses]


def test_a_falling_noisy_loss_is_allowed() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(400)
    losses = (12.0 * np.exp(-steps / 60) + 1.0) * rng.lognormal(0.0, 0.3, 400)
    assert not any(find_problems(losses.tolist(), 10.0))


def test_a_loss_above_ten_times_the_median_of_the_fifty_before_is_an_explosion() -> None:
    before = [1.0] * 25 + [3.0] * 25
    assert find_problems([*before, 20.0], 10.0)[-1] is None
    problem = find_problems([*before, 20.1], 10.0)[-1]
    assert problem is not None and "20.1" in problem and "times 2," in problem
    assert not any(find_problems([*before[:49], 1e6], 10.0)), "nothing is compared before there are fifty"
    assert not any(find_problems([*before, 1e6], 0.0)), "a ratio of 0 allows every finite loss"


def test_a_hard_batch_late_in_a_stage_whose_loss_is_near_zero_is_no_explosion() -> None:
    assert not any(find_problems([1e-4] * 50 + [0.9], 10.0))
    assert find_problems([1e-4] * 50 + [1.1], 10.0)[-1]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_problem_in_the_first_step_and_with_every_ratio(loss: float) -> None:
    assert find_problems([loss], 0.0)[0]
    assert DivergenceDetector(0.0).find_problem(1.0, finite_gradient=False)


def test_the_report_names_the_samples_of_micro_batches_without_a_finite_loss() -> None:
    micro_batches = (RankLoss(0, ("a", "b"), 1.5), RankLoss(1, ("c", "d"), math.nan))
    diverged = DivergedStep(7, "the loss is nan", micro_batches)
    message = str(diverged.to_error(Path("run/broken-step.json")))
    assert message.startswith(
        "step 7: the loss is nan. Its samples: 'c', 'd' (all micro-batches: run/broken-step.json)"
    )
    assert json.loads(diverged.to_json()) == {
        "step": 7,
        "problem": "the loss is nan",
        "micro_batches": [
            {"rank": 0, "loss": "1.5", "sample_ids": ["a", "b"]},
            {"rank": 1, "loss": "nan", "sample_ids": ["c", "d"]},
        ],
    }


def test_the_report_of_a_finite_loss_names_all_samples_up_to_a_limit() -> None:
    micro_batches = tuple(RankLoss(rank, tuple(f"{rank}-{i}" for i in range(20)), 9.0) for rank in range(2))
    diverged = DivergedStep(60, "the loss is 9", micro_batches)
    assert len(diverged.suspects) == 40
    message = str(diverged.to_error(Path("record")))
    assert "'0-0'" in message and "'1-11' and 8 more (" in message and "'1-12'" not in message
