"""Complete checkpoints, which a run may continue from.

    output/checkpoints/.partial/checkpoint-200        being written; never read
    output/checkpoints/checkpoint-200/complete.json   written last and flushed; then the directory is renamed into place

The marker `complete.json` holds the step, the number of ranks, the size and SHA-256 of every other file, and a SHA-256
of itself. All of it is checked before anything of the checkpoint is loaded.

The position in the data needs no state of its own, because it is the global step (see train/data/sampling.py).
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ShardError, StorageError
from common.shards.manifest import file_sha256
from common.storage.files import publish, read_bytes

_log = logging.getLogger(__name__)

MARKER = "complete.json"

# Each holds one piece of a file in memory. Disks are not faster than so many processor cores.
_MAX_HASH_THREADS = 16

# What `_open_checked` raises for a checkpoint that is not to be loaded.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ShardError, StorageError)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its directory, its global step, and the number of ranks that wrote it."""

    path: Path
    step: int
    num_ranks: int


def mark_complete(checkpoint: Path, step: int, *, num_ranks: int) -> None:
    """Writes the marker that distinguishes a complete checkpoint, after reading all of its files back.

    Raises:
        StorageError: a file cannot be read back, or the marker cannot be written.
    """
    paths = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p != checkpoint / MARKER)
    try:
        files = {
            path.relative_to(checkpoint).as_posix(): {"num_bytes": path.stat().st_size, "sha256": sha256}
            for path, sha256 in zip(paths, _hash_files(paths), strict=True)
        }
    except (OSError, ShardError) as error:
        raise StorageError(
            f"{checkpoint}: cannot be read back after it was written ({error}); earlier checkpoints stay. Check the "
            "disk, then run the same command again: it continues"
        ) from error
    content = {"step": step, "num_ranks": num_ranks, "files": files}
    publish(checkpoint / MARKER, json.dumps({**content, "sha256": _digest(content)}, indent=1).encode())


def find_latest_complete(output: Path) -> Checkpoint | None:
    """Returns the newest complete checkpoint of a run, or None if it has no checkpoint.

    Reads all of its files, so one rank calls this for all. Damaged checkpoints are passed over with a warning that
    names the file.

    Raises:
        StorageError: there are checkpoints, but none is whole; or they cannot be listed.
    """
    paths = _list_checkpoints(output / "checkpoints")
    for step in sorted(paths, reverse=True):
        try:
            checkpoint = _open_checked(paths[step])
            if checkpoint.step == step:
                return checkpoint
            raise ValueError(f"holds step {checkpoint.step}, not the one of its name")
        except _DAMAGE as error:
            _log.warning("%s: %s; this checkpoint is passed over", paths[step], error)
    if paths:
        raise StorageError(
            f"{output}: holds {len(paths)} checkpoint(s), and none of them is whole (the warnings before this one name "
            f"the damaged files). Put a copy back; or remove {output / 'checkpoints'} to begin again from step 0"
        )
    return None


def check_undamaged(directory: Path) -> None:
    """Checks every byte of a directory if it is a complete checkpoint; does nothing if it is another one.

    Raises:
        StorageError: it is damaged; names the file.
    """
    try:
        if (directory / MARKER).is_file():
            _open_checked(directory)
    except _DAMAGE as error:
        raise StorageError(f"{directory}: {error}; take another checkpoint") from error


def remove_old(checkpoints: Path, step: int, num_kept: int) -> None:
    """Removes all checkpoints but the newest `num_kept` up to `step`, which was just written; what has no marker stays.

    Later ones stay until the run gets there: they are damaged, because the run would have continued from them, and
    counted as the newest they would push out whole ones.
    """
    paths = _list_checkpoints(checkpoints)
    for old in sorted(number for number in paths if number <= step)[:-num_kept]:
        if (paths[old] / MARKER).is_file():
            shutil.rmtree(paths[old], ignore_errors=True)


def _list_checkpoints(checkpoints: Path) -> dict[int, Path]:
    """Returns the directories named like checkpoints by their steps, whole or not.

    Raises:
        StorageError: the directory cannot be listed.
    """
    try:
        names = os.listdir(checkpoints)  # noqa: PTH208 - names are all that is needed
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"{checkpoints}: cannot be listed ({error.strerror}); check its permissions") from error
    return {
        int(match[1]): checkpoints / name for name in names if (match := re.fullmatch(r"checkpoint-([0-9]+)", name))
    }


def _open_checked(checkpoint: Path) -> Checkpoint:
    """Returns a checkpoint of which every byte is as it was written.

    Raises:
        OSError, ShardError: a file is missing or cannot be read. ValueError: it is not what was written.
        KeyError, TypeError, AttributeError: the marker is of another version.
    """
    marker = _read_marker(checkpoint / MARKER)
    expected = marker["files"]
    sizes = {name: (checkpoint / name).stat().st_size for name in expected}
    for name, num_bytes in sizes.items():
        if num_bytes != expected[name]["num_bytes"]:
            raise ValueError(f"{name} has {num_bytes:,} bytes, {expected[name]['num_bytes']:,} were written")
    _log.info("%s: checking %.2f GB", checkpoint, sum(sizes.values()) / 1e9)
    found = zip(expected, _hash_files([checkpoint / name for name in expected]), strict=True)
    if damaged := [name for name, sha256 in found if sha256 != expected[name]["sha256"]]:
        raise ValueError(f"{', '.join(damaged)}: damaged, the SHA-256 is not that of what was written")
    return Checkpoint(checkpoint, marker["step"], marker["num_ranks"])


def _read_marker(path: Path) -> dict[str, Any]:
    try:
        marker = json.loads(read_bytes(path))
        if not isinstance(marker, dict):
            raise ValueError("expected an object")  # noqa: TRY004 - the same as for other damage
    except ValueError as error:
        raise ValueError(f"{MARKER} is damaged ({error})") from error
    if "sha256" not in marker:
        raise ValueError(f"{MARKER} is damaged, or of an earlier version: it has no SHA-256 to check the files with")
    if marker.pop("sha256") != _digest(marker):
        raise ValueError(f"{MARKER} is damaged, its SHA-256 is not that of what was written")
    return marker


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hash_files(paths: Sequence[Path]) -> list[str]:
    """Returns the SHA-256 of each file, with threads, because hashlib releases the interpreter's lock."""
    with ThreadPoolExecutor(max(1, min(_MAX_HASH_THREADS, os.cpu_count() or 1, len(paths)))) as pool:
        return list(pool.map(file_sha256, paths))
