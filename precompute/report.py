"""Report of an output's verification: named checks with counts and problems, as a table and as JSON."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.console import plain_text
from common.shards.manifest import Manifest, ShardedManifest
from common.storage.files import Location

# Problems that a check lists; further ones are only counted.
MAX_LISTED = 20


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, and the file that it is in."""

    path: str
    what: str


@dataclass
class Check:
    """Outcome of one named check, which was made `num_checked` times.

    `problems` lists the first `MAX_LISTED`, `num_problems` counts all, and `files` names all files that have one.
    `meaning` says what holds if the check passes.
    """

    name: str
    meaning: str
    num_checked: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)
    files: set[str] = field(default_factory=set)

    def passed(self, count: int = 1) -> None:
        """Adds `count` to the number of checked things."""
        self.num_checked += count

    def failed(self, path: Location, what: str) -> None:
        """Adds a problem of the file `path`, whose name is cut from the message, so that it is not shown twice."""
        self.num_problems += 1
        self.files.add(path.name)
        if len(self.problems) < MAX_LISTED:
            self.problems.append(Problem(str(path), what.removeprefix(f"{path}: ")))

    @property
    def ok(self) -> bool:
        """True if no problem was found."""
        return self.num_problems == 0


@dataclass(frozen=True)
class Report:
    """Outcome of verifying an output. A check with a `num_checked` of 0 was not reached, or had nothing to check.

    `listing` has names and bytes of the output's files when verification began. `restored` is the manifest that the
    shards repeat if manifest.json is broken, None otherwise. `schema` is the type of the output's manifest.
    """

    output: Location
    checks: tuple[Check, ...]
    num_shards: int
    num_rows: int
    num_scored_tokens: int
    num_bytes: int
    num_skipped: int
    listing: dict[str, int]
    restored: ShardedManifest | None
    schema: type[ShardedManifest] = Manifest

    @property
    def ok(self) -> bool:
        """True if every check passed, and there was a row to check."""
        return self.num_rows > 0 and all(check.ok for check in self.checks)

    def to_json(self) -> str:
        """Returns the whole report as one JSON object."""
        totals = {
            name: getattr(self, name)
            for name in ("num_shards", "num_rows", "num_scored_tokens", "num_bytes", "num_skipped")
        }
        checks = [
            {
                "name": check.name,
                "meaning": check.meaning,
                "num_checked": check.num_checked,
                "num_problems": check.num_problems,
                "problems": [asdict(problem) for problem in check.problems],
                "ok": check.ok,
            }
            for check in self.checks
        ]
        return json.dumps({"output": str(self.output), "checks": checks, **totals, "ok": self.ok}, indent=1)

    def render(self) -> RenderableType:
        """Returns a table of the checks with the problems and the totals below it."""
        table = Table(title=plain_text(self.output, "table.title"), title_justify="left", show_lines=False)
        table.add_column("check")
        table.add_column("what holds")
        table.add_column("checked", justify="right")
        table.add_column("problems", justify="right")
        for check in self.checks:
            style = "red" if not check.ok else "dim" if not check.num_checked else ""
            table.add_row(check.name, check.meaning, f"{check.num_checked:,}", f"{check.num_problems:,}", style=style)
        totals = f"{self.num_shards:,} shards, {self.num_rows:,} rows, {self.num_bytes:,} bytes"
        if self.schema is Manifest:
            totals += f", {self.num_scored_tokens:,} scored tokens, {self.num_skipped:,} samples skipped by choice"
        verdict = Text("verified", style="green") if self.ok else Text("NOT verified", style="bold red")
        if not self.num_rows:
            verdict.append(": there are no rows")
        return Group(table, *self._problem_lines(), Text(totals), verdict)

    def _problem_lines(self) -> Iterator[Text]:
        for check in self.checks:
            for problem in check.problems:
                yield plain_text(f"{check.name}: {problem.path}: {problem.what}", "red")
            if more := check.num_problems - len(check.problems):
                yield Text(f"{check.name}: and {more:,} more", style="red")


def format_ranges(numbers: Sequence[int]) -> str:
    """Returns ascending numbers with their runs joined: "0-3, 7"."""
    runs: list[range] = []
    for number in numbers:
        if runs and number == runs[-1].stop:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return format_runs(runs)


def format_runs(runs: Iterable[range]) -> str:
    """Returns runs of numbers: "0-3, 7"."""
    return ", ".join(str(run.start) if len(run) == 1 else f"{run.start}-{run[-1]}" for run in runs)
