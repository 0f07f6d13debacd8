"""Prints the demo's table and draws its picture: `python -m demo.report DIRECTORY`."""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from common.console import echo, plain_text
from common.errors import DecantError
from demo.evaluate import Evaluation, evaluate

# Row of the table and directory of its model; a demo without a sparse stage lacks the sparse rows.
MODELS = {
    "teacher": "teacher",
    "student, init": "runs/init/final",
    "CE alone, dense": "runs/ce-dense/final",
    "distilled, dense": "runs/dense-to-dense/final",
    "CE alone, sparse": "runs/ce-sparse/final",
    "distilled, sparse": "runs/dense-to-sparse/final",
    "preference, exported": "student",
}

# Each distilled row, and the row with the same steps, data, order and rate but no teacher.
PAIRS = {
    "distilled, dense": "CE alone, dense",
    "distilled, sparse": "CE alone, sparse",
}


def report(directory: Path) -> dict[str, Evaluation]:
    """Evaluates every model on held-out images, prints the table, writes report.json and losses.png.

    Raises:
        DecantError: the exported student's answers differ between vLLM and transformers.
    """
    rows = {
        name: evaluate(directory / path, directory / "data/test_questions.jsonl", directory / "scores/test")
        for name, path in MODELS.items()
        if (directory / path).exists()
    }
    console = Console()
    console.print(make_table(rows))
    for distilled, alone in ((d, a) for d, a in PAIRS.items() if d in rows):
        console.print(describe_comparison(distilled, rows[distilled], rows[alone]))
    under_vllm = json.loads((directory / "answers.json").read_text("utf-8"))
    under_transformers = rows["preference, exported"].answers[: len(under_vllm)]
    same = sum(a == b for a, b in zip(under_vllm, under_transformers, strict=True))
    console.print(f"exported student: {same} of {len(under_vllm)} greedy answers are the same in vLLM and transformers")
    plot_losses(directory, directory / "losses.png")
    console.print(plain_text(f"loss curves: {directory / 'losses.png'}"))
    body = {
        "rows": {name: {k: v for k, v in asdict(row).items() if k != "answers"} for name, row in rows.items()},
        "same_answers_in_vllm": same,
        "answers_compared": len(under_vllm),
    }
    (directory / "report.json").write_text(json.dumps(body, indent=1) + "\n", "utf-8")
    if same != len(under_vllm):
        raise DecantError(f"{directory / 'student'}: vLLM and transformers disagree; the export is not faithful")
    return rows


def plot_losses(directory: Path, out: Path) -> None:
    """Plots the loss of each stage over its steps; stages with and without a teacher share a panel."""
    panels = {
        "teacher: cross-entropy": {"teacher": "cross_entropy"},
        "student: initialisation": {"init": "cross_entropy"},
        "dense-to-dense: response NLL": {"dense-to-dense": "cross_entropy", "ce-dense": "cross_entropy"},
        "dense-to-dense: KL to the teacher": {"dense-to-dense": "distillation"},
        "dense-to-sparse: response NLL": {"dense-to-sparse": "cross_entropy", "ce-sparse": "cross_entropy"},
        "preference: DPO loss": {"preference": "preference"},
    }
    panels = {
        title: curves for title, curves in panels.items() if all((directory / "runs" / run).exists() for run in curves)
    }
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for run, key in curves.items():
            points = [(m["step"], m[key]) for m in _metrics(directory / "runs" / run) if key in m]
            label = "cross-entropy alone" if run.startswith("ce-") else "distilled" if len(curves) > 1 else run
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
        axis.set(title=title, xlabel="step", ylabel="nats a token" if "DPO" not in title else "nats a pair")
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend()
        if "preference" not in title:
            axis.set_yscale("log")
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def make_table(rows: dict[str, Evaluation]) -> Table:
    """Returns the table of all models' metrics."""
    table = Table(title="Held-out images", title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in ("accuracy", "wrong digit", "NLL", "KL to teacher"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row.accuracy:.1%}",
            f"{row.hallucination_rate:.1%}",
            f"{row.nll:.4f}",
            # Adding 0.0 turns a rounded -0.0 into 0.0.
            f"{round(row.kl_to_teacher, 4) + 0.0:.4f}",
        )
    return table


def describe_comparison(name: str, distilled: Evaluation, alone: Evaluation) -> str:
    """Returns a line with the differences between distillation and cross-entropy alone, losses as well as gains."""
    parts = [
        f"accuracy {distilled.accuracy - alone.accuracy:+.1%}",
        f"NLL {distilled.nll - alone.nll:+.4f}",
        f"KL {distilled.kl_to_teacher - alone.kl_to_teacher:+.4f}",
    ]
    return f"{name} - CE alone, equal steps and data: {', '.join(parts)}"


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    disable_progress_bar()
    try:
        report(Path(sys.argv[1]))
    except DecantError as error:
        echo(f"error: {error}", err=True)
        raise SystemExit(1) from error
