"""A stage looks at its samples before the first step, on one rank and on two."""

import json
from pathlib import Path

import pytest

from tests.support.models import tiny_llava
from tests.support.training import launch, stage, write_mixed_dataset

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_bad_samples_stop_a_stage_before_its_first_step_or_are_skipped(tmp_path: Path, num_ranks: int) -> None:
    write_mixed_dataset(tmp_path / "data", 24)
    path = tmp_path / "data" / "kd.json"
    records = json.loads(path.read_text())
    bad = [number for number, record in enumerate(records) if record.get("image")][-1]
    records[bad]["image"] = "gone.png"
    path.write_text(json.dumps(records))
    tiny_llava(tmp_path / "student", num_layers=1)
    data = {"dataset": str(path), "image_root": str(tmp_path / "data"), "num_workers": 1}
    settings = stage(
        tmp_path / "run",
        tmp_path / "student",
        trainable=["adapter"],
        data=data,
        loss={"cross_entropy": 1.0},
        optim={"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 2},
    )
    for code, output in launch([settings], tmp_path / "scratch", num_ranks, timeout_s=120):
        assert code == 1
        assert "gone.png does not exist" in output, output[-3000:]
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"
    settings["data"] |= {"on_bad_sample": "skip", "max_skipped": 0.01}
    for code, output in launch([settings], tmp_path / "scratch", num_ranks, timeout_s=120):
        assert code == 1
        assert "max_skipped = 0.01 allows 1%" in output, output[-3000:]
    settings["data"] |= {"max_skipped": 0.05}
    for code, output in launch([settings], tmp_path / "scratch", num_ranks, timeout_s=120):
        assert code == 0, output[-3000:]
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert [entry["position"] for entry in record["skipped"]] == [bad]
    assert (tmp_path / "run" / "final" / "config.json").is_file()
    # The corrected sample, and more steps, are a continuation; the record says so.
    records[bad].pop("image")
    records[bad]["conversations"][0]["value"] = "Which digit?"
    path.write_text(json.dumps(records))
    settings["optim"] |= {"max_steps": 3}
    for code, output in launch([settings], tmp_path / "scratch", num_ranks, timeout_s=120):
        assert code == 0, output[-3000:]
    starts = json.loads((tmp_path / "run" / "starts.json").read_text())
    assert starts[-1]["step"] == 2
    changed = " ".join(starts[-1]["changes"])
    assert all(name in changed for name in ("data_sha256", "max_steps", "skipped")), changed
