"""The command `plan` as a user meets it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import cli
from tests.support.fake_teacher import conversation_records
from tests.support.models import tiny_llava
from tests.support.real_weights import write_jsonl

Plan = Callable[..., tuple[int, str]]

WIDTH = 100


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Plan:
    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setenv("COLUMNS", str(WIDTH))
        monkeypatch.setattr(sys, "argv", ["decant", "plan", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out + (captured.err if code else "")

    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher and a student without weight files, a dataset with a missing image, and the two configurations."""
    root = tmp_path_factory.mktemp("plan")
    for name, num_layers in (("teacher", 4), ("student", 2)):
        (tiny_llava(root / name, num_layers=num_layers) / "model.safetensors").unlink()
    records = conversation_records(root, 9)
    records[4]["image"] = "gone.png"
    write_jsonl(root / "data.jsonl", records)
    (root / "capture.toml").write_text(
        f'teacher = "{root}/teacher"\ndataset = "{root}/data.jsonl"\nimage_root = "{root}"\noutput = "{root}/out"\n'
    )
    (root / "stage.toml").write_text(
        f'stage = "init"\noutput = "{root}/run"\n[model]\npath = "{root}/student"\n'
        f'[data]\ndataset = "{root}/data.jsonl"\n[loss]\ncross_entropy = 1.0\n'
        "[optim]\nlearning_rate = 1e-3\n[run]\nzero_stage = 3\n"
    )
    return root


def test_plan_needs_no_weights_and_writes_nothing(plan: Plan, root: Path) -> None:
    before = sorted(root.rglob("*"))
    code, shown = plan("--config", str(root / "capture.toml"))
    assert code == 0, shown
    for words in ("Dataset: exact", "gone.png", "all shards", "KV cache a token", "H100 SXM", "--student DIR"):
        assert words in shown
    assert "ZeRO" not in shown
    assert sorted(root.rglob("*")) == before


def test_everything_fits_a_terminal_of_100_columns(plan: Plan, root: Path) -> None:
    generated = ("--set", "generate.num_samples=2", "--set", "top_p=0.9")
    for more in ((), generated):
        _, shown = plan("--config", str(root / "capture.toml"), "--student", str(root / "student"), *more)
        lines = shown.splitlines()
        assert max(map(len, lines)) <= WIDTH
        # Where a row takes two lines, the first column of the second is empty.
        folded = [line for line in lines if line.startswith("│  ") and not line.strip("│ ")[:1].isdigit()]
        assert len(folded) <= (5 if more else 0), folded


def test_the_stage_file_decides_what_is_trained(plan: Plan, root: Path) -> None:
    code, shown = plan("--config", str(root / "capture.toml"), "--train-config", str(root / "stage.toml"), "--json")
    assert code == 0, shown
    found = json.loads(shown)
    figures = {figure["name"]: figure for figure in found["trainer"]["parameters"]["figures"]}
    assert figures["trained"]["how"] == "adapter"
    assert {row["stage"] for row in found["trainer"]["memory"] if row["chosen"]} == {3}
    assert [section["title"].split()[0] for section in found["capture"]] == ["Dataset:", "Shards", "Teacher's", "GPU"]


def test_overrides_and_gpu_counts_are_applied(plan: Plan, root: Path) -> None:
    config, student = str(root / "capture.toml"), str(root / "student")
    options = ("--gpus", "3,6", "--set", "engine.dtype=float32", "--json")
    code, shown = plan("--config", config, "--student", student, *options)
    assert code == 0, shown
    found = json.loads(shown)
    assert {row["num_gpus"] for row in found["trainer"]["memory"]} == {3, 6}
    memory = {figure["name"]: figure for figure in found["capture"][2]["figures"]}
    assert memory["weights a GPU"]["value"] == 4 * memory["parameters"]["value"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("teacher=nowhere", "nowhere"),
        ("dataset=nowhere.jsonl", "nowhere.jsonl: the dataset cannot be read"),
        ("outptu=x", "outptu: unknown key"),
        ("top_k=500000", "top_k = 500000 exceeds the"),
    ],
)
def test_a_wrong_setting_is_named(plan: Plan, root: Path, option: str, message: str) -> None:
    code, shown = plan("--config", str(root / "capture.toml"), "--set", option)
    assert code == 1
    assert message in shown
    assert "Traceback" not in shown


def test_missing_files_are_named(plan: Plan, root: Path) -> None:
    assert "none.toml: cannot be read" in plan("--config", str(root / "none.toml"))[1]
    code, shown = plan("--config", str(root / "capture.toml"), "--student", str(root / "nobody"))
    assert code == 1
    assert "nobody: its config.json makes no student" in shown
    code, shown = plan("--config", str(root / "capture.toml"), "--train-config", str(root / "no-stage.toml"))
    assert code == 1
    assert "no-stage.toml: cannot be read" in shown


@pytest.mark.parametrize("gpus", ["0", "two", "1,,2", "", "1" * 5000])
def test_invalid_gpu_counts_are_wrong_usage(plan: Plan, root: Path, gpus: str) -> None:
    code, shown = plan("--config", str(root / "capture.toml"), "--gpus", gpus)
    assert code == 2
    assert "1,2,4,8" in shown


def test_the_help_explains_every_option(plan: Plan) -> None:
    code, shown = plan("--help")
    assert code == 0
    for line in shown.splitlines():
        if line.startswith("│") and "--" in line.split()[1]:
            assert len(line.strip("│ ").split()) > 2, line
