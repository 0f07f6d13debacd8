"""Training and its neighbours on a path that holds markup, spaces, letters of other scripts and a line break."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.models import tiny_llava
from tests.support.training import ROOT, environment, stage, write_mixed_dataset

pytestmark = pytest.mark.slow


def to_toml(settings: dict[str, Any]) -> str:
    """Returns settings as TOML; strings and lists of JSON are valid there."""
    plain = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for table, keys in settings.items():
        if isinstance(keys, dict):
            lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in keys.items())]
    return "\n".join(lines) + "\n"


def run(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    return found.returncode, found.stdout + found.stderr


def test_commands_of_the_trainer_take_any_path_and_show_it_as_text(tmp_path: Path) -> None:
    root = tmp_path / "-odd [/x] ü 図\nline"
    # The slash of the markup makes two directories.
    root.mkdir(parents=True)
    write_mixed_dataset(root / "data", 12)
    tiny_llava(root / "student", num_layers=2)
    settings = stage(
        root / "run",
        root / "student",
        trainable=["adapter"],
        data={"dataset": str(root / "data" / "kd.json"), "image_root": str(root / "data")},
        loss={"cross_entropy": 1.0},
        optim={"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 1},
    )
    config = root / "train.toml"
    config.write_text(to_toml(settings), encoding="utf-8")
    commands = (
        ("train", "--config", str(config)),
        ("export", str(root / "run"), str(root / "exported")),
        ("init-student", "--dense", str(root / "exported"), str(root / "sparse [y]")),
        ("import-checkpoint", str(root / "exported"), str(root / "imported")),
    )
    for command in commands:
        code, text = run(*command)
        # The exported student is no original checkpoint.
        assert code == (1 if command[0] == "import-checkpoint" else 0), f"{command[0]}: {text[-3000:]}"
        assert "Traceback" not in text
        assert "this is a bug" not in text
    assert (root / "sparse [y]" / "config.json").is_file()
