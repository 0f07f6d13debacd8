"""Joining outputs and writing shards of another size changes no value, to the bit."""

import re
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigError, DecantError, ProvenanceError, ShardError
from common.shards.manifest import (
    SkippedSample,
    read_manifest,
    read_receipt,
    receipt_path,
    shard_path,
    write_with_digest,
)
from common.shards.score_shard import write_shard
from common.storage.files import parse_location
from precompute.config import PrecomputeConfig
from precompute.logits.run import run_capture
from precompute.merge import merge_outputs
from precompute.verify.logits import verify_logits
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config, preference_records
from tests.support.object_store import BUCKET, Store
from tests.support.outputs import (
    copy_file,
    copy_shards,
    flip_bit,
    read_all_rows,
    read_published_files,
    read_rows,
    render_text,
    rewrite_shard,
    row_values,
)


@pytest.mark.slow
def test_parts_are_joined_byte_for_byte(whole: Path, tmp_path: Path) -> None:
    parts = [copy_shards(whole / "out", tmp_path / "a", 0, 2), copy_shards(whole / "out", tmp_path / "b", 1)]
    merged = merge_outputs(parts, tmp_path / "merged", progress=False)
    assert (merged.num_shards, merged.num_new_shards, merged.missing, merged.num_rows) == (3, 3, (), 10)
    assert read_published_files(tmp_path / "merged") == read_published_files(whole / "out")
    assert render_text(merged.render()).endswith("complete\n")
    assert verify_logits(tmp_path / "merged", whole / "data.jsonl", progress=False).ok


def test_what_is_missing_is_listed(whole: Path, tmp_path: Path) -> None:
    merged = merge_outputs([copy_shards(whole / "out", tmp_path / "a", 1)], tmp_path / "merged", progress=False)
    assert merged.missing == (range(1), range(2, 3))
    assert "incomplete: shards 0, 2 are in none of the outputs" in render_text(merged.render())


def test_an_interrupted_merge_continues(whole: Path, tmp_path: Path) -> None:
    merge_outputs([copy_shards(whole / "out", tmp_path / "a", 0)], tmp_path / "merged", progress=False)
    kept = shard_path(tmp_path / "merged", 0).stat().st_mtime_ns
    copy_file(shard_path(whole / "out", 1), shard_path(tmp_path / "merged", 1))
    merged = merge_outputs([copy_shards(whole / "out", tmp_path / "b", 0, 1, 2)], tmp_path / "merged", progress=False)
    assert merged.num_new_shards == 2
    assert shard_path(tmp_path / "merged", 0).stat().st_mtime_ns == kept
    assert read_published_files(tmp_path / "merged") == read_published_files(whole / "out")


def test_outputs_of_other_provenance_are_refused_with_every_difference(whole: Path, tmp_path: Path) -> None:
    other = copy_shards(whole / "out", tmp_path / "other", 1)
    manifest = read_manifest(other)
    capture = manifest.capture.model_copy(update={"top_k": 9})
    write_with_digest(
        other / "manifest.json", manifest.model_copy(update={"capture": capture, "samples_per_shard": 5, "kind": "dpo"})
    )
    with pytest.raises(ProvenanceError) as caught:
        merge_outputs([whole / "out", other], tmp_path / "merged", progress=False)
    for line in (
        f"capture.top_k: {whole / 'out'} has 8, {other} has 9",
        "kind: ",
        f"samples_per_shard: {whole / 'out'} has 4, {other} has 5",
    ):
        assert line in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_outputs_in_other_sizes_are_refused_with_what_to_do(whole: Path, tmp_path: Path) -> None:
    merge_outputs([whole / "out"], tmp_path / "fives", 5, progress=False)
    with pytest.raises(ProvenanceError, match="merge-shards ONE --samples-per-shard N"):
        merge_outputs([whole / "out", tmp_path / "fives"], tmp_path / "merged", progress=False)
    with pytest.raises(ProvenanceError, match="samples_per_shard"):
        merge_outputs([whole / "out"], tmp_path / "fives", 3, progress=False)


def test_the_first_copy_of_a_shard_that_was_scored_twice_is_taken_with_a_notice(whole: Path, tmp_path: Path) -> None:
    other = copy_shards(whole / "out", tmp_path / "other", 0, 1)
    rows = read_rows(other, 1)
    write_shard(other, 1, read_manifest(other), [*rows[:3], rows[0]], [])
    receipt = read_receipt(whole / "out", 1, read_manifest(other))
    changed = read_receipt(other, 1, read_manifest(other)).model_copy(
        update={"num_scored_tokens": receipt.num_scored_tokens}
    )
    write_with_digest(receipt_path(other, 1), changed)
    merged = merge_outputs([whole / "out", other], tmp_path / "merged", progress=False)
    assert len(merged.notes) == 1
    assert re.search(r"shard 1 was scored twice: .*the first is taken", render_text(merged.render()))
    assert read_published_files(tmp_path / "merged") == read_published_files(whole / "out")


@pytest.mark.parametrize("what", ["rows", "skipped"])
def test_copies_with_other_samples_are_refused(whole: Path, tmp_path: Path, what: str) -> None:
    other = copy_shards(whole / "out", tmp_path / "other", 1)
    if what == "rows":
        write_shard(other, 1, read_manifest(other), read_rows(other, 1)[1:], [])
    else:
        write_shard(other, 1, read_manifest(other), read_rows(other, 1), [SkippedSample(index=4, id="s4", reason="?")])
    with pytest.raises(ShardError, match=r"shard 1: .* has 4 rows .*one of them is wrong: run verify-shards on both"):
        merge_outputs([whole / "out", other], tmp_path / "merged", progress=False)


@pytest.mark.parametrize("size", [None, 5])
def test_an_intact_copy_is_taken_instead_of_a_damaged_one(whole: Path, tmp_path: Path, size: int | None) -> None:
    damaged = copy_shards(whole / "out", tmp_path / "damaged", 0, 1)
    flip_bit(shard_path(damaged, 1), 2000)
    shard_path(damaged, 0).unlink()
    merged = merge_outputs([damaged, whole / "out"], tmp_path / "merged", size, progress=False)
    assert merged.missing == ()
    if size is None:
        assert read_published_files(tmp_path / "merged") == read_published_files(whole / "out")
        assert render_text(merged.render()).count("is gone or not what its receipt names") == 2
    assert verify_logits(tmp_path / "merged", whole / "data.jsonl", progress=False).ok
    with pytest.raises(ShardError, match=r"shard-0000\d.parquet: gone, or not the bytes that the receipt names"):
        merge_outputs([damaged], tmp_path / "second", progress=False)


def test_another_size_needs_an_intact_copy_of_each_shard(output: Path, tmp_path: Path) -> None:
    flip_bit(shard_path(output, 1), 2000)
    with pytest.raises(ShardError, match=r"shard-00001.parquet: gone, or not the bytes that the receipt names"):
        merge_outputs([output], tmp_path / "merged", 5, progress=False)


CAPTURES: dict[str, dict[str, Any]] = {
    "q8": {"precision": "q8"},
    "q6": {"precision": "q6", "top_k": 40, "top_p": 0.9},
    "fp16": {"precision": "fp16"},
    "fp32": {"precision": "fp32"},
    "draws": {"top_k": 0, "num_draws": 30, "seed": 3},
    "pairs": {"kind": "dpo", "top_k": 3},
    "images": {"store_images": True},
}


def capture(root: Path, teacher: Path, what: str, num_samples: int = 11) -> PrecomputeConfig:
    settings = CAPTURES[what]
    records = (preference_records if settings.get("kind") == "dpo" else conversation_records)(root, num_samples)
    records[6]["image"] = "nowhere.png"
    config = make_config(root, teacher, records, on_bad_sample="skip", **settings)
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("what", CAPTURES)
def test_values_are_the_same_to_the_bit_in_shards_of_any_size(tmp_path: Path, llava_dir: Path, what: str) -> None:
    config = capture(tmp_path, llava_dir, what)
    before = [list(row_values(row)) for row in read_all_rows(config.output)]
    last = config.output
    # Shards are written from one size to the next, so that errors of repeated coding would add up.
    for size in (1, 100, 3, 7):
        merged = merge_outputs([last], tmp_path / f"of-{size}", size, progress=False)
        last = tmp_path / f"of-{size}"
        assert (merged.num_shards, merged.num_rows) == (-(-11 // size), 10)
        assert [list(row_values(row)) for row in read_all_rows(last)] == before
        report = verify_logits(last, config.dataset, progress=False)
        assert report.ok
        assert report.num_skipped == 1
    merge_outputs([last], tmp_path / "back", 4, progress=False)
    assert read_published_files(tmp_path / "back") == read_published_files(config.output)


def test_an_interrupted_change_of_size_continues(whole: Path, tmp_path: Path) -> None:
    merge_outputs([whole / "out"], tmp_path / "fives", 3, progress=False)
    before = read_published_files(tmp_path / "fives")
    receipt_path(tmp_path / "fives", 1).unlink()
    shard_path(tmp_path / "fives", 3).unlink()
    assert merge_outputs([whole / "out"], tmp_path / "fives", 3, progress=False).num_new_shards == 2
    assert read_published_files(tmp_path / "fives") == before


def test_another_size_needs_all_shards(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="1 of 3 shards are in none of the outputs: 1;"):
        merge_outputs([copy_shards(whole / "out", tmp_path / "a", 0, 2)], tmp_path / "merged", 5, progress=False)
    assert not (tmp_path / "merged").exists()


def test_rows_that_do_not_cover_the_dataset_are_not_hidden_in_larger_shards(output: Path, tmp_path: Path) -> None:
    write_shard(output, 1, read_manifest(output), read_rows(output, 1)[1:], [])
    with pytest.raises(ShardError, match="the samples 0 to 9 have 9 rows and 0 are skipped"):
        merge_outputs([output], tmp_path / "merged", 10, progress=False)


def test_shards_with_different_image_tokens_are_not_joined_in_one(output: Path, tmp_path: Path) -> None:
    rewrite_shard(output, 1, image_token_id="7")
    with pytest.raises(ShardError, match="the samples 0 to 9 were written with different image tokens"):
        merge_outputs([output], tmp_path / "merged", 10, progress=False)


@pytest.mark.parametrize(("name", "message"), [("out", "is one of the outputs"), ("full", "holds notes.txt")])
def test_a_destination_that_holds_other_things_is_refused(
    output: Path, tmp_path: Path, name: str, message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ConfigError, match=message):
        merge_outputs([output], tmp_path / name, progress=False)


@pytest.mark.slow
def test_outputs_of_a_store_and_of_a_disk_are_joined(store: Store, whole: Path, tmp_path: Path) -> None:
    for name, data in read_published_files(copy_shards(whole / "out", tmp_path / "a", 0, 1)).items():
        parse_location(f"s3://{BUCKET}/part/{name}").write_bytes(data)
    parts = [parse_location(f"s3://{BUCKET}/part"), copy_shards(whole / "out", tmp_path / "b", 2)]
    merge_outputs(parts, parse_location(f"s3://{BUCKET}/merged"), progress=False)
    merged = store.objects("merged")
    assert merged.pop("README.md").startswith(b"---\nconfigs: ")
    assert merged == read_published_files(whole / "out")


def test_a_directory_that_is_no_output_is_named(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(DecantError, match=r"nowhere.manifest\.json: does not exist"):
        merge_outputs([whole / "out", tmp_path / "nowhere"], tmp_path / "merged", progress=False)
