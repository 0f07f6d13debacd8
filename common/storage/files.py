"""Locations of data, and operations on their files. A reader sees a whole file or none.

A location is a local path or an address such as s3://bucket/key. The functions here take either; requests to object
stores are made by object_store.py.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

import fsspec
from pydantic import AfterValidator, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError
from upath import UPath

from common.config import ADDRESS_ERROR
from common.errors import MAX_SHOWN, ConfigError, StorageError
from common.storage import object_store

PARTIAL_SUFFIX = ".partial"
LOCK_NAME = ".lock"

# A location on this machine is always a plain Path, so that `isinstance(location, Path)` tells the two apart.
Location = Path | UPath

# The extra of this package that installs the client library of a protocol.
_EXTRA_BY_PROTOCOL = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


def parse_location(text: str | os.PathLike[str] | UPath) -> Location:
    """Parses a local path, or an address of any protocol that fsspec knows; file:// becomes a local path.

    Raises:
        ConfigError: the protocol is unknown, its package is not installed, or the address holds credentials.
    """
    if not isinstance(text, str | Path) and isinstance(text, UPath):
        return text
    address = os.fspath(text)
    if not address or "\0" in address:
        found = f"{address[:MAX_SHOWN]!r}, which holds a NUL character" if address else "an empty one"
        raise ConfigError(f"expected a path or an address, found {found}")
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)", address)
    if match is None:
        return Path(address)
    protocol, host = match[1].lower(), match[2]
    if "@" in host or re.search(r"\?[\w-]+=", address):
        # The message does not repeat the address, because it may end in a log.
        raise ConfigError(
            f"an address that begins with {protocol}:// holds credentials or options (before an @, or after a ?); "
            "leave them out: credentials come from the environment"
        )
    if "::" in address:
        raise ConfigError(f"{address[:MAX_SHOWN]}: addresses in addresses (::) are not supported; give one of them")
    if protocol in ("file", "local"):
        return Path(address[len(match[1]) + len("://") :])
    return _open_address(address, protocol, host)


def _open_address(address: str, protocol: str, host: str) -> UPath:
    shown = address[:MAX_SHOWN]
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRA_BY_PROTOCOL.get(protocol)
        wanted = f"'.[{extra}]'" if extra else "the package that fsspec names"
        raise ConfigError(f"{shown}: {protocol}:// needs a package ({error}); run: pip install {wanted}") from error
    except ValueError as error:
        raise ConfigError(
            f"{shown}: no protocol {protocol[:MAX_SHOWN]}:// is known; "
            "use a local path, s3:// or gs://, or another of fsspec's"
        ) from error
    if not host:
        raise ConfigError(f"{shown}: names no bucket; expected {protocol}://BUCKET/KEY")
    try:
        path = UPath(address)
        # Some protocols parse the address only when it is used.
        str(path)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{shown}: is no address of {protocol}:// ({error})") from error
    return path


def _validate_location(value: Any) -> Location:
    if not isinstance(value, str | os.PathLike | UPath):
        raise PydanticCustomError("path_type", "a path or an address")
    try:
        return parse_location(value)
    except ConfigError as error:
        raise PydanticCustomError(ADDRESS_ERROR, "{reason}", {"reason": str(error)}) from error


def _validate_local(value: Any) -> Path:
    if isinstance(value, UPath) or (isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value)):
        raise ValueError("models, checkpoints and training outputs are local directories; copy it here first")
    location = _validate_location(value)
    assert isinstance(location, Path)
    return location


def _check_output(location: Location) -> Location:
    if location == Path():
        raise PydanticCustomError("output", "a directory of its own for the output, such as runs/first")
    return location


# Types of configuration fields: data may be anywhere; models and the outputs of training are on this machine.
LocationField = Annotated[Location, PlainValidator(_validate_location), PlainSerializer(str, when_used="json")]
LocalPath = Annotated[Path, PlainValidator(_validate_local), PlainSerializer(str, when_used="json")]

# For outputs: the working directory, which holds other files, is refused.
NOT_HERE = AfterValidator(_check_output)


def publish(location: Location, data: bytes) -> None:
    """Writes a file atomically, and makes its directory.

    A local file is written under a temporary name beside it, flushed to the disk and renamed. A crash at any moment
    leaves the old content or the new one, and at most a `*.partial` file that no reader opens. An object is one PUT.

    Raises:
        StorageError: the directory cannot be written, the disk is full, or the store refuses. The file has its old
            content, or, if only the last step failed, the new one.
    """
    if isinstance(location, Path):
        _write_atomically(location, data)
    else:
        object_store.put(location, data)


def publish_new(location: Location, data: bytes) -> bool:
    """Writes a file atomically unless it exists. Returns True if it was written, False if it existed.

    Of several processes that do this at once on an object store with conditional writes (S3, Google Cloud Storage), one
    gets True. For a local file this holds only under `directory_lock`.

    Raises:
        StorageError: as for `publish`.
    """
    if isinstance(location, Path):
        if _exists(location):
            return False
        _write_atomically(location, data)
        return True
    try:
        object_store.put(location, data, replace=False)
    except FileExistsError:
        return False
    return True


def move(source: Location, destination: Location) -> None:
    """Renames a file within its file system; copies an object within its bucket, then deletes it.

    Raises:
        StorageError: the file was not moved. An object may have been copied already.
    """
    if not isinstance(source, Path):
        assert not isinstance(destination, Path)
        object_store.move(source, destination)
        return
    assert isinstance(destination, Path)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        source.rename(destination)
        for directory in (destination.parent, source.parent):
            _sync_directory(directory)
    except OSError as error:
        raise StorageError(f"{source}: could not be moved to {destination} ({error.strerror})") from error


def read_bytes(location: Location) -> bytes:
    """Reads a whole file.

    Raises:
        FileNotFoundError: there is no such file. OSError: the disk failed.
        StorageError: the store failed, or the path names a FIFO, a device or a socket.
    """
    _refuse_special_file(location)
    return location.read_bytes() if isinstance(location, Path) else object_store.get(location)


def open_ranged(location: Location) -> BinaryIO:
    """Opens a seekable binary file; each read of an object is one request for just the bytes of that read.

    Raises:
        FileNotFoundError: there is no such file. OSError: the disk failed.
        StorageError: the store failed, on opening or on reading, or the path names a FIFO, a device or a socket.
    """
    _refuse_special_file(location)
    return location.open("rb") if isinstance(location, Path) else cast(BinaryIO, object_store.RangedFile(location))


def is_file(location: Location) -> bool:
    """Returns True if there is such a file or object. Raises StorageError if the disk or the store failed."""
    try:
        if isinstance(location, Path):
            return stat.S_ISREG(_look_up(location).st_mode)
        object_store.size(location)
    except FileNotFoundError:
        return False
    return True


def find_special_kind(path: Path) -> str | None:
    """Returns what a path names, such as "a directory", if it is no regular file; None if it is one.

    The file is not opened, because opening a FIFO waits for a writer and opening a device may have effects.

    Raises:
        FileNotFoundError: there is no such file. StorageError: the disk failed.
    """
    mode = _look_up(path).st_mode
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def file_size(location: Location) -> int:
    """Returns the size of a file in bytes.

    Raises:
        FileNotFoundError: there is no such file. StorageError: the disk or the store failed.
    """
    return _look_up(location).st_size if isinstance(location, Path) else object_store.size(location)


def modified_ns(location: Location) -> int | None:
    """Returns the time of a local file's last change in ns since 1970; None for an object, which never changes.

    Raises:
        FileNotFoundError: there is no such file. StorageError: the disk failed.
    """
    return _look_up(location).st_mtime_ns if isinstance(location, Path) else None


def list_files(directory: Location) -> dict[str, int]:
    """Returns the names and sizes (bytes) of the files directly in a directory; none if there is no such directory.

    The listing is never cached.

    Raises:
        StorageError: the disk or the store failed, or the bucket does not exist.
    """
    if not isinstance(directory, Path):
        return object_store.list_objects(directory)
    found = {}
    try:
        for path in directory.iterdir() if directory.is_dir() else ():
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    found[path.name] = path.stat().st_size
    except OSError as error:
        raise StorageError(f"{directory}: cannot be listed ({error.strerror}); check its permissions") from error
    return found


@contextlib.contextmanager
def directory_lock(directory: Location) -> Iterator[None]:
    """Locks `directory` for one process at a time, so that nothing is published between a check and a write.

    The kernel releases the lock when the process ends, however it ends; the empty file `.lock` stays. Object stores
    have no locks, so nothing is locked there: a decision that only one process may take is written with `publish_new`,
    and two processes that write the same shard write the same rows.

    Raises:
        StorageError: the directory cannot be written, or its file system has no locks.
    """
    if not isinstance(directory, Path):
        yield
        return
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


def partial_path(path: Path) -> Path:
    """Returns a new temporary name beside `path`, under which the file is written until it is complete."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}")


def remove_partials(directory: Location, older_than_s: float = 3600.0) -> None:
    """Deletes temporary files that killed processes left in `directory`.

    Younger files stay, because they may belong to a live process. An object store has none, because an object appears
    only when its PUT has ended.
    """
    if not isinstance(directory, Path):
        return
    # One that cannot be deleted only takes room, and a disk that fails does so again where it is written to.
    with contextlib.suppress(OSError):
        for partial in directory.glob(f".*{PARTIAL_SUFFIX}"):
            with contextlib.suppress(OSError):
                if time.time() - partial.stat().st_mtime > older_than_s:
                    partial.unlink()


def _look_up(path: Path) -> os.stat_result:
    """Returns what the file system says of a local path, links followed.

    Raises:
        FileNotFoundError: there is no such file. StorageError: the look-up failed, or the path can name no file.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be looked up ({error.strerror}); check the path and its permissions"
        ) from error
    except ValueError as error:  # such as for a zero byte
        raise StorageError(f"{str(path)!r}: is no path ({error}); correct it") from error


def _exists(path: Path) -> bool:
    try:
        _look_up(path)
    except FileNotFoundError:
        return False
    return True


def _refuse_special_file(location: Location) -> None:
    """Raises StorageError for a FIFO, a device or a socket. A directory is left to the call that opens it."""
    if isinstance(location, Path) and (kind := find_special_kind(location)) not in (None, "a directory"):
        raise StorageError(f"{location}: is {kind}; expected a regular file")


def _write_atomically(path: Path, data: bytes) -> None:
    partial = partial_path(path)
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


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
