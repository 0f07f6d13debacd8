"""Numerics of the GPU check on a CPU with small shapes, and its detection of wrong losses."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import benchmarks.loss
from benchmarks.gpu import QUICK_SHAPES, Report, check_losses, check_row_scores
from train.loss.fused_output import gather_logits

SHAPE = QUICK_SHAPES["tiny"]


def test_fused_losses_and_gradients_stay_within_their_bounds() -> None:
    found = check_losses(SHAPE, "cpu")
    assert found["out_of_bounds"] == []
    assert len(found["errors"]) == 6
    for each in found["errors"].values():
        assert each["fused"]["max_value_error_nats"] < 1e-5
        assert 0 < each["fused"]["hidden_gradient_error"] < 3e-3
        assert 0 < each["fused"]["weight_gradient_error"] < 3e-3


@pytest.mark.parametrize(
    "broken",
    [
        lambda hidden, *rest, **sizes: gather_logits(hidden * 1.01, *rest, **sizes),
        lambda hidden, weight, *rest, **sizes: gather_logits(hidden, weight.detach() + 0 * weight, *rest, **sizes),
        lambda hidden, weight, bias, ids, masked, **sizes: gather_logits(
            hidden, weight, bias, ids, masked & False, **sizes
        ),
    ],
    ids=["values", "gradient", "mask"],
)
def test_a_wrong_fused_loss_is_out_of_bounds(broken: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks.loss, "gather_logits", broken)
    assert check_losses(SHAPE, "cpu")["out_of_bounds"]


def test_row_scores_stay_within_their_bounds() -> None:
    found = check_row_scores(SHAPE, "cpu")
    assert found["out_of_bounds"] == []
    assert found["vs_float64"]["cpu"]["max_own_error_nats"] < 5e-6
    assert found["whole"]["equal_draws_fraction"] == 1.0


def test_parts_that_cannot_run_are_named_and_the_next_one_runs() -> None:
    def lacks_a_package() -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")

    report = Report(True, None)
    report.run("a", lacks_a_package)
    report.run("b", lambda: {"figure": 1 / 0})
    report.run("c", lambda: {"out_of_bounds": ["figure 3 exceeds 2"]})
    report.run("d", lambda: {"figure": 1.0})
    assert report.result["skipped"] == {"a": "not installed: deepspeed"}
    assert report.result["failures"] == {"b": "ZeroDivisionError: division by zero", "c": "figure 3 exceeds 2"}
    assert report.result["parts"]["d"]["figure"] == 1.0
