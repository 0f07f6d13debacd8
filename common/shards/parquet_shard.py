"""What shards of scores and of features have in common: a Parquet file that says what it belongs to, and a receipt."""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import ShardError
from common.shards.manifest import Receipt, ShardedManifest, SkippedSample, receipt_path, shard_path, write_with_digest
from common.storage.files import Location, open_ranged, publish

# Columns hold numbers, in which there are few repetitions: higher levels look for some, and code what they find dearly.
ZSTD_LEVEL = 1

# Keys of the Parquet footer begin with this; what follows it is a key of `ParquetShard.footer`.
_KEY_PREFIX = b"decant."


class ParquetShard:
    """An open shard: rows by row group, each read when it is asked for. `footer` has what the file says of itself.

    Raises:
        ShardError: on opening or reading, naming the file, if it is not a shard of this manifest or is damaged.
    """

    def __init__(self, path: Location, manifest: ShardedManifest, number: int, schema: pa.Schema, what: str) -> None:
        self.path = path
        # pyarrow's reader crashes now and then where threads share it.
        self._one_at_a_time = threading.Lock()
        with self.shard_errors():
            # Of an object, a row group's columns in one request.
            remote = not isinstance(path, Path)
            source = open_ranged(path) if remote else path
            self._file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=remote)
            found = self._file.schema_arrow
            self.footer = _footer(self._file.metadata)
        if not found.equals(schema):
            raise ShardError(
                f"{path}: its columns are not those of a {what}:\n{found.to_string(show_schema_metadata=False)}"
            )
        if self.footer.get("manifest_sha256") != manifest.sha256:
            raise ShardError(f"{path}: belongs to an output with another manifest")
        if self.footer.get("shard") != str(number):
            raise ShardError(f"{path}: holds shard {self.footer.get('shard')!r}; the file was renamed")
        self.num_rows: int = self._file.metadata.num_rows

    @property
    def num_groups(self) -> int:
        """Number of row groups."""
        return int(self._file.num_row_groups)

    def group_rows(self, group: int) -> int:
        """Number of rows in a row group."""
        return int(self._file.metadata.row_group(group).num_rows)

    def read_column(self, name: str) -> list[Any]:
        """All values of one column, or of one part of it, such as images.list.element.path."""
        with self.shard_errors(), self._one_at_a_time:
            values: list[Any] = self._file.read([name]).column(name.partition(".")[0]).to_pylist()
        return values

    def _read(self, group: int, leaves: Sequence[str] | None = None) -> pa.Table:
        with self._one_at_a_time:
            return self._file.read_row_group(group, leaves)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def shard_errors(self) -> "_NamedShardErrors":
        """A context that turns what reading raises into a ShardError."""
        return _NamedShardErrors(self.path)


def footer_metadata(manifest: ShardedManifest, number: int, **others: str | bytes) -> dict[bytes, str | bytes]:
    """Metadata of a shard's file, for `ParquetWriter.add_key_value_metadata`."""
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
    """A shard's Parquet file, and what its receipt says of the rows in it."""

    data: bytes
    num_rows: int
    num_scored_tokens: int = 0
    skipped: tuple[SkippedSample, ...] = ()


def publish_shard(output: Location, number: int, manifest: ShardedManifest, contents: ShardContents) -> Receipt:
    """Publishes a shard's Parquet file, then its receipt.

    Raises:
        StorageError: not written; no receipt exists then, so the shard does not either.
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
    """What a shard says of itself, whatever output it belongs to.

    Raises:
        ShardError: no Parquet file, or a damaged one.
    """
    with _NamedShardErrors(path), open_ranged(path) as file:
        return _footer(pq.read_metadata(file))


def _footer(metadata: pq.FileMetaData) -> dict[str, str]:
    """The keys that this program writes, without their prefix."""
    return {
        key.removeprefix(_KEY_PREFIX).decode(errors="replace"): value.decode(errors="replace")
        for key, value in (metadata.metadata or {}).items()
        if key.startswith(_KEY_PREFIX)
    }


class _NamedShardErrors:
    """Turns whatever pyarrow or numpy raises on damaged bytes into a ShardError that names the file."""

    def __init__(self, path: Location) -> None:
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
                "run verify-shards with --repair, then the command that wrote it again: it fills the gap"
            ) from error
