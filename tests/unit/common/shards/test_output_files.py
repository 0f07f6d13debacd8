"""A path that holds no output is an error of its own, not a damaged output."""

import json
import sys
from pathlib import Path

import pytest
from upath import UPath

import cli
from common.errors import ShardError
from common.shards.manifest import MANIFEST_NAME, receipt_path, shard_path
from common.shards.output_files import list_output_files
from precompute.inspection.collect import open_target
from precompute.verify.features import verify_features
from precompute.verify.logits import verify_logits
from tests.support.inspect_outputs import write_output


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Runs the program; returns its exit code and what it prints to stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["decant", *arguments])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, printed.out, printed.err


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize("command", ["verify-shards", "inspect-shards"])
def test_a_path_without_an_output_is_an_error_on_stderr(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    as_json: list[str],
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("nowhere", "no such directory"),
        ("empty", "is a directory without files"),
        ("notes", "holds 1 files (a.txt ...), but no manifest.json and no shard"),
        ("notes/a.txt", "is a file, not a directory"),
    ):
        code, out, err = run(monkeypatch, capsys, command, str(tmp_path / name), *as_json)
        assert (code, out) == (1, "")
        assert f"{tmp_path / name}: {message}; expected an output of precompute-logits" in err


def test_a_shard_file_in_a_directory_that_does_not_exist_names_the_directory(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="nowhere: no such directory"):
        open_target(shard_path(tmp_path / "nowhere", 1))


def test_an_address_without_an_output_is_an_error() -> None:
    empty = UPath("memory://bucket/nothing-here")
    for verify in (verify_logits, verify_features):
        with pytest.raises(ShardError, match="nothing is stored below this address; expected an output of precompute-"):
            verify(empty, progress=False)
    with pytest.raises(ShardError, match="nothing is stored below this address"):
        open_target(empty)


@pytest.mark.parametrize("lost", ["manifest", "shards", "receipts", "all but a receipt", "all but a shard"])
def test_an_output_that_lost_files_is_still_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    write_output(tmp_path)
    kept = {
        "manifest": lambda name: name != MANIFEST_NAME,
        "shards": lambda name: not name.endswith(".parquet"),
        "receipts": lambda name: name == MANIFEST_NAME or name.endswith(".parquet"),
        "all but a receipt": lambda name: name == receipt_path(tmp_path, 1).name,
        "all but a shard": lambda name: name == shard_path(tmp_path, 1).name,
    }[lost]
    for path in tmp_path.iterdir():
        if not kept(path.name):
            path.unlink()
    code, out, _ = run(monkeypatch, capsys, "verify-shards", str(tmp_path), "--json")
    assert code == 1
    assert json.loads(out)["verify"]["ok"] is False


def test_the_files_of_an_output_are_listed_with_their_bytes(tmp_path: Path) -> None:
    write_output(tmp_path, num_shards=1)
    assert list_output_files(tmp_path, "precompute-logits") == {
        path.name: path.stat().st_size for path in tmp_path.iterdir()
    }
