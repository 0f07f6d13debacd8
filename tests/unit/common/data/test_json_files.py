import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from common.data.samples import Dataset
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
        assert Dataset.open(path, "kd").ids == ("a", "b")
    broken = data.replace(b'"b"', b"b")
    path.write_bytes(compress(broken))
    line = broken[: broken.index(b": b")].count(b"\n") + 1
    with pytest.raises(DataError, match=rf"line {line}, column \d+: broken JSON"):
        Dataset.open(path, "kd")


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_data_is_recognised_without_its_suffix(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(compress(json.dumps([GOOD]).encode()))
    assert Dataset.open(path, "kd").ids == ("a",)


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
