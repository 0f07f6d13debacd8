"""Common part of score shards and feature shards: a Parquet file whose footer holds the manifest, and a receipt."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import ShardError
from common.shards.manifest import (
    Receipt,
    ShardCheck,
    ShardedManifest,
    SkippedSample,
    file_sha256,
    read_receipt,
    read_with_digest,
    receipt_path,
    shard_path,
    write_with_digest,
)
from common.storage.files import Location, file_size, modified_ns, open_ranged, publish

# The lowest level, because the columns' numbers hardly repeat: the few matches that higher levels find cost more bytes.
ZSTD_LEVEL = 1

# Texts and images have no limit by the manifest: they may have this size, or compress by this factor.
_MIN_COLUMN_LIMIT_BYTES = 256 << 20
_MAX_COMPRESSION = 2000

# Prefix of this program's keys in the Parquet footer; `ParquetShard.footer` has them without it.
_KEY_PREFIX = b"decant."


class ParquetShard:
    """Open shard, read by row group. `footer` has this program's metadata in the file's footer, by key.

    Before a byte of the file is parsed, it is compared with its receipt as `check` says.

    Raises:
        ShardError: on opening or reading, if the file is damaged or not this shard of the manifest; names the file.
        ProvenanceError: the receipt belongs to an output with another manifest.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the subclasses give the last three
        self,
        path: Location,
        manifest: ShardedManifest,
        number: int,
        schema: pa.Schema,
        what: str,
        check: ShardCheck,
    ) -> None:
        self.path = path
        receipt = read_receipt(path.parent, number, manifest)
        check_shard_bytes(path, receipt, check)
        # pyarrow's reader may crash if threads use it at the same time.
        self._lock = threading.Lock()
        with self.shard_errors():
            is_object = not isinstance(path, Path)
            source = open_ranged(path) if is_object else path
            # Buffered for an object, so that all columns of a row group are one request.
            self._file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=is_object)
            found = self._file.schema_arrow
            self.footer = _own_metadata(self._file.metadata)
        if not found.equals(schema):
            raise ShardError(
                f"{path}: its columns are not those of a {what}:\n{found.to_string(show_schema_metadata=False)}"
            )
        if self.footer.get("manifest_sha256") != manifest.sha256:
            raise ShardError(f"{path}: belongs to an output with another manifest")
        if self.footer.get("shard") != str(number):
            raise ShardError(f"{path}: holds shard {self.footer.get('shard')!r}; the file was renamed")
        self.num_rows: int = self._file.metadata.num_rows
        if self.num_rows != receipt.num_rows:
            raise _damaged(path, f"has {self.num_rows:,} rows, its receipt says {receipt.num_rows:,}")
        self._check_sizes()

    def max_column_bytes(self, num_rows: int) -> int:
        """Returns how many bytes the manifest allows a column of numbers in a row group to have."""
        raise NotImplementedError

    def _check_sizes(self) -> None:
        """Raises ShardError if a column would take more memory than is possible, before any is taken."""
        metadata = self._file.metadata
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            limit = max(_MIN_COLUMN_LIMIT_BYTES, self.max_column_bytes(row_group.num_rows))
            for number in range(row_group.num_columns):
                column = row_group.column(number)
                num_bytes = column.total_uncompressed_size
                if not 0 <= num_bytes <= max(limit, _MAX_COMPRESSION * column.total_compressed_size):
                    raise _damaged(
                        self.path,
                        f"row group {group}: column {column.path_in_schema} would take {num_bytes:,} bytes, expected "
                        f"at most {limit:,}",
                    )

    @property
    def num_groups(self) -> int:
        """Number of row groups."""
        return int(self._file.num_row_groups)

    def num_group_rows(self, group: int) -> int:
        """Returns the number of rows in a row group."""
        return int(self._file.metadata.row_group(group).num_rows)

    def read_column(self, name: str) -> list[Any]:
        """Reads all values of one column, or of one part of it, such as images.list.element.path."""
        with self.shard_errors(), self._lock:
            values: list[Any] = self._file.read([name]).column(name.partition(".")[0]).to_pylist()
        return values

    def _read(self, group: int, leaves: Sequence[str] | None = None) -> pa.Table:
        with self._lock:
            return self._file.read_row_group(group, leaves)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def shard_errors(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context that turns errors of reading into a ShardError that names the file."""
        return _shard_errors(self.path)


# Shards of this process whose bytes are known to be those of their receipts: path, SHA-256, time of the last change.
_intact: set[tuple[str, str, int | None]] = set()


def check_shard_bytes(path: Location, receipt: Receipt, check: ShardCheck = "sha256") -> None:
    """Checks that a shard's file has the bytes that its receipt names. A file is hashed once a process.

    Parsers of C++ may end the whole process over a damaged footer, so this comes before they see it.

    Raises:
        ShardError: the file is gone, or has another size or SHA-256. StorageError: the store failed.
    """
    with _shard_errors(path):
        size, key = file_size(path), (str(path), receipt.sha256, modified_ns(path))
    if size != receipt.num_bytes:
        raise _damaged(path, f"has {size:,} bytes, its receipt says {receipt.num_bytes:,}")
    if check == "size" or key in _intact:
        return
    if (sha256 := file_sha256(path)) != receipt.sha256:
        raise _damaged(path, f"has SHA-256 {sha256}, its receipt says {receipt.sha256}")
    _intact.add(key)


def remember_intact(path: Location, receipt: Receipt) -> None:
    """Saves `check_shard_bytes` from hashing a file whose SHA-256 the caller has just found to be the receipt's."""
    _intact.add((str(path), receipt.sha256, modified_ns(path)))


def _damaged(path: Location, what: str) -> ShardError:
    return ShardError(
        f"{path}: {what}; the shard is damaged: run verify-shards with --repair, then the command that wrote it again: "
        "it fills the gap"
    )


def footer_metadata(manifest: ShardedManifest, number: int, **others: str | bytes) -> dict[bytes, str | bytes]:
    """Returns the metadata of a shard's file, for `ParquetWriter.add_key_value_metadata`."""
    return {
        _KEY_PREFIX + name.encode(): value
        for name, value in {
            "schema_version": str(manifest.model_dump()["schema_version"]),
            "manifest": manifest.model_dump_json(),
            "manifest_sha256": manifest.sha256,
            "shard": str(number),
            **others,
        }.items()
    }


@dataclass(frozen=True)
class ShardContents:
    """Bytes of a shard's Parquet file, and the facts about its rows that the receipt holds."""

    data: bytes
    num_rows: int
    num_scored_tokens: int = 0
    skipped: tuple[SkippedSample, ...] = ()


def publish_shard(output: Location, number: int, manifest: ShardedManifest, contents: ShardContents) -> Receipt:
    """Publishes a shard's Parquet file, then its receipt.

    Raises:
        StorageError: the file or the receipt was not written, so the shard does not exist.
    """
    publish(shard_path(output, number), contents.data)
    receipt = Receipt(
        shard=number,
        manifest_sha256=manifest.sha256,
        num_rows=contents.num_rows,
        num_scored_tokens=contents.num_scored_tokens,
        num_bytes=len(contents.data),
        sha256=hashlib.sha256(contents.data).hexdigest(),
        skipped=contents.skipped,
    )
    write_with_digest(receipt_path(output, number), receipt)
    return receipt


def read_footer(path: Location) -> dict[str, str]:
    """Reads this program's metadata in the footer of a shard of any output, after a check against its receipt.

    Raises:
        ShardError: the file or its receipt is missing, damaged, or no Parquet file. StorageError: the store failed.
    """
    check_shard_bytes(path, read_with_digest(path.with_suffix(".json"), Receipt))
    with _shard_errors(path), open_ranged(path) as file:
        return _own_metadata(pq.read_metadata(file))


def _own_metadata(metadata: pq.FileMetaData) -> dict[str, str]:
    """Returns the values of this program's keys, by key without the prefix."""
    return {
        key.removeprefix(_KEY_PREFIX).decode(errors="replace"): value.decode(errors="replace")
        for key, value in (metadata.metadata or {}).items()
        if key.startswith(_KEY_PREFIX)
    }


@contextlib.contextmanager
def _shard_errors(path: Location) -> Iterator[None]:
    """Turns any error of pyarrow or numpy over damaged bytes into a ShardError that names the file."""
    try:
        yield
    except (OSError, MemoryError, pa.ArrowException, ValueError, TypeError, LookupError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ShardError(
            f"{path}: cannot be read ({reason}); run verify-shards with --repair, then the command that wrote it "
            "again: it fills the gap"
        ) from error
