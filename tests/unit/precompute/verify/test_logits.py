"""Each kind of damage is found by its check, and none makes verification crash."""

import dataclasses
import hashlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from common.data.samples import Turn
from common.errors import StorageError
from common.shards.manifest import (
    Receipt,
    SkippedSample,
    read_manifest,
    read_receipt,
    receipt_path,
    shard_path,
    write_with_digest,
)
from common.shards.score_shard import ShardFile, ShardRow, write_shard
from precompute.logits.run import run_capture
from precompute.report import MAX_LISTED
from precompute.verify.logits import verify_logits
from tests.support.builders import read_table
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config, preference_records
from tests.support.outputs import (
    copy_file,
    first_problems,
    flip_bit,
    read_rows,
    render_text,
    replace_sample,
    rewrite_as_generated,
    rewrite_receipt,
)
from tests.support.real_weights import write_jsonl

ROOT = Path(__file__).parents[4]

Damage = Callable[[Path], object]


def test_an_intact_output_passes_every_check(whole: Path) -> None:
    report = verify_logits(whole / "out", whole / "data.jsonl", progress=False)
    assert report.ok
    assert all(check.num_checked for check in report.checks)
    assert (report.num_shards, report.num_rows, report.num_skipped) == (3, 10, 0)
    assert report.num_bytes == sum(path.stat().st_size for path in (whole / "out").glob("*.parquet"))


def test_preference_pairs_pass_every_check(tmp_path: Path, llava_dir: Path) -> None:
    config = make_config(tmp_path, llava_dir, preference_records(tmp_path, 6), kind="dpo", top_k=0)
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    assert verify_logits(config.output, config.dataset, progress=False).ok


def remove_two_shards(output: Path) -> None:
    for path in output.glob("shard-0000[12].*"):
        path.unlink()


FILE_DAMAGE: dict[str, tuple[Damage, str, str]] = {
    "manifest gone": (lambda out: (out / "manifest.json").unlink(), "manifest", "does not exist"),
    "manifest edited": (
        lambda out: (out / "manifest.json").write_text((out / "manifest.json").read_text().replace("512", "513")),
        "manifest",
        "does not match its own SHA-256",
    ),
    "manifest is rubbish": (lambda out: (out / "manifest.json").write_bytes(b"\xff\x00"), "manifest", "damaged"),
    "receipt edited": (
        lambda out: receipt_path(out, 1).write_text(receipt_path(out, 1).read_text().replace('"num_rows": 4', "5")),
        "receipts",
        "damaged",
    ),
    "receipt of another shard": (
        lambda out: copy_file(receipt_path(out, 0), receipt_path(out, 1)),
        "receipts",
        "is the receipt of shard 0",
    ),
    "receipt gone": (lambda out: receipt_path(out, 1).unlink(), "files", "has no receipt"),
    "shard gone": (lambda out: shard_path(out, 1).unlink(), "files", "receipt of a shard that is not there"),
    "number past the end": (
        lambda out: copy_file(shard_path(out, 1), shard_path(out, 7)),
        "files",
        "last shard is 2",
    ),
    "shards missing": (
        remove_two_shards,
        "coverage",
        "2 of 3 shards are missing: 1-2",
    ),
    "one bit flipped": (lambda out: flip_bit(shard_path(out, 1), 2000), "checksums", "its receipt says"),
    "cut short": (
        lambda out: shard_path(out, 1).write_bytes(shard_path(out, 1).read_bytes()[:-100]),
        "checksums",
        "run verify-shards with --repair, then precompute-logits again",
    ),
    "emptied": (lambda out: shard_path(out, 1).write_bytes(b""), "checksums", "has 0 bytes"),
}


@pytest.mark.parametrize("what", FILE_DAMAGE)
def test_damage_to_files_is_found(output: Path, what: str) -> None:
    damage, check, message = FILE_DAMAGE[what]
    damage(output)
    found = first_problems(verify_logits(output, progress=False))
    assert re.search(message, found[check]), found


def test_a_flipped_bit_behind_a_matching_receipt_is_found_by_the_page_checksum(output: Path) -> None:
    file = pq.ParquetFile(shard_path(output, 1)).metadata.row_group(0)
    column = next(file.column(i) for i in range(file.num_columns) if file.column(i).path_in_schema == "topk_ids_3")
    flip_bit(shard_path(output, 1), column.data_page_offset + column.total_compressed_size - 8)
    rewrite_receipt(output, 1)
    assert "row group 0" in first_problems(verify_logits(output, progress=False))["pages"]


def test_a_shard_under_another_number_is_found(output: Path) -> None:
    copy_file(shard_path(output, 0), shard_path(output, 1))
    rewrite_receipt(output, 1)
    assert "the file was renamed" in first_problems(verify_logits(output, progress=False))["columns"]


def test_a_shard_of_another_schema_is_found(output: Path) -> None:
    table = pq.read_table(shard_path(output, 1))
    pq.write_table(table.drop_columns(["rest_mass"]), shard_path(output, 1))
    rewrite_receipt(output, 1)
    assert "its columns are not those of a kd shard" in first_problems(verify_logits(output, progress=False))["columns"]


def test_a_wrong_logprob_sum_is_found(output: Path) -> None:
    path = output / "shard-00001.parquet"
    table = read_table(path)
    place = table.schema.get_field_index("logprob_sum")
    values = [value.as_py() + 1e-3 for value in table.column(place)]
    field = table.schema.field(place)
    pq.write_table(table.set_column(place, field, [values]), path, write_page_checksum=True)
    rewrite_receipt(output, 1)
    assert "its tokens' log-probs sum to" in first_problems(verify_logits(output, progress=False))["own"]


def test_more_kept_entries_than_requested_are_found(output: Path) -> None:
    manifest = read_manifest(output)
    lower = manifest.model_copy(update={"capture": manifest.capture.model_copy(update={"top_k": 3})})
    write_with_digest(output / "manifest.json", lower)
    for number in range(3):
        shard = ShardFile(shard_path(output, number), manifest, number)
        write_shard(output, number, lower, list(shard), [])
    assert "expected at most 3" in first_problems(verify_logits(output, progress=False))["kept"]


@pytest.mark.parametrize(
    "rows", [lambda rows: rows[:-1], lambda rows: rows[::-1], lambda rows: [rows[0], rows[0], *rows[2:]]]
)
def test_missing_repeated_and_reordered_rows_are_found(
    output: Path, rows: Callable[[list[ShardRow]], list[ShardRow]]
) -> None:
    write_shard(output, 1, read_manifest(output), rows(read_rows(output, 1)), [])
    found = first_problems(verify_logits(output, progress=False))
    assert found.keys() & {"coverage", "order"}


def test_rows_and_skipped_samples_together_cover_the_range(output: Path, whole: Path) -> None:
    rows = read_rows(output, 1)
    write_shard(output, 1, read_manifest(output), rows[1:], [SkippedSample(index=4, id="s4", reason="too long")])
    report = verify_logits(output, whole / "data.jsonl", progress=False)
    assert report.ok
    assert report.num_skipped == 1
    write_shard(output, 1, read_manifest(output), rows, [SkippedSample(index=4, id="s4", reason="too long")])
    assert "coverage" in first_problems(verify_logits(output, progress=False))
    write_shard(output, 1, read_manifest(output), rows[1:], [SkippedSample(index=4, id="s5", reason="too long")])
    found = first_problems(verify_logits(output, whole / "data.jsonl", progress=False))
    assert "another sample" in found["dataset"]
    assert "lists 's5' as skipped; its id occurs twice" in found["order"]


def test_a_receipt_with_other_counts_is_found(output: Path) -> None:
    receipt: Receipt = read_receipt(output, 1, read_manifest(output))
    write_with_digest(receipt_path(output, 1), receipt.model_copy(update={"num_scored_tokens": 1}))
    assert "its receipt says 4 with 1" in first_problems(verify_logits(output, progress=False))["coverage"]


def test_another_dataset_is_found(output: Path, whole: Path, tmp_path: Path) -> None:
    records = conversation_records(whole, 10)
    records[3]["conversations"][1]["value"] = "something else"
    other = write_jsonl(tmp_path / "other.jsonl", records)
    check = next(c for c in verify_logits(output, other, progress=False).checks if c.name == "dataset")
    assert "has SHA-256" in check.problems[0].what
    assert [problem.what for problem in check.problems[1:]] == [
        "row 3 ('s3'): its conversations differ from those of 's3' in the dataset"
    ]


def test_a_dataset_of_another_length_is_found(output: Path, whole: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", conversation_records(whole, 5))
    check = next(c for c in verify_logits(output, other, progress=False).checks if c.name == "dataset")
    assert check.num_problems == 2 + 5


def test_a_missing_dataset_is_a_problem(output: Path, tmp_path: Path) -> None:
    assert (
        "cannot be read" in first_problems(verify_logits(output, tmp_path / "nowhere.jsonl", progress=False))["dataset"]
    )


def test_a_broken_record_of_the_dataset_is_found(output: Path, whole: Path, tmp_path: Path) -> None:
    records = conversation_records(whole, 10)
    records[3]["conversations"] = []
    other = write_jsonl(tmp_path / "other.jsonl", records)
    check = next(c for c in verify_logits(output, other, progress=False).checks if c.name == "dataset")
    assert [problem.what.startswith("row 3 ('s3'): ") for problem in check.problems] == [False, True]


@pytest.mark.parametrize("name", ["manifest.json", "shard-00001.json"])
def test_a_storage_error_is_not_reported_as_damage(output: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def read_or_fail(path: Path) -> bytes:
        if path.name == name:
            raise StorageError(f"{path}: timed out")
        return path.read_bytes()

    monkeypatch.setattr("common.shards.manifest.read_bytes", read_or_fail)
    with pytest.raises(StorageError, match="timed out"):
        verify_logits(output, progress=False)


def test_an_unforeseen_failure_of_a_reader_is_a_problem_of_its_shard(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_group = ShardFile.read_group

    def read_or_fail(shard: ShardFile, group: int) -> list[ShardRow]:
        if shard.path.name == "shard-00001.parquet":
            raise KeyError("a column")
        return read_group(shard, group)

    monkeypatch.setattr(ShardFile, "read_group", read_or_fail)
    report = verify_logits(output, progress=False)
    assert "cannot be read (KeyError: 'a column')" in first_problems(report)["pages"]
    assert {name for check in report.checks for name in check.files} == {"shard-00001.parquet"}


def test_changed_messages_are_found(output: Path, whole: Path) -> None:
    rows = read_rows(output, 1)
    turns = ((*rows[0].sample.conversations[0][:-1], Turn("assistant", "forged")),)
    forged = dataclasses.replace(rows[0], sample=dataclasses.replace(rows[0].sample, conversations=turns))
    write_shard(output, 1, read_manifest(output), [forged, *rows[1:]], [])
    assert verify_logits(output, progress=False).ok
    assert (
        "conversations differ" in first_problems(verify_logits(output, whole / "data.jsonl", progress=False))["dataset"]
    )


@pytest.mark.parametrize("num_samples", [1, 3])
def test_generated_responses_pass_every_check(output: Path, whole: Path, num_samples: int) -> None:
    rewrite_as_generated(output, num_samples)
    report = verify_logits(output, whole / "data.jsonl", progress=False)
    assert report.ok
    assert report.num_rows == 10 * num_samples
    rows = read_rows(output, 1)
    write_shard(
        output,
        1,
        read_manifest(output),
        rows[num_samples:],
        [SkippedSample(index=4, id="s4", reason="cannot be answered")],
    )
    assert verify_logits(output, whole / "data.jsonl", progress=False).ok
    write_shard(output, 1, read_manifest(output), rows, [])
    assert verify_logits(output, whole / "data.jsonl", progress=False).ok


def replace_turns(row: ShardRow, *, first: Turn | None = None, last: Turn | None = None) -> ShardRow:
    turns = list(row.sample.conversations[0])
    turns[0], turns[-1] = first or turns[0], last or turns[-1]
    return replace_sample(row, conversations=(tuple(turns),))


def append_token(row: ShardRow) -> ShardRow:
    """Adds a token after the scored response."""
    (scored,) = row.conversations
    encoded = dataclasses.replace(scored.encoded, input_ids=np.append(scored.encoded.input_ids, np.int32(1)))
    return dataclasses.replace(row, conversations=(dataclasses.replace(scored, encoded=encoded),))


# For each damage: what it does to the rows of shard 1 (three responses to each of the samples 4 to 7), check, message.
GENERATED_DAMAGE: dict[str, tuple[Callable[[list[ShardRow]], list[ShardRow]], str, str]] = {
    "a response is missing": (lambda rows: [*rows[:2], *rows[3:]], "coverage", "4 to 7, 3 rows each"),
    "a response too many": (
        lambda rows: [*rows[:3], replace_sample(rows[2], id="s4#3"), *rows[3:]],
        "coverage",
        "13 rows and 0 skipped samples",
    ),
    "responses in another order": (lambda rows: [rows[1], rows[0], *rows[2:]], "order", "is response 0 to its sample"),
    "a response numbered twice": (
        lambda rows: [*rows[:2], replace_sample(rows[2], id="s4#1"), *rows[3:]],
        "order",
        "is response 2 to its sample|its id occurs twice",
    ),
    "an id without a number": (lambda rows: [replace_sample(rows[0], id="s4"), *rows[1:]], "order", "should end so"),
    "samples in another order": (lambda rows: [*rows[3:6], *rows[:3], *rows[6:]], "order", "comes after row 5"),
    "the id of another sample": (
        lambda rows: [replace_sample(rows[0], id="t4#0"), *rows[1:]],
        "dataset",
        "its id differ",
    ),
    "tokens after the response": (lambda rows: [append_token(rows[0]), *rows[1:]], "messages", "its response ends at"),
    "another prompt": (
        lambda rows: [replace_turns(rows[0], first=Turn("user", "<image>\nforged")), *rows[1:]],
        "dataset",
        "its conversations differ",
    ),
    "a last turn of the user's": (
        lambda rows: [replace_turns(rows[0], last=Turn("user", "mine")), *rows[1:]],
        "dataset",
        "its conversations differ",
    ),
}


@pytest.mark.parametrize("what", GENERATED_DAMAGE)
def test_damage_to_generated_rows_is_found(output: Path, whole: Path, what: str) -> None:
    rewrite_as_generated(output, 3)
    damage, check, message = GENERATED_DAMAGE[what]
    write_shard(output, 1, read_manifest(output), damage(read_rows(output, 1)), [])
    found = first_problems(verify_logits(output, whole / "data.jsonl", progress=False))
    assert re.search(message, found[check]), found


@pytest.mark.slow
def test_random_damage_never_crashes_and_never_passes(output: Path) -> None:
    """Flips bits and cuts bytes anywhere, in every kind of file."""
    rng = random.Random(0)
    files = {path: path.read_bytes() for path in output.iterdir() if path.suffix in (".json", ".parquet")}
    del files[output / "config.json"]
    for _ in range(150):
        path = rng.choice(sorted(files))
        data = bytearray(files[path])
        if rng.random() < 0.8:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        else:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        report = verify_logits(output, progress=False)
        assert render_text(report.render())
        same = path.suffix == ".json" and _same_json(bytes(data), files[path])
        assert report.ok == same, f"{path.name}: {hashlib.sha256(data).hexdigest()}"
        path.write_bytes(files[path])
    assert verify_logits(output, progress=False).ok


def _same_json(damaged: bytes, original: bytes) -> bool:
    """Returns True if the JSON values are equal, as when a bit turns a space into other white space."""
    try:
        return bool(json.loads(damaged) == json.loads(original))
    except ValueError:
        return False


def test_a_report_names_the_first_problems_and_counts_all(output: Path) -> None:
    report = verify_logits(output, progress=False)
    check = report.checks[0]
    for number in range(MAX_LISTED + 5):
        check.failed(output, f"problem {number}")
    text = render_text(report.render(), width=200)
    assert "problem 19" in text
    assert "problem 20" not in text
    assert "and 5 more" in text
    assert "NOT verified" in text


@pytest.mark.slow
def test_verification_loads_no_engine(whole: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from precompute.verify.logits import verify_logits\n"
        "assert verify_logits(Path(sys.argv[1]), Path(sys.argv[2]), progress=False).ok\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    arguments = [sys.executable, "-c", code, str(whole / "out"), str(whole / "data.jsonl")]
    subprocess.run(arguments, cwd=ROOT, check=True)
