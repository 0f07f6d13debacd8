"""Reads, damages and rewrites outputs for tests."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from common.shards.manifest import (
    file_sha256,
    published_shards,
    read_manifest,
    read_receipt,
    receipt_path,
    shard_path,
    write_with_digest,
)
from common.shards.score_shard import ShardFile, ShardRow
from common.storage.files import Location, list_files
from precompute.config import PrecomputeConfig
from precompute.report import Report


def first_problems(report: Report) -> dict[str, str]:
    """Returns the first problem of each failed check, by the check's name."""
    return {check.name: check.problems[0].what for check in report.checks if not check.ok}


def rows_of(output: Location, number: int) -> list[ShardRow]:
    shard = ShardFile(shard_path(output, number), read_manifest(output), number)
    rows = list(shard)
    shard.close()
    return rows


def rewrite_receipt(output: Path, number: int) -> None:
    """Writes a receipt that matches the shard's current bytes, so that later checks are reached."""
    receipt = read_receipt(output, number, read_manifest(output))
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


def flip(path: Location, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(bytes(data))


def copy_file(source: Location, destination: Location) -> None:
    destination.write_bytes(source.read_bytes())


def load_config(output: Path) -> PrecomputeConfig:
    """Returns the configuration that an output was made with, changed to write to this copy of it."""
    written = json.loads((output / "config.json").read_text())["config"]
    return PrecomputeConfig.model_validate(written).model_copy(update={"output": output})


def contents(output: Location) -> dict[str, bytes]:
    """Returns the bytes of manifest, shards and receipts by their names."""
    names = sorted(name for name in list_files(output) if name.startswith(("shard-", "manifest.")))
    return {name: (output / name).read_bytes() for name in names}


def part(whole: Path, out: Path, *numbers: int) -> Path:
    """Copies an output with some of its shards."""
    shutil.copytree(whole, out, ignore=lambda _, names: [name for name in names if name.startswith("shard-")])
    for number in numbers:
        for path in (shard_path(whole, number), receipt_path(whole, number)):
            copy_file(path, out / path.name)
    return out


def all_rows(output: Location) -> list[ShardRow]:
    return [row for number in published_shards(output) for row in rows_of(output, number)]


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
