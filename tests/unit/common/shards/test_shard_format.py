"""Shards are read by a second reader that is written from docs/shard-format.md alone."""

import base64
import hashlib
import io
import itertools
import json
import math
import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from common.data.samples import Kind
from common.shards.codec import ID_COLUMNS, CodecSettings, pack
from common.shards.manifest import CaptureSettings, GenerateSettings, Manifest, Receipt, SkippedSample, open_output
from common.shards.quantization import Quantizer, StoredPrecision
from common.shards.score_shard import ShardFile, score_schema, write_shard
from common.shards.scores import TeacherScores, scores_from_topk
from common.shards.token_order import TokenOrder
from tests.support.builders import make_manifest, make_rows

PAGE = (Path(__file__).parents[4] / "docs" / "shard-format.md").read_text("utf-8")


def decode_ids(counts: list[int], tables: list[int], orders: list[list[int]], *streams: bytes) -> list[list[int]]:
    """Decodes the ids of each row, by ascending rank in its table, as the page's section "Ids" says."""
    *quarters, low, high = streams
    symbols, low_byte = [iter(quarter) for quarter in quarters], iter(low)
    h_high = iter(struct.unpack(f"<{len(high) // 2}H", high))
    rows = []
    for count, table in zip(counts, tables, strict=True):
        rank, row = -1, []
        for place in range(count):
            (quarter,) = (q for q in range(4) if count * q // 4 <= place < count * (q + 1) // 4)
            d = next(symbols[quarter])
            if d >= 192:
                h = d - 192 if d < 255 else next(h_high)
                d = 192 + 256 * h + next(low_byte)
            rank += d + 1
            row.append(orders[table][rank])
        rows.append(row)
    assert [*itertools.chain(*symbols), *low_byte, *h_high] == []
    return rows


def decode_values(
    columns: dict[str, bytes], counts: list[int], rests: list[float], form: str | None
) -> list[list[float]]:
    """Decodes log-probs or numbers of draws, in the order of the ids, as the page's section "Values" says."""
    if form in ("q8", "q6"):
        streams, rows = [iter(columns[f"topk_roots_{bucket}"]) for bucket in range(16)], []
        for count, rest in zip(counts, rests, strict=True):
            codes = streams[next((b for b in range(15) if rest >= 2.0 ** -(b + 1)), 15)]
            weights = [max(16 * next(codes) ** 2, 1) for _ in range(count)]
            mass = math.log(max(1 - rest, 2**-25))
            rows.append([min(mass + math.log(w) - math.log(sum(weights)), 0.0) for w in weights])
        assert [*itertools.chain(*streams)] == []
        return rows
    name, width, code = {
        "fp32": ("topk_logprobs", 4, "<f"),
        "fp16": ("topk_logprobs", 2, "<e"),
        None: ("topk_draws", 2, "<H"),
    }[form]
    planes = [columns[f"{name}_{plane}"] for plane in range(width)]
    values: Iterator[Any] = (struct.unpack(code, bytes(entry))[0] for entry in zip(*planes, strict=True))
    if form is None:
        bits = columns["topk_repeated"]
        assert len(bits) == -(-sum(counts) // 8)
        flags = [bits[i // 8] >> i % 8 & 1 for i in range(sum(counts))]
        values, repeated = iter([next(values) if flag else 1 for flag in flags]), values
        assert list(repeated) == []
    return [[next(values) for _ in range(count)] for count in counts]


def ids_by_rank(classes: bytes) -> list[int]:
    """Returns the ids whose class is not 0, by descending class, ties by ascending id."""
    return sorted(
        (token_id for token_id, value in enumerate(classes) if value),
        key=lambda token_id: (-classes[token_id], token_id),
    )


def test_the_worked_example_is_right() -> None:
    stated: list[list[tuple[int, float, int]]] = [[], []]
    cells = r"^\| (\d) \| (\d+) \| (\d+) \| ([\d.]+) \| (\d+) \| [^|]* \| 0x([0-9A-F]{8}) \|$"
    classes = np.ones(151_936, np.uint8)
    classes[5] = 2
    order = ids_by_rank(classes.tobytes())
    for row, token_id, rank, p, code, bits in re.findall(cells, PAGE, re.MULTILINE):
        stated[int(row)].append((int(token_id), float(p), int(code)))
        assert order[int(rank)] == int(token_id)
        assert struct.pack(">f", np.float32(np.log(float(p)))) == bytes.fromhex(bits)
    lines = dict(re.findall(r"^(topk_\w+) +([0-9A-F ]+)$", PAGE, re.MULTILINE))
    counts = [int(count) for count in lines.pop("topk_counts").split()]
    tables = [int(table) for table in lines.pop("topk_tables").split()]
    columns = dict.fromkeys((*ID_COLUMNS, *(f"topk_roots_{bucket}" for bucket in range(16))), b"")
    columns |= {name: bytes.fromhex(data) for name, data in lines.items()}
    rests = re.findall(r"stored as\n([\d.]+) and ([\d.]+) beside codes", PAGE)[0]
    rests = [float(rest) for rest in rests]
    ids = decode_ids(counts, tables, [order], *(columns[name] for name in ID_COLUMNS))
    assert ids == [[token_id for token_id, _, _ in row] for row in stated]
    assert [*columns["topk_roots_2"], *columns["topk_roots_1"]] == [code for row in stated for _, _, code in row]
    exact = decode_values(columns, counts, rests, "fp32")
    np.testing.assert_allclose(np.exp([*itertools.chain(*exact)]), [p for row in stated for _, p, _ in row], rtol=1e-6)
    coded = decode_values(columns, counts, rests, "q8")
    np.testing.assert_allclose(np.exp([*itertools.chain(*coded)]), [0.3607, 0.4993, 0.64], atol=5e-5)
    assert decode_values(columns, counts, rests, None) == [[300, 1], [302]]

    # The program writes the same bytes for these entries.
    cases: tuple[tuple[StoredPrecision, list[str]], ...] = (
        ("q8", [f"topk_roots_{bucket}" for bucket in range(16)]),
        ("fp32", [f"topk_logprobs_{p}" for p in range(4)]),
    )
    for form, names in cases:
        quantizer = Quantizer(form, 128, None)
        scores = scores_from_topk(
            np.zeros(2, np.float32),
            np.array([[151_643, 5], [300, 0]]),
            np.log(np.array([[0.5, 0.36], [0.64, 1e-300]])).astype(np.float32) + np.array([[0, 0], [0, -np.inf]]),
        )
        codec = CodecSettings(TokenOrder(classes[None, :]), quantizer)
        packed = pack([scores], [np.array(tables, np.uint8)], codec)
        assert {name: column.data.tobytes() for name, column in packed.items()} == {
            name: columns[name] for name in (*ID_COLUMNS, *names)
        }
        assert scores.rest_mass.tolist() == pytest.approx([0.14, 0.36], rel=1e-6)
        if form == "q8":
            assert quantizer.stored_rest(scores.rest_mass).tolist() == pytest.approx(rests, rel=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp32", "fp16", "q8", "q6"])
@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_a_reader_written_from_the_page_finds_the_rows(tmp_path: Path, kind: Kind, form: str) -> None:
    manifest, rows = make_manifest(kind, precision=form), make_rows(kind, 70)
    open_output(tmp_path, manifest)
    with patch("common.shards.token_order.ENTRIES_PER_TABLE", 300):
        write_shard(
            tmp_path, 0, manifest, rows, [SkippedSample(index=70, id="Ünï 🐈", reason='“missing”: "a\\b"\n\x1f\x7f\t')]
        )

    content, digest = read_checked(tmp_path / "manifest.json")
    receipt, _ = read_checked(tmp_path / "shard-00000.json")
    data = (tmp_path / "shard-00000.parquet").read_bytes()
    assert receipt["manifest_sha256"] == digest
    assert (receipt["num_bytes"], receipt["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())

    file = pq.ParquetFile(tmp_path / "shard-00000.parquet")
    assert file.metadata.metadata[b"decant.manifest_sha256"].decode() == digest
    assert file.metadata.metadata[b"decant.shard"] == b"0"
    assert file.metadata.metadata[b"decant.schema_version"] == b"6"
    assert json.loads(file.metadata.metadata[b"decant.manifest"]) == content
    orders = read_orders(file, manifest.tokenizer.vocab_size)
    assert len(orders) >= 4
    assert file.metadata.metadata[b"decant.image_token_id"] == b"151646"
    assert [file.metadata.row_group(i).num_rows for i in range(2)] == [64, 6]
    ours = list(ShardFile(tmp_path / "shard-00000.parquet", manifest, 0))
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
            ids = decode_ids(
                counts, record[prefix + "topk_tables"], orders, *(record[prefix + name] for name in ID_COLUMNS)
            )
            rests = np.array(record[prefix + "rest_mass"], np.float32)
            if form in ("q8", "q6"):
                assert not (rests.view(np.uint32) & 0xFFF).any()
                np.testing.assert_allclose(rests, scored.scores.rest_mass, rtol=2**-12)
            else:
                np.testing.assert_array_equal(rests, scored.scores.rest_mass)
            columns = {name.removeprefix(prefix): data for name, data in record.items()}
            values = decode_values(columns, counts, record[prefix + "rest_mass"], form)
            # Compared with the rows that were written, and with those that this program reads.
            read = ours[row.index].conversations[prefix == "rejected_"].scores
            for found, probs, expected in zip(ids, values, logprobs_by_row(scored.scores), strict=True):
                assert sorted(found) == sorted(expected)
                slack = {"fp32": 0, "fp16": 2e-4, "q8": 1.5 / 127, "q6": 1.5 / 63}[form]
                for token_id, logprob in zip(found, probs, strict=True):
                    assert math.exp(logprob / 2) == pytest.approx(math.exp(expected[token_id] / 2), abs=slack + 1e-12)
            for found, probs, entries in zip(ids, values, logprobs_by_row(read), strict=True):
                in_order = sorted(zip(found, probs, strict=True), key=lambda e: (-np.float32(e[1]), e[0]))
                assert [token_id for token_id, _ in in_order] == list(entries)
                np.testing.assert_allclose([p for _, p in in_order], list(entries.values()), rtol=2e-7, atol=1e-6)
    assert num_scored == receipt["num_scored_tokens"]


def read_checked(path: Path) -> tuple[dict[str, Any], str]:
    """Reads a JSON file and its digest, and checks the digest against the page's canonical JSON."""
    content = json.loads(path.read_text("utf-8"))
    claimed = content.pop("content_sha256")
    assert hashlib.sha256(canonical(content).encode("ascii")).hexdigest() == claimed
    return content, claimed


def read_orders(file: pq.ParquetFile, vocab_size: int) -> list[list[int]]:
    """Reads the ids by rank in each table from a shard's footer."""
    frame = base64.b64decode(file.metadata.metadata[b"decant.token_classes"])
    data = zstandard.ZstdDecompressor().decompress(frame)
    highest, pairs = data[:vocab_size], data[vocab_size:]
    used = ids_by_rank(highest)
    if not pairs:
        return [used]
    tables = [bytearray(vocab_size) for _ in range(2 * len(pairs) // len(used))]
    for number, byte in enumerate(pairs):
        place, pair = divmod(number, len(tables) // 2)
        tables[2 * pair][used[place]] = byte & 15
        tables[2 * pair + 1][used[place]] = byte >> 4
    for token_id in used:
        assert highest[token_id] == max(table[token_id] for table in tables)
    return [ids_by_rank(bytes(table)) for table in tables]


def logprobs_by_row(scores: TeacherScores) -> list[dict[int, float]]:
    """Returns the log-probs of each row by id, in the order of `scores`."""
    entries = zip(scores.ids.tolist(), scores.logprobs.tolist(), strict=True)
    return [dict(itertools.islice(entries, count)) for count in scores.counts.tolist()]


def canonical(value: object) -> str:
    """Formats a value as the page's canonical JSON, without the json module."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{canonical(key)}:{canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
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
    """Formats a number from 1e-99 to 1e15 as the page says, with as few digits as read back the same number."""
    digits, exponent = next(
        (text.split("e")[0].replace(".", ""), int(text.split("e")[1]))
        for text in (f"{value:.{places}e}" for places in range(17))
        if float(text) == value
    )
    if exponent < -4:
        point = "." if len(digits) > 1 else ""
        return f"{digits[0]}{point}{digits[1:]}e-{-exponent:02d}"
    if exponent < 0:
        return f"0.{'0' * (-exponent - 1)}{digits}"
    return f"{digits[: exponent + 1]:0<{exponent + 1}}.{digits[exponent + 1 :] or 0}"


def test_a_reader_written_from_the_page_finds_drawn_entries(tmp_path: Path) -> None:
    generate = GenerateSettings(temperature=0.1 + 0.2, top_p=5e-05, num_samples=1, max_new_tokens=9)
    manifest = make_manifest(top_k=0, num_draws=1000, seed=7, generate=generate)
    rows = make_rows("kd", 5, num_draws=1000)
    open_output(tmp_path, manifest)
    write_shard(tmp_path, 0, manifest, rows, [])
    read_checked(tmp_path / "manifest.json")
    max_draws = 0.0
    file = pq.ParquetFile(tmp_path / "shard-00000.parquet")
    orders = read_orders(file, manifest.tokenizer.vocab_size)
    for record, row in zip(file.read().to_pylist(), rows, strict=True):
        scores, counts = row.conversations[0].scores, record["topk_counts"]
        assert scores.draws is not None
        ids = decode_ids(counts, record["topk_tables"], orders, *(record[name] for name in ID_COLUMNS))
        draws = decode_values(record, counts, record["rest_mass"], None)
        expected = iter(zip(scores.ids.tolist(), scores.draws.tolist(), strict=True))
        for found, times, rest in zip(ids, draws, record["rest_mass"], strict=True):
            assert dict(zip(found, times, strict=True)) == dict(itertools.islice(expected, len(found)))
            assert 1000 * (1 - rest) == pytest.approx(sum(times), abs=1e-4)
            max_draws = max([max_draws, *times])
    assert max_draws > 255, "the high plane must not be empty"


def test_the_page_names_every_column_type_and_key() -> None:
    length = r"(?:, (?:[TR]|(?:N|⌈N/8⌉) bytes(?: each| together)?))?"
    table = dict(re.findall(rf"^\| `(\w+)`[^|]* \| ([^|]*?){length} \|", PAGE, re.MULTILINE))
    for precision in ("fp32", "fp16", "q8", "q6", None):
        capture = make_manifest(**({"precision": precision} if precision else {"num_draws": 3, "top_k": 0})).capture
        columns = [field.name for field in score_schema("kd", capture)]
        for field in score_schema("kd", capture):
            stated = re.sub(r"_\d+$", "_0", field.name) if field.name[-1].isdigit() else field.name
            assert table[stated] == arrow_type(field.type), field.name
        assert [field.name for field in score_schema("dpo", capture)] == columns[:4] + [
            prefix + name for prefix in ("chosen_", "rejected_") for name in columns[4:]
        ]
    for key in pq.read_metadata(io.BytesIO(shard_bytes())).metadata:
        assert key == b"ARROW:schema" or f"`{key.decode()}`" in PAGE
    keys = [name for model in (Manifest, Receipt, CaptureSettings, SkippedSample) for name in model.model_fields]
    assert [key for key in keys if not re.search(rf"`(capture\.)?{key}[`.]", PAGE)] == []
    assert [key for key in GenerateSettings.model_fields if f"`capture.generate.{key}`" not in PAGE] == []
    for name in ("teacher", "tokenizer", "image", "dataset", "engine"):
        for key in make_manifest().model_dump()[name]:
            assert f"`{name}.{key}`" in PAGE


def shard_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        write_shard(Path(directory), 0, make_manifest(), make_rows("kd", 1), ())
        return (Path(directory) / "shard-00000.parquet").read_bytes()


def arrow_type(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return f"list of {arrow_type(kind.value_type)}"
    if pa.types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        return "struct (" + ", ".join(f"`{field.name}` {arrow_type(field.type)}" for field in fields) + ")"
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))
