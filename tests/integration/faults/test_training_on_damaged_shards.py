"""A damaged or missing shard stops every rank, and every rank names it."""

from pathlib import Path

import pytest

from common.shards.manifest import shard_path
from tests.support.models import tiny_llava
from tests.support.training import LiveTeacher, launch, stage, write_mixed_dataset


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "num_ranks", "num_workers"), [("damaged", 2, 1), ("removed", 1, 0)])
def test_a_fault_found_while_training_stops_all_ranks_and_names_the_file(
    tmp_path: Path, fault: str, num_ranks: int, num_workers: int
) -> None:
    dataset = write_mixed_dataset(tmp_path / "data", 48)
    student = tiny_llava(tmp_path / "student", num_layers=1)
    scores = LiveTeacher(student, dataset.parent).write_output(tmp_path / "scores", dataset, "kd", top_k=4)
    bad = shard_path(scores, 2)
    if fault == "removed":
        bad.unlink()
    else:
        data = bytearray(bad.read_bytes())
        data[len(data) // 3] ^= 1
        bad.write_bytes(bytes(data))
    config = stage(
        tmp_path / "run",
        student,
        trainable=["adapter", "language_model"],
        # Samples are read in the order on disk, so that some steps succeed before one rank reads the bad shard.
        data={
            "shards": str(scores),
            "image_root": str(dataset.parent),
            "num_workers": num_workers,
            "shuffle_window": 1,
            "preflight": False,
        },
        loss={"distillation": 1.0},
        optim={"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 12},
    )
    for code, output in launch([config], tmp_path / "scratch", num_ranks, timeout_s=120):
        assert code == 1
        errors = [line for line in output.splitlines() if "common.errors." in line]
        found = {"damaged": "has SHA-256", "removed": "cannot be read"}[fault]
        assert f"shard-00002.parquet: {found}" in errors[-1], output[-3000:]
    assert (tmp_path / "run" / "metrics.jsonl").read_text(), "it was meant to train until then"
