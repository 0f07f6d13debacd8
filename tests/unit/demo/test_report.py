"""The demo's table and picture from made-up runs."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from demo.evaluate import Evaluation
from demo.report import describe_comparison, make_table, plot_losses


@pytest.mark.slow
def test_the_picture_shows_every_stage(tmp_path: Path) -> None:
    for run in ("teacher", "init", "dense-to-dense", "ce-dense", "dense-to-sparse", "ce-sparse", "preference"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        lines = [{"step": s, "cross_entropy": 1 / s, "distillation": 2 / s, "preference": 0.7 / s} for s in range(1, 9)]
        # Validation and the end of a run write lines without these terms.
        text = "\n".join(json.dumps(line) for line in [*lines, {"step": 8, "train_runtime": 3.0}])
        (tmp_path / "runs" / run / "metrics.jsonl").write_text(text + "\n")
    plot_losses(tmp_path, tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.size[0] > 1000
        assert len(set(picture.convert("RGB").resize((300, 160)).getdata())) > 20


def test_a_comparison_shows_losses_as_well_as_gains() -> None:
    distilled = Evaluation(accuracy=0.9, hallucination_rate=0.1, nll=0.3, kl_to_teacher=0.05, answers=())
    alone = Evaluation(accuracy=0.95, hallucination_rate=0.05, nll=0.25, kl_to_teacher=0.08, answers=())
    line = describe_comparison("distilled, dense", distilled, alone)
    assert "accuracy -5.0%" in line
    assert "NLL +0.0500" in line
    assert "KL -0.0300" in line


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    row = Evaluation(accuracy=1.0, hallucination_rate=0.123, nll=12.3456, kl_to_teacher=12.3456, answers=())
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(make_table({"preference, exported": row}))
    text = console.export_text()
    assert "preference, exported" in text
    assert "12.3456" in text
    assert "…" not in text
