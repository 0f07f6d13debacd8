"""`verify-shards` and `merge-shards` as a user meets them: exit codes, what is printed, what to run next."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cli import app
from common.data.dataset import Dataset
from common.shards.manifest import receipt_path
from tests.support.fake_teacher import conversation_records
from tests.support.outputs import copy_shards, flip_bit, read_published_files
from tests.support.real_weights import write_jsonl


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


def decant(*arguments: object) -> Result:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_repair_moves_broken_shards_and_says_what_to_run(output: Path) -> None:
    flip_bit(output / "shard-00001.parquet", 2000)
    result = decant("verify-shards", output, "--repair")
    assert result.exit_code == 1
    assert "NOT verified" in result.stdout
    assert f"moved shards 1 (2 files) to {output}/broken/" in result.stdout
    assert "decant precompute-logits --config FILE): it writes shards 1 and no others" in result.stdout
    assert not receipt_path(output, 1).exists()


def test_repair_of_a_whole_output_does_nothing(output: Path, whole: Path) -> None:
    result = decant("verify-shards", output, "--repair", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["repair"]["moved"] == []
    assert found["repair"]["ok"] is found["verify"]["ok"] is True
    assert read_published_files(output) == read_published_files(whole / "out")


def test_a_newer_dataset_exits_with_1_if_a_scored_sample_changed(output: Path, whole: Path, tmp_path: Path) -> None:
    records = conversation_records(whole, 40)
    path = write_jsonl(tmp_path / "newer.jsonl", records)
    assert len(Dataset.open(path, "kd")) == 40
    result = decant("verify-shards", output, "--against", path)
    assert result.exit_code == 0
    assert "no scored sample has changed" in result.stdout
    records[3]["conversations"][0]["value"] = "<image>\nwhat?"
    records[3].pop("image", None)
    del records[4]
    path = write_jsonl(tmp_path / "newer.jsonl", [*records[:3], {**records[3], "image": "0-0.png"}, *records[4:]])
    result = decant("verify-shards", output, "--against", path, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)["against"]
    assert found["changed"] == [{"id": "s3", "shard": 0, "what": ["messages", "images"]}]
    assert found["removed"] == [{"id": "s4", "shard": 1, "what": []}]
    assert len(found["new"]) == 30


def test_a_broken_output_is_not_compared(output: Path, whole: Path) -> None:
    flip_bit(output / "shard-00001.parquet", 2000)
    result = decant("verify-shards", output, "--against", whole / "data.jsonl")
    assert result.exit_code == 1
    assert "was not compared with the output" in result.stderr


def test_merging_lists_missing_shards_and_exits_with_0(whole: Path, tmp_path: Path) -> None:
    parts = [copy_shards(whole / "out", tmp_path / "a", 0), copy_shards(whole / "out", tmp_path / "b", 2)]
    result = decant("merge-shards", *parts, "--out", tmp_path / "merged")
    assert result.exit_code == 0
    assert "2 of 3, 2 new" in result.stdout
    assert "incomplete: shards 1 are in none of the outputs" in result.stdout


def test_merging_into_another_size(whole: Path, tmp_path: Path) -> None:
    result = decant("merge-shards", whole / "out", "--out", tmp_path / "merged", "--samples-per-shard", 10)
    assert result.exit_code == 0
    assert "1 of 1, 1 new" in result.stdout
    assert decant("verify-shards", tmp_path / "merged", "--dataset", whole / "data.jsonl").exit_code == 0
