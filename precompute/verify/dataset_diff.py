"""Finds the samples of an output that a newer version of its dataset has changed (`verify-shards --against`).

Samples are compared by the ids that the datasets have, whatever their positions. The scores are not read.
"""

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from common.console import plain_text
from common.data.dataset import Dataset
from common.data.samples import Sample, Turn, without_last_response
from common.errors import DataError
from common.shards.manifest import Manifest, read_manifest, read_receipts, shard_path
from common.shards.score_shard import ShardFile
from common.storage.files import Location
from precompute.report import MAX_LISTED
from precompute.verify.sample_checks import images_as_in_dataset


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
    receipts = read_receipts(output, manifest)
    skipped_ids = {skipped.id for receipt in receipts for skipped in receipt.skipped}
    matcher = _Matcher(newer, skipped_ids, generated=manifest.capture.generate is not None)
    for receipt in tqdm(receipts, desc="comparing", unit=" shards", disable=not progress):
        with closing(ShardFile(shard_path(output, receipt.shard), manifest, receipt.shard)) as shard:
            for stored in _read_samples(shard, manifest):
                matcher.add(stored, receipt.shard)
    changed, removed = matcher.match_rest()
    return DatasetDiff(
        output=str(output),
        dataset=str(dataset),
        num_unchanged=matcher.num_unchanged,
        changed=tuple(changed),
        removed=tuple(removed),
        new=tuple(ChangedSample(sample_id, None) for sample_id in matcher.new_ids()),
        num_skipped=len(skipped_ids),
        num_missing_shards=manifest.num_shards - len(receipts),
    )


class _Matcher:
    """Finds for each stored sample that of the newer dataset with the same id, as the datasets have it.

    Of several samples with one id, or without any, those that hold the same are matched first, the others in order.
    """

    def __init__(self, newer: Dataset, skipped_ids: set[str], *, generated: bool) -> None:
        self.num_unchanged = 0
        self._newer = newer
        self._generated = generated
        # Positions that are not matched yet, by the dataset's own id.
        self._groups: defaultdict[str | None, dict[int, None]] = defaultdict(dict)
        for index, sample_id in enumerate(newer.ids):
            if sample_id not in skipped_ids:
                self._groups[newer.ids.source(index)][index] = None
        self._by_content: dict[str | None, dict[int, list[int]]] = {}
        self._rest: list[tuple[Sample, int]] = []

    def add(self, stored: Sample, shard: int) -> None:
        """Matches a stored sample with one that holds the same; keeps it for `match_rest` if there is none."""
        group = self._groups[stored.source_id]
        candidates = list(group) if len(group) == 1 else self._find_alike(stored) if group else []
        for position in candidates:
            if position in group and not self._find_changes(stored, position):
                del group[position]
                self.num_unchanged += 1
                return
        self._rest.append((stored, shard))

    def match_rest(self) -> tuple[list[ChangedSample], list[ChangedSample]]:
        """Returns the samples that were changed and those that were removed."""
        changed, removed = [], []
        for stored, shard in self._rest:
            group = self._groups[stored.source_id]
            if group:
                position = next(iter(group))
                del group[position]
                changed.append(ChangedSample(stored.id, shard, self._find_changes(stored, position)))
            else:
                removed.append(ChangedSample(stored.id, shard))
        return changed, removed

    def new_ids(self) -> list[str]:
        """Returns the ids of the samples that no stored one was matched with."""
        return [self._newer.ids[position] for position in sorted(p for group in self._groups.values() for p in group)]

    def _find_alike(self, stored: Sample) -> list[int]:
        """Returns the positions of the samples with the same own id that probably hold the same."""
        if stored.source_id not in self._by_content:
            found: defaultdict[int, list[int]] = defaultdict(list)
            for position in self._groups[stored.source_id]:
                # One that cannot be read now is not the same.
                with contextlib.suppress(DataError):
                    found[self._hash(self._newer[position])].append(position)
            self._by_content[stored.source_id] = found
        return self._by_content[stored.source_id].get(self._hash(stored), [])

    def _hash(self, sample: Sample) -> int:
        return hash((self._compared_turns(sample), tuple(ref.path for ref in sample.images)))

    def _compared_turns(self, sample: Sample) -> tuple[tuple[Turn, ...], ...]:
        """Returns the conversations, without the responses that the teacher generated."""
        if self._generated:
            return tuple(map(without_last_response, sample.conversations))
        return sample.conversations

    def _find_changes(self, stored: Sample, position: int) -> tuple[str, ...]:
        """Returns the names of what differs in one sample."""
        try:
            sample = self._newer[position]
        except DataError as error:
            return (f"cannot be read now ({error})",)
        images = images_as_in_dataset(stored.images, sample.images)
        differs = {
            "messages": self._compared_turns(stored) != self._compared_turns(sample),
            "images": images != sample.images,
        }
        return tuple(name for name, is_different in differs.items() if is_different)


def _read_samples(shard: ShardFile, manifest: Manifest) -> Iterator[Sample]:
    """Yields the sample of each row, with the dataset's ids; of several generated responses to one, the first."""
    last_index = -1
    for group in range(shard.num_groups):
        for index, sample, _ in shard.read_unscored(group):
            if index != last_index and manifest.capture.generate is not None:
                yield replace(sample, id=sample.id.rpartition("#")[0])
            elif index != last_index:
                yield sample
            last_index = index


def _describe_samples(name: str, found: tuple[ChangedSample, ...]) -> Iterator[str]:
    for sample in found[:MAX_LISTED]:
        place = "" if sample.shard is None else f" (shard {sample.shard})"
        changes = f": {', '.join(sample.what)}" if sample.what else ""
        yield f"{name}: {sample.id!r}{place}{changes}"
    if len(found) > MAX_LISTED:
        yield f"{name}: and {len(found) - MAX_LISTED:,} more"
