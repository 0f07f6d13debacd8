"""A run continues from its newest complete checkpoint."""

import json
from pathlib import Path

import pytest

from train.run.checkpoint import MARKER, Checkpoint, find_latest_complete, mark_complete


def make_checkpoint(output: Path, step: int, num_ranks: int = 1) -> Path:
    checkpoint = output / "checkpoints" / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"1234")
    mark_complete(checkpoint, step, num_ranks=num_ranks)
    return checkpoint


def test_a_damaged_newest_checkpoint_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newer = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 10, num_ranks=4)
    assert find_latest_complete(tmp_path) == Checkpoint(newer, 10, 4)
    (newer / "weights").write_bytes(b"123")
    with caplog.at_level("WARNING"):
        assert find_latest_complete(tmp_path) == Checkpoint(older, 2, 1)
    assert "weights has 3 bytes, 4 were written" in caplog.text
    (older / MARKER).unlink()
    assert find_latest_complete(tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"step": 3}, "holds step 3, not the one of its name"),
        ({"num_ranks": 0}, "does not say how many ranks wrote it"),
        ({"files": {"gone": 1}}, "is incomplete"),
        ({"files": None}, "is incomplete"),
    ],
)
def test_a_marker_that_does_not_fit_its_checkpoint_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, object], problem: str
) -> None:
    marker = make_checkpoint(tmp_path, 2) / MARKER
    marker.write_text(json.dumps(json.loads(marker.read_text()) | changes))
    with caplog.at_level("WARNING"):
        assert find_latest_complete(tmp_path) is None
    assert problem in caplog.text
