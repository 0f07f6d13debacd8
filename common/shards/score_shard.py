"""Shards of scored samples: ordinary Parquet files with one sample in each row.

Ids, texts, tokens, spans and sums are native columns, which any Parquet reader can query. The kept entries are packed
into binary columns (common/shards/codec.py): best entries with their log-probs, drawn ones with their numbers of
draws. A preference pair has the columns of a conversation twice, with the prefixes `chosen_` and `rejected_`; a
conversation to distil has them without a prefix.
"""

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from common.data.chat_encoding import EncodedChat
from common.data.samples import ImageRef, Kind, Sample, Turn
from common.errors import ShardError
from common.shards.codec import BinaryColumn, CodecSettings, RowColumns, column_names, pack, unpack
from common.shards.manifest import CaptureSettings, Manifest, Receipt, ShardCheck, SkippedSample
from common.shards.parquet_shard import (
    ZSTD_LEVEL,
    ParquetShard,
    ShardContents,
    footer_metadata,
    publish_shard,
)
from common.shards.scores import TeacherScores
from common.shards.token_order import TokenOrder, classes_from_text, classes_to_text, find_classes
from common.storage.files import Location

PREFIXES: dict[Kind, tuple[str, ...]] = {"kd": ("",), "dpo": ("chosen_", "rejected_")}

ROWS_PER_GROUP = 64

_DICTIONARY_COLUMNS = ("messages.list.element.role", "topk_counts.list.element")
_BYTE_SPLIT_COLUMNS = ("input_ids.list.element", "own_logprobs.list.element", "rest_mass.list.element")

_IMAGES = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))
_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string(), "scored": pa.bool_()}))
_SPANS = pa.list_(pa.struct({"start": pa.int32(), "stop": pa.int32()}))
_INTS = pa.list_(pa.int32())
_FLOATS = pa.list_(pa.float32())
_BYTES = pa.list_(pa.uint8())


@dataclass(frozen=True)
class ScoredConversation:
    """Tokens of a conversation, with the teacher's scores of the scored tokens."""

    encoded: EncodedChat
    scores: TeacherScores


@dataclass(frozen=True)
class ShardRow:
    """Sample with its scores; `index` is its position in the dataset."""

    index: int
    sample: Sample
    conversations: tuple[ScoredConversation, ...]


def score_schema(kind: Kind, capture: CaptureSettings) -> pa.Schema:
    """Returns the Arrow schema of a shard."""
    fields = [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("source_id", pa.string()),
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
        "topk_tables": _BYTES,
        **dict.fromkeys(column_names(capture.precision), pa.binary()),
    }
    fields += [
        pa.field(prefix + name, column_type, nullable=False)
        for prefix in PREFIXES[kind]
        for name, column_type in columns.items()
    ]
    return pa.schema(fields)


def write_shard(
    output: Location, number: int, manifest: Manifest, rows: Sequence[ShardRow], skipped: Sequence[SkippedSample]
) -> Receipt:
    """Encodes rows, and publishes the Parquet file, then its receipt. The same rows always give the same bytes.

    Raises:
        StorageError: the file or the receipt was not written, so the shard does not exist.
    """
    image_token_ids = {c.encoded.image_token_id for row in rows for c in row.conversations}
    assert len(image_token_ids) <= 1
    image_token_id = next(iter(image_token_ids), None)
    scores = [c.scores for row in rows for c in row.conversations]
    classes, tables = find_classes(scores, manifest.tokenizer.vocab_size)
    codec = CodecSettings(TokenOrder(classes), manifest.capture.quantizer)
    table_schema = score_schema(manifest.kind, manifest.capture)
    num_conversations = len(PREFIXES[manifest.kind])
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer,
        table_schema,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=[prefix + name for prefix in PREFIXES[manifest.kind] for name in _DICTIONARY_COLUMNS],
        # Bytes of the same significance stand together, because only the high bytes of floats and ids repeat.
        column_encoding={
            prefix + name: "BYTE_STREAM_SPLIT" for prefix in PREFIXES[manifest.kind] for name in _BYTE_SPLIT_COLUMNS
        },
        write_page_checksum=True,
        write_statistics=["sample_id", "index"],
    ) as writer:
        for start in range(0, len(rows), ROWS_PER_GROUP):
            stop = start + ROWS_PER_GROUP
            group_tables = tables[start * num_conversations : stop * num_conversations]
            columns = _to_columns(rows[start:stop], group_tables, manifest.kind, codec)
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=table_schema))
        # Not in the schema's metadata, because Arrow would write that a second time in its own serialised schema.
        writer.add_key_value_metadata(
            footer_metadata(
                manifest,
                number,
                image_token_id="" if image_token_id is None else str(image_token_id),
                token_classes=classes_to_text(classes),
            )
        )
    contents = ShardContents(buffer.getvalue(), len(rows), num_scored_tokens(rows), tuple(skipped))
    return publish_shard(output, number, manifest, contents)


class ShardFile(ParquetShard):
    """Open shard of scores, decoded by row group. `image_token_id` is read from `footer`.

    With `keep_codes` rows have the codes of their log-probs, so that they can be written again without a change. With
    `check_tokens` ids and spans are compared with the vocabulary and the number of tokens.

    Raises:
        ShardError: on opening or reading, if the file is damaged or not this shard of the manifest; names the file.
    """

    def __init__(  # noqa: PLR0913 - the readers differ in what they need of it
        self,
        path: Location,
        manifest: Manifest,
        number: int,
        *,
        keep_codes: bool = False,
        check: ShardCheck = "sha256",
        check_tokens: bool = True,
    ) -> None:
        what = f"{manifest.kind} shard with {manifest.capture.precision or 'drawn'} entries"
        self._num_values = (manifest.capture.max_tokens + 1) * max(manifest.capture.max_kept, 1)
        super().__init__(path, manifest, number, score_schema(manifest.kind, manifest.capture), what, check)
        self._kind = manifest.kind
        self._capture = manifest.capture
        self._vocab_size = manifest.tokenizer.vocab_size
        self._check_tokens = check_tokens
        with self.shard_errors():
            image_token = self.footer.get("image_token_id")
            self.image_token_id = int(image_token) if image_token else None
        text = self.footer.get("token_classes", "")
        order = TokenOrder(classes_from_text(text.encode(), manifest.tokenizer.vocab_size, str(path)))
        self._codec = CodecSettings(order, manifest.capture.quantizer, keep_codes)

    def max_column_bytes(self, num_rows: int) -> int:
        """Returns the bytes of 8 a token, or of 4 a kept entry, of so many rows."""
        return 8 * num_rows * self._num_values

    def read_sizes(self, group: int) -> npt.NDArray[np.int32]:
        """Reads the numbers of tokens and of images of each row of a group, int32 [rows, 2], without decoding the rows.

        Tokens are counted up to the last scored one, an image as one token, in the longer conversation of a pair.
        """
        spans = [f"{prefix}response_spans" for prefix in PREFIXES[self._kind]]
        leaves = [*(f"{name}.list.element.stop" for name in spans), "images.list.element.path"]
        with self.shard_errors():
            table = self._read(group, leaves)
            last_stops = [[cell[-1]["stop"] for cell in table.column(name).to_pylist()] for name in spans]
            num_images = [len(cell) for cell in table.column("images").to_pylist()]
        return np.stack([np.max(last_stops, 0), num_images], 1).astype(np.int32)

    def read_group(self, group: int) -> list[ShardRow]:
        """Decodes one row group."""
        with self.shard_errors():
            return self._to_rows(self._read(group), sum(map(self.num_group_rows, range(group))))

    def read_unscored(self, group: int) -> list[tuple[int, Sample, tuple[EncodedChat, ...]]]:
        """Reads the position in the dataset, the sample and its tokens of each row of a group, without its scores."""
        names = ["sample_id", "source_id", "index", "images"]
        for prefix in PREFIXES[self._kind]:
            names += [f"{prefix}{name}" for name in ("messages", "input_ids", "response_spans")]
        with self.shard_errors():
            table = self._read(group, names)
            encoded = zip(*(self._to_encoded(table, prefix) for prefix in PREFIXES[self._kind]), strict=True)
            return [(*row, chats) for row, chats in zip(self._to_samples(table), encoded, strict=True)]

    def __iter__(self) -> Iterator[ShardRow]:
        for group in range(self.num_groups):
            yield from self.read_group(group)

    def _to_rows(self, table: pa.Table, first_row: int) -> list[ShardRow]:
        scored = [self._to_conversations(table, prefix, first_row) for prefix in PREFIXES[self._kind]]
        return [
            ShardRow(index, sample, scores)
            for (index, sample), scores in zip(self._to_samples(table), zip(*scored, strict=True), strict=True)
        ]

    def _to_samples(self, table: pa.Table) -> Iterator[tuple[int, Sample]]:
        images = [[ImageRef(i["path"], i["bytes"]) for i in cell] for cell in table.column("images").to_pylist()]
        turns = [
            [tuple(Turn(**message) for message in cell) for cell in table.column(p + "messages").to_pylist()]
            for p in PREFIXES[self._kind]
        ]
        columns = (table.column(name).to_pylist() for name in ("index", "sample_id", "source_id"))
        rows = zip(*columns, images, zip(*turns, strict=True), strict=True)
        for index, sample_id, source_id, refs, conversations in rows:
            yield index, Sample(sample_id, self._kind, tuple(refs), conversations, source_id)

    def _to_encoded(self, table: pa.Table, prefix: str) -> list[EncodedChat]:
        ids, spans = (_from_lists(table.column(prefix + name)) for name in ("input_ids", "response_spans"))
        if self._check_tokens:
            for row in zip(ids, spans, strict=True):
                self._check_conversation(*row)
        return [EncodedChat(*row, self.image_token_id) for row in zip(ids, spans, strict=True)]

    def _check_conversation(self, ids_T: npt.NDArray[np.int32], spans: npt.NDArray[np.int32]) -> None:
        """Raises ShardError if an id is past the vocabulary, or a span past the tokens."""
        if ids_T.min(initial=0) < 0 or ids_T.max(initial=0) >= self._vocab_size:
            raise ShardError(
                f"{self.path}: token ids from {ids_T.min()} to {ids_T.max()}, the tokenizer has {self._vocab_size}; "
                "the shard is damaged"
            )
        edges = spans.reshape(-1)
        if edges.size and (edges[0] < 1 or edges[-1] > len(ids_T) or (np.diff(edges) < 0).any()):
            raise ShardError(
                f"{self.path}: scored ranges {spans[:3].tolist()} leave a sequence of {len(ids_T)} tokens; "
                "the shard is damaged"
            )

    def _to_conversations(self, table: pa.Table, prefix: str, first_row: int) -> list[ScoredConversation]:
        spans, own, rest, counts, tables = (
            _from_lists(table.column(prefix + name))
            for name in ("response_spans", "own_logprobs", "rest_mass", "topk_counts", "topk_tables")
        )
        found = map(_lengths, (own, rest, counts, tables))
        for row, lengths in enumerate(zip(map(_num_scored, spans), *found, strict=True)):
            if len(set(lengths)) > 1:
                raise ShardError(
                    f"{self.path}: row {first_row + row}: {lengths[1]} own log-probs, {lengths[2]} rest masses, "
                    f"{lengths[3]} counts and {lengths[4]} tables for {lengths[0]} scored tokens; the shard is damaged"
                )
        kept = unpack(
            {name: _from_binary(table.column(prefix + name)) for name in column_names(self._capture.precision)},
            [RowColumns(*row) for row in zip(counts, rest, tables, strict=True)],
            self._codec,
            f"{self.path}: rows {first_row} to {first_row + len(counts) - 1}",
        )
        columns = zip(self._to_encoded(table, prefix), own, rest, counts, kept, strict=True)
        return [
            ScoredConversation(encoded, TeacherScores(own_, rest_, counts_, *entries))
            for encoded, own_, rest_, counts_, entries in columns
        ]


def _to_columns(
    rows: Sequence[ShardRow], tables: Sequence[npt.NDArray[np.uint8]], kind: Kind, codec: CodecSettings
) -> list[pa.Array]:
    """Returns the columns of `score_schema`, in its order; `tables` has one entry for each conversation of each row."""
    samples = [row.sample for row in rows]
    columns = [
        pa.array([sample.id for sample in samples], pa.string()),
        pa.array([sample.source_id for sample in samples], pa.string()),
        pa.array([row.index for row in rows], pa.int64()),
        pa.array([[{"bytes": image.data, "path": image.path} for image in s.images] for s in samples], _IMAGES),
    ]
    for number in range(len(PREFIXES[kind])):
        turns = [
            [{"role": t.role, "content": t.content, "scored": t.scored} for t in s.conversations[number]]
            for s in samples
        ]
        encoded = [row.conversations[number].encoded for row in rows]
        scores = [row.conversations[number].scores for row in rows]
        own_tables = tables[number :: len(PREFIXES[kind])]
        columns += [
            pa.array(turns, _MESSAGES),
            _to_lists([e.input_ids for e in encoded], _INTS),
            _to_lists([e.spans for e in encoded], _SPANS),
            pa.array([s.total_logprob for s in scores], pa.float64()),
            _to_lists([s.own_logprobs for s in scores], _FLOATS),
            _to_lists([codec.quantizer.stored_rest(s.rest_mass) for s in scores], _FLOATS),
            _to_lists([s.counts for s in scores], _INTS),
            _to_lists(list(own_tables), _BYTES),
            *map(_to_binary, pack(scores, own_tables, codec).values()),
        ]
    return columns


def _to_binary(packed: BinaryColumn) -> pa.BinaryArray:
    """Returns an Arrow column with one value for each conversation."""
    buffers = [None, pa.py_buffer(packed.offsets.astype(np.int32)), pa.py_buffer(packed.data)]
    return pa.Array.from_buffers(pa.binary(), len(packed.offsets) - 1, buffers)


def _from_binary(column: pa.ChunkedArray) -> BinaryColumn:
    """Inverts `_to_binary`."""
    values = column.combine_chunks()
    _, offsets, data = values.buffers()
    offsets = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    return BinaryColumn(np.frombuffer(data, np.uint8) if data else np.zeros(0, np.uint8), offsets)


def _to_lists(arrays: list[npt.NDArray[Any]], list_type: pa.ListType) -> pa.ListArray:
    """Returns an Arrow column with one list for each array [n], or for each array [n, 2] one list of pairs."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    item = list_type.value_type
    flat = np.concatenate(arrays) if arrays else np.zeros((0, item.num_fields or 1), np.int32).squeeze()
    if item.num_fields:
        values = pa.StructArray.from_arrays([pa.array(column) for column in flat.T], fields=list(item))
    else:
        values = pa.array(flat, item)
    return pa.ListArray.from_arrays(offsets, values, type=list_type)


def _from_lists(column: pa.ChunkedArray) -> list[npt.NDArray[Any]]:
    """Inverts `_to_lists`. Each array owns its memory, so that a kept row keeps no other alive."""
    lists = column.combine_chunks()
    values = lists.values
    flat = np.stack([v.to_numpy() for v in values.flatten()], axis=1) if values.type.num_fields else values.to_numpy()
    return [flat[start:stop].copy() for start, stop in itertools.pairwise(lists.offsets.to_numpy())]


def _num_scored(spans: npt.NDArray[np.int32]) -> int:
    return int((spans[:, 1] - spans[:, 0]).sum())


def _lengths(arrays: Sequence[npt.NDArray[Any]]) -> list[int]:
    return [len(array) for array in arrays]


def num_scored_tokens(rows: Iterable[ShardRow]) -> int:
    """Returns the number of scored tokens in all conversations of `rows`."""
    return sum(c.scores.num_rows for row in rows for c in row.conversations)
