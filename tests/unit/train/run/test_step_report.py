"""The vector that ranks add up once a step."""

import math
import signal
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from train.run.step_report import StepOutcome, StepReport, pack_report

CPU = torch.device("cpu")
COUNTS = {"rows": 3, "pairs": 0, "tokens": 10, "positions": 12}


def make_outcome(losses: list[float], norm: float | None = 1.0) -> StepOutcome:
    outcome = StepOutcome()
    for number, loss in enumerate(losses):
        outcome.add_loss((f"s{number}",), torch.tensor(loss))
    outcome.set_gradient_norm(norm)
    return outcome


def pack(
    counts: list[Mapping[str, int]], outcome: StepOutcome, *, failed: bool = False, signum: int | None = None
) -> Tensor:
    return pack_report(counts, outcome.pack(CPU), failed=failed, signum=signum, device=CPU)


def test_reports_of_two_ranks_add_up() -> None:
    healthy = pack([COUNTS, COUNTS], make_outcome([1.0, 2.0]))
    failed = pack([COUNTS], make_outcome([4.0], norm=-1.0), failed=True, signum=signal.SIGTERM)
    report = StepReport.unpack(healthy + failed)
    assert report.counts == {"rows": 9.0, "pairs": 0.0, "tokens": 30.0, "positions": 36.0}
    assert (report.num_failed, report.num_terminated, report.num_interrupted) == (1, 1, 0)
    assert (report.loss, report.num_bad_gradients) == (7.0, 1)


def test_a_rank_without_micro_batches_reports_zeros() -> None:
    assert pack([], StepOutcome()).tolist() == [0.0] * 9


def test_ranks_stop_for_a_signal_that_came_to_one_of_them_and_sigterm_wins() -> None:
    by_signal = {signum: pack([], StepOutcome(), signum=signum) for signum in (None, signal.SIGINT, signal.SIGTERM)}
    none, interrupted, terminated = by_signal.values()
    assert StepReport.unpack(none).stop_signal is None
    assert StepReport.unpack(none + interrupted).stop_signal == signal.SIGINT
    assert StepReport.unpack(terminated + interrupted).stop_signal == signal.SIGTERM


@pytest.mark.parametrize(("norm", "bad"), [(None, 0), (0.0, 0), (2.5, 0), (-1.0, 1), (math.inf, 1), (math.nan, 1)])
def test_a_gradient_norm_that_is_negative_or_not_finite_is_bad(norm: float | None, bad: int) -> None:
    assert make_outcome([1.0], norm).pack(CPU).tolist() == [1.0, bad]


def test_a_step_is_checked_when_its_losses_are_taken() -> None:
    assert not make_outcome([1.0]).is_checked
    outcome = make_outcome([1.0, math.nan])
    assert math.isnan(outcome.pack(CPU)[0])
    assert [micro_batch.sample_ids for micro_batch in outcome.pop_losses()] == [("s0",), ("s1",)]
    assert outcome.is_checked
    assert outcome.pack(CPU).tolist() == [0.0, 0.0]
