"""Where data is, and writing files so that a reader sees a whole one or none.

A location is a local path or an address such as s3://bucket/key; the functions here treat both alike, and what is
special about object stores is in object_store.py.
"""

import contextlib
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast

from pydantic import BeforeValidator, PlainSerializer, PlainValidator
from pydantic_core import PydanticCustomError
from upath import UPath

from common.config import ADDRESS_ERROR
from common.errors import ConfigError, StorageError
from common.storage import object_store

PARTIAL_SUFFIX = ".partial"
LOCK_NAME = ".lock"

# What is on a disk of this machine is a plain Path, never a UPath.
Location = Path | UPath

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


def parse_location(text: str | os.PathLike[str] | UPath) -> Location:
    """A local path, or an address of any protocol that fsspec knows; file:// becomes a local path.

    Raises:
        ConfigError: an unknown protocol, one whose package is not installed, or an address that holds credentials.
    """
    if not isinstance(text, str | Path) and isinstance(text, UPath):
        return text
    address = os.fspath(text)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/]*)", address)
    if match is None:
        return Path(address)
    protocol, host = match[1].lower(), match[2]
    if "@" in host or re.search(r"\?[\w-]+=", address):
        # Not repeated in the message, which may end in a log.
        raise ConfigError(
            f"an address that begins with {protocol}:// holds credentials or options (before an @, or after a ?); "
            "leave them out: credentials come from the environment"
        )
    if "::" in address:
        raise ConfigError(f"{address}: addresses in addresses (::) are not supported; give one of them")
    if protocol in ("file", "local"):
        return Path(address[len(match[1]) + len("://") :])
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(protocol)
    except ImportError as error:
        extra = _EXTRAS.get(protocol)
        wanted = f"'decant[{extra}]'" if extra else "the package that fsspec names"
        raise ConfigError(f"{address}: {protocol}:// needs a package ({error}); run: pip install {wanted}") from error
    except ValueError as error:
        raise ConfigError(
            f"{address}: no protocol {protocol}:// is known; use a local path, s3:// or gs://, or another of fsspec's"
        ) from error
    if not host:
        raise ConfigError(f"{address}: names no bucket; expected {protocol}://BUCKET/KEY")
    return UPath(address)


def _validate_location(value: Any) -> Location:
    if not isinstance(value, str | os.PathLike | UPath):
        # Not a TypeError, which pydantic would not take for a wrong value.
        raise ValueError("expected a path or an address")  # noqa: TRY004
    try:
        return parse_location(value)
    except ConfigError as error:
        raise PydanticCustomError(ADDRESS_ERROR, "{reason}", {"reason": str(error)}) from error


def _check_no_address(value: Any) -> Any:
    if isinstance(value, UPath) or (isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value)):
        raise ValueError("models, checkpoints and training outputs are local directories; copy it here first")
    return value


# Fields of configurations: data may be anywhere, models and what training writes are on this machine.
LocationField = Annotated[Location, PlainValidator(_validate_location), PlainSerializer(str, when_used="json")]
LocalPath = Annotated[Path, BeforeValidator(_check_no_address)]


def publish(location: Location, data: bytes) -> None:
    """Writes a file that is there whole or not at all; the directory is made.

    Locally: under a temporary name beside it, flushed to the disk, renamed. A crash at any moment leaves the old
    content or the new one, and at most a `*.partial` file that no reader looks at. On an object store: one PUT.

    Raises:
        StorageError: the directory cannot be written, the disk is full, or the store refuses; the file has its old
            content, or, if only the last step failed, the new one.
    """
    if isinstance(location, Path):
        _publish_locally(location, data)
    else:
        object_store.put(location, data)


def publish_new(location: Location, data: bytes) -> bool:
    """As `publish`, but leaves a file that is there already: returns False then.

    Of two processes that do this at once on an object store with conditional writes (S3, Google Cloud Storage), one
    gets True. Locally it takes `directory_lock` as well.

    Raises:
        StorageError: as `publish`.
    """
    if isinstance(location, Path):
        if location.exists():
            return False
        _publish_locally(location, data)
        return True
    try:
        object_store.put(location, data, replace=False)
    except FileExistsError:
        return False
    return True


def move(source: Location, destination: Location) -> None:
    """Gives a file another name in the same file system or bucket; of an object, copies it and then deletes it.

    Raises:
        StorageError: not moved; of an object there may be a copy already.
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
    """A whole file.

    Raises:
        FileNotFoundError: there is none. OSError: the disk refused. StorageError: the store did.
    """
    return location.read_bytes() if isinstance(location, Path) else object_store.get(location)


def open_ranged(location: Location) -> BinaryIO:
    """A seekable binary file; of an object, each read asks for the bytes that it wants and no others.

    Raises:
        FileNotFoundError: there is none. OSError: the disk refused. StorageError: the store did, now or when reading.
    """
    return location.open("rb") if isinstance(location, Path) else cast(BinaryIO, object_store.RangedFile(location))


def is_file(location: Location) -> bool:
    """Whether there is such a file or object. Raises StorageError if the store does not say."""
    if isinstance(location, Path):
        return location.is_file()
    try:
        object_store.size(location)
    except FileNotFoundError:
        return False
    return True


def file_size(location: Location) -> int:
    """Bytes of a file. Raises as `read_bytes`."""
    return location.stat().st_size if isinstance(location, Path) else object_store.size(location)


def list_files(directory: Location) -> dict[str, int]:
    """Names of the files right in a directory, with their bytes; none if it is not there. Never from a cache.

    Raises:
        StorageError: the disk or the store refused, or the bucket does not exist.
    """
    if not isinstance(directory, Path):
        return object_store.listing(directory)
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
    """Holds `directory` for one process at a time, between looking at what is published and publishing.

    The lock is the kernel's and ends with its process, however that ends; the empty file `.lock` stays. Object stores
    have no locks, and nothing is held there: what must be decided once is written with `publish_new`, and a shard that
    two processes write is the same rows twice.

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


def remove_partials(directory: Location, older_than_s: float = 3600.0) -> None:
    """Deletes temporary files that killed processes left in `directory`; younger ones may belong to a live one.

    An object store has none: an object appears when its PUT has ended.
    """
    if not isinstance(directory, Path):
        return
    for partial in directory.glob(f".*{PARTIAL_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > older_than_s:
                partial.unlink()


def _publish_locally(path: Path, data: bytes) -> None:
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


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
