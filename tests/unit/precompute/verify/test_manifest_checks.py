"""Damage to footers, manifests, messages and images is found, also if the receipt matches the damaged file."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.samples import ImageRef, Turn
from common.shards.manifest import read_manifest, write_with_digest
from common.shards.score_shard import ShardRow, write_shard
from precompute.logits.run import run_capture
from precompute.verify.logits import verify_logits
from precompute.verify.manifest_checks import manifest_problems
from tests.support.builders import make_manifest
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config, preference_records
from tests.support.outputs import first_problems, read_rows, replace_sample, rewrite_shard

FOOTER_DAMAGE: dict[str, tuple[dict[str, Any], str, str]] = {
    "another version": ({"schema_version": "2"}, "footers", "schema version '2', expected 6"),
    "no version": ({"schema_version": None}, "footers", "schema version None"),
    "another manifest": (
        {"manifest": make_manifest().model_dump_json()},
        "footers",
        "the manifest in its footer is not that of the output",
    ),
    "no manifest": ({"manifest": None}, "footers", "the manifest in its footer"),
    "another digest": ({"manifest_sha256": "0" * 64}, "columns", "another manifest"),
    "another number": ({"shard": "2"}, "columns", "the file was renamed"),
    "a number written otherwise": ({"shard": "01"}, "columns", "the file was renamed"),
    "an image token that is none": ({"image_token_id": "x"}, "columns", "cannot be read"),
    "an image token past the vocabulary": ({"image_token_id": "293"}, "footers", "is 293, the tokenizer has 293"),
    "another image token": ({"image_token_id": "7"}, "footers", r"is 7, in most shards it is \d+"),
    "no image token": ({"image_token_id": ""}, "footers", "is None, in most shards"),
    "token classes of another vocabulary": ({"token_classes": ""}, "columns", "token classes|classes of"),
    "small row groups": ({"row_group_size": 3}, "footers", r"row groups hold \[3, 1\] rows, expected 64"),
}


@pytest.mark.parametrize("what", FOOTER_DAMAGE)
def test_damage_to_a_footer_is_found(output: Path, what: str) -> None:
    changes, check, message = FOOTER_DAMAGE[what]
    rewrite_shard(output, 1, **changes)
    found = first_problems(verify_logits(output, progress=False))
    assert re.search(message, found[check]), found


def test_a_file_that_is_written_again_without_changes_passes(output: Path) -> None:
    rewrite_shard(output, 1)
    assert verify_logits(output, progress=False).ok


def test_a_shard_under_a_number_written_otherwise_is_missing(output: Path) -> None:
    """Readers look for the canonical name, so they would not find it."""
    (output / "shard-00001.parquet").rename(output / "shard-000001.parquet")
    assert "a shard that is not there" in first_problems(verify_logits(output, progress=False))["files"]


MANIFEST_DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no samples": ({"dataset": {"num_samples": 0}}, "has no samples"),
    "no precision": ({"capture": {"precision": None}}, "no precision"),
    "a precision of draws": ({"capture": {"num_draws": 5}}, "5 draws, top_k 8"),
    "a mass above 1": ({"capture": {"top_p": 1.5}}, "top_p 1.5"),
    "too large a vocabulary": ({"tokenizer": {"vocab_size": 2**21}}, "2,097,152 tokens"),
    "more tokens than outputs": ({"teacher": {"vocab_size": 10}}, "10 rows in the output layer"),
    "images of nothing": ({"image": {"tokens_per_image": 0}}, "images of 0 tokens"),
    "generated pairs": (
        {
            "kind": "dpo",
            "capture": {"generate": {"temperature": 1.0, "top_p": 1.0, "num_samples": 1, "max_new_tokens": 9}},
        },
        "responses of kind dpo",
    ),
}


@pytest.mark.parametrize("what", MANIFEST_DAMAGE)
def test_impossible_settings_are_found(output: Path, what: str) -> None:
    changes, message = MANIFEST_DAMAGE[what]
    before = read_manifest(output)
    body = before.model_dump()
    for name, value in changes.items():
        body[name] = {**body[name], **value} if isinstance(value, dict) else value
    manifest = type(before).model_validate(body)
    assert not list(manifest_problems(before))
    write_with_digest(output / "manifest.json", manifest)
    assert message in first_problems(verify_logits(output, progress=False))["manifest"]


def test_a_broken_manifest_does_not_hide_other_damage(output: Path) -> None:
    rewrite_shard(output, 1, schema_version="2")
    (output / "manifest.json").unlink()
    report = verify_logits(output, progress=False)
    assert first_problems(report).keys() == {"manifest", "footers"}
    assert report.num_rows == 10


def test_the_manifest_of_another_output_is_found_once(output: Path) -> None:
    write_with_digest(output / "manifest.json", read_manifest(output).model_copy(update={"samples_per_shard": 5}))
    report = verify_logits(output, progress=False)
    assert first_problems(report).keys() == {"manifest"}
    assert "is not the manifest of the shards" in first_problems(report)["manifest"]


def split_last_span(row: ShardRow) -> ShardRow:
    """Splits the scored range of the last response into two."""
    (scored,) = row.conversations
    start, stop = scored.encoded.spans[-1]
    spans = np.array([[start, start + 1], [start + 1, stop]], np.int32)
    encoded = dataclasses.replace(scored.encoded, spans=spans)
    return dataclasses.replace(row, conversations=(dataclasses.replace(scored, encoded=encoded),))


def replace_first_turn(row: ShardRow, turn: Turn) -> ShardRow:
    return replace_sample(row, conversations=((turn, *row.sample.conversations[0][1:]),))


# For each damage: what it does to the first row of shard 1 (one image, a question, an answer), check, message.
SAMPLE_DAMAGE: dict[str, tuple[Callable[[ShardRow], ShardRow], str, str]] = {
    "an unknown role": (lambda row: replace_first_turn(row, Turn("tool", "x")), "messages", "role='tool'"),  # type: ignore[arg-type]
    "no text": (lambda row: replace_first_turn(row, Turn("user", None)), "messages", "content=None"),  # type: ignore[arg-type]
    "no turns": (lambda row: replace_sample(row, conversations=((),)), "messages", "without turns"),
    "a marker too few": (
        lambda row: replace_first_turn(row, Turn("user", "what?")),
        "messages",
        "0 <image> markers for 1",
    ),
    "more ranges than responses": (split_last_span, "messages", "2 scored ranges for 1 responses"),
    "a file that is no image": (
        lambda row: replace_sample(row, images=(ImageRef("4-0.png", b"x"),)),
        "images",
        r"image 0 \(4-0.png\): its file cannot be opened",
    ),
    "no path": (
        lambda row: replace_sample(row, images=(ImageRef(None),)),
        "images",
        "image 0: expected a path or a file",
    ),
}


@pytest.mark.parametrize("what", SAMPLE_DAMAGE)
def test_damage_to_a_sample_is_found(output: Path, what: str) -> None:
    damage, check, message = SAMPLE_DAMAGE[what]
    rows = read_rows(output, 1)
    write_shard(output, 1, read_manifest(output), [damage(rows[0]), *rows[1:]], [])
    found = first_problems(verify_logits(output, progress=False))
    assert re.search(message, found[check]), found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda chosen: (Turn("user", "forged"), *chosen[1:]), "the prompts of its two answers differ"),
        (lambda chosen: (*chosen[:-1], Turn("user", "mine")), "a last turn of user"),
    ],
)
def test_damage_to_a_pair_is_found(
    tmp_path: Path, llava_dir: Path, change: Callable[[tuple[Turn, ...]], tuple[Turn, ...]], message: str
) -> None:
    config = make_config(tmp_path, llava_dir, preference_records(tmp_path, 4), kind="dpo")
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    assert verify_logits(config.output, config.dataset, progress=False).ok
    rows = read_rows(config.output, 0)
    chosen, rejected = rows[0].sample.conversations
    forged = replace_sample(rows[0], conversations=(change(chosen), rejected))
    write_shard(config.output, 0, read_manifest(config.output), [forged, *rows[1:]], [])
    assert message in first_problems(verify_logits(config.output, progress=False))["messages"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, llava_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("stored")
    config = make_config(root, llava_dir, conversation_records(root, 4), store_images=True)
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    return root / "out"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "its file is not stored"),
        (b"", r"cannot be opened \(it is none of JPEG, PNG, .*, or its header is damaged\)"),
        (b"\x89PNG\r\n\x1a\n\0\0", "cannot be opened"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot be opened .it is none of JPEG"),
    ],
)
def test_a_stored_file_that_is_not_an_image_is_found(stored: Path, data: bytes | None, message: str) -> None:
    rows = read_rows(stored, 0)
    damaged = replace_sample(rows[1], images=(ImageRef("1-0.png", data),))
    write_shard(stored, 0, read_manifest(stored), [rows[0], damaged, *rows[2:]], [])
    found = first_problems(verify_logits(stored, progress=False))["images"]
    write_shard(stored, 0, read_manifest(stored), rows, [])
    assert re.search(message, found), found
    report = verify_logits(stored, progress=False)
    assert report.ok
    assert next(check for check in report.checks if check.name == "images").num_checked == 3


def test_stored_images_of_too_many_pixels_are_found(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.data.images.MAX_PIXELS", 700)
    found = first_problems(verify_logits(stored, progress=False))["images"]
    assert "is 24 x 28, padded to a square 28 x 28, the limit is 700 pixels" in found
