"""Reads how a student was trained from the outputs of its stages, the first one first.

student directory ─> the stage that wrote it (config.json, metrics.jsonl) ─> model.path ─> the stage before, ...
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A chain of stages that leads back to itself ends here.
_MAX_STAGES = 32


@dataclass(frozen=True)
class StageHistory:
    """One stage: its output, its resolved configuration, and the lines of its metrics.jsonl."""

    output: Path
    config: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]

    @property
    def name(self) -> str:
        """Returns the stage's name, such as dense-to-sparse."""
        return str(self.config.get("stage"))

    @property
    def start_directory(self) -> Path:
        """Returns the directory that relative paths of the configuration begin at, wherever the run is now."""
        recorded, found = Path(str(self.config.get("output"))), self.output.resolve()
        if recorded.is_absolute() or found.parts[-len(recorded.parts) :] != recorded.parts:
            return Path.cwd()
        return Path(*found.parts[: -len(recorded.parts)])

    @property
    def num_steps(self) -> int:
        """Returns the last step that was logged, 0 if none was."""
        return max((int(line["step"]) for line in self.metrics if "step" in line), default=0)

    @property
    def last_metrics(self) -> dict[str, float]:
        """Returns the last value of each metric of training and validation."""
        found: dict[str, float] = {}
        for line in self.metrics:
            found |= {name: value for name, value in line.items() if isinstance(value, int | float)}
        return found

    @property
    def data(self) -> list[str]:
        """Returns the names of the files and outputs that were trained on, without directories."""
        data = self.config.get("data") or {}
        sets = data.get("mix") or [data]
        return [name for each in sets if (name := _name(each.get("shards") or each.get("dataset")))]


def read_stage(output: Path) -> StageHistory | None:
    """Reads a stage's output; returns None for a directory that is none, or whose record cannot be read."""
    record = _read_json(output / "config.json")
    if not isinstance(record, dict) or not {"config", "config_sha256"} <= record.keys():
        return None
    metrics = []
    try:
        for line in (output / "metrics.jsonl").read_text("utf-8").splitlines():
            if isinstance(found := json.loads(line), dict):
                metrics.append(found)
    except (OSError, ValueError):
        # The rest of a line that was being written when a run was killed.
        pass
    return StageHistory(output, dict(record["config"]), tuple(metrics))


def find_stages(model_dir: Path) -> tuple[list[StageHistory], Path]:
    """Returns the stages that trained a student, the first one first, and the directory that the first began with.

    `model_dir` may be a stage's output, its `final`, one of its checkpoints, or a student that no stage has trained.
    The chain ends where a directory is gone.
    """
    stages: list[StageHistory] = []
    current = model_dir
    while len(stages) < _MAX_STAGES:
        found = next((stage for path in (current, *current.resolve().parents[:2]) if (stage := read_stage(path))), None)
        if found is None:
            break
        stages.insert(0, found)
        current = found.start_directory / str((found.config.get("model") or {}).get("path"))
    return stages, current


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _name(location: Any) -> str | None:
    return None if location is None else str(location).rstrip("/").rpartition("/")[2]
