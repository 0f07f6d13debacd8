"""A run continues from its newest complete checkpoint, and every byte of it is as it was written."""

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ShardError, StorageError
from train.run.checkpoint import MARKER, Checkpoint, check_undamaged, find_latest_complete, mark_complete, remove_old

# Names as DeepSpeed and the Trainer choose them, and one directory deeper.
FILES = {
    "latest": b"global_step2",
    "trainer_state.json": b'{"global_step": 2}',
    "rng_state_0.pth": bytes(range(256)),
    "global_step2/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"state" * 1000,
    "global_step2/deep/er": b"\0",
    "empty": b"",
}


def make_checkpoint(output: Path, step: int, num_ranks: int = 1) -> Path:
    checkpoint = output / "checkpoints" / f"checkpoint-{step}"
    for name, content in FILES.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content)
    mark_complete(checkpoint, step, num_ranks=num_ranks)
    return checkpoint


def rewrite_marker(checkpoint: Path, changes: dict[str, Any]) -> None:
    """Changes a marker and gives it the SHA-256 of the changed one."""
    content = json.loads((checkpoint / MARKER).read_text()) | changes
    del content["sha256"]
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (checkpoint / MARKER).write_text(json.dumps({**content, "sha256": sha256}))


def test_a_damaged_newest_checkpoint_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_latest_complete(tmp_path) is None
    older, newer = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 10, num_ranks=4)
    assert find_latest_complete(tmp_path) == Checkpoint(newer, 10, 4)
    (newer / "latest").write_bytes(b"123")
    assert find_latest_complete(tmp_path) == Checkpoint(older, 2, 1)
    assert f"{newer}: latest has 3 bytes, 12 were written" in caplog.text


def test_a_run_with_damaged_checkpoints_alone_is_not_begun_again(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 2)
    (checkpoint / MARKER).unlink()
    with pytest.raises(StorageError, match=r"holds 1 checkpoint\(s\), and none of them is whole"):
        find_latest_complete(tmp_path)


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
def test_one_flipped_bit_in_any_file_is_found_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    older, newer = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 10)
    flipped = bytearray(FILES[name])
    flipped[len(flipped) // 2] ^= 4
    (newer / name).write_bytes(flipped)
    assert find_latest_complete(tmp_path) == Checkpoint(older, 2, 1)
    assert f"{newer}: {name}: damaged, the SHA-256" in caplog.text
    assert caplog.text.count("passed over") == 1


def test_one_flipped_bit_of_the_marker_never_changes_what_is_chosen(tmp_path: Path) -> None:
    older, newer = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 10, num_ranks=2)
    marker = (newer / MARKER).read_bytes()
    passed_over = 0
    places = range(0, len(marker), 11)
    for place in places:
        flipped = bytearray(marker)
        flipped[place] ^= 1 << place % 8
        (newer / MARKER).write_bytes(flipped)
        found = find_latest_complete(tmp_path)
        # A space between two keys may become another one, which means the same.
        assert found in (Checkpoint(newer, 10, 2), Checkpoint(older, 2, 1))
        passed_over += found == Checkpoint(older, 2, 1)
    assert passed_over > 0.8 * len(places)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"step": 3}, "holds step 3, not the one of its name"),
        ({"files": {"gone": {"num_bytes": 1}}}, "gone"),
        ({"files": {"latest": {}}}, "num_bytes"),
        ({"files": None}, "NoneType"),
    ],
)
def test_a_marker_that_does_not_fit_its_checkpoint_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, object], problem: str
) -> None:
    rewrite_marker(make_checkpoint(tmp_path, 2), changes)
    with pytest.raises(StorageError, match="none of them is whole"):
        find_latest_complete(tmp_path)
    assert problem in caplog.text


@pytest.mark.parametrize(
    ("marker", "problem"),
    [
        ('{"step": 2, "num_ranks": 1, "files": {"latest": 12}}', "of an earlier version: it has no SHA-256"),
        ("[]", "complete.json is damaged (expected an object)"),
        ("{", "complete.json is damaged"),
    ],
)
def test_a_marker_without_digests_is_not_trusted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, marker: str, problem: str
) -> None:
    older, newer = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    (newer / MARKER).write_text(marker)
    assert find_latest_complete(tmp_path) == Checkpoint(older, 1, 1)
    assert problem in caplog.text


def test_an_unreadable_file_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)

    def fail(path: Path) -> str:
        if path == newer / "latest":
            raise ShardError(f"{path}: cannot be read (Input/output error)")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr("train.run.checkpoint.file_sha256", fail)
    assert find_latest_complete(tmp_path) == Checkpoint(older, 1, 1)
    assert f"{newer / 'latest'}: cannot be read (Input/output error)" in caplog.text
    (newer / MARKER).unlink()
    with pytest.raises(StorageError, match="cannot be read back after it was written"):
        mark_complete(newer, 2, num_ranks=1)
    assert not (newer / MARKER).exists()


def test_checkpoints_that_cannot_be_listed_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> list[str]:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.listdir", fail)
    with pytest.raises(StorageError, match=r"cannot be listed \(Input/output error\)"):
        find_latest_complete(tmp_path)


def test_a_damaged_later_checkpoint_does_not_push_out_a_whole_one(tmp_path: Path) -> None:
    for step in (2, 4, 7, 10):
        make_checkpoint(tmp_path, step)
    # The run continued from step 4, because 10 is damaged, and was stopped at 7.
    remove_old(tmp_path / "checkpoints", step=7, num_kept=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-7"]


def test_a_damaged_checkpoint_is_not_taken_as_a_model(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 2).rename(tmp_path / "elsewhere")
    check_undamaged(checkpoint)
    check_undamaged(tmp_path)
    check_undamaged(tmp_path / "none")
    (checkpoint / "latest").write_bytes(b"global_step3")
    with pytest.raises(StorageError, match=r"elsewhere: latest: damaged, .*; take another checkpoint"):
        check_undamaged(checkpoint)
