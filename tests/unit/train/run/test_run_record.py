"""The record of a run, and the check of a continuation against it."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, ProvenanceError, StorageError
from tests.support.training import stage
from train.config import TrainConfig
from train.data.sources import Example
from train.run.run_record import append_start, check_continuation, write_config


class UnreadSource:
    """Source of seven samples that no test reads."""

    sha256 = "d" * 64
    sampled = False

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Example:
        raise AssertionError

    def length(self, index: int, tokens_per_image: int) -> int:  # noqa: ARG002 - the protocol's signature
        raise AssertionError


SOURCE = UnreadSource()


def make_settings(root: Path, **changes: Any) -> dict[str, Any]:
    return stage(root / "run", root, data={"dataset": str(root / "data.json")}, loss={"cross_entropy": 1.0}, **changes)


def test_a_run_of_an_older_version_continues_if_newer_keys_have_their_defaults(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(make_settings(tmp_path))
    write_config(config, SOURCE)
    path = tmp_path / "run" / "config.json"
    recorded = json.loads(path.read_text())
    del recorded["config"]["optim"]["betas"], recorded["config"]["data"]["batching"]
    path.write_text(json.dumps(recorded))
    check_continuation(config, SOURCE)
    # This key does not have its default here.
    del recorded["config"]["optim"]["eps"]
    path.write_text(json.dumps(recorded))
    with pytest.raises(ProvenanceError, match=r"optim\.eps: the output has 1e-08, this run has 0\.0001"):
        check_continuation(config, SOURCE)
    recorded["config"]["optim"] |= {"eps": 1e-4, "gone": 1}
    path.write_text(json.dumps(recorded))
    with pytest.raises(ProvenanceError, match=r"optim\.gone"):
        check_continuation(config, SOURCE)


def test_a_moved_output_continues(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    write_config(TrainConfig.model_validate(settings), SOURCE)
    (tmp_path / "run").rename(tmp_path / "moved")
    check_continuation(TrainConfig.model_validate({**settings, "output": str(tmp_path / "moved")}), SOURCE)


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(make_settings(tmp_path))
    write_config(config, SOURCE)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(StorageError, match=r"config\.json: cannot be read"):
        check_continuation(config, SOURCE)


def test_each_start_is_recorded_and_earlier_ones_are_kept(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, seed=3)
    before = TrainConfig.model_validate(settings)
    write_config(before, SOURCE)
    append_start(before, SOURCE, step=0, num_ranks=8, device="H100")
    settings["run"]["save_steps"] = 7
    after = TrainConfig.model_validate(settings)
    check_continuation(after, SOURCE)
    append_start(after, SOURCE, step=20, num_ranks=4, device="H100")

    starts = json.loads((tmp_path / "run" / "starts.json").read_text())
    assert [(s["step"], s["num_ranks"], s["seed"], s["device"]) for s in starts] == [
        (0, 8, 3, "H100"),
        (20, 4, 3, "H100"),
    ]
    assert [s["config"]["run"]["save_steps"] for s in starts] == [1000, 7]
    assert starts[0]["data"] == [{"location": str(tmp_path / "data.json"), "sha256": "d" * 64, "num_samples": 7}]
    packages = {"python", "torch", "transformers", "deepspeed", "numpy", "pyarrow", "decant"}
    assert starts[0]["versions"].keys() >= packages
    assert TrainConfig.model_validate(starts[1]["config"]) == after

    settings["optim"]["learning_rate"] = 5e-4
    with pytest.raises(ProvenanceError, match=r"optim\.learning_rate"):
        check_continuation(TrainConfig.model_validate(settings), SOURCE)
    settings["run"]["resume"] = "never"
    with pytest.raises(ConfigError, match="never"):
        check_continuation(TrainConfig.model_validate(settings), SOURCE)
