"""Finds the samples of an output that a newer version of its dataset has changed (`verify-shards --against`).

Samples are compared by id, whatever their positions. The scores are not read.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from common.console import plain_text
from common.data.samples import Dataset, Turn, without_last_response
from common.errors import DataError
from common.shards.manifest import Manifest, read_manifest, read_receipts, shard_path
from common.shards.score_shard import PREFIXES, ShardFile
from common.storage.files import Location
from precompute.report import MAX_LISTED


@dataclass(frozen=True)
class ChangedSample:
    """A sample that was changed, removed or added. `shard` is None if none holds it; `what` names what was changed."""

    id: str
    shard: int | None
    what: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetDiff:
    """Differences of an output and a newer dataset; the `num_skipped` samples of the capture are not compared."""

    output: str
    dataset: str
    num_unchanged: int
    changed: tuple[ChangedSample, ...]
    removed: tuple[ChangedSample, ...]
    new: tuple[ChangedSample, ...]
    num_skipped: int
    num_missing_shards: int

    @property
    def ok(self) -> bool:
        """True if no scored sample was changed or removed."""
        return not (self.changed or self.removed)

    def to_json(self) -> str:
        """Returns the whole comparison, with all ids, as one JSON object."""
        return json.dumps(asdict(self) | {"ok": self.ok}, indent=1)

    def render(self) -> RenderableType:
        """Returns the counts, and the first samples of each kind."""
        table = Table()
        table.add_column("samples")
        table.add_column("count", justify="right")
        groups = {"changed": self.changed, "removed": self.removed, "new": self.new}
        table.add_row("unchanged", f"{self.num_unchanged:,}")
        for name, found in groups.items():
            table.add_row(name, f"{len(found):,}", style="red" if found and name != "new" else "")
        table.add_row("skipped by choice then", f"{self.num_skipped:,}")
        lines = [line for name, found in groups.items() for line in _describe_samples(name, found)]
        if self.num_missing_shards:
            lines.append(f"{self.num_missing_shards:,} shards are missing; their samples count as new")
        verdict = (
            Text("no scored sample has changed", style="green")
            if self.ok
            else Text("the scores of changed and removed samples are out of date", style="bold red")
        )
        return Group(plain_text(f"{self.output} against {self.dataset}"), table, *map(plain_text, lines), verdict)


def diff_dataset(output: Location, dataset: Location, *, progress: bool = True) -> DatasetDiff:
    """Compares messages and image paths of samples with one id; where responses were generated, only the prompts.

    Raises:
        DataError: the dataset cannot be read.
        ShardError: the output is damaged.
        StorageError: the disk or the store refused.
    """
    manifest = read_manifest(output)
    newer = Dataset.open(dataset, manifest.kind)
    positions = {sample_id: position for position, sample_id in enumerate(newer.ids)}
    receipts = read_receipts(output, manifest)
    seen_ids = {skipped.id for receipt in receipts for skipped in receipt.skipped}
    num_skipped, num_unchanged = len(seen_ids), 0
    changed, removed = [], []
    for receipt in tqdm(receipts, desc="comparing", unit=" shards", disable=not progress):
        with closing(ShardFile(shard_path(output, receipt.shard), manifest, receipt.shard)) as shard:
            for sample_id, paths, conversations in _read_samples(shard, manifest):
                if sample_id in seen_ids:
                    continue
                seen_ids.add(sample_id)
                if sample_id not in positions:
                    removed.append(ChangedSample(sample_id, receipt.shard))
                elif what := _find_changes(newer, positions[sample_id], paths, conversations, manifest):
                    changed.append(ChangedSample(sample_id, receipt.shard, what))
                else:
                    num_unchanged += 1
    return DatasetDiff(
        output=str(output),
        dataset=str(dataset),
        num_unchanged=num_unchanged,
        changed=tuple(changed),
        removed=tuple(removed),
        new=tuple(ChangedSample(sample_id, None) for sample_id in newer.ids if sample_id not in seen_ids),
        num_skipped=num_skipped,
        num_missing_shards=manifest.num_shards - len(receipts),
    )


_Conversations = tuple[tuple[Turn, ...], ...]


def _read_samples(shard: ShardFile, manifest: Manifest) -> Iterator[tuple[str, tuple[str | None, ...], _Conversations]]:
    """Yields the dataset's id, the image paths and the conversations of each row."""
    messages = [shard.read_column(prefix + "messages") for prefix in PREFIXES[manifest.kind]]
    images = shard.read_column("images.list.element.path")
    for sample_id, refs, *sides in zip(shard.read_column("sample_id"), images, *messages, strict=True):
        if manifest.capture.generate is not None:
            sample_id = sample_id.rpartition("#")[0]
        turns = tuple(tuple(Turn(message["role"], message["content"]) for message in side) for side in sides)
        yield sample_id, tuple(ref["path"] for ref in refs), turns


def _find_changes(
    newer: Dataset, position: int, paths: tuple[str | None, ...], conversations: _Conversations, manifest: Manifest
) -> tuple[str, ...]:
    """Returns the names of what differs in one sample."""
    try:
        sample = newer[position]
    except DataError as error:
        return (f"cannot be read now ({error})",)
    stored, new = conversations, sample.conversations
    if manifest.capture.generate is not None:
        stored, new = (tuple(map(without_last_response, turns)) for turns in (stored, new))
    differs = {"messages": stored != new, "images": paths != tuple(ref.path for ref in sample.images)}
    return tuple(name for name, is_different in differs.items() if is_different)


def _describe_samples(name: str, found: tuple[ChangedSample, ...]) -> Iterator[str]:
    for sample in found[:MAX_LISTED]:
        place = "" if sample.shard is None else f" (shard {sample.shard})"
        changes = f": {', '.join(sample.what)}" if sample.what else ""
        yield f"{name}: {sample.id!r}{place}{changes}"
    if len(found) > MAX_LISTED:
        yield f"{name}: and {len(found) - MAX_LISTED:,} more"
