"""docs/shard-format.md against the files: a reader that knows only that page."""

import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.manifest import CaptureSettings, GenerateSettings, Manifest, Receipt, Skipped, open_output
from common.samples import Kind
from common.scores import pack_draws, pack_ids, pack_logprobs
from common.shards import schema, write_shard
from tests.common.builders import make_manifest, make_rows

PAGE = (Path(__file__).parents[2] / "docs" / "shard-format.md").read_text("utf-8")


def decode(data: bytes, num_entries: int, width: int) -> list[bytes]:
    """Byte p of entry i stands at offset p N + i."""
    return [bytes(data[p * num_entries + i] for p in range(width)) for i in range(num_entries)]


def decode_rows(counts: list[int], ids: bytes, logprobs: bytes) -> list[list[tuple[int, float]]]:
    num_entries = sum(counts)
    assert (len(ids), len(logprobs)) == (3 * num_entries, 4 * num_entries)
    entries = iter(
        (struct.unpack("<I", i + b"\0")[0], struct.unpack("<f", p)[0])
        for i, p in zip(decode(ids, num_entries, 3), decode(logprobs, num_entries, 4), strict=True)
    )
    return [[next(entries) for _ in range(count)] for count in counts]


def test_the_worked_example_is_right() -> None:
    stated: list[list[tuple[int, float]]] = [[], []]
    cells = r"^\| (\d) \| (\d+) \| 0x([0-9A-F]{6}) \| (-[\d.]+) \| 0x([0-9A-F]{8}) \|$"
    for row, token_id, id_bits, logprob, bits in re.findall(cells, PAGE, re.MULTILINE):
        stated[int(row)].append((int(token_id), float(logprob)))
        assert int(id_bits, 16) == int(token_id)
        assert struct.pack(">f", float(logprob)) == bytes.fromhex(bits)
    lines = dict(re.findall(r"^(topk_\w+) +([0-9A-F ]+)$", PAGE, re.MULTILINE))
    counts = [int(count) for count in lines["topk_counts"].split()]
    ids, logprobs = bytes.fromhex(lines["topk_ids"]), bytes.fromhex(lines["topk_logprobs"])
    assert decode_rows(counts, ids, logprobs) == stated
    assert [len(row) for row in stated] == [2, 1]
    draws = bytes.fromhex(lines["topk_draws"])
    assert [struct.unpack("<H", entry)[0] for entry in decode(draws, 3, 2)] == [300, 2, 302]
    assert pack_draws(np.array([300, 2, 302], np.int32)) == draws
    flat = [entry for row in stated for entry in row]
    assert pack_ids(np.array([i for i, _ in flat], np.int32)) == ids
    assert pack_logprobs(np.array([p for _, p in flat], np.float32)) == logprobs


@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_a_reader_that_knows_only_the_page_finds_what_was_written(tmp_path: Path, kind: Kind) -> None:
    manifest, rows = make_manifest(kind), make_rows(kind, 70)
    open_output(tmp_path, manifest)
    write_shard(tmp_path, 0, manifest, rows, [Skipped(index=70, id="Ünï 🐈", reason='“missing”: "a\\b"\n\x1f\x7f\t')])

    contents = {}
    for name in ("manifest.json", "shard-00000.json"):
        content = json.loads((tmp_path / name).read_text("utf-8"))
        claimed = content.pop("content_sha256")
        assert hashlib.sha256(canonical(content).encode("ascii")).hexdigest() == claimed
        contents[name] = content | {"digest": claimed}
    receipt, digest = contents["shard-00000.json"], contents["manifest.json"]["digest"]
    data = (tmp_path / "shard-00000.parquet").read_bytes()
    assert receipt["manifest_sha256"] == digest
    assert (receipt["num_bytes"], receipt["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())

    file = pq.ParquetFile(tmp_path / "shard-00000.parquet")
    assert file.metadata.metadata[b"decant.manifest_sha256"].decode() == digest
    assert file.metadata.metadata[b"decant.shard"] == b"0"
    assert file.metadata.metadata[b"decant.image_token_id"] == b"151646"
    assert [file.metadata.row_group(i).num_rows for i in range(2)] == [64, 6]
    records = file.read().to_pylist()
    assert [record["index"] for record in records] == list(range(70))
    num_scored = 0
    for record, row in zip(records, rows, strict=True):
        for prefix, scored in zip(("",) if kind == "kd" else ("chosen_", "rejected_"), row.conversations, strict=True):
            spans = [(span["start"], span["stop"]) for span in record[prefix + "response_spans"]]
            own = record[prefix + "own_logprobs"]
            num_scored += len(own)
            assert len(own) == sum(stop - start for start, stop in spans)
            assert own == scored.scores.own_logprobs.tolist()
            assert record[prefix + "logprob_sum"] == pytest.approx(sum(own), rel=1e-12)
            counts = record[prefix + "topk_counts"]
            entries = decode_rows(counts, record[prefix + "topk_ids"], record[prefix + "topk_logprobs"])
            ids_RK, logprobs_RK = scored.scores.topk()
            for found, count, ids, logprobs in zip(entries, counts, ids_RK, logprobs_RK, strict=True):
                assert found == list(zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True))
                assert found == sorted(found, key=lambda entry: (-entry[1], entry[0]))
    assert num_scored == receipt["num_scored_tokens"]


def canonical(value: object) -> str:
    """The page's canonical JSON, written by hand."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return shortest(value)
    assert isinstance(value, str)
    units = struct.unpack(f"<{len(value.encode('utf-16-le')) // 2}H", value.encode("utf-16-le"))
    short = {ord('"'): '\\"', ord("\\"): "\\\\", 10: "\\n", 13: "\\r", 9: "\\t", 8: "\\b", 12: "\\f"}
    escapes = short | {unit: f"\\u{unit:04x}" for unit in {*range(32), *units} - {*range(32, 127)} - set(short)}
    return '"' + "".join(escapes.get(unit, chr(unit)) for unit in units) + '"'


def shortest(value: float) -> str:
    """The page's spelling of a number from 1e-99 to 1e15, by trying one digit more until it reads back."""
    digits, exponent = next(
        (text.split("e")[0].replace(".", ""), int(text.split("e")[1]))
        for text in (f"{value:.{places}e}" for places in range(17))
        if float(text) == value
    )
    if exponent < -4:
        return f"{digits[0]}{'.' * (len(digits) > 1)}{digits[1:]}e-{-exponent:02d}"
    if exponent < 0:
        return f"0.{'0' * (-exponent - 1)}{digits}"
    return f"{digits[: exponent + 1]:0<{exponent + 1}}.{digits[exponent + 1 :] or 0}"


def test_drawn_entries_are_found_by_the_page_too(tmp_path: Path) -> None:
    generate = GenerateSettings(temperature=0.1 + 0.2, top_p=5e-05, num_samples=1, max_new_tokens=9)
    manifest = make_manifest(top_k=0, num_draws=1000, seed=7, generate=generate)
    rows = make_rows("kd", 5, num_draws=1000)
    open_output(tmp_path, manifest)
    write_shard(tmp_path, 0, manifest, rows, [])
    content = json.loads((tmp_path / "manifest.json").read_text("utf-8"))
    claimed = content.pop("content_sha256")
    assert hashlib.sha256(canonical(content).encode("ascii")).hexdigest() == claimed
    most = 0
    for record, row in zip(pq.read_table(tmp_path / "shard-00000.parquet").to_pylist(), rows, strict=True):
        scores = row.conversations[0].scores
        num_entries = sum(record["topk_counts"])
        assert len(record["topk_draws"]) == 2 * num_entries
        assert scores.draws is not None
        draws = [struct.unpack("<H", entry)[0] for entry in decode(record["topk_draws"], num_entries, 2)]
        assert draws == scores.draws.tolist()
        most = max(most, *draws)
        ids = [struct.unpack("<I", entry + b"\0")[0] for entry in decode(record["topk_ids"], num_entries, 3)]
        entries = iter(zip(ids, draws, strict=True))
        for count, rest in zip(record["topk_counts"], record["rest_mass"], strict=True):
            found = [next(entries) for _ in range(count)]
            assert found == sorted(found, key=lambda entry: (-entry[1], entry[0]))
            assert 1000 * (1 - rest) == pytest.approx(sum(draw for _, draw in found), abs=1e-4)
    assert most > 255, "the high plane must matter"


def test_the_page_names_every_column_type_and_key() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]*?)(?:, (?:[TR]|\d·N bytes))? \|", PAGE, re.MULTILINE))
    for sampled in (False, True):
        columns = [field.name for field in schema("kd", sampled)]
        assert columns[-1] == ("topk_draws" if sampled else "topk_logprobs")
        for field in schema("kd", sampled):
            assert table[field.name] == arrow_type(field.type), field.name
        assert [field.name for field in schema("dpo", sampled)] == columns[:3] + [
            prefix + name for prefix in ("chosen_", "rejected_") for name in columns[3:]
        ]
    keys = [name for model in (Manifest, Receipt, CaptureSettings, Skipped) for name in model.model_fields]
    assert [key for key in keys if not re.search(rf"`(capture\.)?{key}[`.]", PAGE)] == []
    assert [key for key in GenerateSettings.model_fields if f"`capture.generate.{key}`" not in PAGE] == []
    for name in ("teacher", "tokenizer", "image", "dataset", "engine"):
        for key in make_manifest().model_dump()[name]:
            assert f"`{name}.{key}`" in PAGE


def arrow_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {arrow_type(kind.value_type)}"
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return "struct (" + ", ".join(f"`{field.name}` {arrow_type(field.type)}" for field in fields) + ")"
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
