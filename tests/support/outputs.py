"""Reads, damages and rewrites outputs for tests."""

import dataclasses
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console, RenderableType

from common.data.samples import Turn
from common.shards.manifest import (
    MANIFEST_NAME,
    GenerateSettings,
    Receipt,
    file_sha256,
    published_shards,
    read_manifest,
    read_with_digest,
    receipt_path,
    shard_path,
    write_with_digest,
)
from common.shards.score_shard import ScoredConversation, ShardFile, ShardRow, write_shard
from common.shards.scores import TeacherScores
from common.storage.files import Location, list_files
from precompute.config import PrecomputeConfig
from precompute.report import Report


def first_problems(report: Report) -> dict[str, str]:
    """Returns the first problem of each failed check, by the check's name."""
    return {check.name: check.problems[0].what for check in report.checks if not check.ok}


def render_text(renderable: RenderableType, width: int = 1000) -> str:
    """Returns what a terminal of this width shows, without colours."""
    file = io.StringIO()
    Console(width=width, file=file).print(renderable)
    return file.getvalue()


def read_rows(output: Location, number: int) -> list[ShardRow]:
    shard = ShardFile(shard_path(output, number), read_manifest(output), number)
    rows = list(shard)
    shard.close()
    return rows


def rewrite_receipt(output: Path, number: int) -> None:
    """Writes a receipt that matches the shard's current bytes, so that later checks are reached."""
    receipt = read_with_digest(receipt_path(output, number), Receipt)
    path = shard_path(output, number)
    changed = {"sha256": file_sha256(path), "num_bytes": path.stat().st_size}
    write_with_digest(receipt_path(output, number), receipt.model_copy(update=changed))


def replace_sample(row: ShardRow, **changes: Any) -> ShardRow:
    return dataclasses.replace(row, sample=dataclasses.replace(row.sample, **changes))


def rewrite_shard(output: Path, number: int, row_group_size: int | None = None, **footer: str | None) -> None:
    """Writes a shard's Parquet file again with other keys in its footer (None removes one) and a matching receipt."""
    path = shard_path(output, number)
    before = {key: value for key, value in pq.read_metadata(path).metadata.items() if key != b"ARROW:schema"}
    changes = {f"decant.{name}".encode(): value for name, value in footer.items()}
    metadata = {key: value for key, value in {**before, **changes}.items() if value is not None}
    table = pq.read_table(path).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=row_group_size)
    rewrite_receipt(output, number)


def flip_bit(path: Location, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def copy_file(source: Location, destination: Location) -> None:
    destination.write_bytes(source.read_bytes())


def load_config(output: Path) -> PrecomputeConfig:
    """Returns the configuration that an output was made with, changed to write to this copy of it."""
    written = json.loads((output / "config.json").read_text())["config"]
    return PrecomputeConfig.model_validate(written).model_copy(update={"output": output})


def read_published_files(output: Location) -> dict[str, bytes]:
    """Returns the bytes of manifest, shards and receipts by their names."""
    names = sorted(name for name in list_files(output) if name.startswith(("shard-", "manifest.")))
    return {name: (output / name).read_bytes() for name in names}


def rewrite_as_generated(output: Path, num_samples: int) -> None:
    """Turns an output into one of generated responses, `num_samples` to each sample."""
    rows = {number: read_rows(output, number) for number in published_shards(output)}
    before = read_manifest(output)
    generate = GenerateSettings(temperature=1.0, top_p=1.0, num_samples=num_samples, max_new_tokens=64)
    manifest = before.model_copy(update={"capture": before.capture.model_copy(update={"generate": generate})})
    write_with_digest(output / MANIFEST_NAME, manifest)
    for number, shard_rows in rows.items():
        responses = [make_response(row, n) for row in shard_rows for n in range(num_samples)]
        write_shard(output, number, manifest, responses, [])


def make_response(row: ShardRow, number: int) -> ShardRow:
    """Returns the row as response `number` to its sample: with another last turn, which alone is scored."""
    turns = (*row.sample.conversations[0][:-1], Turn("assistant", f"written by the teacher {number}"))
    (scored,) = row.conversations
    start, stop = scored.encoded.spans[-1]
    encoded = dataclasses.replace(
        scored.encoded, input_ids=scored.encoded.input_ids[:stop], spans=np.array([[start, stop]], np.int32)
    )
    num_before = scored.scores.num_rows - int(stop - start)
    num_entries = int(scored.scores.counts[:num_before].sum())
    by_row = {name: getattr(scored.scores, name)[num_before:] for name in ("own_logprobs", "rest_mass", "counts")}
    entries = {name: getattr(scored.scores, name)[num_entries:] for name in ("ids", "logprobs")}
    last = ScoredConversation(encoded, TeacherScores(**by_row, **entries))
    return replace_sample(
        dataclasses.replace(row, conversations=(last,)), id=f"{row.sample.id}#{number}", conversations=(turns,)
    )


def copy_shards(whole: Path, out: Path, *numbers: int) -> Path:
    """Copies an output with some of its shards."""
    shutil.copytree(whole, out, ignore=lambda _, names: [name for name in names if name.startswith("shard-")])
    for number in numbers:
        for path in (shard_path(whole, number), receipt_path(whole, number)):
            copy_file(path, out / path.name)
    return out


def read_all_rows(output: Location) -> list[ShardRow]:
    return [row for number in published_shards(output) for row in read_rows(output, number)]


def row_values(row: ShardRow) -> Iterator[Any]:
    """Yields all that a row holds, arrays as their bytes."""
    yield row.index
    yield row.sample
    for scored in row.conversations:
        yield scored.encoded.image_token_id
        for record in (scored.encoded, scored.scores):
            yield [
                (name, value.dtype, value.tobytes())
                for name, value in vars(record).items()
                if isinstance(value, np.ndarray) and not name.startswith("response")
            ]
