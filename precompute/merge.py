"""Joins outputs that were captured apart (`merge-shards`), or writes an output in shards of another size.

    outputs of one manifest ─> for each shard: the first intact copy ─> its bytes, then its receipt
    with --samples-per-shard: rows of all shards ─> new shards under a manifest that differs in that number alone

Every file is checked against its receipt before it is used. An interrupted merge continues when it is started again,
because complete shards stay.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from common.console import plain_text
from common.errors import ConfigError, ProvenanceError, ShardError
from common.shards.manifest import (
    Manifest,
    Receipt,
    SkippedSample,
    is_complete,
    list_differences,
    open_output,
    read_manifest,
    read_receipts,
    receipt_path,
    shard_path,
    write_with_digest,
)
from common.shards.output_files import output_kind
from common.shards.score_shard import ShardFile, ShardRow, write_shard
from common.storage.files import Location, directory_lock, publish, read_bytes, remove_partials
from common.storage.output_check import check_output
from precompute.dataset_card import write_card_if_complete
from precompute.report import format_runs


@dataclass(frozen=True)
class MergeResult:
    """Totals of the merged output; `notes` say which copy of a shard was taken where copies differ."""

    out: Location
    num_shards: int
    num_new_shards: int
    missing: tuple[range, ...]
    num_rows: int
    num_scored_tokens: int
    num_bytes: int
    notes: tuple[str, ...]

    def render(self) -> RenderableType:
        """Returns totals, notes, and what is missing."""
        table = Table(show_header=False, box=None)
        num_present = self.num_shards - sum(map(len, self.missing))
        table.add_row("output", plain_text(self.out))
        table.add_row("shards", f"{num_present:,} of {self.num_shards:,}, {self.num_new_shards:,} new")
        table.add_row("rows", f"{self.num_rows:,}")
        table.add_row("scored tokens", f"{self.num_scored_tokens:,} in {self.num_bytes:,} bytes")
        verdict = Text("complete", style="green")
        if self.missing:
            verdict = Text(
                f"incomplete: shards {format_runs(self.missing)} are in none of the outputs; precompute-logits with "
                "this output writes them, or merge again with the outputs that have them",
                style="bold red",
            )
        return Group(table, *map(plain_text, self.notes), verdict)


@dataclass(frozen=True)
class _Copy:
    """A shard of one of the merged outputs."""

    output: Location
    receipt: Receipt

    @property
    def path(self) -> Location:
        return shard_path(self.output, self.receipt.shard)

    def read_intact(self) -> bytes | None:
        """Returns the shard's bytes; None if the file is gone or its SHA-256 is not that of the receipt."""
        try:
            data = read_bytes(self.path)
        except OSError:
            return None
        return data if hashlib.sha256(data).hexdigest() == self.receipt.sha256 else None


def merge_outputs(
    outputs: Sequence[Location], out: Location, samples_per_shard: int | None = None, *, progress: bool = True
) -> MergeResult:
    """Joins outputs of one manifest into `out`; with `samples_per_shard`, writes their rows in shards of that size.

    Raises:
        ConfigError: `out` is one of `outputs`, or holds other things.
        ProvenanceError: the manifests of the outputs, or the one in `out`, differ; every difference is listed.
        ShardError: no copy of a shard is intact, copies contradict each other, or shards are missing although
            `samples_per_shard` is given.
        StorageError: the disk or the store refused. Shards that are written stay.
    """
    source = _read_common_manifest(outputs)
    manifest = source
    if samples_per_shard is not None:
        manifest = source.model_copy(update={"samples_per_shard": samples_per_shard})
    _check_destination(outputs, out)
    copies, notes = _find_copies(outputs, source)
    missing = source.missing_shards(sorted(copies))
    if missing and manifest != source:
        num_missing = sum(map(len, missing))
        raise ShardError(
            f"{num_missing} of {source.num_shards} shards are in none of the outputs: {format_runs(missing)}; "
            "shards of another size need all of them: write them with precompute-logits, or merge without "
            "--samples-per-shard"
        )
    with directory_lock(out):
        open_output(out, manifest)
        remove_partials(out)
        numbers = sorted(copies) if manifest == source else range(manifest.num_shards)
        pending = [number for number in numbers if not is_complete(out, number, manifest)]
        rows = _RowReader(copies, source)
        for number in tqdm(pending, desc="merging", unit=" shards", disable=not progress):
            if manifest == source:
                notes += _copy_shard(copies[number], out)
            else:
                _write_shard(number, manifest, rows, out)
    receipts = read_receipts(out, manifest)
    write_card_if_complete(out, manifest, receipts)
    return MergeResult(
        out=out,
        num_shards=manifest.num_shards,
        num_new_shards=len(pending),
        missing=manifest.missing_shards(receipt.shard for receipt in receipts),
        num_rows=sum(receipt.num_rows for receipt in receipts),
        num_scored_tokens=sum(receipt.num_scored_tokens for receipt in receipts),
        num_bytes=sum(receipt.num_bytes for receipt in receipts),
        notes=tuple(notes),
    )


def _read_common_manifest(outputs: Sequence[Location]) -> Manifest:
    """Returns the manifest of all outputs; raises ProvenanceError with every difference if they have several."""
    first, *others = ((output, read_manifest(output)) for output in outputs)
    lines = []
    for output, manifest in others:
        names = (str(first[0]), str(output))
        lines += list_differences(first[1].model_dump(), manifest.model_dump(), names=names)
    if lines:
        hint = ""
        if all(line.startswith("samples_per_shard:") for line in lines):
            hint = "; write one of them in shards of the other's size first: merge-shards ONE --samples-per-shard N"
        raise ProvenanceError(
            "the outputs were not made alike; nothing was written\n"
            + "\n".join(f"  {line}" for line in lines)
            + f"\nonly outputs of one teacher, dataset and setting can be joined{hint}"
        )
    return first[1]


def _check_destination(outputs: Sequence[Location], out: Location) -> None:
    if str(out) in map(str, outputs):
        raise ConfigError(f"--out {out}: is one of the outputs that are merged; give another directory")
    inputs: dict[str, Location | None] = {f"output {number}": each for number, each in enumerate(outputs, 1)}
    check_output(out, output_kind("merge-shards"), inputs)


def _find_copies(outputs: Sequence[Location], manifest: Manifest) -> tuple[dict[int, list[_Copy]], list[str]]:
    """Returns each shard's copies in the order of the outputs, and notes on copies with different bytes.

    Raises:
        ShardError: two copies of a shard hold different samples.
    """
    copies: dict[int, list[_Copy]] = {}
    for output in outputs:
        for receipt in read_receipts(output, manifest):
            copies.setdefault(receipt.shard, []).append(_Copy(output, receipt))
    notes = []
    for number, (first, *others) in sorted(copies.items()):
        for other in others:
            if _summary(first.receipt) != _summary(other.receipt):
                raise ShardError(
                    f"shard {number}: {first.output} has {_describe_receipt(first.receipt)}, {other.output} has "
                    f"{_describe_receipt(other.receipt)}; one of them is wrong: run verify-shards on both"
                )
            if other.receipt.sha256 == first.receipt.sha256:
                continue
            notes.append(
                f"shard {number} was scored twice: {first.output} and {other.output} hold the same samples in other "
                "bytes, as two runs may; the first is taken"
            )
    return copies, notes


def _summary(receipt: Receipt) -> tuple[int, int, tuple[int, ...]]:
    """Returns what copies of a shard must have in common: rows, scored tokens, positions of skipped samples."""
    return receipt.num_rows, receipt.num_scored_tokens, tuple(skipped.index for skipped in receipt.skipped)


def _describe_receipt(receipt: Receipt) -> str:
    return (
        f"{receipt.num_rows:,} rows with {receipt.num_scored_tokens:,} scored tokens and {len(receipt.skipped)} skipped"
    )


def _copy_shard(copies: Sequence[_Copy], out: Location) -> list[str]:
    """Writes the first intact copy; returns notes on the damaged ones before it."""
    notes: list[str] = []
    for copy in copies:
        data = copy.read_intact()
        if data is not None:
            publish(shard_path(out, copy.receipt.shard), data)
            write_with_digest(receipt_path(out, copy.receipt.shard), copy.receipt)
            return notes
        notes.append(f"{copy.path}: is gone or not what its receipt names; another output's copy is taken")
    raise _no_intact_copy(copies)


def _no_intact_copy(copies: Sequence[_Copy]) -> ShardError:
    where = ", ".join(str(copy.path) for copy in copies)
    return ShardError(
        f"{where}: gone, or not the bytes that the receipt names; run verify-shards --repair on the output, then "
        "precompute-logits: it fills the gap"
    )


def _write_shard(number: int, manifest: Manifest, rows: "_RowReader", out: Location) -> None:
    """Writes one shard of the new size with the stored codes of its log-probs.

    Raises:
        ShardError: rows and skipped samples are not each sample once, or have different image tokens.
    """
    expected = manifest.shard_range(number)
    found, skipped = list(rows.read_rows(expected)), rows.skipped_samples(expected)
    rows_each = 1 if manifest.capture.generate is None else manifest.capture.generate.num_samples
    covered = Counter(row.index for row in found) + Counter({entry.index: rows_each for entry in skipped})
    if covered != Counter(dict.fromkeys(expected, rows_each)):
        raise ShardError(
            f"the samples {expected.start} to {expected.stop - 1} have {len(found)} rows and {len(skipped)} are "
            "skipped, which is not each of them once; run verify-shards on the outputs"
        )
    if len({scored.encoded.image_token_id for row in found for scored in row.conversations}) > 1:
        raise ShardError(
            f"the samples {expected.start} to {expected.stop - 1} were written with different image tokens; run "
            "verify-shards on the outputs"
        )
    write_shard(out, number, manifest, found, skipped)


class _RowReader:
    """Reader of all shards' rows by their position in the dataset, one row group at a time."""

    def __init__(self, copies: dict[int, list[_Copy]], manifest: Manifest) -> None:
        self._copies = copies
        self._manifest = manifest
        self._intact: dict[int, _Copy] = {}

    def read_rows(self, indices: range) -> Iterator[ShardRow]:
        for number in self._shard_numbers(indices):
            path = self._find_intact_copy(number).path
            with closing(ShardFile(path, self._manifest, number, keep_codes=True)) as shard:
                stored, start = shard.read_column("index"), 0
                for group in range(shard.num_groups):
                    stop = start + shard.num_group_rows(group)
                    if any(index in indices for index in stored[start:stop]):
                        yield from (row for row in shard.read_group(group) if row.index in indices)
                    start = stop

    def skipped_samples(self, indices: range) -> list[SkippedSample]:
        receipts = (self._find_intact_copy(number).receipt for number in self._shard_numbers(indices))
        entries = chain.from_iterable(receipt.skipped for receipt in receipts)
        return [entry for entry in entries if entry.index in indices]

    def _shard_numbers(self, indices: range) -> range:
        size = self._manifest.samples_per_shard
        return range(indices.start // size, (indices.stop - 1) // size + 1)

    def _find_intact_copy(self, number: int) -> _Copy:
        """Returns the first intact copy. Each file is read once for that, before its rows are read."""
        if number not in self._intact:
            intact = next((copy for copy in self._copies[number] if copy.read_intact() is not None), None)
            if intact is None:
                raise _no_intact_copy(self._copies[number])
            self._intact[number] = intact
        return self._intact[number]
