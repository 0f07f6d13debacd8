"""Reads an output into an `Inspection`: counts, distributions and samples. Needs neither torch nor vLLM.

    manifest ─> receipt and footer of every shard ─> counts, bytes by column
             ─> row groups, evenly spread         ─> distributions, samples

An output that is still being written is shown with the shards that it has. A damaged shard becomes a problem of the
result, and the rest is shown.
"""

import itertools
from bisect import bisect_right
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from common.concurrency import prefetch_map
from common.errors import ConfigError, DecantError, ShardError
from common.shards.manifest import (
    Manifest,
    ShardCheck,
    published_shards,
    read_manifest,
    read_receipt,
    shard_number,
    shard_path,
)
from common.shards.output_files import list_output_files
from common.shards.parquet_shard import check_shard_bytes
from common.shards.score_shard import PREFIXES, ShardFile, ShardRow
from common.storage.files import Location, open_ranged
from precompute.inspection import statistics
from precompute.inspection.sample_view import SampleView, TokenText, load_token_text, make_sample_view
from precompute.report import Problem

# Name under which the bytes outside all columns are counted.
FOOTERS = "(footers)"


@dataclass(frozen=True)
class ColumnBytes:
    """Compressed bytes of one column in all shards; `is_packed` if it holds kept entries."""

    name: str
    num_bytes: int
    is_packed: bool = False


@dataclass(frozen=True)
class Counts:
    """Totals of the shards' receipts, and how much was read for the distributions (`num_*_read`)."""

    num_shards: int
    num_rows: int
    num_scored_tokens: int
    num_bytes: int
    num_skipped: int
    num_groups: int
    num_groups_read: int
    num_rows_read: int
    num_tokens_read: int
    num_images_read: int


@dataclass(frozen=True)
class Inspection:
    """Result of `inspect_output`.

    `num_expected` shards make the output complete. `samples` begins with the requested one; it is empty if that one
    cannot be read.
    """

    path: Location
    manifest: Manifest
    num_published: int
    num_expected: int
    counts: Counts
    columns: tuple[ColumnBytes, ...]
    distributions: tuple[statistics.Distribution, ...]
    samples: tuple[SampleView, ...]
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """True if everything could be read."""
        return not self.problems


@dataclass(frozen=True)
class InspectionTarget:
    """The shards that a path names: all published ones of an output, or one of them; `check` as for `ShardFile`."""

    output: Location
    manifest: Manifest
    shards: tuple[int, ...]
    num_expected: int
    check: ShardCheck = "sha256"


def open_target(path: Location, check: ShardCheck = "sha256") -> InspectionTarget:
    """Finds the shards of `path`, which is the directory of an output or a shard file in one.

    Raises:
        ShardError: there is no output, its manifest is damaged, or the file is not a published shard.
        StorageError: the disk or the store refused.
    """
    number = shard_number(path.name) if path.name.endswith(".parquet") else None
    list_output_files(path if number is None else path.parent, "precompute-logits")
    if number is None:
        manifest = read_manifest(path)
        return InspectionTarget(path, manifest, published_shards(path), manifest.num_shards, check)
    output = path.parent
    manifest = read_manifest(output)
    if number not in published_shards(output):
        raise ShardError(f"{path}: has no receipt beside it, so it was never finished; expected a published shard")
    return InspectionTarget(output, manifest, (number,), 1, check)


def inspect_output(  # noqa: PLR0913 - its arguments are the options of inspect-shards
    path: Location,
    *,
    sample: str | None = None,
    num_samples: int = 1,
    num_alternatives: int = 5,
    max_tokens: int = 48,
    max_groups: int | None = 64,
    tokenizer: Path | None = None,
    progress: bool = True,
    check: ShardCheck = "sha256",
) -> Inspection:
    """Reads an output, or one of its shards, and returns what it holds.

    Args:
        path: an output directory of precompute-logits, or a shard file in one.
        sample: the id of a sample, or its position in the dataset; None for the first row.
        num_samples: number of samples to show; those after the first are evenly spread over what is read.
        num_alternatives: maximum number of kept entries shown of a token.
        max_tokens: maximum number of scored tokens shown of a conversation.
        max_groups: row groups to read, evenly spread; None for all.
        tokenizer: directory of the teacher or its tokenizer, for token texts.
        check: how a shard is compared with its receipt before it is parsed.

    Raises:
        ShardError: as `open_target`. Damaged shards are problems of the result instead.
        ConfigError: there is no such sample.
        ModelError, ProvenanceError: the tokenizer is missing, or is not that of the shards.
    """
    target = open_target(path, check)
    token_text = str if tokenizer is None else load_token_text(tokenizer, target.manifest)
    return _Collector(target, token_text, num_alternatives, max_tokens, progress).collect(
        path, sample, num_samples, max_groups
    )


@dataclass(frozen=True)
class _Footer:
    """Numbers from a shard's receipt and footer."""

    number: int
    num_rows: int
    num_scored_tokens: int
    num_bytes: int
    num_skipped: int
    group_rows: tuple[int, ...]
    column_bytes: Counter[str]


# A shard and the number of a row group in it.
_RowGroup = tuple[_Footer, int]
# The number of a shard and a row of it.
_NumberedRow = tuple[int, ShardRow]


class _Collector:
    """Reader of a target's shards that collects numbers, samples and problems for one inspection."""

    def __init__(
        self, target: InspectionTarget, token_text: TokenText, num_alternatives: int, max_tokens: int, progress: bool
    ) -> None:
        self._target = target
        self._token_text = token_text
        self._num_alternatives = num_alternatives
        self._max_tokens = max_tokens
        self._progress = progress
        self._problems: list[Problem] = []
        self._damaged: set[int] = set()
        self._distributions = {
            metric.name: statistics.StreamingDistribution(metric) for metric in _select_metrics(target.manifest)
        }
        self._read: Counter[str] = Counter()

    def collect(self, path: Location, sample: str | None, num_samples: int, max_groups: int | None) -> Inspection:
        footers = self._read_footers()
        groups = [(footer, group) for footer in footers for group in range(len(footer.group_rows))]
        chosen = [groups[i] for i in evenly_spaced(len(groups), max_groups)]
        first = self._read_row(groups) if sample is None else self._find_sample(sample, footers)
        samples = [] if first is None else [self._view(*first)]
        # One more than is needed, because one of them may be the first sample.
        sample_positions = set(evenly_spaced(sum(footer.group_rows[group] for footer, group in chosen), num_samples))
        position = 0
        for number, rows in self._read_groups(chosen, show=self._progress):
            self._read["groups"] += 1
            self._add_scores(rows)
            for row in rows:
                is_chosen = position in sample_positions and 0 < len(samples) < num_samples
                if is_chosen and row.sample.id != samples[0].sample_id:
                    samples.append(self._view(number, row))
                position += 1
        columns = sum((footer.column_bytes for footer in footers), Counter[str]())
        distributions = (stream.distribution() for stream in self._distributions.values())
        return Inspection(
            path=path,
            manifest=self._target.manifest,
            num_published=len(self._target.shards),
            num_expected=self._target.num_expected,
            counts=Counts(
                num_shards=len(footers),
                num_rows=sum(footer.num_rows for footer in footers),
                num_scored_tokens=sum(footer.num_scored_tokens for footer in footers),
                num_bytes=sum(footer.num_bytes for footer in footers),
                num_skipped=sum(footer.num_skipped for footer in footers),
                num_groups=len(groups),
                num_groups_read=self._read["groups"],
                num_rows_read=self._read["rows"],
                num_tokens_read=self._read["tokens"],
                num_images_read=self._read["images"],
            ),
            columns=tuple(ColumnBytes(name, num_bytes, _is_packed(name)) for name, num_bytes in columns.most_common()),
            distributions=tuple(filter(None, distributions)),
            samples=tuple(samples),
            problems=tuple(self._problems),
        )

    def _read_footers(self) -> list[_Footer]:
        """Returns the footers that can be read; the others become problems. Uses threads, because a store is slow."""
        footers = []
        numbers = self._target.shards
        results = prefetch_map(self._read_footer, numbers, num_threads=8, ahead=64)
        for footer in tqdm(results, "footers", len(numbers), unit=" shards", disable=not self._progress, leave=False):
            if isinstance(footer, _Footer):
                footers.append(footer)
            else:
                self._problems.append(footer)
        return footers

    def _read_footer(self, number: int) -> _Footer | Problem:
        path = shard_path(self._target.output, number)
        try:
            receipt = read_receipt(self._target.output, number, self._target.manifest)
            check_shard_bytes(path, receipt, self._target.check)
            with open_ranged(path) as file:
                metadata = pq.read_metadata(file)
        except (DecantError, OSError, pa.ArrowException) as error:
            return Problem(str(path), _describe_error(error, path))
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        column_bytes: Counter[str] = Counter()
        for group in groups:
            for i in range(group.num_columns):
                column = group.column(i)
                column_bytes[column.path_in_schema.split(".")[0]] += column.total_compressed_size
        column_bytes[FOOTERS] = receipt.num_bytes - column_bytes.total()
        return _Footer(
            number=number,
            num_rows=receipt.num_rows,
            num_scored_tokens=receipt.num_scored_tokens,
            num_bytes=receipt.num_bytes,
            num_skipped=len(receipt.skipped),
            group_rows=tuple(int(group.num_rows) for group in groups),
            column_bytes=column_bytes,
        )

    def _read_groups(
        self, groups: Iterable[_RowGroup], *, show: bool = False
    ) -> Generator[tuple[int, list[ShardRow]], None, None]:
        """Yields shard number and rows of each of `groups`, in order; skips the rest of a shard once it is damaged."""
        by_shard: dict[int, list[int]] = {}
        for footer, group in groups:
            by_shard.setdefault(footer.number, []).append(group)
        for number in tqdm(by_shard, "reading", unit=" shards", disable=not show, leave=False):
            if number in self._damaged:
                continue
            path = shard_path(self._target.output, number)
            try:
                with closing(self._open(path, number)) as shard:
                    for group in by_shard[number]:
                        yield number, shard.read_group(group)
            except ShardError as error:
                self._damaged.add(number)
                self._problems.append(Problem(str(path), _describe_error(error, path)))

    def _open(self, path: Location, number: int) -> ShardFile:
        return ShardFile(path, self._target.manifest, number, check=self._target.check)

    def _read_row(self, groups: Iterable[_RowGroup], position: int = 0) -> _NumberedRow | None:
        """Returns the row at `position` in the first of `groups` that can be read; None if none can."""
        with closing(self._read_groups(groups)) as found:
            return next(((number, rows[position]) for number, rows in found), None)

    def _find_sample(self, wanted: str, footers: Sequence[_Footer]) -> _NumberedRow | None:
        """Returns a sample by its id, or else by its position in the dataset; None if its shard is damaged.

        Raises:
            ConfigError: no row is that sample.
        """
        found = self._locate("sample_id", wanted, footers)
        if found is None and wanted.isdecimal():
            number = int(wanted) // self._target.manifest.samples_per_shard
            found = self._locate("index", int(wanted), [footer for footer in footers if footer.number == number])
        if found is None:
            raise ConfigError(
                f"{self._target.output}: no shard that can be read holds sample {wanted!r}; expected the id of a "
                "sample, or its position in the dataset from 0, that is neither skipped nor still to be scored"
            )
        footer, group, position = found
        return self._read_row([(footer, group)], position)

    def _locate(self, column: str, wanted: str | int, footers: Iterable[_Footer]) -> tuple[_Footer, int, int] | None:
        """Returns shard, row group and position in the group of the first row with this value; None without one."""
        for footer in footers:
            path = shard_path(self._target.output, footer.number)
            # A damaged shard becomes a problem when its rows are read.
            with suppress(ShardError), closing(self._open(path, footer.number)) as shard:
                values = shard.read_column(column)
                if wanted in values:
                    ends = list(itertools.accumulate(footer.group_rows))
                    row = values.index(wanted)
                    group = bisect_right(ends, row)
                    return footer, group, row - ends[group] + footer.group_rows[group]
        return None

    def _view(self, number: int, row: ShardRow) -> SampleView:
        return make_sample_view(
            row, number, self._token_text, num_alternatives=self._num_alternatives, max_tokens=self._max_tokens
        )

    def _add_scores(self, rows: Sequence[ShardRow]) -> None:
        """Adds the rows of a row group to the distributions."""
        conversations = [conversation for row in rows for conversation in row.conversations]
        scores = [conversation.scores for conversation in conversations]
        self._read.update(
            rows=len(rows),
            images=sum(len(row.sample.images) for row in rows),
            tokens=sum(s.num_rows for s in scores),
        )
        values_by_name: dict[str, list[npt.NDArray[Any]]] = {
            statistics.OWN_LOGPROB.name: [s.own_logprobs for s in scores],
            statistics.KEPT_MASS.name: [1.0 - s.rest_mass.astype(np.float64) for s in scores],
            statistics.ENTROPY.name: [statistics.entropies(s) for s in scores],
            statistics.NUM_KEPT.name: [s.counts for s in scores],
            statistics.NUM_SCORED.name: [np.array([s.num_rows for s in scores])],
            statistics.LENGTH.name: [np.array([len(c.encoded.input_ids) for c in conversations])],
        }
        if statistics.MARGIN.name in self._distributions:
            sums = np.array([s.total_logprob for s in scores]).reshape(-1, 2)
            values_by_name[statistics.MARGIN.name] = [sums[:, 0] - sums[:, 1]]
        for name, distribution in self._distributions.items():
            distribution.add(np.concatenate(values_by_name[name]))


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """Returns at most `limit` evenly spread positions from 0 to `count` - 1; all of them if `limit` is None."""
    if limit is None or limit >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * limit) for i in range(limit)]


def _select_metrics(manifest: Manifest) -> tuple[statistics.Metric, ...]:
    """Returns the metrics that an output has: some need kept entries, the margin needs preference pairs."""
    entropy = statistics.ENTROPY if manifest.capture.num_draws is None else statistics.DRAWN_ENTROPY
    kept = (statistics.KEPT_MASS, entropy, statistics.NUM_KEPT) if manifest.capture.max_kept else ()
    margin = (statistics.MARGIN,) if manifest.kind == "dpo" else ()
    return (*kept, statistics.OWN_LOGPROB, *margin, statistics.NUM_SCORED, statistics.LENGTH)


def _is_packed(column: str) -> bool:
    return any(column.startswith(f"{prefix}topk_") for prefixes in PREFIXES.values() for prefix in prefixes)


def _describe_error(error: Exception, path: Location) -> str:
    """Returns the first line of an error, without the path that is shown beside it."""
    return str(error).removeprefix(f"{path}: ").splitlines()[0]
