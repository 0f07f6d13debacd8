"""What a run was, in its output: for people, and for the start that continues it.

config.json   the resolved configuration and the data; a continuation has to fit it
starts.json   one entry a start: when, from which step, on what, with which versions, data and configuration
"""

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from common.config import digest
from common.errors import ConfigError, ProvenanceError, StorageError
from common.shards.manifest import list_differences
from common.storage.files import publish
from train.config import TrainConfig
from train.data.sources import ExampleSource, MixtureSource

_PACKAGES = ("decant", "torch", "transformers", "deepspeed", "accelerate", "numpy", "pyarrow")

# May change between a run and its continuation: they do not change what is computed.
_FREE = {
    "run": ("save_steps", "keep_checkpoints", "eval_steps", "log_steps", "resume", "report_to", "max_loss_ratio"),
    "data": ("num_workers",),
}


def check_continuation(config: TrainConfig, source: ExampleSource) -> None:
    """Compares the output's own record with what is asked for now.

    Raises:
        ConfigError: run.resume forbids to continue.
        ProvenanceError: other settings or other data; lists all of them.
        StorageError: the record is damaged.
    """
    if config.run.resume == "never":
        raise ConfigError(
            f'{config.output}: holds checkpoints of an earlier run, and run.resume is "never"; choose another '
            "output, or remove this one"
        )
    path = config.output / "config.json"
    try:
        before, now = json.loads(path.read_text("utf-8")), _record(config, source)
        # A key that is newer than the run had its default's effect; one that is older than this version differs.
        with suppress(ValidationError):
            before["config"] = TrainConfig.model_validate(before["config"]).model_dump(mode="json")
        for side in (before, now):
            side.pop("config_sha256", None)
            for table, keys in _FREE.items():
                for key in keys:
                    side["config"][table].pop(key, None)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise StorageError(
            f"{path}: cannot be read ({error}), so it is not known whether this run fits the checkpoints beside it; "
            "put it back, or choose another output"
        ) from error
    if differences := list_differences(before, now):
        raise ProvenanceError(
            f"{config.output}: holds a run with other settings\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nchoose another output, or remove this one"
        )


def write_config(config: TrainConfig, source: ExampleSource) -> None:
    """Writes config.json of a new run."""
    publish(config.output / "config.json", json.dumps(_record(config, source), indent=1).encode())


def append_start(config: TrainConfig, source: ExampleSource, *, step: int, num_ranks: int, device: str) -> None:
    """Adds this start to starts.json, whose earlier entries stay; a damaged file is begun again."""
    path = config.output / "starts.json"
    try:
        starts = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        starts = []
    sources: Sequence[ExampleSource] = source.sources if isinstance(source, MixtureSource) else (source,)
    starts.append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "seed": config.seed,
            "num_ranks": num_ranks,
            "device": device,
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
            "git_commit": _git_commit(Path(__file__).resolve().parents[2]),
            # Of an output of precompute-logits its manifest's, of a dataset file its own.
            "data": [
                {"location": str(each.location), "sha256": one.sha256, "num_samples": len(one)}
                for each, one in zip(config.data.sets, sources, strict=True)
            ],
            "config": config.model_dump(mode="json"),
            "config_sha256": digest(config),
        }
    )
    publish(path, json.dumps(starts, indent=1).encode())


def device_name(device: torch.device) -> str:
    """What the ranks compute on, as its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type


def _record(config: TrainConfig, source: ExampleSource) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"),
        "config_sha256": digest(config),
        "data_sha256": source.sha256,
        "num_samples": len(source),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit(root: Path) -> str | None:
    """The commit of a checkout, with -dirty where files were changed; None for an installed package."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
