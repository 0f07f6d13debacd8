"""Writes packed kept entries as list columns, for programs that read only Parquet (`inspect-shards --unpack`).

Legend: R scored tokens, N kept entries of all rows.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from common.errors import ConfigError, ShardError, StorageError
from common.shards.manifest import Manifest, shard_path
from common.shards.score_shard import PREFIXES, ShardFile, ShardRow
from common.shards.scores import TeacherScores
from common.storage.files import open_ranged, partial_path
from precompute.inspection.collect import InspectionTarget
from precompute.report import Problem

# Marks a file in its metadata as made from a shard, so that it is not taken for one.
EXPORT_KEY = b"decant.export"
EXPORT_VALUE = b"unpacked"

_ID_LISTS = pa.list_(pa.list_(pa.int32()))
_LOGPROB_LISTS = pa.list_(pa.list_(pa.float32()))


@dataclass(frozen=True)
class UnpackResult:
    """Files that were written: one for each shard, with the same name."""

    out: Path
    num_files: int
    num_rows: int
    num_bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """True if every shard was written."""
        return not self.problems

    @property
    def summary(self) -> str:
        """One line of totals, and one for each shard that was not written."""
        lines = [f"{self.out}: {self.num_files:,} files, {self.num_rows:,} rows, {self.num_bytes:,} bytes"]
        return "\n".join(lines + [f"{problem.path}: not unpacked: {problem.what}" for problem in self.problems])


def check_unpack_destination(target: InspectionTarget, out: Path) -> None:
    """Checks that `out` is a new or empty directory outside the output.

    Raises:
        ConfigError: `out` is the output or inside it, is a file, or has files already.
    """
    if isinstance(target.output, Path) and out.resolve().is_relative_to(target.output.resolve()):
        raise ConfigError(f"{out}: is the output itself or inside it; choose a directory beside it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: holds something already; choose a new or empty directory")


def unpack_output(target: InspectionTarget, out: Path, *, progress: bool = True) -> UnpackResult:
    """Writes each shard of `target` into the directory `out`, row group by row group.

    Other columns and the keys of the metadata stay as they are. Packed columns are replaced by `topk_ids`
    list<list<int32>>, `topk_logprobs` list<list<float32>>, and, where entries were drawn, `topk_draws`
    list<list<int32>>, with one inner list for each scored token. Those of preference pairs have the prefixes `chosen_`
    and `rejected_`. A file appears when it is complete. A damaged shard is a problem of the result; the others are
    written.

    Raises:
        ConfigError: see `check_unpack_destination`.
        StorageError: a file cannot be written.
    """
    check_unpack_destination(target, out)
    problems, num_files, num_rows, num_bytes = [], 0, 0, 0
    for number in tqdm(target.shards, "unpacking", unit=" shards", disable=not progress, leave=False):
        source = shard_path(target.output, number)
        destination = out / source.name
        partial = partial_path(destination)
        try:
            out.mkdir(parents=True, exist_ok=True)
            num_rows += _unpack_shard(target, number, partial)
            partial.replace(destination)
            num_files += 1
            num_bytes += destination.stat().st_size
        except ShardError as error:
            problems.append(Problem(str(source), str(error).removeprefix(f"{source}: ").splitlines()[0]))
        except OSError as error:
            raise StorageError(
                f"{destination}: cannot be written ({error.strerror or error}); free space or choose another directory"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
    return UnpackResult(out, num_files, num_rows, num_bytes, tuple(problems))


def _unpack_shard(target: InspectionTarget, number: int, partial: Path) -> int:
    """Writes one shard to `partial`, flushes it to the disk, and returns its number of rows."""
    source, manifest = shard_path(target.output, number), target.manifest
    with (
        closing(ShardFile(source, manifest, number, check=target.check)) as shard,
        open_ranged(source) as native,
        partial.open("wb") as file,
    ):
        # Opening the shard checked its schema; reading the rows first finds damaged pages.
        parquet = pq.ParquetFile(native)
        packed = [field.name for field in parquet.schema_arrow if _is_packed(field)]
        kept = [field for field in parquet.schema_arrow if field.name not in packed]
        metadata = {key: value for key, value in parquet.metadata.metadata.items() if key != b"ARROW:schema"}
        schema = pa.schema([*kept, *_list_fields(manifest)])
        with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
            for group in range(shard.num_groups):
                rows = shard.read_group(group)
                table = parquet.read_row_group(group, columns=[field.name for field in kept])
                columns = [*table.columns, *_list_columns(rows, manifest)]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=len(rows))
            writer.add_key_value_metadata({**metadata, EXPORT_KEY: EXPORT_VALUE})
        file.flush()
        os.fsync(file.fileno())
        return sum(map(shard.num_group_rows, range(shard.num_groups)))


def _is_packed(field: pa.Field) -> bool:
    """Returns True for a column of packed kept entries."""
    return bool(pa.types.is_binary(field.type))


def _list_fields(manifest: Manifest) -> Iterator[pa.Field]:
    for prefix in PREFIXES[manifest.kind]:
        yield pa.field(f"{prefix}topk_ids", _ID_LISTS, nullable=False)
        yield pa.field(f"{prefix}topk_logprobs", _LOGPROB_LISTS, nullable=False)
        if manifest.capture.num_draws is not None:
            yield pa.field(f"{prefix}topk_draws", _ID_LISTS, nullable=False)


def _list_columns(rows: Sequence[ShardRow], manifest: Manifest) -> Iterator[pa.ChunkedArray]:
    """Yields the columns of `_list_fields`. Each row is a chunk, so that 32-bit offsets suffice for many entries."""
    for side in range(len(PREFIXES[manifest.kind])):
        scores = [row.conversations[side].scores for row in rows]
        yield pa.chunked_array([_lists(s, s.ids, _ID_LISTS) for s in scores], _ID_LISTS)
        yield pa.chunked_array([_lists(s, s.logprobs, _LOGPROB_LISTS) for s in scores], _LOGPROB_LISTS)
        if manifest.capture.num_draws is not None:
            yield pa.chunked_array([_lists(s, s.draws, _ID_LISTS) for s in scores], _ID_LISTS)


def _lists(scores: TeacherScores, values: npt.NDArray[Any] | None, kind: pa.ListType) -> pa.ListArray:
    """Returns values [N] as one row of a column: a list of R lists."""
    inner_offsets = np.cumsum([0, *scores.counts], dtype=np.int32)
    inner = pa.ListArray.from_arrays(inner_offsets, pa.array(values, kind.value_type.value_type), type=kind.value_type)
    return pa.ListArray.from_arrays(np.array([0, scores.num_rows], np.int32), inner, type=kind)
