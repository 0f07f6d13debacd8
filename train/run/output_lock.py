"""Lock on the output of a training run, so that two trainers never write into the same one.

    output/.train.lock   names the process that holds the lock or held it last

The lock itself is the kernel's: it ends with the process, however that ends, and moves with the directory. It is a
POSIX record lock, because children would inherit one of flock(2), and a killed trainer's data workers would keep it.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from common.errors import ConfigError, StorageError

_log = logging.getLogger(__name__)

LOCK_NAME = ".train.lock"


@contextlib.contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """Locks an output for this process, and makes the directory; removes it again if nothing was written into it.

    A process must not lock an output twice at a time: the kernel would allow it, and drop both locks with the first.

    Raises:
        ConfigError: another process holds the lock; names it.
        StorageError: the directory cannot be written.
    """
    # A path that cannot be looked up is not new, and opening it says why.
    is_new = not os.path.lexists(output)
    descriptor, is_locked = _open_locked(output)
    try:
        if is_locked:
            _write_holder(descriptor, output / LOCK_NAME)
        yield
    finally:
        if is_new and is_locked:
            _remove_unused(output)
        os.close(descriptor)


def _open_locked(output: Path) -> tuple[int, bool]:
    """Returns the open lock file, and False if the file system has no locks."""
    path = output / LOCK_NAME
    while True:
        try:
            output.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"{path}: cannot be written ({error.strerror}); choose another output") from error
        try:
            is_locked = _lock(descriptor, output)
            # A process that ended meanwhile may have removed the file that was opened.
            if not is_locked or _is_same_file(path, descriptor):
                return descriptor, is_locked
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _remove_unused(output: Path) -> None:
    """Removes a directory that holds the lock file alone, so that a refused run leaves nothing behind."""
    with contextlib.suppress(OSError):
        if os.listdir(output) == [LOCK_NAME]:  # noqa: PTH208 - names are all that is needed
            (output / LOCK_NAME).unlink()
            output.rmdir()


def _lock(descriptor: int, output: Path) -> bool:
    """Returns True once the file is locked, False if the file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(
                f"{output}: another train writes into it ({_read_holder(descriptor)}); wait until it has ended, stop "
                "it with SIGTERM (it saves a checkpoint, and the same command continues), or choose another output"
            ) from error
        _log.warning(
            "%s: cannot be locked (%s); make sure that no other train writes into this output", output, error.strerror
        )
        return False
    return True


def _write_holder(descriptor: int, path: Path) -> None:
    holder = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror}); free space") from error


def _read_holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        # The other process has the lock and has not written its name yet.
        return "a process that has just started"
