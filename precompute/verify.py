"""`verify-shards`: whether an output is whole and what it claims to be. Needs neither torch nor vLLM.

    manifest ─> for each shard: receipt ─> SHA-256 ─> columns ─> footer ─> pages ─> rows ─> totals and coverage

Nothing that a file holds makes this crash: each finding is a problem in the report, and the walk goes on with
what can still be read. A file whose bytes changed is not parsed.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

from tqdm import tqdm

from common.errors import DataError, DecantError, ShardError, StorageError
from common.manifest import (
    MANIFEST_NAME,
    Manifest,
    Receipt,
    file_sha256,
    published_shards,
    read_manifest,
    read_receipt,
    read_sealed,
    receipt_path,
    shard_number,
    shard_path,
)
from common.samples import Dataset, ImageRef, Sample, prompt_turns
from common.shards import PREFIXES, ShardFile, ShardRow
from common.storage import Location, list_files
from precompute.provenance import footer_problems, manifest_of_shards, manifest_problems
from precompute.report import Check, Report, ranges
from precompute.row_checks import kept_problems, mass_problems, own_problems, token_problems
from precompute.sample_checks import image_problems, message_problems

_MEANINGS = {
    "manifest": "manifest.json is what was written",
    "receipts": "each receipt is what was written and belongs to this output",
    "files": "each shard has a receipt and each receipt a shard",
    "coverage": "all shards are there, and each holds or lists every sample of its range",
    "checksums": "the bytes of each shard are those that were written",
    "columns": "each shard has the columns of the format",
    "pages": "each page of each shard can be read and matches its checksum",
    "footers": "footers repeat the manifest, and row groups have the size that readers count on",
    "order": "rows are in dataset order, ids are unique, generated responses are numbered",
    "messages": "roles, image markers and scored turns are those that the settings allow",
    "images": "image files are stored and can be opened, or not stored where paths are to do",
    "tokens": "token ids are in the vocabulary, spans inside the sequence",
    "kept": "kept entries are finite, and no more than were asked for",
    "mass": "kept mass is at most 1, adds up to 1 with the rest, and is what was asked for",
    "own": "own log-probs are finite, at most 0, and agree with kept entries and sums",
    "dataset": "every sample is the dataset's, in its order, with the same messages (but generated responses)",
}


def verify(output: Location, dataset: Location | None = None, *, progress: bool = True) -> Report:
    """Checks everything that can be checked without the teacher; `dataset` adds a comparison with the source.

    Raises:
        StorageError: the store did not give what it holds, so nothing can be said of it.
    """
    return _Verification(output).report(dataset, progress)


class _Verification:
    """One walk over an output, collecting what is wrong."""

    def __init__(self, output: Location) -> None:
        self._output = output
        self._checks = {name: Check(name, meaning) for name, meaning in _MEANINGS.items()}
        self._dataset: Dataset | None = None
        self._seen_ids: set[str] = set()
        self._last_index = -1
        # Of the rows of one sample, where the teacher wrote several responses to it.
        self._number = 0
        self._receipts: list[Receipt] = []
        self._files: dict[str, int] = {}
        self._restored: Manifest | None = None
        # Shards with rows, by the id of their image token.
        self._image_tokens: dict[int | None, list[Location]] = {}

    def report(self, dataset: Location | None, progress: bool) -> Report:
        self._files = list_files(self._output)
        manifest = self._read_manifest()
        if manifest is not None:
            self._open_dataset(dataset, manifest)
            published = set(published_shards(self._output))
            self._check_files(manifest, published)
            numbers = [number for number in range(manifest.num_shards) if number in published]
            with tqdm(numbers, desc="verifying", unit=" shards", disable=not progress) as shown:
                for number in shown:
                    self._check_shard(number, manifest)
            self._check_image_tokens()
        if dataset is None:
            del self._checks["dataset"]
        return Report(
            output=self._output,
            checks=tuple(self._checks.values()),
            num_shards=len(self._receipts),
            num_rows=sum(receipt.num_rows for receipt in self._receipts),
            num_scored_tokens=sum(receipt.num_scored_tokens for receipt in self._receipts),
            num_bytes=sum(receipt.num_bytes for receipt in self._receipts),
            num_skipped=sum(len(receipt.skipped) for receipt in self._receipts),
            listing=self._files,
            restored=self._restored,
        )

    def _read_manifest(self) -> Manifest | None:
        """That of the output, or, if it is broken, the one in its shards, so that these can still be checked."""
        check, path = self._checks["manifest"], self._output / MANIFEST_NAME
        check.passed()
        try:
            manifest = read_manifest(self._output)
            problems = [*manifest_problems(manifest), *self._is_another_outputs(manifest)]
        except StorageError:
            raise
        except DecantError as error:
            problems = [str(error)]
        if not problems:
            return manifest
        for problem in problems:
            check.failed(path, problem)
        try:
            self._restored = manifest_of_shards(self._output)
        except ShardError as error:
            check.failed(path, f"nothing else was checked, since the shards do not tell what it was: {error}")
            return None
        return None if list(manifest_problems(self._restored)) else self._restored

    def _is_another_outputs(self, manifest: Manifest) -> Iterator[str]:
        """No receipt belongs to it, while all shards belong together."""
        numbers = published_shards(self._output)
        with contextlib.suppress(ShardError):
            if numbers and read_sealed(receipt_path(self._output, numbers[0]), Receipt).manifest_sha256 != (
                manifest.sha256
            ):
                yield f"is not the manifest of the shards, which all name {manifest_of_shards(self._output).sha256}"

    def _open_dataset(self, path: Location | None, manifest: Manifest) -> None:
        if path is None:
            return
        check = self._checks["dataset"]
        check.passed()
        try:
            self._dataset = Dataset.open(path, manifest.kind)
        except DataError as error:
            check.failed(path, str(error))
            return
        if self._dataset.sha256 != manifest.dataset.sha256:
            check.failed(
                path, f"has SHA-256 {self._dataset.sha256}, the output was made from {manifest.dataset.sha256}"
            )
        if len(self._dataset) != manifest.dataset.num_samples:
            check.failed(path, f"has {len(self._dataset):,} samples, expected {manifest.dataset.num_samples:,}")

    def _check_files(self, manifest: Manifest, published: set[int]) -> None:
        """Shards without receipts and the reverse, numbers past the end, and shards that are missing."""
        files, coverage = self._checks["files"], self._checks["coverage"]
        stored = [name for name in self._files if name.endswith(".parquet")]
        found = {number for name in stored if (number := shard_number(name)) is not None}
        for number in sorted(found | published):
            files.passed()
            if number >= manifest.num_shards:
                files.failed(shard_path(self._output, number), f"the last shard is {manifest.num_shards - 1}")
            elif number not in published:
                files.failed(shard_path(self._output, number), "has no receipt, so it was never finished")
            elif number not in found:
                files.failed(receipt_path(self._output, number), "is the receipt of a shard that is not there")
        missing = [number for number in range(manifest.num_shards) if number not in published]
        coverage.passed(manifest.num_shards)
        if missing:
            coverage.failed(
                self._output,
                f"{len(missing)} of {manifest.num_shards} shards are missing: {ranges(missing)}; "
                "run precompute-logits again, it writes these alone",
            )

    def _check_shard(self, number: int, manifest: Manifest) -> None:
        path = shard_path(self._output, number)
        receipt = self._read_receipt(number, manifest)
        if receipt is None or path.name not in self._files or not self._bytes_are_right(path, receipt):
            return
        columns, pages = self._checks["columns"], self._checks["pages"]
        columns.passed()
        try:
            shard = ShardFile(path, manifest, number)
        except ShardError as error:
            columns.failed(path, str(error))
            return
        try:
            self._check_rows(shard, number, receipt, manifest)
        except StorageError:
            raise
        except Exception as error:
            # The bytes are what was written, yet reading them fails in a way that ShardFile does not foresee.
            pages.failed(path, f"cannot be read ({type(error).__name__}: {error})")
        finally:
            shard.close()

    def _read_receipt(self, number: int, manifest: Manifest) -> Receipt | None:
        check = self._checks["receipts"]
        check.passed()
        try:
            receipt = read_receipt(self._output, number, manifest)
        except StorageError:
            raise
        except DecantError as error:
            check.failed(receipt_path(self._output, number), str(error))
            return None
        self._receipts.append(receipt)
        return receipt

    def _bytes_are_right(self, path: Location, receipt: Receipt) -> bool:
        check = self._checks["checksums"]
        check.passed()
        try:
            size, sha256 = self._files[path.name], file_sha256(path)
        except (OSError, ShardError) as error:
            check.failed(path, str(error))
            return False
        if (size, sha256) == (receipt.num_bytes, receipt.sha256):
            return True
        check.failed(
            path,
            f"has {size:,} bytes with SHA-256 {sha256}, its receipt says {receipt.num_bytes:,} with {receipt.sha256}; "
            "run verify-shards with --repair, then precompute-logits again: it fills the gap",
        )
        return False

    def _check_image_tokens(self) -> None:
        """The shards of one tokenizer have one; those that differ from most are taken to be wrong."""
        most = max(map(len, self._image_tokens.values()), default=0)
        usual = next((token for token, shards in self._image_tokens.items() if len(shards) == most), None)
        for token, shards in self._image_tokens.items():
            for path in shards if token != usual else ():
                self._checks["footers"].failed(path, f"its image token is {token}, in most shards it is {usual}")

    def _check_rows(self, shard: ShardFile, number: int, receipt: Receipt, manifest: Manifest) -> None:
        self._note("footers", shard.path, "footer", footer_problems(shard, manifest))
        if shard.num_rows:
            self._image_tokens.setdefault(shard.image_token_id, []).append(shard.path)
        indices: list[int] = []
        num_tokens = 0
        self._last_index = manifest.shard_range(number).start - 1
        sums = [iter(shard.read_column(prefix + "logprob_sum")) for prefix in PREFIXES[manifest.kind]]
        for row in self._rows(shard):
            indices.append(row.index)
            where = f"row {row.index} ({row.sample.id!r})"
            self._check_order(row, where, shard.path, manifest, manifest.shard_range(number))
            self._note("messages", shard.path, where, message_problems(row, manifest))
            self._note("images", shard.path, where, image_problems(row, manifest), len(row.sample.images))
            self._check_against_dataset(row, where, shard.path, manifest)
            for scored, column in zip(row.conversations, sums, strict=True):
                total = next(column)
                num_tokens += scored.scores.num_rows
                wrong = list(token_problems(scored.encoded, len(row.sample.images), manifest))
                self._note("tokens", shard.path, where, wrong)
                self._note("kept", shard.path, where, kept_problems(scored.scores, manifest), scored.scores.ids.size)
                self._note("mass", shard.path, where, mass_problems(scored.scores, manifest), scored.scores.num_rows)
                if not wrong:
                    problems = own_problems(scored.encoded, scored.scores, total, manifest)
                    self._note("own", shard.path, where, problems, scored.scores.num_rows)
        self._check_coverage(shard, receipt, indices, num_tokens, manifest)

    def _rows(self, shard: ShardFile) -> Iterator[ShardRow]:
        check = self._checks["pages"]
        for group in range(shard.num_groups):
            check.passed()
            try:
                rows = shard.read_group(group)
            except ShardError as error:
                check.failed(shard.path, f"row group {group}: {error}")
                # The rows after a gap cannot be told from their columns read elsewhere.
                return
            yield from rows

    def _note(self, name: str, path: Location, where: str, problems: Iterable[str], count: int = 1) -> None:
        check = self._checks[name]
        check.passed(count)
        for problem in problems:
            check.failed(path, f"{where}: {problem}")

    def _check_order(self, row: ShardRow, where: str, path: Location, manifest: Manifest, expected: range) -> None:
        check = self._checks["order"]
        check.passed()
        if row.index not in expected:
            check.failed(path, f"{where}: this shard holds rows {expected.start} to {expected.stop - 1}")
        generated = manifest.capture.generate is not None
        self._number = self._number + 1 if row.index == self._last_index else 0
        if row.index < self._last_index or (row.index == self._last_index and not generated):
            check.failed(path, f"{where}: comes after row {self._last_index}")
        if generated and not row.sample.id.endswith(f"#{self._number}"):
            check.failed(path, f"{where}: is response {self._number} to its sample, so its id should end so")
        if row.sample.id in self._seen_ids:
            check.failed(path, f"{where}: its id occurs twice")
        self._last_index = row.index
        self._seen_ids.add(row.sample.id)

    def _check_against_dataset(self, row: ShardRow, where: str, path: Location, manifest: Manifest) -> None:
        if self._dataset is None:
            return
        check = self._checks["dataset"]
        check.passed()
        if not 0 <= row.index < len(self._dataset):
            check.failed(path, f"{where}: the dataset ends at row {len(self._dataset) - 1}")
            return
        try:
            sample = self._dataset[row.index]
        except DataError as error:
            check.failed(path, f"{where}: {error}")
            return
        # Where shards hold image files, the dataset still has their paths alone.
        found = replace(row.sample, images=tuple(ImageRef(ref.path) for ref in row.sample.images))
        if manifest.capture.generate is not None:
            sample = _without_response(replace(sample, id=f"{sample.id}#{self._number}"))
            found = _without_response(found)
        for name in ("id", "conversations", "images"):
            if getattr(sample, name) != getattr(found, name):
                check.failed(path, f"{where}: its {name} differ from those of {sample.id!r} in the dataset")

    def _check_coverage(
        self, shard: ShardFile, receipt: Receipt, indices: list[int], num_tokens: int, manifest: Manifest
    ) -> None:
        coverage, expected = self._checks["coverage"], manifest.shard_range(receipt.shard)
        generate = manifest.capture.generate
        rows_each = 1 if generate is None else generate.num_samples
        left_out = [skipped.index for skipped in receipt.skipped]
        if sorted([*indices, *left_out * rows_each]) != sorted([*expected] * rows_each):
            coverage.failed(
                shard.path,
                f"{len(indices)} rows and {len(left_out)} skipped samples do not make up the samples "
                f"{expected.start} to {expected.stop - 1}" + f", {rows_each} rows each" * (rows_each > 1),
            )
        if (len(indices), num_tokens) != (receipt.num_rows, receipt.num_scored_tokens):
            coverage.failed(
                shard.path,
                f"{len(indices)} rows with {num_tokens:,} scored tokens, its receipt says {receipt.num_rows} with "
                f"{receipt.num_scored_tokens:,}",
            )
        for skipped in receipt.skipped:
            if skipped.id in self._seen_ids:
                self._checks["order"].failed(
                    receipt_path(self._output, receipt.shard), f"lists {skipped.id!r} as skipped; its id occurs twice"
                )
            self._seen_ids.add(skipped.id)
        if self._dataset is not None:
            for skipped in receipt.skipped:
                if not (skipped.index < len(self._dataset) and self._dataset.ids[skipped.index] == skipped.id):
                    self._checks["dataset"].failed(
                        receipt_path(self._output, receipt.shard),
                        f"lists {skipped.id!r} as skipped at {skipped.index}, where the dataset has another sample",
                    )


def _without_response(sample: Sample) -> Sample:
    """The sample with its prompts alone."""
    return replace(sample, conversations=tuple(map(prompt_turns, sample.conversations)))
