"""Complete checkpoints, which a run may continue from.

    output/checkpoints/.partial/checkpoint-200        being written; never read
    output/checkpoints/checkpoint-200/complete.json   written last and flushed; then the directory is renamed into place

The position in the data needs no state of its own, because it is the global step (see train/data/sampling.py).
"""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from common.storage.files import publish

_log = logging.getLogger(__name__)

MARKER = "complete.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its directory, its global step, and the number of ranks that wrote it."""

    path: Path
    step: int
    num_ranks: int


def mark_complete(checkpoint: Path, step: int, *, num_ranks: int) -> None:
    """Writes the marker that distinguishes a complete checkpoint: its step, its ranks and the size of each file."""
    sizes = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    publish(checkpoint / MARKER, json.dumps({"step": step, "num_ranks": num_ranks, "files": sizes}, indent=1).encode())


def find_latest_complete(output: Path) -> Checkpoint | None:
    """Returns the newest complete checkpoint of a run, or None; damaged ones are skipped with a warning."""
    paths = {
        int(match[1]): path
        for path in (output / "checkpoints").glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for step in sorted(paths, reverse=True):
        if (problem := _find_problem(paths[step], step)) is None:
            num_ranks = json.loads((paths[step] / MARKER).read_bytes())["num_ranks"]
            return Checkpoint(paths[step], step, int(num_ranks))
        _log.warning("%s: %s; continuing from an older checkpoint", paths[step], problem)
    return None


def _find_problem(checkpoint: Path, step: int) -> str | None:
    try:
        marker = json.loads((checkpoint / MARKER).read_bytes())
        if marker["step"] != step:
            return f"holds step {marker['step']}, not the one of its name"
        if marker["num_ranks"] < 1:
            return "does not say how many ranks wrote it"
        for name, size in marker["files"].items():
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found:,} bytes, {size:,} were written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"is incomplete ({error})"
    return None
