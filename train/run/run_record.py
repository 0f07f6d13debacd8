"""Writes the record of a run into its output, and checks a continuation against it.

config.json   the resolved configuration and the data, which a continuation has to match; the newest, if it changed
starts.json   one entry for each start: time, step, seed, ranks, device, versions, data, configuration, changes
"""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from common.config import digest
from common.errors import ConfigError, ProvenanceError, StorageError
from common.shards.manifest import list_differences
from common.storage.files import publish, read_bytes
from train.config import TrainConfig
from train.data.preflight import BadSample
from train.data.sources import ExampleSource, MixtureSource

_PACKAGES = ("decant", "torch", "transformers", "deepspeed", "accelerate", "numpy", "pyarrow")

# Settings that may differ between a run and its continuation, because they do not change the trained weights.
_CHANGEABLE = {
    "run": ("save_steps", "keep_checkpoints", "eval_steps", "log_steps", "resume", "report_to", "max_loss_ratio"),
    "data": ("num_workers", "check", "ids", "preflight", "on_bad_sample", "max_skipped"),
}

# A set of samples that was corrected has about as many as before; one of another size is another set.
_MAX_CHANGE_OF_DATA = 0.05
_MAX_CHANGED_SAMPLES = 10


def _may_grow(before: Any, now: Any) -> bool:
    # No limit, or one epoch, which is the default, is the absence of a number.
    return now is None or (before is not None and now >= before)


# Settings that may change on the way, because an error advises it or because more of the same follows: each with what
# holds of the old and the new value.
_RECORDED: dict[str, Callable[[Any, Any], bool]] = {
    "config.optim.epochs": _may_grow,
    "config.optim.max_steps": _may_grow,
    "config.optim.micro_batch_size": lambda _before, _now: True,
    "config.data.max_tokens": _may_grow,
    "skipped": lambda _before, _now: True,
    "config.data.image_root": lambda _before, _now: True,
    "config.data.follow_symlinks": lambda _before, _now: True,
    "config.data.mix": lambda before, now: _without_image_roots(before) == _without_image_roots(now),
}


@dataclass(frozen=True)
class StartPlace:
    """Step, number of ranks and device of a start."""

    step: int
    num_ranks: int
    device: str


@dataclass(frozen=True)
class RunRecord:
    """Contents of config.json."""

    content: dict[str, Any]

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        source: ExampleSource,
        template_date: datetime.date | None = None,
        skipped: Mapping[str, Sequence[BadSample]] | None = None,
    ) -> "RunRecord":
        """Makes the record of a run.

        `template_date` is the date that the chat template shows; `skipped` has the samples that are left out, by the
        digest of their source.

        Raises:
            ConfigError: a file that the configuration names cannot be read.
        """
        return cls(
            {
                "config": config.model_dump(mode="json"),
                "config_sha256": digest(config),
                "data_sha256": source.sha256,
                "num_samples": len(source),
                "skipped": [vars(bad) for bads in (skipped or {}).values() for bad in bads],
                "template_date": None if template_date is None else template_date.isoformat(),
                "files": {
                    name: _file_digest(path)
                    for name, path in (
                        ("chat_template", config.model.chat_template),
                        ("deepspeed", config.run.deepspeed),
                    )
                    if path is not None
                },
            }
        )

    def write(self, output: Path) -> None:
        """Writes config.json."""
        publish(output / "config.json", json.dumps(self.content, indent=1).encode())

    def check_continuation(self, config: TrainConfig) -> list[str]:
        """Compares with the record in the output; returns the changes that are allowed, one line each.

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
            before, now = _read(path), json.loads(json.dumps(self.content))
            sides = _comparable(before, now), _comparable(now, now)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise StorageError(
                f"{path}: cannot be read ({error}), so it is not known whether this run fits the checkpoints beside "
                "it; put it back, or choose another output"
            ) from error
        differing = _differing_keys(*sides)
        allowed = [key for key in differing if _is_allowed(key, *sides)]
        changes = [line for key in allowed for line in _describe(key, *sides)]
        refused = [line for key in differing if key not in allowed for line in _describe(key, *sides)]
        if refused:
            raise ProvenanceError(
                f"{config.output}: holds a run with other settings\n"
                + "\n".join(f"  {line}" for line in refused)
                + "\nchoose another output, or remove this one"
            )
        return changes


def find_template_date(config: TrainConfig, *, continues: bool) -> datetime.date | None:
    """Returns the date that a chat template is to show: the configured one, or that of the run; None for today.

    Raises:
        StorageError: the record of the run that continues is damaged.
    """
    text = config.model.chat_template_date
    if text is None and continues:
        path = config.output / "config.json"
        try:
            text = _read(path).get("template_date")
        except ValueError:
            # Comparing the record says what is wrong with it.
            return None
    return None if text is None else datetime.date.fromisoformat(text)


def append_start(config: TrainConfig, source: ExampleSource, place: StartPlace, changes: Sequence[str] = ()) -> None:
    """Appends this start to starts.json, with what changed since the last; a damaged file is replaced."""
    path = config.output / "starts.json"
    try:
        starts = json.loads(read_bytes(path))
    except (OSError, ValueError, StorageError):
        starts = []
    sources: Sequence[ExampleSource] = source.sources if isinstance(source, MixtureSource) else (source,)
    starts.append(
        {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "step": place.step,
            "changes": list(changes),
            "seed": config.seed,
            "num_ranks": place.num_ranks,
            "device": place.device,
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


def _read(path: Path) -> dict[str, Any]:
    """Reads a record. Raises ValueError if it is missing or damaged."""
    try:
        record = json.loads(read_bytes(path))
    except OSError as error:
        raise ValueError(error.strerror) from error
    if not isinstance(record, dict):
        raise ValueError("expected an object")  # noqa: TRY004 - the same as for other damage
    return record


def _comparable(record: dict[str, Any], newest: dict[str, Any]) -> dict[str, Any]:
    """Returns what of a record a continuation has to match."""
    record = {key: value for key, value in record.items() if key != "config_sha256"}
    # Validation adds keys that are newer than the run, with their defaults, because the run had their effect. It fails
    # for keys that this version no longer has; they stay and show up as differences.
    with suppress(ValidationError):
        record["config"] = TrainConfig.model_validate(record["config"]).model_dump(mode="json")
    # What earlier versions did not record cannot be compared.
    for key in ("template_date", "files", "skipped"):
        record.setdefault(key, newest[key])
    # An output may be moved or renamed.
    record["config"].pop("output", None)
    for table, keys in _CHANGEABLE.items():
        for key in keys:
            record["config"][table].pop(key, None)
    return record


def _differing_keys(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key in sorted({*before, *now}):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            keys += _differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            keys.append(f"{prefix}{key}")
    return keys


def _is_allowed(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    if key in ("data_sha256", "num_samples"):
        counts = before["num_samples"], now["num_samples"]
        is_same_place = all(
            _at(before, name) == _at(now, name) for name in ("config.data.shards", "config.data.dataset")
        )
        return is_same_place and abs(counts[0] - counts[1]) <= max(
            _MAX_CHANGED_SAMPLES, _MAX_CHANGE_OF_DATA * counts[0]
        )
    return key in _RECORDED and _RECORDED[key](_at(before, key), _at(now, key))


def _describe(key: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if key == "skipped":
        old, new = ({bad["position"] for bad in side[key]} for side in (before, now))
        return [f"skipped: the run left out {len(old)} samples, this start {len(new)}, {len(new - old)} of them others"]
    return list_differences({key: _at(before, key)}, {key: _at(now, key)}, names=("the run", "this start"))


def _at(record: dict[str, Any], key: str) -> Any:
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _without_image_roots(sets: Any) -> Any:
    return [{**each, "image_root": None} for each in sets] if isinstance(sets, list) else sets


def _file_digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error


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
