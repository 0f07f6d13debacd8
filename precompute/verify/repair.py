"""`verify-shards --repair`: what is broken is moved aside, so that a rerun of the command that wrote it fills the gap.

    Report ─> manifest.json, restored from the shards ─> both files of each broken shard ─> OUTPUT/broken/<UTC time>/
                                                         images.parquet of a feature cache

Nothing is deleted. A receipt is moved before its shard: whatever stops this half way leaves a shard without a receipt,
which does not exist to readers and is written again.
"""

import contextlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Group, RenderableType
from rich.text import Text

from common.shards.feature_shard import INDEX_NAME
from common.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    published_shards,
    read_with_digest,
    receipt_path,
    shard_number,
    shard_path,
    write_with_digest,
)
from common.storage.files import Location, directory_lock, list_files, move
from precompute.report import Report, ranges

# Their problems are of an output or of its source: no shard is moved for them.
_OF_NO_SHARD = frozenset({"manifest", "dataset", "sources"})


@dataclass(frozen=True)
class RepairResult:
    """What was done. `moved` has file names, now in `destination`; `missing` the shards that a rerun is to write.

    `command` is what writes them. `refusal` says why nothing could be done, if so.
    """

    output: Location
    destination: Location | None
    moved: tuple[str, ...]
    restored: bool
    missing: tuple[int, ...]
    notes: tuple[str, ...]
    refusal: str | None = None
    command: str = Manifest.command

    @property
    def ok(self) -> bool:
        """Whether there is nothing left to do, and was nothing to do."""
        return not (self.moved or self.restored or self.missing or self.notes or self.refusal)

    def to_json(self) -> str:
        """The result as one JSON object."""
        place = None if self.destination is None else str(self.destination)
        return json.dumps({**vars(self), "output": str(self.output), "destination": place, "ok": self.ok}, indent=1)

    def render(self) -> RenderableType:
        """What was moved, and what to run next."""
        lines = []
        if self.refusal:
            lines.append(Text(f"not repaired: {self.refusal}", style="bold red"))
        if self.moved:
            numbers = sorted({number for name in self.moved if (number := shard_number(name)) is not None})
            others = [name for name in self.moved if shard_number(name) is None]
            what = [f"shards {ranges(numbers)}"] * bool(numbers) + others
            lines.append(Text(f"moved {' and '.join(what)} ({len(self.moved)} files) to {self.destination}"))
        if self.restored:
            lines.append(Text(f"{MANIFEST_NAME} was restored from the shards"))
        lines += [Text(note) for note in self.notes]
        if self.missing or INDEX_NAME in self.moved:
            options = " --config FILE" if self.command == Manifest.command else ""
            what_next = f"shards {ranges(self.missing)} and no others" if self.missing else INDEX_NAME
            lines.append(
                Text(f"run the same {self.command} again (decant {self.command}{options}): it writes {what_next}")
            )
        return Group(*(lines or [Text("nothing was broken, nothing was moved")]))


def repair_output(report: Report) -> RepairResult:
    """Moves aside what `report` found broken of the output, and restores its manifest.

    A shard whose files are not those that the report looked at is left alone: another process works on it.

    Raises:
        StorageError: a file could not be moved; the same command may be run again.
    """
    output = report.output
    broken_manifest = not all(check.ok for check in report.checks if check.name == "manifest")
    if broken_manifest and report.restored is None:
        refusal = f"{MANIFEST_NAME} is broken and cannot be restored from the shards (see above); nothing was moved"
        return RepairResult(output, None, (), False, (), (), refusal, report.schema.command)
    names = {name for check in report.checks if check.name not in _OF_NO_SHARD for name in check.files}
    numbers = sorted({number for name in names if (number := shard_number(name)) is not None})
    notes = [
        f"the problems of the check {check.name!r} are not the damage of a shard: nothing was moved for them"
        for check in report.checks
        if check.name in ("dataset", "sources") and not check.ok
    ]
    moved: list[str] = []
    with directory_lock(output) if numbers or INDEX_NAME in names or broken_manifest else contextlib.nullcontext():
        destination = _unused(output / "broken")
        now = list_files(output)
        if broken_manifest:
            assert report.restored is not None
            if MANIFEST_NAME in now:
                move(output / MANIFEST_NAME, destination / MANIFEST_NAME)
                moved.append(MANIFEST_NAME)
            write_with_digest(output / MANIFEST_NAME, report.restored)
        if INDEX_NAME in names and INDEX_NAME in now:
            move(output / INDEX_NAME, destination / INDEX_NAME)
            moved.append(INDEX_NAME)
        for number in numbers:
            files = (receipt_path(output, number), shard_path(output, number))
            if any(now.get(path.name) != report.listing.get(path.name) for path in files):
                notes.append(f"shard {number} changed while it was checked: it was left alone; run the command again")
                continue
            for path in files:
                if path.name in now:
                    move(path, destination / path.name)
                    moved.append(path.name)
    manifest = read_with_digest(output / MANIFEST_NAME, report.schema)
    missing = set(range(manifest.num_shards)) - set(published_shards(output))
    return RepairResult(
        output,
        destination if moved else None,
        tuple(moved),
        broken_manifest,
        tuple(sorted(missing)),
        tuple(notes),
        command=report.schema.command,
    )


def _unused(parent: Location) -> Location:
    """A directory below `parent` that is named after the time and holds nothing."""
    name = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    candidate, count = parent / name, 1
    while list_files(candidate):
        count += 1
        candidate = parent / f"{name}-{count}"
    return candidate
