"""Moves what is broken aside, so that a rerun of the command that wrote it fills the gap (`verify-shards --repair`).

    Report ─> manifest.json, restored from the shards ─> both files of each broken shard ─> OUTPUT/broken/<UTC time>/
                                                         images.parquet of a feature cache

Nothing is deleted. A receipt is moved before its shard, so that an interrupted repair leaves a shard without a receipt,
which readers ignore and a rerun replaces.
"""

import contextlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime

from rich.console import Group, RenderableType

from common.console import plain_text
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
from precompute.report import Report, format_ranges, format_runs

# Checks of the whole output or of its source, for whose problems no shard is moved.
_CHECKS_WITHOUT_SHARD = frozenset({"manifest", "dataset", "sources"})


@dataclass(frozen=True)
class RepairResult:
    """Result of a repair: `moved` files are now in `destination`, `missing` shards are left for a rerun of `command`.

    `refusal` says why nothing could be done; None if it was.
    """

    output: Location
    destination: Location | None
    moved: tuple[str, ...]
    restored: bool
    missing: tuple[range, ...]
    notes: tuple[str, ...]
    refusal: str | None = None
    command: str = Manifest.command

    @property
    def ok(self) -> bool:
        """True if nothing had to be done and nothing is left to do."""
        return not (self.moved or self.restored or self.missing or self.notes or self.refusal)

    def to_json(self) -> str:
        """Returns one JSON object; its `missing` holds the first and the last number of each run of missing shards."""
        changed = {
            "output": str(self.output),
            "destination": None if self.destination is None else str(self.destination),
            "missing": [(run.start, run[-1]) for run in self.missing],
            "ok": self.ok,
        }
        return json.dumps({**vars(self), **changed}, indent=1)

    def render(self) -> RenderableType:
        """Returns what was moved, and what to run next."""
        lines = []
        if self.refusal:
            lines.append(plain_text(f"not repaired: {self.refusal}", "bold red"))
        if self.moved:
            numbers = sorted({number for name in self.moved if (number := shard_number(name)) is not None})
            others = [name for name in self.moved if shard_number(name) is None]
            what = [f"shards {format_ranges(numbers)}", *others] if numbers else others
            lines.append(plain_text(f"moved {' and '.join(what)} ({len(self.moved)} files) to {self.destination}"))
        if self.restored:
            lines.append(plain_text(f"{MANIFEST_NAME} was restored from the shards"))
        lines += [plain_text(note) for note in self.notes]
        if self.missing or INDEX_NAME in self.moved:
            options = " --config FILE" if self.command == Manifest.command else ""
            what_next = f"shards {format_runs(self.missing)} and no others" if self.missing else INDEX_NAME
            lines.append(
                plain_text(f"run the same {self.command} again (decant {self.command}{options}): it writes {what_next}")
            )
        return Group(*(lines or [plain_text("nothing was broken, nothing was moved")]))


def repair_output(report: Report) -> RepairResult:
    """Moves aside the files that `report` found broken, and restores the manifest.

    A shard whose files have changed since verification began is left alone, because another process is writing it.

    Raises:
        StorageError: a file could not be moved; the same command may be run again.
    """
    output = report.output
    broken_manifest = not all(check.ok for check in report.checks if check.name == "manifest")
    if broken_manifest and report.restored is None:
        refusal = f"{MANIFEST_NAME} is broken and cannot be restored from the shards (see above); nothing was moved"
        return RepairResult(output, None, (), False, (), (), refusal, report.schema.command)
    names = {name for check in report.checks if check.name not in _CHECKS_WITHOUT_SHARD for name in check.files}
    numbers = sorted({number for name in names if (number := shard_number(name)) is not None})
    notes = [
        f"the problems of the check {check.name!r} are not the damage of a shard: nothing was moved for them"
        for check in report.checks
        if check.name in ("dataset", "sources") and not check.ok
    ]
    moved: list[str] = []
    with directory_lock(output) if numbers or INDEX_NAME in names or broken_manifest else contextlib.nullcontext():
        destination = _find_new_directory(output / "broken")
        current_files = list_files(output)

        def move_aside(path: Location) -> None:
            if path.name in current_files:
                move(path, destination / path.name)
                moved.append(path.name)

        if broken_manifest:
            assert report.restored is not None
            move_aside(output / MANIFEST_NAME)
            write_with_digest(output / MANIFEST_NAME, report.restored)
        if INDEX_NAME in names:
            move_aside(output / INDEX_NAME)
        for number in numbers:
            receipt_and_shard = (receipt_path(output, number), shard_path(output, number))
            if any(current_files.get(path.name) != report.listing.get(path.name) for path in receipt_and_shard):
                notes.append(f"shard {number} changed while it was checked: it was left alone; run the command again")
                continue
            for path in receipt_and_shard:
                move_aside(path)
    manifest = read_with_digest(output / MANIFEST_NAME, report.schema)
    return RepairResult(
        output,
        destination if moved else None,
        tuple(moved),
        broken_manifest,
        manifest.missing_shards(published_shards(output)),
        tuple(notes),
        command=report.schema.command,
    )


def _find_new_directory(parent: Location) -> Location:
    """Returns a directory below `parent` that is named after the time and holds nothing."""
    name = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%SZ")
    candidate, count = parent / name, 1
    while list_files(candidate):
        count += 1
        candidate = parent / f"{name}-{count}"
    return candidate
