"""Verifies an output of precompute-logits (`verify-shards`). Needs neither torch nor vLLM.

    manifest ─> for each shard: receipt ─> SHA-256 ─> columns ─> footer ─> pages ─> rows ─> totals and coverage

Verification goes on after each problem, with what can still be read.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import replace

from tqdm import tqdm

from common.data.chat_template import describe_template
from common.data.dataset import Dataset
from common.data.samples import Sample, without_last_response
from common.errors import DataError, ShardError
from common.shards.manifest import Manifest, Receipt, receipt_path
from common.shards.score_shard import PREFIXES, ShardFile, ShardRow
from common.storage.files import Location
from precompute.report import Report
from precompute.verify.base import MEANINGS, OutputVerifier
from precompute.verify.manifest_checks import footer_problems, manifest_problems
from precompute.verify.sample_checks import image_problems, images_as_in_dataset, message_problems
from precompute.verify.score_checks import kept_problems, mass_problems, own_problems, token_problems

_log = logging.getLogger(__name__)

_MEANINGS = {
    **MEANINGS,
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


def verify_logits(output: Location, dataset: Location | None = None, *, progress: bool = True) -> Report:
    """Checks all that can be checked without the teacher; with `dataset`, also compares each sample with its source.

    Raises:
        ShardError: there is no output at all.
        StorageError: the disk or the store refused, so that nothing is known of the output.
    """
    return _LogitsVerifier(output).run(dataset, progress)


class _LogitsVerifier(OutputVerifier[Manifest]):
    """Verifier of one output with scores."""

    def __init__(self, output: Location) -> None:
        super().__init__(output, Manifest, _MEANINGS)
        self._dataset: Dataset | None = None
        self._seen_ids: set[str] = set()
        self._last_index = -1
        # Position of the last row among the rows of its sample, which has several if the teacher wrote responses.
        self._response_number = 0
        # Shards that have rows, by the id of their image token.
        self._image_tokens: dict[int | None, list[Location]] = {}

    def run(self, dataset: Location | None, progress: bool) -> Report:
        manifest = self.verify_manifest(manifest_problems)
        if manifest is not None:
            self._warn_of_template(manifest)
            if dataset is not None:
                expected = manifest.dataset
                self._dataset = self.open_dataset(dataset, manifest.kind, expected.sha256, expected.num_samples)
            with tqdm(self.verify_files(manifest), desc="verifying", unit=" shards", disable=not progress) as shown:
                for number in shown:
                    verify_rows = functools.partial(self._verify_rows, number, manifest)
                    self.verify_shard(number, manifest, functools.partial(ShardFile, check_tokens=False), verify_rows)
            self._compare_image_tokens()
        if dataset is None:
            del self.checks["dataset"]
        return self.report()

    def _warn_of_template(self, manifest: Manifest) -> None:
        """Logs what a student learns from a chat template without ends of turns; a generated response has its own."""
        tokenizer = manifest.tokenizer
        ends_turns = tokenizer.ends_turns or manifest.capture.generate is not None
        for line in describe_template(ends_turns, tokenizer.has_generation_prompt):
            _log.warning("%s: %s", self.output, line)

    def _compare_image_tokens(self) -> None:
        """Finds shards whose image token is not that of most shards, because one tokenizer has one image token."""
        if not self._image_tokens:
            return
        usual = max(self._image_tokens, key=lambda token: len(self._image_tokens[token]))
        for token, shards in self._image_tokens.items():
            if token == usual:
                continue
            for path in shards:
                self.checks["footers"].failed(path, f"its image token is {token}, in most shards it is {usual}")

    def _verify_rows(self, number: int, manifest: Manifest, shard: ShardFile, receipt: Receipt) -> None:
        self.add_problems("footers", shard.path, "footer", footer_problems(shard, manifest))
        if shard.num_rows:
            self._image_tokens.setdefault(shard.image_token_id, []).append(shard.path)
        indices: list[int] = []
        num_tokens = 0
        self._last_index = manifest.shard_range(number).start - 1
        sums = [iter(shard.read_column(prefix + "logprob_sum")) for prefix in PREFIXES[manifest.kind]]
        for row in self._read_rows(shard):
            indices.append(row.index)
            where = f"row {row.index} ({row.sample.id!r})"
            self._verify_order(row, where, shard.path, manifest, manifest.shard_range(number))
            self.add_problems("messages", shard.path, where, message_problems(row, manifest))
            self.add_problems("images", shard.path, where, image_problems(row, manifest), len(row.sample.images))
            self._compare_with_dataset(row, where, shard.path, manifest)
            for scored, column in zip(row.conversations, sums, strict=True):
                total = next(column)
                num_tokens += scored.scores.num_rows
                bad_tokens = list(token_problems(scored.encoded, len(row.sample.images), manifest))
                self.add_problems("tokens", shard.path, where, bad_tokens)
                self.add_problems(
                    "kept", shard.path, where, kept_problems(scored.scores, manifest), scored.scores.ids.size
                )
                self.add_problems(
                    "mass", shard.path, where, mass_problems(scored.scores, manifest), scored.scores.num_rows
                )
                if not bad_tokens:
                    problems = own_problems(scored.encoded, scored.scores, total, manifest)
                    self.add_problems("own", shard.path, where, problems, scored.scores.num_rows)
        self._verify_coverage(shard, receipt, indices, num_tokens, manifest)

    def _read_rows(self, shard: ShardFile) -> Iterator[ShardRow]:
        check = self.checks["pages"]
        for group in range(shard.num_groups):
            check.passed()
            try:
                rows = shard.read_group(group)
            except ShardError as error:
                check.failed(shard.path, f"row group {group}: {error}")
                # Columns that are read for the whole shard no longer match the rows after a gap.
                return
            yield from rows

    def _verify_order(self, row: ShardRow, where: str, path: Location, manifest: Manifest, expected: range) -> None:
        check = self.checks["order"]
        check.passed()
        if row.index not in expected:
            check.failed(path, f"{where}: this shard holds rows {expected.start} to {expected.stop - 1}")
        generated = manifest.capture.generate is not None
        self._response_number = self._response_number + 1 if row.index == self._last_index else 0
        if row.index < self._last_index or (row.index == self._last_index and not generated):
            check.failed(path, f"{where}: comes after row {self._last_index}")
        if generated and not row.sample.id.endswith(f"#{self._response_number}"):
            check.failed(path, f"{where}: is response {self._response_number} to its sample, so its id should end so")
        if row.sample.id in self._seen_ids:
            check.failed(path, f"{where}: its id occurs twice")
        self._last_index = row.index
        self._seen_ids.add(row.sample.id)

    def _compare_with_dataset(self, row: ShardRow, where: str, path: Location, manifest: Manifest) -> None:
        if self._dataset is None:
            return
        check = self.checks["dataset"]
        check.passed()
        if not 0 <= row.index < len(self._dataset):
            check.failed(path, f"{where}: the dataset ends at row {len(self._dataset) - 1}")
            return
        try:
            sample = self._dataset[row.index]
        except DataError as error:
            check.failed(path, f"{where}: {error}")
            return
        found = replace(row.sample, images=images_as_in_dataset(row.sample.images, sample.images))
        if manifest.capture.generate is not None:
            sample = _without_last_response(replace(sample, id=f"{sample.id}#{self._response_number}"))
            found = _without_last_response(found)
        for name in ("id", "source_id", "conversations", "images"):
            if getattr(sample, name) != getattr(found, name):
                check.failed(path, f"{where}: its {name} differ from those of {sample.id!r} in the dataset")

    def _verify_coverage(
        self, shard: ShardFile, receipt: Receipt, indices: list[int], num_tokens: int, manifest: Manifest
    ) -> None:
        coverage, expected = self.checks["coverage"], manifest.shard_range(receipt.shard)
        generate = manifest.capture.generate
        rows_each = 1 if generate is None else generate.num_samples
        skipped_indices = [skipped.index for skipped in receipt.skipped]
        if sorted([*indices, *skipped_indices * rows_each]) != sorted([*expected] * rows_each):
            suffix = "" if rows_each == 1 else f", {rows_each} rows each"
            coverage.failed(
                shard.path,
                f"{len(indices)} rows and {len(skipped_indices)} skipped samples do not make up the samples "
                f"{expected.start} to {expected.stop - 1}{suffix}",
            )
        if (len(indices), num_tokens) != (receipt.num_rows, receipt.num_scored_tokens):
            coverage.failed(
                shard.path,
                f"{len(indices)} rows with {num_tokens:,} scored tokens, its receipt says {receipt.num_rows} with "
                f"{receipt.num_scored_tokens:,}",
            )
        for skipped in receipt.skipped:
            if skipped.id in self._seen_ids:
                self.checks["order"].failed(
                    receipt_path(self.output, receipt.shard), f"lists {skipped.id!r} as skipped; its id occurs twice"
                )
            self._seen_ids.add(skipped.id)
        if self._dataset is not None:
            for skipped in receipt.skipped:
                if not (skipped.index < len(self._dataset) and self._dataset.ids[skipped.index] == skipped.id):
                    self.checks["dataset"].failed(
                        receipt_path(self.output, receipt.shard),
                        f"lists {skipped.id!r} as skipped at {skipped.index}, where the dataset has another sample",
                    )


def _without_last_response(sample: Sample) -> Sample:
    """Returns the sample without the responses that it ends with."""
    return replace(sample, conversations=tuple(map(without_last_response, sample.conversations)))
