"""Parquet files as records, as `datasets` and others write them; images are {bytes, path} in a column of their own.

When a file is opened its metadata and its ids are read. Row groups are decoded when they are needed, and the most
recent ones stay in memory.
"""

import hashlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.data.record_keys import (
    CHAT_KEYS,
    ID_KEYS,
    IMAGE_KEYS,
    PAIR_KEYS,
    PROMPT_KEYS,
    find_source_id,
    is_relevant,
    is_unused_key,
    is_unused_turn_key,
)
from common.data.sample_ids import SourceIds
from common.errors import DataError
from common.storage.files import Location, open_ranged

MAGIC = b"PAR1"

_CACHED_BYTES = 512 << 20
_READ_BYTES = 8 << 20
_ROWS_PER_BATCH = 1 << 16
_FOOTER_END_BYTES = 8
# Parts of a leaf column's path that lists and structs add.
_LIST_PARTS = frozenset(("list", "element", "item", "array"))


class ParquetFile:
    """Records of one Parquet file; it may be pickled.

    `sha256` (hex) covers the footer and all columns but the bytes of images, as that of a JSON file covers the names of
    its images alone: millions of images would take hours to read. `unused` counts the keys that are not used.
    """

    def __init__(self, path: Location) -> None:
        """Reads the metadata and the ids.

        Raises:
            DataError: the file cannot be read, or a column cannot be used. StorageError: the store failed.
        """
        self.path = path
        self.source_ids = SourceIds()
        self._lock = threading.Lock()
        self._file: pq.ParquetFile | None = None
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()
        try:
            metadata = self._open().metadata
            sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            self._first_row = np.cumsum([0, *sizes])
            self.unused = _count_unused(metadata)
            self.sha256 = self._hash(metadata)
            self._read_ids()
        except (OSError, pa.ArrowException, ValueError) as error:
            raise DataError(f"{path}: the dataset cannot be read ({error}); check it, or write it again") from error

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._first_row, index, "right")) - 1
        with self._lock:
            try:
                rows = self._read_group(group).slice(index - int(self._first_row[group]), 1).to_pylist()
            except (OSError, pa.ArrowException, ValueError) as error:
                raise DataError(
                    f"{self.path}: row group {group} cannot be read ({error}); check it, or write it again"
                ) from error
        record: dict[str, Any] = rows[0]
        return record

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_groups": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def position(self, index: int) -> str:
        """Returns where a record stands, for messages."""
        return f"row {index}"

    def _open(self) -> pq.ParquetFile:
        if self._file is None:
            self._file = pq.ParquetFile(open_ranged(self.path))
        return self._file

    def _read_group(self, group: int) -> pa.Table:
        if group not in self._groups:
            file = self._open()
            columns = [name for name in file.schema_arrow.names if is_relevant(name)]
            self._groups[group] = file.read_row_group(group, columns=columns)
        self._groups.move_to_end(group)
        while len(self._groups) > 1 and sum(table.nbytes for table in self._groups.values()) > _CACHED_BYTES:
            self._groups.popitem(last=False)
        return self._groups[group]

    def _read_ids(self) -> None:
        file = self._open()
        columns = [name for name in ID_KEYS if name in file.schema_arrow.names]
        if not columns:
            self.source_ids.append_missing(len(self))
            return
        for batch in file.iter_batches(_ROWS_PER_BATCH, columns=columns):
            for record in batch.to_pylist():
                where = f"{self.path}: row {len(self.source_ids)}"
                self.source_ids.append(find_source_id(record, where))

    def _hash(self, metadata: pq.FileMetaData) -> str:
        """Returns the SHA-256 of all that is hashed, in the order in which it stands in the file."""
        sha256 = hashlib.sha256()
        with open_ranged(self.path) as file:
            size = file.seek(0, 2)
            file.seek(size - _FOOTER_END_BYTES)
            footer_bytes = int.from_bytes(file.read(4), "little")
            footer_start = size - _FOOTER_END_BYTES - footer_bytes
            ranges = sorted(_hashed_chunks(metadata))
            for start, stop in (*ranges, (footer_start, size)):
                if not 0 <= start <= stop <= size:
                    raise ValueError(f"a column ends at byte {stop} of {size}")
                file.seek(start)
                while start < stop and (chunk := file.read(min(_READ_BYTES, stop - start))):
                    sha256.update(chunk)
                    start += len(chunk)
        return sha256.hexdigest()


def _hashed_chunks(metadata: pq.FileMetaData) -> Iterator[tuple[int, int]]:
    """Yields the byte ranges of all columns but the bytes of images."""
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(metadata.num_columns):
            column = row_group.column(number)
            parts = column.path_in_schema.split(".")
            is_binary = (
                column.physical_type == "BYTE_ARRAY" and metadata.schema.column(number).logical_type.type == "NONE"
            )
            if parts[0] in IMAGE_KEYS and is_binary:
                continue
            start = column.data_page_offset
            if column.dictionary_page_offset is not None:
                start = min(start, column.dictionary_page_offset)
            yield start, start + column.total_compressed_size


def _count_unused(metadata: pq.FileMetaData) -> Counter[str]:
    """Counts the values of columns that are not used, as the metadata has them."""
    counts: Counter[str] = Counter()
    for number in range(metadata.num_columns):
        top, *rest = metadata.schema.column(number).path.split(".")
        names = [part for part in rest if part not in _LIST_PARTS]
        if is_unused_key(top):
            key = top
        elif top in (*CHAT_KEYS, *PAIR_KEYS, *PROMPT_KEYS) and names and is_unused_turn_key(names[0]):
            key = f"{top}.{names[0]}"
        else:
            continue
        chunks = [metadata.row_group(group).column(number) for group in range(metadata.num_row_groups)]
        num_nulls = sum(chunk.statistics.null_count or 0 for chunk in chunks if chunk.statistics is not None)
        if num_filled := sum(chunk.num_values for chunk in chunks) - num_nulls:
            counts[key] = max(counts[key], num_filled)
    return counts
