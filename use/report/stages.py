"""Selects from the outputs of stages what a report shows: tables and curves, nothing of the screen."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from train.run.history import StageHistory, find_stages

# Metrics of one chart, each with what is drawn: a name, and beside it its value over held-out samples (eval_).
_CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("divergence from the teacher, nats a token", ("distillation",)),
    ("cross-entropy, nats a token", ("cross_entropy",)),
    ("preference loss", ("preference",)),
    ("rewards", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("share of pairs ranked rightly", ("rewards/accuracies",)),
    ("router balance; top_k where even", ("balance",)),
    ("load of experts; 1 is even", ("router/largest_load", "router/smallest_load")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
    ("tokens a second", ("tokens_per_s",)),
    ("share of time waiting for data", ("wait_fraction",)),
)

# A logarithmic axis helps where values span this factor, and all are positive.
_LOG_RATIO = 20.0

# Settings that differ between any two stages and say nothing.
_NOT_COMPARED = ("output", "stage")


@dataclass(frozen=True)
class Chart:
    """Curves over steps; `is_log` asks for a logarithmic axis of values."""

    title: str
    curves: dict[str, list[tuple[float, float]]]
    is_log: bool


def collect_stages(runs: Sequence[Path]) -> list[StageHistory]:
    """Returns the stages to report: of a single run also those before it, the first one first; of several these alone.

    Raises:
        ConfigError: a directory is no output of a stage.
    """
    chains = [find_stages(run)[0] for run in runs]
    for run, chain in zip(runs, chains, strict=True):
        if not chain:
            raise ConfigError(
                f"{run}: is no output of decant train; expected a directory with its config.json and metrics.jsonl"
            )
    return chains[0] if len(runs) == 1 else [chain[-1] for chain in chains]


def charts_of(stage: StageHistory) -> list[Chart]:
    """Returns the charts of a stage, without those that have no value."""
    charts = []
    for title, names in _CHARTS:
        curves = {
            name: points
            for each in names
            for name in (each, f"eval_{each}")
            if (points := _points(stage.metrics, name))
        }
        values = [y for points in curves.values() for _, y in points]
        if values:
            is_log = min(values) > 0 and max(values) > _LOG_RATIO * min(values)
            charts.append(Chart(title, curves, is_log))
    return charts


def summary_rows(stages: Sequence[StageHistory]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and a row for each stage: what it optimised, on what, how long."""
    header = ["stage", "data", "losses", "steps", "batch", "rate", "precision", "time"]
    rows = []
    for stage in stages:
        loss, optim, run = (stage.config.get(name) or {} for name in ("loss", "optim", "run"))
        terms = ("distillation", "cross_entropy", "preference", "balance", "router_z")
        weights = ", ".join(f"{name} {loss[name]:g}" for name in terms if loss.get(name))
        seconds = stage.last_metrics.get("train_runtime")
        rows.append(
            [
                stage.name if stage.name == stage.output.name else f"{stage.name} ({stage.output.name})",
                ", ".join(stage.data),
                weights,
                f"{stage.num_steps:,}",
                str(optim.get("global_batch_size")),
                f"{optim.get('learning_rate'):g}",
                f"{run.get('precision')}, ZeRO {run.get('zero_stage')}",
                "unknown" if seconds is None else _format_seconds(seconds),
            ]
        )
    return header, rows


def metric_rows(stages: Sequence[StageHistory]) -> tuple[list[str], list[list[str]]]:
    """Returns a table of the last values: a row for each metric of held-out samples, a column for each stage.

    Where a stage has held nothing out, its metrics of training stand in rows of their own.
    """
    last = [stage.last_metrics for stage in stages]
    terms = [name for _, names in _CHARTS[:6] for name in names]
    names = [*(f"eval_{name}" for name in terms), *terms]
    rows = [
        [name, *(f"{values[name]:.4g}" if name in values else "" for values in last)]
        for name in names
        if any(name in values for values in last)
    ]
    return ["last value", *(stage.name for stage in stages)], rows


def difference_rows(stages: Sequence[StageHistory]) -> tuple[list[str], list[list[str]]]:
    """Returns the settings that are not the same in all stages."""
    flat = [_flatten(stage.config) for stage in stages]
    keys = sorted({key for settings in flat for key in settings if key not in _NOT_COMPARED})
    rows = [
        [key, *(_format_setting(settings.get(key)) for settings in flat)]
        for key in keys
        if len({_format_setting(settings.get(key)) for settings in flat}) > 1
    ]
    return ["setting", *(stage.name for stage in stages)], rows


def _points(metrics: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Returns (step, value) of a metric. A step that was trained again after a stop counts as it was the last time."""
    found: dict[float, float] = {}
    for line in metrics:
        if isinstance(value := line.get(name), int | float) and isinstance(step := line.get("step"), int):
            found[float(step)] = float(value)
    return sorted(found.items())


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _format_setting(value: Any) -> str:
    return "" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _format_seconds(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
