"""Comparing an output with a newer version of its dataset finds what changed, by id."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import DataError
from precompute.logits.run import run_capture
from precompute.verify.dataset_diff import ChangedSample, diff_dataset
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config, preference_records
from tests.support.outputs import render_text, rewrite_as_generated
from tests.support.real_weights import write_jsonl


def write_newer_dataset(path: Path, records: list[dict[str, Any]]) -> Path:
    return write_jsonl(path / "newer.jsonl", records)


def test_the_same_samples_in_another_order_are_unchanged(output: Path, whole: Path, tmp_path: Path) -> None:
    comparison = diff_dataset(
        output, write_newer_dataset(tmp_path, conversation_records(whole, 10)[::-1]), progress=False
    )
    assert comparison.ok
    assert comparison.num_unchanged == 10
    assert comparison.new == ()
    assert "no scored sample has changed" in render_text(comparison.render())


def test_changed_removed_and_new_samples_are_distinguished(output: Path, whole: Path, tmp_path: Path) -> None:
    records = conversation_records(whole, 12)
    records[1]["conversations"][1]["value"] = "corrected"
    records[5]["image"] = ["5-0.png", "another.png"]
    records[9]["conversations"] = []
    del records[2]
    comparison = diff_dataset(output, write_newer_dataset(tmp_path, records), progress=False)
    assert not comparison.ok
    assert comparison.num_unchanged == 6
    assert comparison.changed[:2] == (ChangedSample("s1", 0, ("messages",)), ChangedSample("s5", 1, ("images",)))
    assert comparison.changed[2].id == "s9"
    assert "cannot be read now" in comparison.changed[2].what[0]
    assert comparison.removed == (ChangedSample("s2", 0),)
    assert comparison.new == (ChangedSample("s10", None), ChangedSample("s11", None))
    text = render_text(comparison.render())
    assert "changed: 's5' (shard 1): images" in text
    assert "removed: 's2' (shard 0)" in text
    assert "new: 's10'\n" in text.replace(" \n", "\n")


def test_new_samples_do_not_make_the_scores_outdated(output: Path, whole: Path, tmp_path: Path) -> None:
    comparison = diff_dataset(output, write_newer_dataset(tmp_path, conversation_records(whole, 40)), progress=False)
    assert comparison.ok
    assert "new: and 10 more" in render_text(comparison.render())
    assert len(json.loads(comparison.to_json())["new"]) == 30


def test_samples_of_missing_shards_count_as_new_with_a_notice(output: Path, whole: Path, tmp_path: Path) -> None:
    for path in output.glob("shard-00001.*"):
        path.unlink()
    comparison = diff_dataset(output, write_newer_dataset(tmp_path, conversation_records(whole, 10)), progress=False)
    assert [each.id for each in comparison.new] == ["s4", "s5", "s6", "s7"]
    assert "1 shards are missing; their samples count as new" in render_text(comparison.render())


def test_skipped_samples_are_neither_new_nor_removed(tmp_path: Path, llava_dir: Path) -> None:
    records = conversation_records(tmp_path, 6)
    records[3]["image"] = "nowhere.png"
    config = make_config(tmp_path, llava_dir, records, on_bad_sample="skip")
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    comparison = diff_dataset(config.output, write_newer_dataset(tmp_path, records), progress=False)
    assert (comparison.ok, comparison.num_unchanged, comparison.num_skipped, comparison.new) == (True, 5, 1, ())


@pytest.mark.parametrize("store_images", [False, True])
def test_a_change_in_either_answer_of_a_pair_is_found(tmp_path: Path, llava_dir: Path, store_images: bool) -> None:
    records = preference_records(tmp_path, 4)
    config = make_config(tmp_path, llava_dir, records, kind="dpo", store_images=store_images)
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    records[2]["rejected"][-1]["value"] = "yes"
    comparison = diff_dataset(config.output, write_newer_dataset(tmp_path, records), progress=False)
    assert comparison.changed == (ChangedSample("s2", 0, ("messages",)),)


def test_generated_responses_are_compared_by_their_prompts(output: Path, whole: Path, tmp_path: Path) -> None:
    rewrite_as_generated(output, 2)
    records = conversation_records(whole, 10)
    records[1]["conversations"][-1]["value"] = "another answer"
    records[2]["conversations"][0]["value"] = "<image>\n<image>\nanother question?"
    comparison = diff_dataset(output, write_newer_dataset(tmp_path, records), progress=False)
    assert comparison.changed == (ChangedSample("s2", 0, ("messages",)),)
    assert comparison.num_unchanged == 9


def test_a_missing_dataset_is_named(output: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl: the dataset cannot be read"):
        diff_dataset(output, tmp_path / "nowhere.jsonl", progress=False)
