import base64
import hashlib
import math
import shutil
import tracemalloc
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.data.chat_encoding import EncodedChat
from common.data.samples import Kind, Sample, Turn
from common.errors import ProvenanceError, ShardError, StorageError
from common.shards.codec import ID_COLUMNS
from common.shards.manifest import (
    ShardCheck,
    SkippedSample,
    file_sha256,
    published_shards,
    read_receipt,
    receipt_path,
    shard_path,
    write_with_digest,
)
from common.shards.score_shard import (
    ROWS_PER_GROUP,
    ScoredConversation,
    ShardFile,
    ShardRow,
    num_scored_tokens,
    write_shard,
)
from common.shards.scores import TeacherScores, scores_from_topk
from tests.support.builders import IMAGE_TOKEN_ID, VOCAB_SIZE, make_manifest, make_rows, read_table
from tests.support.outputs import rewrite_receipt, rewrite_shard

# Settings of the capture and of `make_rows` for each kind of kept entries.
CAPTURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "best": ({}, {}),
    "drawn": ({"top_k": 0, "num_draws": 40, "seed": 0}, {"num_draws": 40}),
}

NATIVE = {
    "messages": 'STRUCT("role" VARCHAR, "content" VARCHAR, scored BOOLEAN)[]',
    "input_ids": "INTEGER[]",
    "response_spans": 'STRUCT("start" INTEGER, stop INTEGER)[]',
    "logprob_sum": "DOUBLE",
    "own_logprobs": "FLOAT[]",
    "rest_mass": "FLOAT[]",
    "topk_counts": "INTEGER[]",
    "topk_tables": "UTINYINT[]",
    **dict.fromkeys(ID_COLUMNS, "BLOB"),
}


def query(sql: str) -> list[tuple[Any, ...]]:
    relation = duckdb.sql(sql)
    assert relation is not None
    return relation.fetchall()


def assert_same_rows(found: list[ShardRow], expected: list[ShardRow]) -> None:
    assert [(row.index, row.sample) for row in found] == [(row.index, row.sample) for row in expected]
    for one, two in zip(found, expected, strict=True):
        for a, b in zip(one.conversations, two.conversations, strict=True):
            assert a.encoded.image_token_id == b.encoded.image_token_id
            pairs = [(a.encoded.input_ids, b.encoded.input_ids), (a.encoded.spans, b.encoded.spans)]
            assert (a.scores.draws is None) == (b.scores.draws is None)
            names = ["own_logprobs", "rest_mass", "counts", "ids", "logprobs"]
            if a.scores.draws is not None:
                names.append("draws")
            for x, y in pairs + [(getattr(a.scores, name), getattr(b.scores, name)) for name in names]:
                assert x.dtype == y.dtype
                np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("kind", ["kd", "dpo"])
@pytest.mark.parametrize("num_rows", [0, 1, ROWS_PER_GROUP, 2 * ROWS_PER_GROUP + 3])
def test_rows_are_read_as_they_were_written(tmp_path: Path, kind: Kind, num_rows: int, capture: str) -> None:
    settings, entries = CAPTURES[capture]
    manifest, rows = make_manifest(kind, **settings), make_rows(kind, num_rows, **entries)
    skipped = [SkippedSample(index=199, id="s199", reason="no assistant turn")]
    receipt = write_shard(tmp_path, 3, manifest, rows, skipped)
    assert read_receipt(tmp_path, 3, manifest) == receipt
    path = shard_path(tmp_path, 3)
    assert (receipt.num_bytes, receipt.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    num_tokens = sum(len(c.scores.own_logprobs) for row in rows for c in row.conversations)
    assert (receipt.num_rows, receipt.num_scored_tokens) == (num_rows, num_tokens)
    assert receipt.skipped == tuple(skipped)
    shard = ShardFile(path, manifest, 3)
    assert shard.num_rows == num_rows
    assert sum(map(shard.num_group_rows, range(shard.num_groups))) == num_rows
    assert max(map(shard.num_group_rows, range(shard.num_groups)), default=0) <= ROWS_PER_GROUP
    assert_same_rows(list(shard), rows)
    assert num_scored_tokens(shard) == num_tokens
    if num_rows:
        assert_same_rows(shard.read_group(shard.num_groups - 1), rows[(shard.num_groups - 1) * ROWS_PER_GROUP :])
    shard.close()


def scored_row(index: int, scores: TeacherScores, image_token_id: int | None) -> ShardRow:
    num_rows = scores.num_rows
    encoded = EncodedChat(
        np.arange(num_rows + 1, dtype=np.int32), np.array([[1, num_rows + 1]], np.int32), image_token_id
    )
    turns = (Turn("user", ""), Turn("assistant", "x"))
    return ShardRow(index, Sample(str(index), "kd", (), (turns,)), (ScoredConversation(encoded, scores),))


def test_rows_without_entries_and_rows_with_the_whole_vocabulary_are_kept(tmp_path: Path) -> None:
    own = np.array([-1.0], np.float32)
    all_ids = np.arange(1000)[None]
    nothing = scores_from_topk(own, all_ids[:, :0], np.zeros((1, 0), np.float32))
    everything = scores_from_topk(own, all_ids, np.full((1, 1000), -math.log(1000), np.float32))
    rows = [scored_row(0, nothing, None), scored_row(1, everything, None)]
    manifest = make_manifest()
    write_shard(tmp_path, 0, manifest, rows, ())
    found = list(ShardFile(shard_path(tmp_path, 0), manifest, 0))
    assert_same_rows(found, rows)
    assert [row.conversations[0].scores.rest_mass[0] for row in found] == [1.0, 0.0]


def test_rows_that_keep_different_numbers_are_kept(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    logprobs = np.log(rng.dirichlet(np.full(20, 0.3), 50)).astype(np.float32)
    own, ids = logprobs[:, 0].copy(), np.tile(np.arange(20), (50, 1))
    scores = scores_from_topk(own, ids, logprobs, top_p=0.9, min_k=2)
    assert len(set(scores.counts.tolist())) > 3
    manifest = make_manifest(top_k=20, top_p=0.9, min_k=2)
    write_shard(tmp_path, 0, manifest, [scored_row(0, scores, None)], ())
    assert_same_rows(list(ShardFile(shard_path(tmp_path, 0), manifest, 0)), [scored_row(0, scores, None)])


def test_rows_that_were_read_own_their_memory(tmp_path: Path) -> None:
    manifest = make_manifest()
    write_shard(tmp_path, 0, manifest, make_rows("kd", 3), ())
    scored = next(iter(ShardFile(shard_path(tmp_path, 0), manifest, 0))).conversations[0]
    for array in (scored.encoded.input_ids, scored.encoded.spans, scored.scores.own_logprobs, scored.scores.counts):
        assert array.flags.writeable
        assert array.base is None or array.base.nbytes == array.nbytes


@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_the_same_rows_give_the_same_bytes(tmp_path: Path, kind: Kind) -> None:
    for output in ("a", "b"):
        write_shard(tmp_path / output, 0, make_manifest(kind), make_rows(kind, 100), ())
    for name in ("shard-00000.parquet", "shard-00000.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("failing", [1, 2])
def test_a_shard_whose_write_failed_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    replace, calls = Path.replace, iter(range(1, 9))

    def full_disk(self: Path, target: Path) -> Path:
        if next(calls) == failing:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(StorageError):
        write_shard(tmp_path, 0, make_manifest(), make_rows("kd", 3), ())
    assert published_shards(tmp_path) == ()
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.parquet"][: failing - 1]
    write_shard(tmp_path, 0, make_manifest(), make_rows("kd", 3), ())
    assert published_shards(tmp_path) == (0,)


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_duckdb_sees_native_columns(tmp_path: Path, kind: Kind, capture: str) -> None:
    settings, entries = CAPTURES[capture]
    rows = make_rows(kind, 70, **entries)
    write_shard(tmp_path, 0, make_manifest(kind, **settings), rows, ())
    drawn = ("topk_repeated", "topk_draws_0", "topk_draws_1")
    names = drawn if capture == "drawn" else [f"topk_logprobs_{p}" for p in range(4)]
    packed = dict.fromkeys(names, "BLOB")
    prefixes = ("",) if kind == "kd" else ("chosen_", "rejected_")
    files = f"read_parquet('{tmp_path}/shard-*.parquet')"
    found = {name: column for name, column, *_ in query(f"describe select * from {files}")}
    assert found == {
        "sample_id": "VARCHAR",
        "source_id": "VARCHAR",
        "index": "BIGINT",
        "images": "STRUCT(bytes BLOB, path VARCHAR)[]",
    } | {prefix + name: column for prefix in prefixes for name, column in (NATIVE | packed).items()}
    for which, prefix in enumerate(prefixes):
        ((counts, total, low),) = query(
            f"select sum(list_sum({prefix}topk_counts)), sum({prefix}logprob_sum), "
            f"min(list_min({prefix}own_logprobs)) from {files}"
        )
        scores = [row.conversations[which].scores for row in rows]
        assert counts == sum(len(s.ids) for s in scores)
        assert total == pytest.approx(math.fsum(float(v) for s in scores for v in s.own_logprobs), rel=1e-12)
        assert low == min(float(s.own_logprobs.min()) for s in scores)


def test_pandas_and_pyarrow_see_the_values(tmp_path: Path) -> None:
    rows = make_rows("kd", 5)
    write_shard(tmp_path, 0, make_manifest(), rows, ())
    frame = pd.read_parquet(shard_path(tmp_path, 0))
    assert frame["sample_id"].tolist() == [f"s{i}" for i in range(5)]
    assert frame["images"][2][1]["bytes"] == rows[2].sample.images[1].data
    assert frame["images"][2][0]["path"] == "a/2.png"
    table = pq.read_table(shard_path(tmp_path, 0))
    assert table["messages"][1].as_py()[1] == {"role": "assistant", "content": "ja 🐈", "scored": True}
    assert table["response_spans"][0].as_py() == [{"start": 2, "stop": 5}, {"start": 7, "stop": 12}]
    assert table["own_logprobs"][4].as_py() == rows[4].conversations[0].scores.own_logprobs.tolist()
    assert [name for name in table.column_names if table.schema.field(name).nullable] == ["source_id"]


def test_hugging_face_datasets_opens_shards_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    rows = make_rows("dpo", 4)
    for number in (0, 1):
        write_shard(tmp_path, number, make_manifest("dpo"), rows, ())
    files = [str(shard_path(tmp_path, number)) for number in (0, 1)]
    found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(found) == 8
    assert found[6]["rejected_messages"] == [
        {"role": "user", "content": "<image>\nQuestion 2?", "scored": True},
        {"role": "assistant", "content": "", "scored": True},
    ]
    assert found[6]["images"][1]["bytes"] == rows[2].sample.images[1].data
    assert found.features["chosen_own_logprobs"] == datasets.List(datasets.Value("float32"))
    assert found[3]["chosen_own_logprobs"] == rows[3].conversations[0].scores.own_logprobs.tolist()


def test_pages_are_zstd_with_checksums_and_roles_share_a_dictionary(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, make_manifest("dpo"), make_rows("dpo", 5), ())
    group = pq.read_metadata(shard_path(tmp_path, 0)).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    assert {column.compression for column in columns} == {"ZSTD"}
    dictionaries = {c.path_in_schema for c in columns if "RLE_DICTIONARY" in c.encodings}
    names = ("messages.list.element.role", "topk_counts.list.element")
    assert dictionaries == {f"{prefix}_{name}" for prefix in ("chosen", "rejected") for name in names}
    # The page's own checksum finds a changed byte, without the receipt.
    offset = next(c for c in columns if c.path_in_schema == "chosen_topk_logprobs_1").data_page_offset + 60
    data = bytearray(shard_path(tmp_path, 0).read_bytes())
    data[offset] ^= 1
    shard_path(tmp_path, 0).write_bytes(bytes(data))
    rewrite_receipt(tmp_path, 0)
    with pytest.raises(ShardError, match="CRC"):
        list(ShardFile(shard_path(tmp_path, 0), make_manifest("dpo"), 0))


def test_a_column_is_read_alone(tmp_path: Path) -> None:
    manifest, rows = make_manifest(), make_rows("kd", 70)
    write_shard(tmp_path, 0, manifest, rows, ())
    shard = ShardFile(shard_path(tmp_path, 0), manifest, 0)
    assert shard.read_column("index") == list(range(70))
    with pytest.raises(ShardError, match="no_such_column"):
        shard.read_column("no_such_column")


def test_a_renamed_shard_or_one_of_another_output_or_kind_is_refused(tmp_path: Path) -> None:
    manifest = make_manifest()
    write_shard(tmp_path, 0, manifest, make_rows("kd", 2), ())
    path, other = shard_path(tmp_path, 0), tmp_path / "other"
    for expected in (make_manifest(num_samples=201), make_manifest("dpo"), make_manifest(top_k=0, num_draws=3)):
        with pytest.raises(ProvenanceError, match=r"shard-00000\.json: belongs to an output with another manifest"):
            ShardFile(path, expected, 0)
    for suffix in (".parquet", ".json"):
        shutil.copy(tmp_path / f"shard-00000{suffix}", tmp_path / f"shard-00001{suffix}")
    with pytest.raises(ShardError, match=r"shard-00001\.json: is the receipt of shard 0; the file was renamed"):
        ShardFile(shard_path(tmp_path, 1), manifest, 1)
    # The file's own footer is checked too, behind a receipt that fits its bytes.
    for expected, number, found in (
        (manifest, 1, "holds shard '0'; the file was renamed"),
        (make_manifest(num_samples=201), 0, "another manifest"),
        (make_manifest("dpo"), 0, "columns are not those of a dpo shard"),
        (make_manifest(top_k=0, num_draws=3), 0, "kd shard with drawn entries"),
    ):
        write_shard(other, number, expected, [], ())
        shutil.copy(tmp_path / "shard-00000.parquet", other / f"shard-{number:05d}.parquet")
        rewrite_receipt(other, number)
        with pytest.raises(ShardError, match=f"{shard_path(other, number)}.*{found}"):
            ShardFile(shard_path(other, number), expected, number)


def test_a_shard_is_compared_with_its_receipt_before_it_is_parsed(tmp_path: Path) -> None:
    manifest = make_manifest()
    write_shard(tmp_path, 0, manifest, make_rows("kd", 2), ())
    path = shard_path(tmp_path, 0)
    whole = path.read_bytes()
    # The reader is not even asked about bytes that are not those of the receipt.
    with patch("common.shards.parquet_shard.pq.ParquetFile", side_effect=AssertionError):
        path.write_bytes(whole[:-20] + bytes(20))
        for check, found in (("sha256", "has SHA-256 .*, its receipt says"), ("size", None)):
            error: type[Exception] = AssertionError if found is None else ShardError
            with pytest.raises(error, match=found):
                ShardFile(path, manifest, 0, check=cast(ShardCheck, check))
        path.write_bytes(whole[:-20])
        with pytest.raises(ShardError, match="bytes, its receipt says"):
            ShardFile(path, manifest, 0, check="size")
    path.write_bytes(whole)
    with patch("common.shards.parquet_shard.file_sha256", wraps=file_sha256) as hashed:
        for _ in range(3):
            ShardFile(path, manifest, 0).close()
    assert hashed.call_count == 1


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" * 9, b'{"a": 1}'])
def test_a_file_that_is_no_parquet_is_a_shard_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "shard-00000.parquet"
    write_shard(tmp_path, 0, make_manifest(), make_rows("kd", 1), ())
    path.write_bytes(data)
    rewrite_receipt(tmp_path, 0)
    with pytest.raises(ShardError, match=str(path)):
        ShardFile(path, make_manifest(), 0)
    path.unlink()
    with pytest.raises(ShardError, match=str(path)):
        ShardFile(path, make_manifest(), 0)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("own_logprobs", [0.5]),
        ("own_logprobs", [None] * 8),
        ("topk_counts", [2**31 - 1] * 8),
        ("topk_counts", [-1] * 8),
        ("topk_tables", [0]),
        ("topk_tables", [1] * 8),
        ("topk_ids_3", b"123"),
        ("topk_ids_low", b"1"),
        ("topk_ids_high", b"12"),
        ("topk_logprobs_3", b""),
        ("response_spans", []),
        ("response_spans", [{"start": 2, "stop": None}]),
    ],
)
def test_well_formed_parquet_with_wrong_values_is_refused(tmp_path: Path, column: str, value: object) -> None:
    manifest = make_manifest()
    write_shard(tmp_path, 0, manifest, make_rows("kd", 3), ())
    path = tmp_path / "shard-00000.parquet"
    table = read_table(path)
    values = table[column].to_pylist()
    values[1] = value
    position, field = table.column_names.index(column), table.schema.field(column)
    pq.write_table(table.set_column(position, field, pa.array(values, field.type)), path)
    rewrite_receipt(tmp_path, 0)
    with pytest.raises(ShardError, match=f"{path}.*(row|null)"):
        list(ShardFile(path, manifest, 0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_flipped_bits_are_found_by_sha256_and_never_crash_the_reader(tmp_path: Path, kind: Kind) -> None:
    manifest, rows = make_manifest(kind), make_rows(kind, 3)
    receipt = write_shard(tmp_path, 0, manifest, rows, ())
    path = shard_path(tmp_path, 0)
    whole, rng = path.read_bytes(), np.random.default_rng(5)
    num_refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(data))
        assert file_sha256(path) != receipt.sha256
        try:
            list(ShardFile(path, manifest, 0, check="size"))
        except ShardError as error:
            assert str(path) in str(error)
            num_refused += 1
    assert num_refused > 100
    for end in rng.integers(0, len(whole), 40):
        path.write_bytes(whole[:end])
        with pytest.raises(ShardError, match=str(path)):
            ShardFile(path, manifest, 0)


def test_the_image_token_is_kept_with_and_without_one(tmp_path: Path) -> None:
    manifest = make_manifest()
    scores = scores_from_topk(np.zeros(2, np.float32), np.zeros((2, 1), np.int64), np.zeros((2, 1), np.float32))
    for image_token_id in (None, 0, IMAGE_TOKEN_ID):
        write_shard(tmp_path, 0, manifest, [scored_row(0, scores, image_token_id)], ())
        (row,) = ShardFile(shard_path(tmp_path, 0), manifest, 0)
        assert row.conversations[0].encoded.image_token_id == image_token_id
    assert receipt_path(tmp_path, 0).exists()


@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_sizes_are_read_without_decoding_the_rows(tmp_path: Path, kind: Kind) -> None:
    manifest, rows = make_manifest(kind), make_rows(kind, ROWS_PER_GROUP + 3)
    write_shard(tmp_path, 0, manifest, rows, ())
    sizes = ShardFile(shard_path(tmp_path, 0), manifest, 0).read_sizes(1)
    assert sizes.dtype == np.int32
    # Every conversation of `make_rows` has 12 tokens, of which the last is scored.
    assert sizes.tolist() == [[12, len(row.sample.images)] for row in rows[ROWS_PER_GROUP:]]


def _rewrite(output: Path, **columns: Any) -> None:
    """Replaces columns of shard 0, and writes a receipt that matches its bytes."""
    path = output / "shard-00000.parquet"
    table = read_table(path)
    for name, values in columns.items():
        position = table.schema.get_field_index(name)
        field = table.schema.field(position)
        table = table.set_column(position, field, pa.array(values, field.type))
    pq.write_table(table, path, compression="zstd")
    rewrite_receipt(output, 0)


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"input_ids": [[1, 2, VOCAB_SIZE]] * 3}, "token ids from 1 to .*, the tokenizer has"),
        ({"input_ids": [[1, 2, -1]] * 3}, "token ids from -1"),
        ({"response_spans": [[{"start": 2, "stop": 2**31 - 1}]] * 3}, "leave a sequence of"),
        ({"response_spans": [[{"start": -5, "stop": 2}]] * 3}, "leave a sequence of"),
        ({"response_spans": [[{"start": 5, "stop": 3}]] * 3}, "leave a sequence of"),
    ],
)
def test_ids_and_spans_beyond_their_range_are_refused_by_name(
    tmp_path: Path, columns: dict[str, Any], found: str
) -> None:
    write_shard(tmp_path, 0, make_manifest(), make_rows("kd", 3), ())
    _rewrite(tmp_path, **columns)
    shard = ShardFile(shard_path(tmp_path, 0), make_manifest(), 0)
    with pytest.raises(ShardError, match=f"shard-00000.parquet: .*{found}"):
        shard.read_unscored(0)
    with pytest.raises(ShardError, match=r"shard-00000\.parquet: .*the shard is damaged"):
        shard.read_group(0)


def test_a_small_file_that_claims_much_memory_is_refused_before_any_is_taken(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, make_manifest(), make_rows("kd", 3), ())
    _rewrite(tmp_path, sample_id=["a" * (300 << 20), "b", "c"])
    assert shard_path(tmp_path, 0).stat().st_size < 1 << 20
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    with pytest.raises(ShardError, match=r"shard-00000.parquet: row group 0: column sample_id would take 314,"):
        ShardFile(shard_path(tmp_path, 0), make_manifest(), 0)
    assert tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before < 40 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("change", [-1, 1])
def test_a_row_more_or_less_than_the_receipt_says_is_refused_by_name(tmp_path: Path, change: int) -> None:
    receipt = write_shard(tmp_path, 0, make_manifest(), make_rows("kd", 3), ())
    path = receipt_path(tmp_path, 0)
    write_with_digest(path, receipt.model_copy(update={"num_rows": 3 + change}))
    with pytest.raises(ShardError, match=rf"shard-00000.parquet: has 3 rows, its receipt says {3 + change}"):
        ShardFile(shard_path(tmp_path, 0), make_manifest(), 0)


def test_token_classes_that_claim_terabytes_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, 0, make_manifest(), make_rows("kd", 3), ())
    # The header of a zstd frame with a content size of 2^42 bytes.
    frame = b"\x28\xb5\x2f\xfd\xe0" + (2**42).to_bytes(8, "little") + b"\x01\x00\x00"
    rewrite_shard(tmp_path, 0, token_classes=base64.b64encode(frame).decode())
    with pytest.raises(ShardError, match=r"shard-00000.parquet: its token classes cannot be read \(it claims 4,398"):
        ShardFile(shard_path(tmp_path, 0), make_manifest(), 0)
