"""Writing files so that a reader sees a whole one or none."""

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from common.errors import StorageError

PARTIAL_SUFFIX = ".partial"
LOCK_NAME = ".lock"


def publish(path: Path, data: bytes) -> None:
    """Writes `data` under a temporary name beside `path`, flushes it to the disk and renames it.

    A crash at any moment leaves the old content of `path` or the new one, and at most a `*.partial` file that
    no reader looks at.

    Raises:
        StorageError: the directory cannot be written, or the disk is full; `path` has its old content, or, if only
            the last step failed, the new one.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: {len(data):,} bytes could not be written safely ({error.strerror or error}). "
            "Free space or choose another output, then run the same command again: it continues"
        ) from error


@contextlib.contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Holds `directory` for one process at a time, between looking at what is published and publishing.

    The lock is the kernel's and ends with its process, however that ends; the empty file `.lock` stays.

    Raises:
        StorageError: the directory cannot be written, or its file system has no locks.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"{directory}: cannot be written ({error.strerror})") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise StorageError(f"{directory}: cannot be locked ({error.strerror})") from error
        yield
    finally:
        os.close(descriptor)


def remove_partials(directory: Path, older_than_s: float = 3600.0) -> None:
    """Deletes temporary files that killed processes left in `directory`; younger ones may belong to a live one."""
    for partial in directory.glob(f".*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > older_than_s:
                partial.unlink()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
