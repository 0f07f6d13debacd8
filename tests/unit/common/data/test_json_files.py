import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from common.data import json_files
from common.data.dataset import Dataset
from common.errors import DataError

GOOD = {"id": "a", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("text", [json.dumps({"data": [GOOD]}, indent=1), json.dumps(GOOD, indent=1) * 2])
def test_an_object_over_several_lines_is_refused_as_such(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text("\n" + text)
    with pytest.raises(DataError, match="line 2: an object over several lines; expected a JSON array"):
        Dataset.open(tmp_path / name, "kd")


@pytest.mark.parametrize("name", ["data", "data.json", "data.jsonl", "data.json.gz", "data.jsonl.gz", "data.json.zst"])
@pytest.mark.parametrize("is_array", [True, False])
def test_array_and_lines_are_told_apart_by_content_whatever_the_name(tmp_path: Path, name: str, is_array: bool) -> None:
    records = [GOOD, GOOD | {"id": "b"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    data = (json.dumps(records, indent=1) if is_array else "\n  " + lines).encode()
    path = tmp_path / name
    compressors: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    compress = compressors.get(path.suffix, bytes)
    for before in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(compress(before + data))
        assert tuple(Dataset.open(path, "kd").ids) == ("a", "b")
    broken = data.replace(b'"b"', b"b")
    path.write_bytes(compress(broken))
    line = broken[: broken.index(b": b")].count(b"\n") + 1
    with pytest.raises(DataError, match=rf"line {line}, column \d+: broken JSON"):
        Dataset.open(path, "kd")


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_data_is_recognised_without_its_suffix(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(compress(json.dumps([GOOD]).encode()))
    assert tuple(Dataset.open(path, "kd").ids) == ("a",)


@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_compressed_data_that_ends_too_early_or_is_damaged_is_refused(tmp_path: Path, suffix: str) -> None:
    data = b"".join(json.dumps(GOOD | {"id": i}).encode() + b"\n" for i in range(20_000))
    packed = zstandard.ZstdCompressor(level=1).compress(data) if suffix == "zst" else gzip.compress(data, 1)
    path = tmp_path / f"data.jsonl.{suffix}"
    for cut in (len(packed) // 2, len(packed) - 1, 3):
        path.write_bytes(packed[:cut])
        with pytest.raises(DataError, match="cannot be read"):
            Dataset.open(path, "kd")
    if suffix == "gz":
        for place in (0, len(packed) // 2, len(packed) - 6):
            path.write_bytes(packed[:place] + bytes([packed[place] ^ 1]) + packed[place + 1 :])
            with pytest.raises(DataError, match="cannot be read"):
                Dataset.open(path, "kd")


def _awkward_records(seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    texts = ["", "x" * 40, 'say "hi"\\', "Grün", "図🐈", "😀", "\u2028[{]},", "\\u0041"]
    return [
        {"id": f"{texts[int(rng.integers(len(texts)))]}{i}", "n": [1.5e300, -0.0, 12345678901234567890, None, True]}
        | {"conversations": [{"from": "human", "value": texts[int(rng.integers(len(texts)))]}]}
        for i in range(12)
    ]


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_an_array_is_read_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, indent: int | None, ensure_ascii: bool
) -> None:
    monkeypatch.setattr(json_files, "_CHUNK_BYTES", chunk_bytes)
    records = _awkward_records(chunk_bytes)
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=ensure_ascii) + " \n", "utf-8")
    file = json_files.JsonFile(path)
    assert [file[i] for i in range(len(file))] == records
    assert [file.source_ids[i] for i in range(len(file))] == [record["id"] for record in records]


@pytest.mark.parametrize("chunk_bytes", [3, 1 << 20])
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('[{"id": 1}\n{"id": 2}]', r"line 2, column 1: broken JSON: Expecting ',' delimiter"),
        ('[{"id": 1},\n {"id": "a}]', "line 2, column 9: broken JSON: Unterminated string"),
        ('[{"id": 1},\n {"id": 2}', r"line 2, column 11: broken JSON: Expecting ',' delimiter"),
        ('[{"id": 1}] x', "line 1, column 13: broken JSON: Extra data"),
        ('[{"id": 1},\n]', "line 2, column 1: broken JSON: Expecting value"),
        ('[{"id": 1},\n {"ü": "ü", "id": tru}]', "line 2, column 19: broken JSON: Expecting value"),
        ("[" * 100_000, "line 1: cannot be read as JSON: maximum recursion depth"),
    ],
)
def test_an_array_that_is_broken_is_named_with_line_and_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, text: str, found: str
) -> None:
    monkeypatch.setattr(json_files, "_CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "data.json"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError, match=found):
        Dataset.open(path, "kd")


def test_utf16_is_read_as_utf8_is(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD | {"id": "図"}], ensure_ascii=False), "utf-16")
    assert list(Dataset.open(path, "kd").ids) == ["図"]


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz", "data.json"])
def test_a_dataset_is_read_by_another_process(tmp_path: Path, name: str) -> None:
    records = [GOOD, GOOD | {"id": "b"}]
    text = json.dumps(records) if name == "data.json" else "".join(json.dumps(record) + "\n" for record in records)
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    dataset = Dataset.open(path, "kd")
    assert pickle.loads(pickle.dumps(dataset))[1] == dataset[1]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    dataset = Dataset.open(path, "kd")
    dataset[0]
    with path.open("a") as file:
        file.write(json.dumps(GOOD | {"id": "b"}) + "\n")
    with pytest.raises(DataError, match=r"data.jsonl: was changed while it was read"):
        dataset[0]
