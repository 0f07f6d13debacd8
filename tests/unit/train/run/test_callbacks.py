"""The metrics file of a run that is continued."""

import json
import math
from pathlib import Path

from transformers import TrainerControl, TrainerState, TrainingArguments

from train.run.callbacks import MetricsWriter


def write_logs(path: Path, steps: list[int], start_step: int) -> list[int]:
    """Logs some steps of a run that starts at `start_step`, and returns the steps in its file."""
    writer, control = MetricsWriter(path), TrainerControl()
    args = TrainingArguments(report_to=[], use_cpu=True)
    writer.on_train_begin(args, TrainerState(global_step=start_step), control)
    for step in steps:
        writer.on_log(args, TrainerState(global_step=step), control, {"loss": 1.0, "grad_norm": math.nan})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(record.keys() == {"step", "loss"} for record in records), "only finite numbers are written"
    return [record["step"] for record in records]


def test_a_continued_run_replaces_the_lines_after_its_start_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert write_logs(path, [1, 2, 3], 0) == [1, 2, 3]
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert write_logs(path, [3, 4], 2) == [1, 2, 3, 4]


def test_a_new_run_starts_with_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_logs(path, [1, 2], 0)
    assert write_logs(path, [1], 0) == [1]
