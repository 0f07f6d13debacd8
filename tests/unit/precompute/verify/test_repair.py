"""A repair moves broken files aside and loses none, and a rerun writes exactly what is missing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from common.shards.manifest import (
    SkippedSample,
    published_shards,
    read_manifest,
    receipt_path,
    shard_path,
    write_with_digest,
)
from common.shards.score_shard import write_shard
from common.storage.files import parse_location
from precompute.logits.run import run_capture
from precompute.verify.logits import verify_logits
from precompute.verify.repair import repair_output
from tests.support.fake_teacher import FakeTeacher, conversation_records
from tests.support.object_store import BUCKET, Store
from tests.support.outputs import (
    copy_file,
    flip_bit,
    load_config,
    read_published_files,
    read_rows,
    render_text,
    rewrite_shard,
)
from tests.support.real_weights import write_jsonl


def continue_capture(output: Path) -> int:
    """Continues the capture; returns the number of shards that it wrote."""
    return run_capture(load_config(output), progress=False, start_teacher=FakeTeacher).num_new_shards


def damage_two_shards(output: Path) -> None:
    flip_bit(shard_path(output, 0), 2000)
    receipt_path(output, 2).unlink()


def lose_a_row(output: Path) -> None:
    write_shard(output, 1, read_manifest(output), read_rows(output, 1)[1:], [])


def list_stored_sample_as_skipped(output: Path) -> None:
    rows = read_rows(output, 1)
    write_shard(output, 1, read_manifest(output), rows, [SkippedSample(index=4, id="s4", reason="?")])


# For each damage: what causes it, and the files that a repair moves.
DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a flipped bit": (lambda out: flip_bit(shard_path(out, 1), 2000), ["shard-00001.json", "shard-00001.parquet"]),
    "an emptied receipt": (
        lambda out: receipt_path(out, 1).write_bytes(b""),
        ["shard-00001.json", "shard-00001.parquet"],
    ),
    "no receipt": (lambda out: receipt_path(out, 1).unlink(), ["shard-00001.parquet"]),
    "no shard": (lambda out: shard_path(out, 1).unlink(), ["shard-00001.json"]),
    "another version": (
        lambda out: rewrite_shard(out, 1, schema_version="2"),
        ["shard-00001.json", "shard-00001.parquet"],
    ),
    "a lost row": (lose_a_row, ["shard-00001.json", "shard-00001.parquet"]),
    "a row that is said to be skipped": (list_stored_sample_as_skipped, ["shard-00001.json", "shard-00001.parquet"]),
    "another shard's file": (
        lambda out: copy_file(shard_path(out, 0), shard_path(out, 1)),
        ["shard-00001.json", "shard-00001.parquet"],
    ),
    "a number past the end": (lambda out: copy_file(shard_path(out, 1), shard_path(out, 7)), ["shard-00007.parquet"]),
    "two shards": (
        damage_two_shards,
        ["shard-00000.json", "shard-00000.parquet", "shard-00002.parquet"],
    ),
    "everything": (
        lambda out: [path.write_bytes(b"?") for path in out.glob("shard-*")],
        [f"shard-0000{number}.{kind}" for number in range(3) for kind in ("json", "parquet")],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGE)
def test_a_rerun_after_a_repair_writes_exactly_what_was_broken(output: Path, whole: Path, what: str) -> None:
    damage, expected = DAMAGE[what]
    damage(output)
    broken = read_published_files(output)
    result = repair_output(verify_logits(output, whole / "data.jsonl", progress=False))
    assert sorted(result.moved) == expected
    assert not result.ok
    assert result.destination is not None
    assert {path.name: path.read_bytes() for path in Path(str(result.destination)).iterdir()} == {
        name: broken[name] for name in expected
    }
    assert read_published_files(output) == {name: data for name, data in broken.items() if name not in expected}
    assert continue_capture(output) == sum(map(len, result.missing))
    assert read_published_files(output) == read_published_files(whole / "out")
    assert verify_logits(output, whole / "data.jsonl", progress=False).ok


def test_an_intact_output_is_not_touched(output: Path, whole: Path) -> None:
    result = repair_output(verify_logits(output, progress=False))
    assert result.ok
    assert (result.moved, result.missing, result.destination) == ((), (), None)
    assert render_text(result.render()) == "nothing was broken, nothing was moved\n"
    assert read_published_files(output) == read_published_files(whole / "out")
    assert not (output / "broken").exists()


def test_missing_shards_are_named_and_nothing_is_moved(output: Path) -> None:
    for path in output.glob("shard-00002.*"):
        path.unlink()
    result = repair_output(verify_logits(output, progress=False))
    assert (result.moved, result.missing) == ((), (range(2, 3),))
    assert "it writes shards 2 and no others" in render_text(result.render())


def test_another_dataset_is_reported_and_moves_nothing(output: Path, whole: Path, tmp_path: Path) -> None:
    records = conversation_records(whole, 10)
    records[3]["conversations"][1]["value"] = "something else"
    result = repair_output(verify_logits(output, write_jsonl(tmp_path / "other.jsonl", records), progress=False))
    assert read_published_files(output) == read_published_files(whole / "out")
    assert result.moved == ()
    assert "the check 'dataset' are not the damage of a shard" in render_text(result.render())


@pytest.mark.parametrize("how", ["gone", "edited", "rubbish", "another output's"])
def test_the_manifest_is_restored_from_the_shards(output: Path, whole: Path, how: str) -> None:
    path, manifest = output / "manifest.json", read_manifest(output)
    match how:
        case "gone":
            path.unlink()
        case "edited":
            path.write_text(path.read_text().replace("512", "513"))
        case "rubbish":
            path.write_bytes(b"\xff")
        case _:
            write_with_digest(path, manifest.model_copy(update={"samples_per_shard": 3}))
    flip_bit(shard_path(output, 1), 2000)
    result = repair_output(verify_logits(output, progress=False))
    assert result.restored
    assert result.moved == (*(["manifest.json"] if how != "gone" else []), "shard-00001.json", "shard-00001.parquet")
    assert (output / "manifest.json").read_bytes() == (whole / "out" / "manifest.json").read_bytes()
    assert "manifest.json was restored from the shards" in render_text(result.render())
    assert continue_capture(output) == 1
    assert read_published_files(output) == read_published_files(whole / "out")


def test_a_manifest_on_which_the_shards_disagree_is_not_restored(output: Path) -> None:
    other = read_manifest(output).model_copy(update={"samples_per_shard": 5})
    write_shard(output, 1, other, read_rows(output, 1), [])
    (output / "manifest.json").unlink()
    before = read_published_files(output)
    result = repair_output(verify_logits(output, progress=False))
    assert result.refusal is not None
    assert "not repaired: manifest.json is broken and cannot be restored" in render_text(result.render())
    assert read_published_files(output) == before
    assert not (output / "broken").exists()


def test_without_shards_a_manifest_cannot_be_restored(output: Path) -> None:
    for path in output.glob("shard-*"):
        path.unlink()
    (output / "manifest.json").write_text("{}")
    result = repair_output(verify_logits(output, progress=False))
    assert result.refusal is not None
    assert (output / "manifest.json").read_text() == "{}"
    assert not (output / "broken").exists()


def test_a_shard_that_is_written_during_verification_is_left_alone(output: Path, whole: Path) -> None:
    receipt_path(output, 1).unlink()
    report = verify_logits(output, progress=False)
    copy_file(receipt_path(whole / "out", 1), receipt_path(output, 1))
    result = repair_output(report)
    assert result.moved == ()
    assert "shard 1 changed while it was checked" in render_text(result.render())
    assert published_shards(output) == (0, 1, 2)


def test_repairs_in_one_second_do_not_share_a_directory(output: Path) -> None:
    for round_ in range(3):
        shard_path(output, 1).write_bytes(bytes([round_]))
        assert repair_output(verify_logits(output, progress=False)).moved
        continue_capture(output)
    moved = [path.read_bytes() for path in (output / "broken").glob("*/shard-00001.parquet")]
    assert sorted(moved) == [b"\0", b"\1", b"\2"]


@pytest.mark.slow
def test_objects_are_copied_before_they_are_deleted(store: Store, output: Path) -> None:
    flip_bit(shard_path(output, 1), 2000)
    for name, data in read_published_files(output).items():
        parse_location(f"s3://{BUCKET}/scores/{name}").write_bytes(data)
    result = repair_output(verify_logits(parse_location(f"s3://{BUCKET}/scores"), progress=False))
    assert result.missing == (range(1, 2),)
    (stamp,) = {name.split("/")[1] for name in store.objects("scores") if name.startswith("broken/")}
    assert str(result.destination) == f"s3://{BUCKET}/scores/broken/{stamp}"
    expected = {
        f"broken/{stamp}/{name}" if "00001" in name else name: data
        for name, data in read_published_files(output).items()
    }
    assert store.objects("scores") == expected
    printed = json.loads(result.to_json())
    assert (printed["destination"], printed["missing"]) == (str(result.destination), [[1, 1]])
