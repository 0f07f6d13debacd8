"""The record of a run, and the check of a continuation against it."""

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, ProvenanceError, StorageError
from tests.support.training import stage
from train.config import TrainConfig
from train.data.preflight import BadSample
from train.data.sources import Example
from train.run.run_record import RunRecord, StartPlace, append_start, find_template_date


class UnreadSource:
    """Source of seven samples that no test reads."""

    sha256 = "d" * 64
    sampled = False

    num_samples = 7

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Example:
        raise AssertionError

    def read_unscored(self, index: int) -> Example:  # noqa: ARG002 - the protocol's signature
        raise AssertionError

    def length(self, index: int, tokens_per_image: int) -> int:  # noqa: ARG002 - the protocol's signature
        raise AssertionError


SOURCE = UnreadSource()


def _write(config: TrainConfig, source: UnreadSource) -> None:
    RunRecord.of(config, source).write(config.output)


def _check(config: TrainConfig, source: UnreadSource) -> list[str]:
    return RunRecord.of(config, source).check_continuation(config)


def make_settings(root: Path, **changes: Any) -> dict[str, Any]:
    return stage(root / "run", root, data={"dataset": str(root / "data.json")}, loss={"cross_entropy": 1.0}, **changes)


def test_a_run_of_an_older_version_continues_if_newer_keys_have_their_defaults(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(make_settings(tmp_path))
    _write(config, SOURCE)
    path = tmp_path / "run" / "config.json"
    recorded = json.loads(path.read_text())
    del recorded["config"]["optim"]["betas"], recorded["config"]["data"]["batching"]
    path.write_text(json.dumps(recorded))
    _check(config, SOURCE)
    # This key does not have its default here.
    del recorded["config"]["optim"]["eps"]
    path.write_text(json.dumps(recorded))
    with pytest.raises(ProvenanceError, match=r"optim\.eps: the run has 1e-08, this start has 0\.0001"):
        _check(config, SOURCE)
    recorded["config"]["optim"] |= {"eps": 1e-4, "gone": 1}
    path.write_text(json.dumps(recorded))
    with pytest.raises(ProvenanceError, match=r"optim\.gone"):
        _check(config, SOURCE)


def test_a_moved_output_continues(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    _write(TrainConfig.model_validate(settings), SOURCE)
    (tmp_path / "run").rename(tmp_path / "moved")
    _check(TrainConfig.model_validate({**settings, "output": str(tmp_path / "moved")}), SOURCE)


def test_a_damaged_record_is_an_error(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(make_settings(tmp_path))
    _write(config, SOURCE)
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(StorageError, match=r"config\.json: cannot be read"):
        _check(config, SOURCE)


def test_each_start_is_recorded_and_earlier_ones_are_kept(tmp_path: Path) -> None:
    settings = make_settings(tmp_path, seed=3)
    before = TrainConfig.model_validate(settings)
    _write(before, SOURCE)
    append_start(before, SOURCE, StartPlace(0, 8, "H100"))
    settings["run"]["save_steps"] = 7
    after = TrainConfig.model_validate(settings)
    _check(after, SOURCE)
    append_start(after, SOURCE, StartPlace(20, 4, "H100"), ["a change"])

    starts = json.loads((tmp_path / "run" / "starts.json").read_text())
    assert [(s["step"], s["num_ranks"], s["seed"], s["device"]) for s in starts] == [
        (0, 8, 3, "H100"),
        (20, 4, 3, "H100"),
    ]
    assert [s["config"]["run"]["save_steps"] for s in starts] == [1000, 7]
    assert [s["changes"] for s in starts] == [[], ["a change"]]
    assert starts[0]["data"] == [{"location": str(tmp_path / "data.json"), "sha256": "d" * 64, "num_samples": 7}]
    packages = {"python", "torch", "transformers", "deepspeed", "numpy", "pyarrow", "decant"}
    assert starts[0]["versions"].keys() >= packages
    assert TrainConfig.model_validate(starts[1]["config"]) == after

    settings["optim"]["learning_rate"] = 5e-4
    with pytest.raises(ProvenanceError, match=r"optim\.learning_rate"):
        _check(TrainConfig.model_validate(settings), SOURCE)
    settings["run"]["resume"] = "never"
    with pytest.raises(ConfigError, match="never"):
        _check(TrainConfig.model_validate(settings), SOURCE)


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "more epochs": ({"optim": {"epochs": 1}}, {"optim": {"epochs": 3}}, None),
    "fewer epochs": (
        {"optim": {"epochs": 3}},
        {"optim": {"epochs": 1}},
        "optim.epochs: the run has 3, this start has 1",
    ),
    "more steps": ({"optim": {"max_steps": 5}}, {"optim": {"max_steps": 9}}, None),
    "no limit of steps": ({"optim": {"max_steps": 5}}, {"optim": {"max_steps": None}}, None),
    "fewer steps": ({"optim": {"max_steps": 5}}, {"optim": {"max_steps": 4}}, "optim.max_steps"),
    "longer samples": ({"data": {"max_tokens": 64}}, {"data": {"max_tokens": 128}}, None),
    "shorter samples": ({"data": {"max_tokens": 128}}, {"data": {"max_tokens": 64}}, "data.max_tokens"),
    "smaller micro-batches": ({}, {"optim": {"micro_batch_size": 1}}, None),
    "another global batch": ({}, {"optim": {"global_batch_size": 16}}, "optim.global_batch_size"),
    "another image root": ({}, {"data": {"image_root": "elsewhere"}}, None),
    "another loss": ({}, {"loss": {"cross_entropy": 2.0}}, "loss.cross_entropy"),
    "skipping": ({}, {"data": {"on_bad_sample": "skip"}}, None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_an_error_advises_may_change_and_nothing_else(tmp_path: Path, name: str) -> None:
    first, second, refused = CHANGES[name]

    def configure(changes: dict[str, Any]) -> TrainConfig:
        settings = make_settings(tmp_path)
        for table, keys in changes.items():
            settings[table] = settings[table] | keys
        return TrainConfig.model_validate(settings)

    before, after = configure(first), configure(second)
    _write(before, SOURCE)
    if refused is not None:
        with pytest.raises(ProvenanceError, match=re.escape(refused)):
            _check(after, SOURCE)
        return
    changes = _check(after, SOURCE)
    assert len(changes) == (0 if name == "skipping" else 1)
    for table, keys in second.items():
        assert all(any(f"{table}.{key}: the run has" in line for line in changes) for key in keys) or not changes


@pytest.mark.parametrize(
    ("num_samples", "is_allowed"), [(200, True), (199, True), (190, True), (210, True), (180, False)]
)
def test_a_set_that_was_corrected_continues_and_another_one_does_not(
    tmp_path: Path, num_samples: int, is_allowed: bool
) -> None:
    def source(count: int, digest: str) -> UnreadSource:
        found = UnreadSource()
        found.num_samples, found.sha256 = count, digest * 64
        return found

    config = TrainConfig.model_validate(make_settings(tmp_path))
    _write(config, source(200, "a"))
    if is_allowed:
        assert any("data_sha256: the run has" in line for line in _check(config, source(num_samples, "b")))
    else:
        with pytest.raises(ProvenanceError, match=r"num_samples: the run has 200, this start has 180"):
            _check(config, source(num_samples, "b"))


def test_the_contents_of_files_that_a_configuration_names_are_compared(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("{}")
    settings = make_settings(tmp_path)
    settings["run"]["deepspeed"] = str(path)
    config = TrainConfig.model_validate(settings)
    _write(config, SOURCE)
    assert _check(config, SOURCE) == []
    path.write_text('{"gradient_clipping": 2.0}')
    with pytest.raises(ProvenanceError, match=r"files\.deepspeed"):
        _check(config, SOURCE)
    path.unlink()
    with pytest.raises(ConfigError, match=r"ds\.json: cannot be read"):
        _check(config, SOURCE)


def test_the_date_of_the_chat_template_is_that_of_the_run(tmp_path: Path) -> None:
    settings = make_settings(tmp_path)
    config = TrainConfig.model_validate(settings)
    assert find_template_date(config, continues=False) is None
    day = datetime.date(2024, 7, 26)
    RunRecord.of(config, SOURCE, day).write(config.output)
    assert find_template_date(config, continues=True) == day
    settings["model"]["chat_template_date"] = "2024-01-02"
    assert find_template_date(TrainConfig.model_validate(settings), continues=True) == datetime.date(2024, 1, 2)


def test_other_samples_that_are_skipped_are_a_change_that_is_recorded(tmp_path: Path) -> None:
    config = TrainConfig.model_validate(make_settings(tmp_path))
    RunRecord.of(config, SOURCE, None, {"x": [BadSample(3, "too long")]}).write(config.output)
    again = RunRecord.of(config, SOURCE, None, {"x": [BadSample(3, "too long")]})
    assert again.check_continuation(config) == []
    other = RunRecord.of(config, SOURCE, None, {"x": [BadSample(3, "too long"), BadSample(5, "gone")]})
    (change,) = other.check_continuation(config)
    assert change == "skipped: the run left out 1 samples, this start 2, 1 of them others"
