"""Shards: ordinary Parquet files of scored samples.

One row is one sample. Everything that people ask about is a native column; the kept entries are packed in binary
planes (common/scores.py): best entries with their log-probs, drawn ones with their numbers of draws. A preference
pair has each conversation's columns twice, with the prefixes `chosen_` and `rejected_`; a conversation to distil has
them without a prefix.
"""

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from common.encoding import Encoded
from common.errors import ShardError
from common.manifest import Manifest, Receipt, Skipped, receipt_path, shard_path, write_sealed
from common.samples import ImageRef, Kind, Sample, Turn
from common.scores import (
    TeacherScores,
    pack_draws,
    pack_ids,
    pack_logprobs,
    share_logprobs,
    unpack_draws,
    unpack_ids,
    unpack_logprobs,
)
from common.storage import publish

PREFIXES: dict[Kind, tuple[str, ...]] = {"kd": ("",), "dpo": ("chosen_", "rejected_")}

ROWS_PER_GROUP = 64

_MANIFEST_KEY = b"decant.manifest_sha256"
_SHARD_KEY = b"decant.shard"
_IMAGE_TOKEN_KEY = b"decant.image_token_id"

_IMAGES = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
_SPANS = pa.list_(pa.struct({"start": pa.int32(), "stop": pa.int32()}))
_INTS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())


@dataclass(frozen=True)
class ScoredConversation:
    """A conversation's tokens and the teacher's scores of the scored ones."""

    encoded: Encoded
    scores: TeacherScores


@dataclass(frozen=True)
class ShardRow:
    """One sample with its scores; `index` is its position in the dataset."""

    index: int
    sample: Sample
    conversations: tuple[ScoredConversation, ...]


def schema(kind: Kind, sampled: bool) -> pa.Schema:
    """Arrow schema of a shard; `sampled` for entries that were drawn."""
    fields = [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("images", _IMAGES, nullable=False),
    ]
    columns: dict[str, pa.DataType] = {
        "messages": _MESSAGES,
        "input_ids": _INTS,
        "response_spans": _SPANS,
        "logprob_sum": pa.float64(),
        "own_logprobs": _FLOATS,
        "rest_mass": _FLOATS,
        "topk_counts": _INTS,
        "topk_ids": pa.binary(),
        "topk_draws" if sampled else "topk_logprobs": pa.binary(),
    }
    fields += [pa.field(p + name, kind_, nullable=False) for p in PREFIXES[kind] for name, kind_ in columns.items()]
    return pa.schema(fields)


def write_shard(
    output: Path, number: int, manifest: Manifest, rows: Sequence[ShardRow], skipped: Sequence[Skipped]
) -> Receipt:
    """Encodes rows, publishes the Parquet file, then its receipt. Deterministic: same rows, same bytes.

    Raises:
        StorageError: not written; no receipt exists then, so the shard does not either.
    """
    image_token_ids = {c.encoded.image_token_id for row in rows for c in row.conversations}
    assert len(image_token_ids) <= 1
    image_token_id = next(iter(image_token_ids), None)
    sampled = manifest.capture.num_draws is not None
    assert all((c.scores.draws is not None) == sampled for row in rows for c in row.conversations)
    table_schema = schema(manifest.kind, sampled).with_metadata(
        {
            _MANIFEST_KEY: manifest.sha256,
            _SHARD_KEY: str(number),
            _IMAGE_TOKEN_KEY: "" if image_token_id is None else str(image_token_id),
        }
    )
    table = pa.Table.from_arrays(_to_columns(rows, manifest.kind), schema=table_schema)
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        # Higher levels save under 2% and take twice as long or more: what is left are the low bits of float32.
        compression_level=3,
        row_group_size=ROWS_PER_GROUP,
        use_dictionary=[f"{prefix}messages.list.element.role" for prefix in PREFIXES[manifest.kind]],
        write_page_checksum=True,
        write_statistics=["sample_id", "index"],
    )
    data = buffer.getvalue()
    publish(shard_path(output, number), data)
    receipt = Receipt(
        shard=number,
        manifest_sha256=manifest.sha256,
        num_rows=len(rows),
        num_scored_tokens=num_scored_tokens(rows),
        num_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        skipped=tuple(skipped),
    )
    write_sealed(receipt_path(output, number), receipt)
    return receipt


class ShardFile:
    """An open shard: rows by row group, each decoded when it is asked for.

    Raises:
        ShardError: on opening or reading, naming the file, if it is not a shard of this manifest or is damaged.
    """

    def __init__(self, path: Path, manifest: Manifest, number: int) -> None:
        self.path = path
        self._kind = manifest.kind
        self._num_draws = manifest.capture.num_draws
        with self._damage_is_named():
            self._file = pq.ParquetFile(path, page_checksum_verification=True)
            found = self._file.schema_arrow
            metadata = found.metadata or {}
            image_token = metadata.get(_IMAGE_TOKEN_KEY)
            self._image_token_id = int(image_token) if image_token else None
        if not found.equals(schema(manifest.kind, self._num_draws is not None)):
            raise ShardError(
                f"{path}: its columns are not those of a {manifest.kind} shard with "
                f"{'best' if self._num_draws is None else 'drawn'} entries:\n{found.to_string()}"
            )
        if metadata.get(_MANIFEST_KEY) != manifest.sha256.encode():
            raise ShardError(f"{path}: belongs to an output with another manifest")
        if metadata.get(_SHARD_KEY) != str(number).encode():
            raise ShardError(f"{path}: holds shard {metadata.get(_SHARD_KEY)!r}; the file was renamed")
        self.num_rows: int = self._file.metadata.num_rows

    @property
    def num_groups(self) -> int:
        """Number of row groups."""
        return int(self._file.num_row_groups)

    def group_rows(self, group: int) -> int:
        """Number of rows in a row group."""
        return int(self._file.metadata.row_group(group).num_rows)

    def read_column(self, name: str) -> list[Any]:
        """All values of one column."""
        with self._damage_is_named():
            values: list[Any] = self._file.read([name]).column(name).to_pylist()
        return values

    def read_group(self, group: int) -> list[ShardRow]:
        """Decodes one row group."""
        with self._damage_is_named():
            return self._to_rows(self._file.read_row_group(group), sum(map(self.group_rows, range(group))))

    def __iter__(self) -> Iterator[ShardRow]:
        for group in range(self.num_groups):
            yield from self.read_group(group)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _damage_is_named(self) -> "_DamageIsNamed":
        return _DamageIsNamed(self.path)

    def _to_rows(self, table: pa.Table, first_row: int) -> list[ShardRow]:
        prefixes = PREFIXES[self._kind]
        images = [[ImageRef(i["path"], i["bytes"]) for i in cell] for cell in table.column("images").to_pylist()]
        turns = [
            [tuple(Turn(m["role"], m["content"]) for m in cell) for cell in table.column(p + "messages").to_pylist()]
            for p in prefixes
        ]
        scored = [self._to_conversations(table, p, first_row) for p in prefixes]
        return [
            ShardRow(index, Sample(sample_id, self._kind, tuple(refs), conversations), scores)
            for index, sample_id, refs, conversations, scores in zip(
                table.column("index").to_pylist(),
                table.column("sample_id").to_pylist(),
                images,
                zip(*turns, strict=True),
                zip(*scored, strict=True),
                strict=True,
            )
        ]

    def _to_conversations(self, table: pa.Table, prefix: str, first_row: int) -> list[ScoredConversation]:
        columns = zip(
            _split(table.column(prefix + "input_ids")),
            _split(table.column(prefix + "response_spans")),
            _split(table.column(prefix + "own_logprobs")),
            _split(table.column(prefix + "rest_mass")),
            _split(table.column(prefix + "topk_counts")),
            table.column(prefix + "topk_ids"),
            table.column(prefix + ("topk_logprobs" if self._num_draws is None else "topk_draws")),
            strict=True,
        )
        conversations = []
        for row, (input_ids, spans, own, rest, counts, packed_ids, packed) in enumerate(columns, first_row):
            where = f"{self.path}: row {row}"
            num_scored = int((spans[:, 1] - spans[:, 0]).sum())
            if not len(own) == len(rest) == len(counts) == num_scored:
                raise ShardError(
                    f"{where}: {len(own)} own log-probs, {len(rest)} rest masses and {len(counts)} counts for "
                    f"{num_scored} scored tokens; the shard is damaged"
                )
            num_entries = int(counts.sum())
            ids = unpack_ids(packed_ids.as_buffer(), num_entries, where)
            if self._num_draws is None:
                draws, logprobs = None, unpack_logprobs(packed.as_buffer(), num_entries, where)
            else:
                draws = unpack_draws(packed.as_buffer(), num_entries, where)
                logprobs = share_logprobs(draws, self._num_draws)
            scores = TeacherScores(own, rest, counts, ids, logprobs, draws)
            conversations.append(ScoredConversation(Encoded(input_ids, spans, self._image_token_id), scores))
        return conversations


class _DamageIsNamed:
    """Turns whatever pyarrow or numpy raises on damaged bytes into a ShardError that names the file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if isinstance(
            error,
            OSError | pa.ArrowException | ValueError | TypeError | KeyError | OverflowError | IndexError,
        ):
            raise ShardError(
                f"{self._path}: cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
                "run verify-shards, remove the named files and run precompute-logits again: it fills the gap"
            ) from error


def _to_columns(rows: Sequence[ShardRow], kind: Kind) -> list[pa.Array]:
    """The columns of `schema`, in its order."""
    samples = [row.sample for row in rows]
    columns = [
        pa.array([sample.id for sample in samples], pa.string()),
        pa.array([row.index for row in rows], pa.int64()),
        pa.array([[{"bytes": image.data, "path": image.path} for image in s.images] for s in samples], _IMAGES),
    ]
    for which in range(len(PREFIXES[kind])):
        turns = [[{"role": t.role, "content": t.content} for t in s.conversations[which]] for s in samples]
        encoded = [row.conversations[which].encoded for row in rows]
        scores = [row.conversations[which].scores for row in rows]
        columns += [
            pa.array(turns, _MESSAGES),
            _join([e.input_ids for e in encoded], _INTS),
            _join([e.spans for e in encoded], _SPANS),
            pa.array([s.total_logprob for s in scores], pa.float64()),
            _join([s.own_logprobs for s in scores], _FLOATS),
            _join([s.rest_mass for s in scores], _FLOATS),
            _join([s.counts for s in scores], _INTS),
            pa.array([pack_ids(s.ids) for s in scores], pa.binary()),
            pa.array([_pack_values(s) for s in scores], pa.binary()),
        ]
    return columns


def _pack_values(scores: TeacherScores) -> bytes:
    return pack_logprobs(scores.logprobs) if scores.draws is None else pack_draws(scores.draws)


def _join(arrays: list[npt.NDArray[Any]], list_type: pa.ListType) -> pa.ListArray:
    """One list a row from arrays [n], or [n, 2] for a list of pairs."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    item = list_type.value_type
    flat = np.concatenate(arrays) if arrays else np.zeros((0, item.num_fields or 1), np.int32).squeeze()
    if item.num_fields:
        values = pa.StructArray.from_arrays([pa.array(column) for column in flat.T], fields=list(item))
    else:
        values = pa.array(flat, item)
    return pa.ListArray.from_arrays(offsets, values, type=list_type)


def _split(column: pa.ChunkedArray) -> list[npt.NDArray[Any]]:
    """Inverse of `_join`. Each array owns its memory, so that keeping one row keeps nothing else."""
    lists = column.combine_chunks()
    values = lists.values
    flat = np.stack([v.to_numpy() for v in values.flatten()], axis=1) if values.type.num_fields else values.to_numpy()
    return [flat[start:stop].copy() for start, stop in itertools.pairwise(lists.offsets.to_numpy())]


def num_scored_tokens(rows: Iterable[ShardRow]) -> int:
    """Scored tokens of all conversations of `rows`."""
    return sum(c.scores.num_rows for row in rows for c in row.conversations)
