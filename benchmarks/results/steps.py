"""Steps of a long measurement: each command and each evaluation runs once, and a new start continues a stopped one.

DIRECTORY/
  done/NAME.json      a command that has finished, with its seconds
  metrics/NAME.json   figures of an evaluation, or of a capture
  log.txt             output of the commands
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.errors import DecantError
from common.shards.manifest import published_shards, read_manifest, read_receipts, shard_path
from common.shards.score_shard import ShardFile

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "demo"

# Changes to the configuration of a stage. The number of steps is so large that only the last one is saved, which
# happens in any case.
CROSS_ENTROPY_ALONE: dict[str, Any] = {"loss.distillation": 0.0, "loss.cross_entropy": 1.0}
SAVE_LAST_STEP: dict[str, Any] = {"run.save_steps": 10_000}


class StepError(DecantError):
    """Error: a command failed, or the directory holds the steps of another measurement."""


class Steps:
    """Runs the steps of one directory; commands run in it, on one thread each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Creates the directory for a measurement of these sizes, or continues one of the same sizes.

        Raises:
            StepError: the directory was begun with other sizes.
        """
        for name in ("done", "metrics"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        path = self.directory / "settings.json"
        # Tuples become lists, as in the file that they are compared with.
        wanted = json.loads(json.dumps(settings))
        if path.exists() and self.settings() != wanted:
            raise StepError(f"{path}: begun with other sizes than are asked for now; choose another directory")
        path.write_text(json.dumps(wanted, indent=1) + "\n", "utf-8")

    def settings(self) -> dict[str, Any]:
        """Returns the sizes that the directory was begun with.

        Raises:
            StepError: nothing was begun there.
        """
        path = self.directory / "settings.json"
        if not path.exists():
            raise StepError(f"{path}: not there, so nothing was measured; run this half first")
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return found

    def decant(self, name: str, *arguments: str) -> None:
        """Runs a command of the command line."""
        self._run(name, "-m", "cli", *arguments)

    def module(self, name: str, module: str, *arguments: str) -> None:
        """Runs a module of the project."""
        self._run(name, "-m", module, *arguments)

    def train(self, name: str, config: Path, overrides: Mapping[str, Any]) -> Path:
        """Trains a stage into `runs/NAME`; returns its final student, relative to the directory."""
        run = Path("runs", name)
        self.decant(f"train-{name}", "train", "--config", str(config), *_set({"output": str(run), **overrides}))
        # Only a stopped run needs its checkpoints, which are several times as large as the student.
        shutil.rmtree(self.directory / run / "checkpoints", ignore_errors=True)
        return run / "final"

    def capture(
        self, name: str, config: Path, dataset: str, overrides: Mapping[str, Any], *, verify: bool = True
    ) -> None:
        """Scores `dataset` into `scores/NAME`, verifies the output, and measures it.

        Measured are `ids`, the mean number of kept entries a token, and `bytes`, the size of the shards a token.
        """
        output = f"scores/{name}"
        settings = _set({"dataset": dataset, "output": output, **overrides})
        self.decant(f"capture-{name}", "precompute-logits", "--config", str(config), *settings)
        if verify:
            self.decant(f"verify-{name}", "verify-shards", output, "--dataset", dataset)
        self.measure(f"capture-{name}", lambda: _measure_output(self.directory / output))

    def measure(self, name: str, work: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """Returns the figures of `work`, which runs only if they are not there yet."""
        path = self.directory / "metrics" / f"{name}.json"
        if not path.exists():
            started = time.monotonic()
            found = dict(work())
            path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            self._mark_done(f"measure-{name}", time.monotonic() - started)
            shown = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
            self._print_progress(f"{name}: {shown}")
        body: dict[str, float] = json.loads(path.read_text("utf-8"))
        return body

    def metrics(self) -> dict[str, dict[str, float]]:
        """Returns all figures measured so far, by name."""
        paths = sorted((self.directory / "metrics").glob("*.json"))
        return {path.stem: json.loads(path.read_text("utf-8")) for path in paths}

    def seconds(self) -> dict[str, float]:
        """Returns the wall-clock seconds of each finished step."""
        paths = sorted((self.directory / "done").glob("*.json"))
        return {path.stem: json.loads(path.read_text("utf-8"))["seconds"] for path in paths}

    def _run(self, name: str, *command: str) -> None:
        marker = self.directory / "done" / f"{name}.json"
        if marker.exists():
            return
        environment = {
            **os.environ,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        started = time.monotonic()
        with (self.directory / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"\n$ {shlex.join(command)}\n")
            log.flush()
            code = subprocess.run(
                [sys.executable, *command], cwd=self.directory, env=environment, stdout=log, stderr=log, check=False
            ).returncode
        if code:
            raise StepError(f"{name}: exit code {code}; {self.directory / 'log.txt'} says why. Start again to continue")
        self._mark_done(name, time.monotonic() - started)

    def _mark_done(self, name: str, seconds: float) -> None:
        body = {"seconds": round(seconds, 1)}
        (self.directory / "done" / f"{name}.json").write_text(json.dumps(body) + "\n", "utf-8")
        self._print_progress(f"{name}: {seconds:.0f} s")

    def _print_progress(self, text: str) -> None:
        print(f"{self.directory.name}: {text}", flush=True)


def _set(overrides: Mapping[str, Any]) -> list[str]:
    """Returns options of the command line; JSON is valid TOML for all values in use."""
    return [part for key, value in overrides.items() for part in ("--set", f"{key}={json.dumps(value)}")]


def _measure_output(output: Path) -> dict[str, float]:
    """Returns the scored tokens of an output, and its kept entries and bytes a token."""
    manifest = read_manifest(output)
    receipts = read_receipts(output, manifest)
    tokens = sum(each.num_scored_tokens for each in receipts)
    entries = 0
    for number in published_shards(output):
        for row in ShardFile(shard_path(output, number), manifest, number):
            entries += int(row.conversations[0].scores.counts.sum())
    num_bytes = sum(each.num_bytes for each in receipts)
    return {"tokens": tokens, "ids": entries / tokens, "bytes": num_bytes / tokens}
