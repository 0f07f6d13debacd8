"""Parquet files as `datasets`, pandas and pyarrow write them are read like the JSON of the same records."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.data import parquet_files
from common.data.dataset import Dataset
from common.data.samples import ImageRef, Turn
from common.errors import DataError

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(60))

# As `datasets` holds llava-instruct-mix-vsft and RLAIF-V: images inside, nulls where a struct has no value.
PARTS = [{"index": 0, "text": None, "type": "image"}, {"index": None, "text": "c?", "type": "text"}]
REPLY = [{"index": None, "text": "Red.", "type": "text"}]
VSFT = {
    "messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": REPLY}],
    "images": [{"bytes": PNG, "path": None}],
}
RLAIF = {
    "image": {"bytes": PNG, "path": "a.jpg"},
    "question": "c?",
    "chosen": "Red.",
    "rejected": "Blue.",
    "idx": 7,
    "ds_name": "x",
}


def write(path: Path, records: list[dict[str, Any]], rows_per_group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path, row_group_size=rows_per_group)
    return path


def text_records(count: int) -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "<image>\nc?"}, {"from": "gpt", "value": "Grün."}]
    return [{"id": f"s{i}", "image": f"図/{i}.png", "conversations": turns, "topic": "t"} for i in range(count)]


def test_images_inside_a_table_are_read(tmp_path: Path) -> None:
    sample = Dataset.open(write(tmp_path / "a.parquet", [VSFT]), "kd")[0]
    assert (sample.id, sample.source_id) == ("@0", None)
    assert sample.images == (ImageRef(None, PNG),)
    assert sample.conversations == ((Turn("user", "<image>c?"), Turn("assistant", "Red.")),)
    pair = Dataset.open(write(tmp_path / "b.parquet", [RLAIF]), "dpo")[0]
    assert (pair.id, pair.source_id, pair.images) == ("7", "7", (ImageRef("a.jpg", PNG),))
    assert [turns[-1].content for turns in pair.conversations] == ["Red.", "Blue."]


def test_what_datasets_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    records = text_records(4)
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "data.parquet"))
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines, table = (Dataset.open(tmp_path / name, "kd") for name in ("data.jsonl", "data.parquet"))
    assert [table[i] for i in range(4)] == [lines[i] for i in range(4)]
    assert list(table.ids) == ["s0", "s1", "s2", "s3"]


def test_rows_are_read_from_their_groups_in_any_order_and_after_pickling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_files, "_CACHED_BYTES", 1)
    dataset = Dataset.open(write(tmp_path / "a.parquet", text_records(10)), "kd")
    for found in (dataset, pickle.loads(pickle.dumps(dataset))):
        assert [found[i].images[0].path for i in (9, 0, 3, 2, 8)] == [f"図/{i}.png" for i in (9, 0, 3, 2, 8)]
    with pytest.raises(IndexError):
        dataset[10]


def test_a_folder_and_a_pattern_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    records = text_records(9)
    for number in (1, 0, 2):
        write(tmp_path / f"train-{number:05d}-of-00003.parquet", records[3 * number : 3 * number + 3])
    (tmp_path / "README.md").write_text("a card")
    folder, pattern = Dataset.open(tmp_path, "kd"), Dataset.open(tmp_path / "train-*.parquet", "kd")
    for dataset in (folder, pattern):
        assert [dataset[i].id for i in range(9)] == [f"s{i}" for i in range(9)]
        assert "train-00001-of-00003.parquet, row 2" in dataset.where(5)
    assert folder.sha256 == pattern.sha256
    write(tmp_path / "test-00000-of-00001.parquet", records[:1])
    with pytest.raises(DataError, match=r"several splits, test, train; name one, such as .*train-\*.parquet"):
        Dataset.open(tmp_path, "kd")
    assert len(Dataset.open(tmp_path / "train-*.parquet", "kd")) == 9
    with pytest.raises(DataError, match=r"no file in .* has such a name"):
        Dataset.open(tmp_path / "valid-*.parquet", "kd")


def test_a_folder_without_tables_is_refused_and_says_where_some_are(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-0.parquet", text_records(1))
    with pytest.raises(DataError, match=r"is a folder without .parquet files.*there are some in .*data"):
        Dataset.open(tmp_path, "kd")


def test_files_of_a_pattern_may_be_json(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / f"part[{number}].jsonl").write_text(json.dumps(text_records(2)[number]))
    assert list(Dataset.open(tmp_path / "part*.jsonl", "kd").ids) == ["s0", "s1"]
    # The name of a file comes before its meaning as a pattern.
    assert list(Dataset.open(tmp_path / "part[1].jsonl", "kd").ids) == ["s1"]


def test_the_digest_covers_all_but_the_pages_of_images(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [RLAIF, RLAIF | {"image": {"bytes": PNG + b"2", "path": "b.jpg"}}])
    data, digest = path.read_bytes(), Dataset.open(path, "dpo").sha256
    for number in range(pq.read_metadata(path).num_columns):
        column = pq.read_metadata(path).row_group(0).column(number)
        if column.path_in_schema in ("idx", "question"):
            continue
        last = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1
        path.write_bytes(data[:last] + bytes([data[last] ^ 1]) + data[last + 1 :])
        assert (Dataset.open(path, "dpo").sha256 == digest) == (column.path_in_schema == "image.bytes")
        path.write_bytes(data)


def test_numbers_that_pandas_made_floats_are_ids(tmp_path: Path) -> None:
    turns = text_records(1)[0]["conversations"]
    frame = pd.DataFrame({"id": [1.0, None, 3.0], "image": ["a.jpg"] * 3, "conversations": [turns] * 3})
    frame.to_parquet(tmp_path / "a.parquet")
    assert list(Dataset.open(tmp_path / "a.parquet", "kd").ids) == ["1", "@1", "3"]


def test_columns_that_are_not_used_are_said_with_their_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = text_records(4)
    records[0]["grade"] = 1
    for record in records:
        record["conversations"] = [{"emotion": None, **turn} for turn in record["conversations"]]
    records[1]["conversations"][0]["emotion"] = "glad"
    path = write(tmp_path / "a.parquet", records)
    with caplog.at_level(logging.INFO, "common"):
        Dataset.open(path, "kd")
    assert caplog.messages == [f"{path}: not used: keys topic (4), conversations.emotion (1), grade (1)"]


def test_a_column_that_changes_the_meaning_is_refused_by_name(tmp_path: Path) -> None:
    dataset = Dataset.open(write(tmp_path / "a.parquet", [text_records(1)[0] | {"video": "v.mp4"}]), "kd")
    with pytest.raises(DataError, match=r"sample 's0' \(row 0\): \"video\" is given"):
        dataset[0]


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path / "a.parquet", text_records(5))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a.parquet: the dataset cannot be read"):
        Dataset.open(path, "kd")


def test_a_damaged_page_names_its_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(text_records(50)), path, compression="zstd", use_dictionary=False)
    column = pq.read_metadata(path).row_group(0).column(2)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    dataset = Dataset.open(path, "kd")
    with pytest.raises(DataError, match=r"a.parquet: row group 0 cannot be read"):
        dataset[0]
