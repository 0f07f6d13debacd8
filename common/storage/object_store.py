"""Requests to object stores: S3, Google Cloud Storage or any other file system of fsspec. All are made here.

    put, get, ... ─> call_with_retries ─> filesystem ─> one request
                     a transient failure is retried after a pause; any other is a StorageError at once

The client libraries' own retries are switched off where possible, so that one place waits and logs. The client
libraries take credentials from the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, the machine's role,
AWS_ENDPOINT_URL for other stores that speak S3).
"""

import errno
import functools
import io
import itertools
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec
from upath import UPath

from common.errors import StorageError

logger = logging.getLogger(__name__)

# The waits add up to about half a minute, because a store that scales up answers "slow down" for some seconds.
MAX_TRIES = 8
MIN_WAIT_S = 0.25
MAX_WAIT_S = 8.0

# The largest object that S3 takes in one PUT.
MAX_PUT_BYTES = 5 * 2**30

# gcsfs makes six tries of its own within half a minute, which cannot be switched off.
_RETRIED_BY_CLIENT = frozenset({"gs", "gcs"})

_TRANSIENT_CODES = frozenset(
    {"408", "429", "500", "502", "503", "504"}
    | {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling"}
)
_TRANSIENT_ERRNOS = frozenset({errno.EBUSY, errno.ETIMEDOUT, errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH})
# Names of classes, because their packages (botocore, aiohttp, requests) need not be installed.
_TRANSIENT_CLASSES = frozenset(
    {"ConnectionError", "TimeoutError", "HTTPClientError", "ResponseParserError", "ResponseStreamingError", "Timeout"}
    | {"ClientConnectionError", "ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ChunkedEncodingError"}
)
_CREDENTIALS_CLASSES = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})
_DENIED_CODES = frozenset({"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"})

_S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60},
    # With more, s3fs requests the size of an object before it reads it.
    "max_concurrency": 1,
}

T = TypeVar("T")


def call_with_retries(path: UPath, action: str, call: Callable[[Any, str], T]) -> T:
    """Returns `call(filesystem, key)`; a call that fails for a transient reason is repeated after growing pauses.

    `action` names the request in messages, such as "read".

    Raises:
        FileNotFoundError, FileExistsError: as `call` raised it, unless it is the bucket that does not exist.
        StorageError: at once if a retry cannot help, else after the last try; names the key.
    """
    began_s = time.monotonic()
    num_tries = 1 if path.protocol in _RETRIED_BY_CLIENT else MAX_TRIES
    for attempt in itertools.count(1):
        try:
            return call(filesystem(path.protocol, os.getpid()), path.path)
        except Exception as error:
            # Any other built-in exception, such as a TypeError, is a defect of the program, not a failure of the store.
            if not isinstance(error, OSError | ValueError) and type(error).__module__ == "builtins":
                raise
            if isinstance(error, FileNotFoundError | FileExistsError) and "NoSuchBucket" not in _codes(error):
                raise
            failure = f"{path}: could not {action}: "
            if not _is_transient(error):
                raise StorageError(failure + _explain(error, path)) from error
            if attempt == num_tries:
                raise StorageError(
                    f"{failure}{attempt} tries in {time.monotonic() - began_s:.0f} s failed, the last with "
                    f"{_first_line(error)}; the store is out of reach or overloaded: run the same "
                    "command again later, it continues"
                ) from error
            # The pause is partly random, so that the nodes of a cluster do not all retry at once.
            wait_s = min(MIN_WAIT_S * 2 ** (attempt - 1), MAX_WAIT_S) * random.uniform(0.5, 1.0)
            logger.warning("%s%s; trying again in %.1f s", failure, _first_line(error), wait_s)
        time.sleep(wait_s)
    raise AssertionError("unreachable")


@functools.lru_cache
def filesystem(protocol: str, pid: int) -> Any:  # noqa: ARG001 - a part of the cache's key
    """Returns the fsspec file system of a protocol.

    There is one for each process id, because connections do not survive a fork. It caches no listings, because other
    processes write to the same output.
    """
    is_s3 = protocol in ("s3", "s3a")
    options = _S3_OPTIONS if is_s3 else {}
    found = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, **options)
    if is_s3:
        found.retries = 1
    return found


def put(path: UPath, data: bytes, *, replace: bool = True) -> None:
    """Writes an object with one PUT, or, above its limit, in parts that become visible together.

    Raises:
        FileExistsError: the object exists and `replace` is False. A store without conditional writes replaces it.
        StorageError: the object was not written.
    """
    options: dict[str, Any] = {} if replace else {"mode": "create"}
    if path.protocol in ("s3", "s3a"):
        # s3fs writes an object in parts if it is larger than two chunks.
        options["chunksize"] = MAX_PUT_BYTES // 2

    def call(fs: Any, key: str) -> None:
        try:
            fs.pipe_file(key, data, **options)
        except OSError as error:
            if replace or not {"NotImplemented", "501"} & _codes(error):
                raise
            fs.pipe_file(key, data, **{**options, "mode": "overwrite"})

    try:
        call_with_retries(path, f"write {len(data):,} bytes", call)
    except FileNotFoundError as error:
        raise StorageError(f"{path}: could not be written ({_first_line(error)}); is there such a bucket?") from error


def move(source: UPath, destination: UPath) -> None:
    """Copies an object within its store, then deletes it. Raises StorageError."""
    try:
        call_with_retries(source, f"copy to {destination}", lambda fs, key: fs.cp_file(key, destination.path))
    except FileNotFoundError as error:
        raise StorageError(f"{source}: could not be moved, it is gone; find out what removed it") from error
    call_with_retries(source, "delete", lambda fs, key: fs.rm_file(key))


def get(path: UPath) -> bytes:
    """Reads a whole object. Raises FileNotFoundError or StorageError."""
    return bytes(call_with_retries(path, "read", lambda fs, key: fs.cat_file(key)))


def size(path: UPath) -> int:
    """Returns the size of an object in bytes. Raises FileNotFoundError or StorageError."""
    info = call_with_retries(path, "look at", lambda fs, key: fs.info(key))
    if info["type"] != "file":
        raise FileNotFoundError(f"{path}: is no object")
    return int(info["size"])


def list_objects(path: UPath) -> dict[str, int]:
    """Returns the names and sizes (bytes) of the objects directly below a key; may be none. Raises StorageError."""
    try:
        found = call_with_retries(path, "list", lambda fs, key: fs.ls(key, detail=True))
    except FileNotFoundError:
        return {}
    files = {str(entry["name"]).rsplit("/", 1)[-1]: int(entry["size"]) for entry in found if entry["type"] == "file"}
    # A store may list an object of the key itself in place of those below it; a folder made by hand has the name "".
    return {name: num_bytes for name, num_bytes in files.items() if name and name != path.name}


class RangedFile(io.RawIOBase):
    """Object as a seekable file; each read is one request for its range of bytes. Remains usable after a fork.

    Raises:
        FileNotFoundError: on opening, if there is no such object.
        StorageError: on opening and reading, if the store failed.
    """

    def __init__(self, path: UPath) -> None:
        self._path = path
        self._size = size(path)
        self._position = 0

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the position, without a request."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, num_bytes: int | None = -1) -> bytes:
        """Reads up to `num_bytes` from the position on; all of the rest for None or -1."""
        start = self._position
        stop = self._size if num_bytes is None or num_bytes < 0 else min(start + num_bytes, self._size)
        if stop <= start:
            return b""
        try:
            data = call_with_retries(self._path, f"read bytes {start:,} to {stop:,}", self._read_range(start, stop))
        except FileNotFoundError as error:
            raise StorageError(
                f"{self._path}: is gone since it was opened; find out what removed it, then run the same command again"
            ) from error
        self._position = stop
        return data

    def _read_range(self, start: int, stop: int) -> Callable[[Any, str], bytes]:
        def call(fs: Any, key: str) -> bytes:
            data = bytes(fs.cat_file(key, start=start, end=stop))
            if len(data) != stop - start:
                raise ConnectionError(f"{len(data):,} bytes came, expected {stop - start:,}")
            return data

        return call

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` from the position on. Returns the number of bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _codes(error: BaseException) -> set[str]:
    """Returns the error codes and HTTP statuses of an exception of a client library and of its causes."""
    codes = set()
    for link in _causes(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            codes |= {
                str(response.get("Error", {}).get("Code")),
                str(response.get("ResponseMetadata", {}).get("HTTPStatusCode")),
            }
        codes |= {str(code) for name in ("status", "code") if isinstance(code := getattr(link, name, None), int | str)}
    return codes


def _class_names(error: BaseException) -> set[str]:
    return {kind.__name__ for link in _causes(error) for kind in type(link).__mro__}


def _is_transient(error: BaseException) -> bool:
    names = _class_names(error)
    if _CREDENTIALS_CLASSES & names:
        return False
    is_broken = _TRANSIENT_CLASSES & names or getattr(error, "errno", None) in _TRANSIENT_ERRNOS
    return bool(is_broken or _TRANSIENT_CODES & _codes(error))


def _explain(error: BaseException, path: UPath) -> str:
    codes = _codes(error)
    if _CREDENTIALS_CLASSES & _class_names(error):
        return (
            "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for gs:// "
            "GOOGLE_APPLICATION_CREDENTIALS) in the environment, or give the machine a role"
        )
    if "NoSuchBucket" in codes:
        return f"there is no bucket {path.path.split('/', 1)[0]!r}; make it, or correct the address"
    if isinstance(error, PermissionError) or _DENIED_CODES & codes or str(error).startswith("Forbidden"):
        return (
            f"access was denied ({_first_line(error)}); check that the credentials in the environment are those of "
            "this store, are not expired and may do this here, then run the same command again: it continues"
        )
    return f"the store refused ({_first_line(error)}); correct that, then run the same command again: it continues"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
