"""Which checkpoint a run may continue from.

    output/checkpoints/.partial/checkpoint-200   being written; never read
    output/checkpoints/checkpoint-200/complete.json   written, flushed, then renamed into place: whole

The position in the data needs no state of its own: it is the global step (see train/data/sources.py).
"""

import json
import logging
import re
from pathlib import Path

from common.storage.files import publish

_log = logging.getLogger(__name__)

MARKER = "complete.json"


def mark_complete(checkpoint: Path, step: int, *, num_ranks: int) -> None:
    """Writes the marker that tells a whole checkpoint from a damaged one: the size of each of its files."""
    sizes = {str(p.relative_to(checkpoint)): p.stat().st_size for p in sorted(checkpoint.rglob("*")) if p.is_file()}
    publish(checkpoint / MARKER, json.dumps({"step": step, "num_ranks": num_ranks, "files": sizes}, indent=1).encode())


def read_num_ranks(checkpoint: Path) -> int:
    """How many ranks wrote a whole checkpoint."""
    return int(json.loads((checkpoint / MARKER).read_bytes())["num_ranks"])


def find_latest_complete(output: Path) -> tuple[Path, int] | None:
    """The newest whole checkpoint and its global step; damaged ones are skipped with a warning."""
    steps = {
        int(match[1]): path
        for path in (output / "checkpoints").glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for step in sorted(steps, reverse=True):
        if (problem := _problem(steps[step], step)) is None:
            return steps[step], step
        _log.warning("%s: %s; continuing from an older checkpoint", steps[step], problem)
    return None


def _problem(checkpoint: Path, step: int) -> str | None:
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
