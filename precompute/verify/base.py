"""Base class of both verifiers: checks an output's manifest, its files, receipts and checksums.

Nothing that a file holds makes verification crash: each finding is a problem of a named check, and verification goes on
with what can still be read. A file whose bytes changed is not parsed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from common.data.dataset import Dataset
from common.data.samples import Kind
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
from common.shards.output_files import list_output_files
from common.shards.parquet_shard import ParquetShard, remember_intact
from common.storage.files import Location
from precompute.report import Check, Report, format_runs
from precompute.verify.manifest_checks import restore_manifest

# The checks of every output, each with what holds if it passes.
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
    """Verifier of one output. Its methods add their findings to `checks`; they raise nothing but StorageError.

    `files` has names and bytes of the output's files when verification began.
    """

    def __init__(self, output: Location, schema: type[ManifestT], meanings: Mapping[str, str]) -> None:
        self.output = output
        self.checks = {name: Check(name, meaning) for name, meaning in meanings.items()}
        self.files = list_output_files(output, "precompute-logits or precompute-features")
        self._schema = schema
        self._receipts: list[Receipt] = []
        self._restored: ManifestT | None = None

    def report(self) -> Report:
        """Returns what was found so far."""
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

    def verify_manifest(self, find_problems: Callable[[ManifestT], Iterable[str]]) -> ManifestT | None:
        """Checks manifest.json and returns the manifest.

        If it is broken, the one that the shards repeat is returned, so that these can still be checked; None if they
        repeat none.
        """
        check, path = self.checks["manifest"], self.output / MANIFEST_NAME
        check.passed()
        try:
            manifest = read_with_digest(path, self._schema)
            problems = [*find_problems(manifest), *self._compare_with_shards(manifest)]
        except StorageError:
            raise
        except DecantError as error:
            problems = [str(error)]
        if not problems:
            return manifest
        for problem in problems:
            check.failed(path, problem)
        try:
            self._restored = restore_manifest(self.output, self._schema)
        except ShardError as error:
            check.failed(path, f"nothing else was checked, since the shards do not tell what it was: {error}")
            return None
        return None if list(find_problems(self._restored)) else self._restored

    def _compare_with_shards(self, manifest: ManifestT) -> Iterator[str]:
        """Yields a problem if all shards belong to one manifest, which is another one."""
        numbers = published_shards(self.output)
        with contextlib.suppress(ShardError):
            if numbers and read_with_digest(receipt_path(self.output, numbers[0]), Receipt).manifest_sha256 != (
                manifest.sha256
            ):
                restored = restore_manifest(self.output, self._schema)
                yield f"is not the manifest of the shards, which all name {restored.sha256}"

    def open_dataset(self, path: Location, kind: Kind, sha256: str, num_samples: int) -> Dataset | None:
        """Opens the dataset and checks that the output was made from it; returns None if it cannot be read."""
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

    def verify_files(self, manifest: ManifestT) -> list[int]:
        """Checks that no shard and no receipt is missing; returns the numbers of the published shards."""
        published = set(published_shards(self.output))
        files, coverage = self.checks["files"], self.checks["coverage"]
        parquet_names = [name for name in self.files if name.endswith(".parquet")]
        stored = {number for name in parquet_names if (number := shard_number(name)) is not None}
        for number in sorted(stored | published):
            files.passed()
            if number >= manifest.num_shards:
                files.failed(shard_path(self.output, number), f"the last shard is {manifest.num_shards - 1}")
            elif number not in published:
                files.failed(shard_path(self.output, number), "has no receipt, so it was never finished")
            elif number not in stored:
                files.failed(receipt_path(self.output, number), "is the receipt of a shard that is not there")
        missing = manifest.missing_shards(sorted(published))
        coverage.passed(manifest.num_shards)
        if missing:
            coverage.failed(
                self.output,
                f"{sum(map(len, missing))} of {manifest.num_shards} shards are missing: {format_runs(missing)}; "
                f"run {self._schema.command} again, it writes these alone",
            )
        return [number for number in sorted(published) if number < manifest.num_shards]

    def _verify_receipt(self, number: int, manifest: ManifestT) -> Receipt | None:
        """Returns a shard's receipt if it is undamaged and the shard has the bytes that it names."""
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
        return receipt if path.name in self.files and self._verify_checksum(path, receipt) else None

    def _verify_checksum(self, path: Location, receipt: Receipt) -> bool:
        check = self.checks["checksums"]
        check.passed()
        try:
            size, sha256 = self.files[path.name], file_sha256(path)
        except ShardError as error:
            check.failed(path, str(error))
            return False
        if (size, sha256) == (receipt.num_bytes, receipt.sha256):
            remember_intact(path, receipt)
            return True
        check.failed(
            path,
            f"has {size:,} bytes with SHA-256 {sha256}, its receipt says {receipt.num_bytes:,} with {receipt.sha256}; "
            f"run verify-shards with --repair, then {self._schema.command} again: it fills the gap",
        )
        return False

    def verify_shard(
        self,
        number: int,
        manifest: ManifestT,
        open_shard: Callable[[Location, ManifestT, int], FileT],
        verify_rows: Callable[[FileT, Receipt], None],
    ) -> None:
        """Checks a shard's receipt and bytes; if both are right, opens it and calls `verify_rows`."""
        receipt = self._verify_receipt(number, manifest)
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
                verify_rows(shard, receipt)
            except StorageError:
                raise
            except Exception as error:  # noqa: BLE001 - damage behind a matching checksum may raise anything
                self.checks["pages"].failed(path, f"cannot be read ({type(error).__name__}: {error})")

    def add_problems(self, name: str, path: Location, where: str, problems: Iterable[str], count: int = 1) -> None:
        """Adds `count` checked things and their problems to the check `name`; `where` is their place in the file."""
        check = self.checks[name]
        check.passed(count)
        for problem in problems:
            check.failed(path, f"{where}: {problem}")
