"""`verify-shards --against`: which samples of an output a newer version of its dataset has changed.

Samples are compared by id, wherever they stand. The scores are not read.
"""

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from common.data.samples import Dataset, Turn, without_last_response
from common.errors import DataError
from common.shards.manifest import Manifest, read_manifest, read_receipts, shard_path
from common.shards.score_shard import PREFIXES, ShardFile
from common.storage.files import Location
from precompute.report import MAX_LISTED


@dataclass(frozen=True)
class ChangedSample:
    """A sample that is not what it was: `shard` is None if none holds it, `what` differs of a changed one."""

    id: str
    shard: int | None
    what: tuple[str, ...] = ()


@dataclass(frozen=True)
class DatasetDiff:
    """An output beside a newer dataset. `num_skipped`: samples that the capture left out, which cannot be compared."""

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
        """Whether every sample that was scored is still the same."""
        return not (self.changed or self.removed)

    def to_json(self) -> str:
        """The whole comparison, all ids included, as one JSON object."""
        return json.dumps(asdict(self) | {"ok": self.ok}, indent=1)

    def render(self) -> RenderableType:
        """Counts, and the first samples of each kind."""
        table = Table()
        table.add_column("samples")
        table.add_column("count", justify="right")
        groups = {"changed": self.changed, "removed": self.removed, "new": self.new}
        table.add_row("unchanged", f"{self.num_unchanged:,}")
        for name, found in groups.items():
            table.add_row(name, f"{len(found):,}", style="red" if found and name != "new" else "")
        table.add_row("skipped by choice then", f"{self.num_skipped:,}")
        lines = [line for name, found in groups.items() for line in _lines(name, found)]
        if self.num_missing_shards:
            lines.append(f"{self.num_missing_shards:,} shards are missing; their samples count as new")
        verdict = (
            Text("no scored sample has changed", style="green")
            if self.ok
            else Text("the scores of changed and removed samples are out of date", style="bold red")
        )
        return Group(Text(f"{self.output} against {self.dataset}"), table, *map(Text, lines), verdict)


def diff_dataset(output: Location, dataset: Location, *, progress: bool = True) -> DatasetDiff:
    """Compares messages and image paths by sample id; of generated responses the prompts alone.

    Raises:
        DataError: the dataset cannot be read. ShardError: the output is damaged. StorageError: the store refused.
    """
    manifest = read_manifest(output)
    newer = Dataset.open(dataset, manifest.kind)
    positions = {sample_id: position for position, sample_id in enumerate(newer.ids)}
    receipts = read_receipts(output, manifest)
    known = {skipped.id for receipt in receipts for skipped in receipt.skipped}
    num_skipped, num_unchanged = len(known), 0
    changed, removed = [], []
    for receipt in tqdm(receipts, desc="comparing", unit=" shards", disable=not progress):
        with closing(ShardFile(shard_path(output, receipt.shard), manifest, receipt.shard)) as shard:
            for sample_id, paths, conversations in _samples(shard, manifest):
                if sample_id in known:
                    continue
                known.add(sample_id)
                if sample_id not in positions:
                    removed.append(ChangedSample(sample_id, receipt.shard))
                elif what := _changes(newer, positions[sample_id], paths, conversations, manifest):
                    changed.append(ChangedSample(sample_id, receipt.shard, what))
                else:
                    num_unchanged += 1
    return DatasetDiff(
        output=str(output),
        dataset=str(dataset),
        num_unchanged=num_unchanged,
        changed=tuple(changed),
        removed=tuple(removed),
        new=tuple(ChangedSample(sample_id, None) for sample_id in newer.ids if sample_id not in known),
        num_skipped=num_skipped,
        num_missing_shards=manifest.num_shards - len(receipts),
    )


_Conversations = tuple[tuple[Turn, ...], ...]


def _samples(shard: ShardFile, manifest: Manifest) -> Iterator[tuple[str, tuple[str | None, ...], _Conversations]]:
    """Id in the dataset, image paths and conversations of each row."""
    messages = [shard.read_column(prefix + "messages") for prefix in PREFIXES[manifest.kind]]
    images = shard.read_column("images.list.element.path")
    for sample_id, refs, *sides in zip(shard.read_column("sample_id"), images, *messages, strict=True):
        if manifest.capture.generate is not None:
            sample_id = sample_id.rpartition("#")[0]
        turns = tuple(tuple(Turn(m["role"], m["content"]) for m in side) for side in sides)
        yield sample_id, tuple(ref["path"] for ref in refs), turns


def _changes(
    newer: Dataset, position: int, paths: tuple[str | None, ...], conversations: _Conversations, manifest: Manifest
) -> tuple[str, ...]:
    """What differs of one sample."""
    try:
        sample = newer[position]
    except DataError as error:
        return (f"cannot be read now ({error})",)
    before, now = conversations, sample.conversations
    if manifest.capture.generate is not None:
        before, now = (tuple(map(without_last_response, turns)) for turns in (before, now))
    differs = {"messages": before != now, "images": paths != tuple(ref.path for ref in sample.images)}
    return tuple(name for name, is_other in differs.items() if is_other)


def _lines(name: str, found: tuple[ChangedSample, ...]) -> Iterator[str]:
    for each in found[:MAX_LISTED]:
        place = "" if each.shard is None else f" (shard {each.shard})"
        yield f"{name}: {each.id!r}{place}" + f": {', '.join(each.what)}" * bool(each.what)
    if len(found) > MAX_LISTED:
        yield f"{name}: and {len(found) - MAX_LISTED:,} more"
