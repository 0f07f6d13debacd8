"""What makes a run stop by itself, and what does not; who is told, and with which packages."""

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, ProvenanceError
from tests.support.training import stage
from train.config import TrainConfig
from train.data.sources import Example
from train.run.divergence import DivergenceDetector
from train.run.run_record import append_start, check_continuation, write_config
from train.run.shutdown import GracefulShutdown
from train.run.stage import train_stage


class Samples:
    """A source that no test reads."""

    sha256 = "d" * 64
    sampled = False

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Example:
        raise AssertionError


def verdicts(losses: list[float], ratio: float) -> list[str | None]:
    detector = DivergenceDetector(ratio)
    return [detector.find_problem(loss, finite_gradient=True) for loss in losses]


def test_a_falling_loss_and_its_noise_are_let_pass() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(400)
    losses = (12.0 * np.exp(-steps / 60) + 1.0) * rng.lognormal(0.0, 0.3, 400)
    assert not any(verdicts(losses.tolist(), 10.0))


def test_a_loss_above_ten_times_the_median_of_the_fifty_before_is_an_explosion() -> None:
    before = [1.0] * 25 + [3.0] * 25
    assert verdicts([*before, 20.0], 10.0)[-1] is None
    problem = verdicts([*before, 20.1], 10.0)[-1]
    assert problem is not None and "20.1" in problem and "times 2," in problem
    assert not any(verdicts([*before[:49], 1e6], 10.0)), "before there are fifty, nothing is known"
    assert not any(verdicts([*before, 1e6], 0.0)), "0 turns it off"


def test_a_hard_batch_late_in_a_stage_whose_loss_is_near_zero_is_no_explosion() -> None:
    assert not any(verdicts([1e-4] * 50 + [0.9], 10.0))
    assert verdicts([1e-4] * 50 + [1.1], 10.0)[-1]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_the_first_step_and_cannot_be_allowed(loss: float) -> None:
    assert verdicts([loss], 0.0)[0]
    assert DivergenceDetector(0.0).find_problem(1.0, finite_gradient=False)


def test_a_signal_is_remembered_inside_and_deadly_again_outside() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with GracefulShutdown() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert stop.signum == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_metrics_package_that_is_missing_is_named_before_anything_is_read(tmp_path: Path) -> None:
    config = stage(
        tmp_path / "run",
        tmp_path / "no-such-student",
        data={"dataset": str(tmp_path / "no-such-file.json")},
        loss={"cross_entropy": 1.0},
        run={"report_to": ["tensorboard", "wandb", "trackio"]},
    )
    with pytest.raises(ConfigError, match=r"wandb, trackio is not installed.*pip install wandb trackio"):
        train_stage(TrainConfig.model_validate(config))
    assert not (tmp_path / "run").exists()


def test_a_run_of_an_older_version_continues_where_newer_keys_have_their_defaults(tmp_path: Path) -> None:
    settings = stage(tmp_path / "run", tmp_path, data={"dataset": "data.json"}, loss={"cross_entropy": 1.0})
    config = TrainConfig.model_validate(settings)
    write_config(config, Samples())
    path = tmp_path / "run" / "config.json"
    recorded = json.loads(path.read_text())
    del recorded["config"]["optim"]["betas"], recorded["config"]["data"]["batching"]
    path.write_text(json.dumps(recorded))
    check_continuation(config, Samples())
    # Not the default here.
    del recorded["config"]["optim"]["eps"]
    path.write_text(json.dumps(recorded))
    with pytest.raises(ProvenanceError, match=r"optim\.eps: the output has 1e-08, this run has 0\.0001"):
        check_continuation(config, Samples())
    recorded["config"]["optim"] |= {"eps": 1e-4, "gone": 1}
    path.write_text(json.dumps(recorded))
    with pytest.raises(ProvenanceError, match=r"optim\.gone"):
        check_continuation(config, Samples())


def test_each_start_is_recorded_and_the_earlier_ones_are_kept(tmp_path: Path) -> None:
    settings = stage(
        tmp_path / "run", tmp_path, data={"dataset": str(tmp_path / "data.json")}, loss={"cross_entropy": 1.0}, seed=3
    )
    first = TrainConfig.model_validate(settings)
    write_config(first, Samples())
    append_start(first, Samples(), step=0, num_ranks=8, device="H100")
    settings["run"]["save_steps"] = 7
    second = TrainConfig.model_validate(settings)
    check_continuation(second, Samples())
    append_start(second, Samples(), step=20, num_ranks=4, device="H100")

    starts = json.loads((tmp_path / "run" / "starts.json").read_text())
    assert [(s["step"], s["num_ranks"], s["seed"], s["device"]) for s in starts] == [
        (0, 8, 3, "H100"),
        (20, 4, 3, "H100"),
    ]
    assert [s["config"]["run"]["save_steps"] for s in starts] == [1000, 7]
    assert starts[0]["data"] == [{"location": str(tmp_path / "data.json"), "sha256": "d" * 64, "num_samples": 7}]
    assert starts[0]["versions"].keys() >= {
        "python",
        "torch",
        "transformers",
        "deepspeed",
        "numpy",
        "pyarrow",
        "decant",
    }
    assert TrainConfig.model_validate(starts[1]["config"]) == second

    settings["optim"]["learning_rate"] = 5e-4
    with pytest.raises(ProvenanceError, match=r"optim\.learning_rate"):
        check_continuation(TrainConfig.model_validate(settings), Samples())
    settings["run"]["resume"] = "never"
    with pytest.raises(ConfigError, match="never"):
        check_continuation(TrainConfig.model_validate(settings), Samples())
