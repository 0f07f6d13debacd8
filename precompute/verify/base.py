"""What verifying any output begins with: its manifest, which files are there, receipts and checksums.

Nothing that a file holds makes this crash: each finding is a problem of a named check, and the walk goes on with what
can still be read. A file whose bytes changed is not parsed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from common.data.samples import Dataset, Kind
from common.errors import DataError, DecantError, ShardError, StorageError
from common.shards.manifest import (
    MANIFEST_NAME,
    Receipt,
    ShardedManifest,
    file_sha256,
    published_shards,
    read_receipt,
    read_with_digest,
    receipt_path,
    shard_number,
    shard_path,
)
from common.shards.parquet_shard import ParquetShard
from common.storage.files import Location
from precompute.output_files import list_output_files
from precompute.report import Check, Report, ranges
from precompute.verify.manifest_checks import manifest_of_shards

MEANINGS = {
    "manifest": "manifest.json is what was written",
    "receipts": "each receipt is what was written and belongs to this output",
    "files": "each shard has a receipt and each receipt a shard",
    "coverage": "all shards are there, and each holds or lists every sample of its range",
    "checksums": "the bytes of each shard are those that were written",
    "columns": "each shard has the columns of the format",
    "pages": "each page of each shard can be read and matches its checksum",
}

ManifestT = TypeVar("ManifestT", bound=ShardedManifest)
FileT = TypeVar("FileT", bound=ParquetShard)


class OutputVerifier(Generic[ManifestT]):
    """One walk over an output, collecting what is wrong."""

    def __init__(self, output: Location, schema: type[ManifestT], meanings: Mapping[str, str]) -> None:
        self.output = output
        self.checks = {name: Check(name, meaning) for name, meaning in meanings.items()}
        self.files = list_output_files(output, "precompute-logits or precompute-features")
        self._schema = schema
        self._receipts: list[Receipt] = []
        self._restored: ManifestT | None = None

    def report(self) -> Report:
        """What was found so far."""
        return Report(
            output=self.output,
            checks=tuple(self.checks.values()),
            num_shards=len(self._receipts),
            num_rows=sum(receipt.num_rows for receipt in self._receipts),
            num_scored_tokens=sum(receipt.num_scored_tokens for receipt in self._receipts),
            num_bytes=sum(receipt.num_bytes for receipt in self._receipts),
            num_skipped=sum(len(receipt.skipped) for receipt in self._receipts),
            listing=self.files,
            restored=self._restored,
            schema=self._schema,
        )

    def manifest(self, problems_of: Callable[[ManifestT], Iterable[str]]) -> ManifestT | None:
        """That of the output, or, if it is broken, the one in its shards, so that these can still be checked."""
        check, path = self.checks["manifest"], self.output / MANIFEST_NAME
        check.passed()
        try:
            manifest = read_with_digest(path, self._schema)
            problems = [*problems_of(manifest), *self._is_another_outputs(manifest)]
        except StorageError:
            raise
        except DecantError as error:
            problems = [str(error)]
        if not problems:
            return manifest
        for problem in problems:
            check.failed(path, problem)
        try:
            self._restored = manifest_of_shards(self.output, self._schema)
        except ShardError as error:
            check.failed(path, f"nothing else was checked, since the shards do not tell what it was: {error}")
            return None
        return None if list(problems_of(self._restored)) else self._restored

    def _is_another_outputs(self, manifest: ManifestT) -> Iterator[str]:
        """No receipt belongs to it, while all shards belong together."""
        numbers = published_shards(self.output)
        with contextlib.suppress(ShardError):
            if numbers and read_with_digest(receipt_path(self.output, numbers[0]), Receipt).manifest_sha256 != (
                manifest.sha256
            ):
                theirs = manifest_of_shards(self.output, self._schema).sha256
                yield f"is not the manifest of the shards, which all name {theirs}"

    def open_dataset(self, path: Location, kind: Kind, sha256: str, num_samples: int) -> Dataset | None:
        """The dataset that the output was made from; None if it cannot be read."""
        check = self.checks["dataset"]
        check.passed()
        try:
            dataset = Dataset.open(path, kind)
        except DataError as error:
            check.failed(path, str(error))
            return None
        if dataset.sha256 != sha256:
            check.failed(path, f"has SHA-256 {dataset.sha256}, the output was made from {sha256}")
        if len(dataset) != num_samples:
            check.failed(path, f"has {len(dataset):,} samples, expected {num_samples:,}")
        return dataset

    def shards(self, manifest: ManifestT) -> list[int]:
        """Published shards below the last; notes what is missing: receipts, files, shards."""
        published = set(published_shards(self.output))
        files, coverage = self.checks["files"], self.checks["coverage"]
        stored = [name for name in self.files if name.endswith(".parquet")]
        found = {number for name in stored if (number := shard_number(name)) is not None}
        for number in sorted(found | published):
            files.passed()
            if number >= manifest.num_shards:
                files.failed(shard_path(self.output, number), f"the last shard is {manifest.num_shards - 1}")
            elif number not in published:
                files.failed(shard_path(self.output, number), "has no receipt, so it was never finished")
            elif number not in found:
                files.failed(receipt_path(self.output, number), "is the receipt of a shard that is not there")
        missing = [number for number in range(manifest.num_shards) if number not in published]
        coverage.passed(manifest.num_shards)
        if missing:
            coverage.failed(
                self.output,
                f"{len(missing)} of {manifest.num_shards} shards are missing: {ranges(missing)}; "
                f"run {self._schema.command} again, it writes these alone",
            )
        return [number for number in range(manifest.num_shards) if number in published]

    def receipt(self, number: int, manifest: ManifestT) -> Receipt | None:
        """A shard's receipt, if it is whole and the shard has the bytes that it names."""
        check, path = self.checks["receipts"], shard_path(self.output, number)
        check.passed()
        try:
            receipt = read_receipt(self.output, number, manifest)
        except StorageError:
            raise
        except DecantError as error:
            check.failed(receipt_path(self.output, number), str(error))
            return None
        self._receipts.append(receipt)
        return receipt if path.name in self.files and self._bytes_are_right(path, receipt) else None

    def _bytes_are_right(self, path: Location, receipt: Receipt) -> bool:
        check = self.checks["checksums"]
        check.passed()
        try:
            size, sha256 = self.files[path.name], file_sha256(path)
        except (OSError, ShardError) as error:
            check.failed(path, str(error))
            return False
        if (size, sha256) == (receipt.num_bytes, receipt.sha256):
            return True
        check.failed(
            path,
            f"has {size:,} bytes with SHA-256 {sha256}, its receipt says {receipt.num_bytes:,} with {receipt.sha256}; "
            f"run verify-shards with --repair, then {self._schema.command} again: it fills the gap",
        )
        return False

    def check_shard(
        self,
        number: int,
        manifest: ManifestT,
        open_shard: Callable[[Location, ManifestT, int], FileT],
        check_rows: Callable[[FileT, Receipt], None],
    ) -> None:
        """Hands a shard with a whole receipt and the bytes that it names to `check_rows`."""
        receipt = self.receipt(number, manifest)
        if receipt is None:
            return
        path, columns = shard_path(self.output, number), self.checks["columns"]
        columns.passed()
        try:
            shard = open_shard(path, manifest, number)
        except ShardError as error:
            columns.failed(path, str(error))
            return
        with contextlib.closing(shard):
            try:
                check_rows(shard, receipt)
            except StorageError:
                raise
            except Exception as error:  # noqa: BLE001 - damage behind a matching checksum may raise anything
                self.checks["pages"].failed(path, f"cannot be read ({type(error).__name__}: {error})")

    def note(self, name: str, path: Location, where: str, problems: Iterable[str], count: int = 1) -> None:
        """Counts what was looked at, and what was wrong with it."""
        check = self.checks[name]
        check.passed(count)
        for problem in problems:
            check.failed(path, f"{where}: {problem}")
