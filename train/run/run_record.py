"""Writes the record of a run into its output, and checks a continuation against it.

config.json   the resolved configuration and the data, which a continuation has to match
starts.json   one entry for each start: time, step, seed, ranks, device, versions, data and configuration
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

# Settings that may differ between a run and its continuation, because they do not change the trained weights.
_CHANGEABLE = {
    "run": ("save_steps", "keep_checkpoints", "eval_steps", "log_steps", "resume", "report_to", "max_loss_ratio"),
    "data": ("num_workers", "check"),
}


def check_continuation(config: TrainConfig, source: ExampleSource) -> None:
    """Checks that a configuration and its data match those recorded in the output.

    Raises:
        ConfigError: run.resume forbids to continue.
        ProvenanceError: settings or data differ; lists all differences.
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
        # Validation adds keys that are newer than the run, with their defaults, because the run had their effect. It
        # fails for keys that this version no longer has; they stay and show up as differences.
        with suppress(ValidationError):
            before["config"] = TrainConfig.model_validate(before["config"]).model_dump(mode="json")
        for side in (before, now):
            side.pop("config_sha256", None)
            # An output may be moved or renamed.
            side["config"].pop("output", None)
            for table, keys in _CHANGEABLE.items():
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
    """Writes config.json for a new run."""
    publish(config.output / "config.json", json.dumps(_record(config, source), indent=1).encode())


def append_start(config: TrainConfig, source: ExampleSource, *, step: int, num_ranks: int, device: str) -> None:
    """Appends this start to starts.json; a damaged file is replaced."""
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
            # The digest of an output of precompute-logits is its manifest's.
            "data": [
                {"location": str(member.location), "sha256": opened.sha256, "num_samples": len(opened)}
                for member, opened in zip(config.data.sets, sources, strict=True)
            ],
            "config": config.model_dump(mode="json"),
            "config_sha256": digest(config),
        }
    )
    publish(path, json.dumps(starts, indent=1).encode())


def device_name(device: torch.device) -> str:
    """Returns the GPU's product name, or the processor's where no GPU is used."""
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
    """Returns the commit of a checkout, with -dirty if files were changed; None for an installed package."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
