"""`decant doctor` on the machine that runs the tests, whose environment has everything for both halves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cli

ROOT = Path(cli.__file__).parent


@pytest.mark.slow
def test_both_halves_can_run_here(tmp_path: Path) -> None:
    # From another directory, as after an installation.
    done = subprocess.run(
        [sys.executable, ROOT / "cli.py", "doctor", "--json"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    found = json.loads(done.stdout)
    assert found["ok"]
    assert found["halves"] == {half: {"can_run": True, "failed": []} for half in ("precompute", "train")}
    by_name = {each["what"]: each for each in found["findings"]}
    assert by_name["capture inside vLLM"]["verdict"] == "ok"
    assert by_name["write access"]["found"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == []
