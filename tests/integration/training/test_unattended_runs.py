"""Runs that nobody watches: killed at any moment, stopped by a signal, diverged because of a sample."""

import json
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.data.chat_encoding import ChatEncoder
from tests.support.forked import Ranks, steps_logged
from tests.support.models import tiny_llava
from tests.support.training import ROOT, environment, losses, stage, weights, write_mixed_dataset
from train.run.checkpoint import find_latest_complete

pytestmark = pytest.mark.slow

NUM_STEPS = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unattended")
    write_mixed_dataset(root / "data", 36)
    # With dropout the weights depend on every random state, which a checkpoint therefore has to contain.
    tiny_llava(root / "student", num_layers=2, attention_dropout=0.2)
    return root


def config(root: Path, name: str, **changes: dict[str, Any]) -> dict[str, Any]:
    return stage(
        root / name,
        root / "student",
        trainable=["adapter", "language_model"],
        data={"dataset": str(root / "data" / "kd.json"), "image_root": str(root / "data"), **changes.get("data", {})},
        loss={"cross_entropy": 1.0},
        optim={"max_steps": NUM_STEPS, "scheduler": "cosine", **changes.get("optim", {})},
        run={"zero_stage": 2, "save_steps": 5, **changes.get("run", {})},
    )


def metrics_inode(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else 0


def test_a_run_interrupted_at_ten_random_moments_ends_where_the_uninterrupted_one_ends(root: Path) -> None:
    whole = Ranks(config(root, "whole"), root / "whole.log")
    assert whole.wait() == [0], whole.output[-3000:]

    settings, output, log = config(root, "interrupted"), root / "interrupted", root / "interrupted.log"
    draw = random.Random(0)
    signals = [signal.SIGTERM, signal.SIGKILL] * 5
    draw.shuffle(signals)
    for number, signum in enumerate(signals):
        newest = find_latest_complete(output)
        start_step = newest.step if newest else 0
        # A few steps, so that all ten interruptions happen before the end; then any moment of a step or a save.
        wanted_step = start_step + draw.randint(1, 5)
        before = metrics_inode(output)
        run = Ranks(settings, log)

        def has_reached_step(before: int = before, wanted_step: int = wanted_step) -> bool:
            # A start first rewrites the file, so an unchanged inode means that the old lines are still there.
            return metrics_inode(output) != before and max(steps_logged(output), default=0) >= wanted_step

        assert run.wait_until(has_reached_step), run.output[-3000:]
        time.sleep(draw.uniform(0.0, 0.05))
        run.signal(signum)
        assert run.wait() == [143 if signum == signal.SIGTERM else -signal.SIGKILL], run.output[-3000:]
        newest = find_latest_complete(output)
        if signum == signal.SIGTERM:
            assert newest is not None and newest.step == steps_logged(output)[-1]
        assert not (output / "final").exists(), f"interruption {number + 1} came after the end"
    last = Ranks(settings, log)
    assert last.wait() == [0], last.output[-3000:]

    # The samples of a step are fixed, so each step once and in order means each sample once per epoch.
    assert steps_logged(output) == list(range(1, NUM_STEPS + 1))
    assert losses(output) == losses(root / "whole")
    expected, found = weights(root / "whole"), weights(output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    starts = json.loads((output / "starts.json").read_text())
    assert len(starts) == 11
    assert [start["step"] for start in starts] == sorted(start["step"] for start in starts)


def test_a_launcher_that_terminates_the_workers_too_still_gets_a_checkpoint_and_code_143(root: Path) -> None:
    output, file = root / "tree", root / "tree.toml"
    settings = config(root, "tree", data={"num_workers": 1}, optim={"max_steps": 400}, run={"save_steps": 1000})
    text = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not isinstance(value, dict)]
    for name, table in settings.items():
        if isinstance(table, dict):
            text += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    file.write_text("\n".join(text))
    command = [sys.executable, "-m", "cli", "train", "--config", str(file), "--resume", "auto"]
    with (root / "tree.log").open("wb") as log:
        rank = psutil.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)
    try:
        while len(steps_logged(output)) < 3:
            assert rank.poll() is None, (root / "tree.log").read_text()
            time.sleep(0.01)
        workers = rank.children(recursive=True)
        assert workers
        for process in [*workers, rank]:
            process.terminate()
        assert rank.wait(60) == 143, (root / "tree.log").read_text()
    finally:
        if rank.is_running():
            rank.kill()
    checkpoint = find_latest_complete(output)
    assert checkpoint is not None
    assert checkpoint.step == steps_logged(output)[-1] < 400
    assert "stopped by SIGTERM" in (root / "tree.log").read_text()
    assert all(not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE for worker in workers)


STUB = """
import contextvars, json
config, context_vars = {}, type("V", (), {"current_space_id": contextvars.ContextVar("space", default=None)})
class Config(dict):
    def update(self, values, **_): super().update(values)
config = Config()
def write(record):
    with open(PATH, "a") as file: file.write(json.dumps(record) + chr(10))
def init(**settings): write({"init": settings["space_id"]})
def log(values): write(values)
def finish(): write({"finished": True})
"""


def test_a_metrics_package_gets_what_the_metrics_file_gets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "stub").mkdir()
    (root / "stub" / "trackio.py").write_text(f"PATH = {str(root / 'stub' / 'log')!r}{STUB}")
    monkeypatch.syspath_prepend(root / "stub")
    settings = config(root, "reported", optim={"max_steps": 3}, run={"report_to": ["trackio"]})
    run = Ranks(settings, root / "reported.log")
    assert run.wait() == [0], run.output[-3000:]
    records = [json.loads(line) for line in (root / "stub" / "log").read_text().splitlines()]
    assert records[0] == {"init": None}, "by default nothing is sent to a server"
    logged = [record["train/loss"] for record in records if "train/loss" in record]
    assert logged == losses(root / "reported")
    assert {"finished": True} in records
    assert not (root / "reported" / "tensorboard").exists()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_sample_whose_loss_is_nan_stops_all_ranks_and_is_named(root: Path, zero: int) -> None:
    with_nan = root / f"with_nan-{zero}"
    student = tiny_llava(with_nan / "student", num_layers=1)
    encoder = ChatEncoder.load(student)
    # Only one sample has this token, whose embedding becomes NaN.
    (token,) = encoder.tokenizer.encode("~", add_special_tokens=False)
    tensors = load_file(student / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("embed_tokens.weight")]
    tensors[name][token] = torch.nan
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    records = json.loads((root / "data" / "kd.json").read_text())
    records[22]["conversations"][0]["value"] += " ~"
    (with_nan / "data.json").write_text(json.dumps(records))
    output = with_nan / "run"
    settings = stage(
        output,
        student,
        trainable=["adapter", "language_model"],
        data={"dataset": str(with_nan / "data.json"), "image_root": str(root / "data"), "shuffle_window": 1},
        loss={"cross_entropy": 1.0},
        optim={"max_steps": 20},
        run={"zero_stage": zero, "save_steps": 1, "max_loss_ratio": 0.0},
    )
    run = Ranks(settings, with_nan / "log", num_ranks=2)
    assert run.wait() == [1, 1], run.output[-3000:]
    errors = [line for line in run.output.splitlines() if line.startswith("train.run.divergence.DivergedError")]
    assert len(errors) == 2
    assert len(set(errors)) == 1
    record = json.loads((output / "broken-step.json").read_text())
    step = record["step"]
    assert f"step {step}: the loss is nan" in errors[0]
    diverged = [m for m in record["micro_batches"] if m["loss"] == "nan"]
    assert len(diverged) == 1 and "s22" in diverged[0]["sample_ids"] and len(diverged[0]["sample_ids"]) == 2
    assert "Its samples: " + ", ".join(map(repr, diverged[0]["sample_ids"])) + " (" in errors[0]
    assert sum(len(m["sample_ids"]) for m in record["micro_batches"]) == 8, "all samples of the global step"
    checkpoint = find_latest_complete(output)
    assert (checkpoint.step if checkpoint else 0) == step - 1, "the step before is saved, the diverged one is not"
    assert not (output / "checkpoints" / f"checkpoint-{step}").exists()
