"""Objects of S3, Google Cloud Storage or whatever else fsspec knows: every request to them is made here.

    attempt ─> filesystem ─> one request; what fails for a moment is tried again, the rest names the key at once

The client libraries' own tries are switched off where they can be, so that one place waits and says so. Credentials
come from the environment, as the client libraries look for them (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS,
the machine's role, AWS_ENDPOINT_URL for other stores that speak S3).
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

# About half a minute in all: stores ask for patience for seconds while they make room for more requests.
ATTEMPTS = 8
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 8.0

# What one PUT may hold on S3.
MAX_PUT_BYTES = 5 * 2**30

# gcsfs tries six times by itself, for half a minute, and cannot be told not to.
_TRIED_BY_CLIENT = frozenset({"gs", "gcs"})

_BUSY = frozenset(
    {"408", "429", "500", "502", "503", "504"}
    | {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "Throttling"}
)
_BUSY_ERRNOS = frozenset({errno.EBUSY, errno.ETIMEDOUT, errno.EPIPE, errno.EHOSTUNREACH, errno.ENETUNREACH})
# By name, because these belong to packages that need not be installed: botocore, aiohttp, requests.
_BROKEN_CONNECTIONS = frozenset(
    {"ConnectionError", "TimeoutError", "HTTPClientError", "ResponseParserError", "ResponseStreamingError", "Timeout"}
    | {"ClientConnectionError", "ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ChunkedEncodingError"}
)
_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})
_DENIED = frozenset({"401", "403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"})

_S3_OPTIONS: dict[str, Any] = {
    "config_kwargs": {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": 60},
    # Otherwise the length of an object is asked for before it is read.
    "max_concurrency": 1,
}

T = TypeVar("T")


def call_with_retries(path: UPath, action: str, call: Callable[[Any, str], T]) -> T:
    """`call(filesystem, key)`, tried again with growing pauses while the store or the way to it is out of order.

    `action` says for messages what was tried, such as "read".

    Raises:
        FileNotFoundError, FileExistsError: as `call` raised it, unless it is the bucket that is not there.
        StorageError: at once if trying again cannot help, else when the last try has failed; it names the key.
    """
    began_s = time.monotonic()
    num_tries = 1 if path.protocol in _TRIED_BY_CLIENT else ATTEMPTS
    for number in itertools.count(1):
        try:
            return call(filesystem(path.protocol, os.getpid()), path.path)
        except Exception as error:
            if not isinstance(error, OSError | ValueError) and type(error).__module__ == "builtins":
                raise
            if isinstance(error, FileNotFoundError | FileExistsError) and "NoSuchBucket" not in _codes(error):
                raise
            what = f"{path}: could not {action}: "
            if not _is_transient(error):
                raise StorageError(what + _permanent(error, path)) from error
            if number == num_tries:
                raise StorageError(
                    f"{what}{number} tries in {time.monotonic() - began_s:.0f} s failed, the last with "
                    f"{_words(error)}; the store is out of reach or overloaded: run the same "
                    "command again later, it continues"
                ) from error
            # Half of the pause is drawn, so that the nodes of a cluster do not come back all at once.
            wait_s = min(FIRST_WAIT_S * 2 ** (number - 1), LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            logger.warning("%s%s; trying again in %.1f s", what, _words(error), wait_s)
        time.sleep(wait_s)
    raise AssertionError("unreachable")


@functools.lru_cache
def filesystem(protocol: str, pid: int) -> Any:  # noqa: ARG001 - a part of the cache's key
    """The process's fsspec file system of a protocol; `pid` because its connections do not survive a fork.

    Listings are never cached: other processes write to the same output.
    """
    is_s3 = protocol in ("s3", "s3a")
    options = _S3_OPTIONS if is_s3 else {}
    made = fsspec.filesystem(protocol, use_listings_cache=False, skip_instance_cache=True, **options)
    if is_s3:
        made.retries = 1
    return made


def put(path: UPath, data: bytes, *, replace: bool = True) -> None:
    """Writes an object with one PUT, or, above what one may hold, in parts that become visible together.

    Raises:
        FileExistsError: there is one and `replace` is False. A store without conditional writes replaces it.
        StorageError: not written.
    """
    options: dict[str, Any] = {} if replace else {"mode": "create"}
    if path.protocol in ("s3", "s3a"):
        # s3fs writes in parts what is larger than two of these.
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
        raise StorageError(f"{path}: could not be written ({_words(error)}); is there such a bucket?") from error


def move(source: UPath, destination: UPath) -> None:
    """Copies an object within its store, then deletes it. Raises StorageError."""
    try:
        call_with_retries(source, f"copy to {destination}", lambda fs, key: fs.cp_file(key, destination.path))
    except FileNotFoundError as error:
        raise StorageError(f"{source}: could not be moved, it is gone; find out what removed it") from error
    call_with_retries(source, "delete", lambda fs, key: fs.rm_file(key))


def get(path: UPath) -> bytes:
    """A whole object. Raises FileNotFoundError or StorageError."""
    return bytes(call_with_retries(path, "read", lambda fs, key: fs.cat_file(key)))


def size(path: UPath) -> int:
    """Bytes of an object. Raises FileNotFoundError or StorageError."""
    info = call_with_retries(path, "look at", lambda fs, key: fs.info(key))
    if info["type"] != "file":
        raise FileNotFoundError(f"{path}: is no object")
    return int(info["size"])


def listing(path: UPath) -> dict[str, int]:
    """Names and sizes of the objects right below a key; none if there is nothing there. Raises StorageError."""
    try:
        found = call_with_retries(path, "list", lambda fs, key: fs.ls(key, detail=True))
    except FileNotFoundError:
        return {}
    files = {str(entry["name"]).rsplit("/", 1)[-1]: int(entry["size"]) for entry in found if entry["type"] == "file"}
    # An object of the key itself may be listed in place of what is below it; folders made by hand are named "".
    return {name: num_bytes for name, num_bytes in files.items() if name and name != path.name}


class RangedFile(io.RawIOBase):
    """An object as a seekable file; each read is one request for that range. Works on after a fork.

    Raises:
        FileNotFoundError: on opening. StorageError: on opening and reading.
    """

    def __init__(self, path: UPath) -> None:
        self._path = path
        self._size = size(path)
        self._position = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves; nothing is read."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def read(self, num_bytes: int | None = -1) -> bytes:
        """Up to `num_bytes` from here on; all of the rest for None or -1."""
        start = self._position
        stop = self._size if num_bytes is None or num_bytes < 0 else min(start + num_bytes, self._size)
        if stop <= start:
            return b""
        try:
            data = call_with_retries(self._path, f"read bytes {start:,} to {stop:,}", self._range(start, stop))
        except FileNotFoundError as error:
            raise StorageError(
                f"{self._path}: is gone since it was opened; find out what removed it, then run the same command again"
            ) from error
        self._position = stop
        return data

    def _range(self, start: int, stop: int) -> Callable[[Any, str], bytes]:
        def call(fs: Any, key: str) -> bytes:
            data = bytes(fs.cat_file(key, start=start, end=stop))
            if len(data) != stop - start:
                raise ConnectionError(f"{len(data):,} bytes came, expected {stop - start:,}")
            return data

        return call

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` from here on; returns the number of bytes."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _codes(error: BaseException) -> set[str]:
    """Error codes and HTTP statuses that the client libraries left in an exception, and in what led to it."""
    codes = set()
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):
            codes |= {
                str(response.get("Error", {}).get("Code")),
                str(response.get("ResponseMetadata", {}).get("HTTPStatusCode")),
            }
        codes |= {str(code) for name in ("status", "code") if isinstance(code := getattr(link, name, None), int | str)}
    return codes


def _class_names(error: BaseException) -> set[str]:
    return {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}


def _is_transient(error: BaseException) -> bool:
    names = _class_names(error)
    if _NO_CREDENTIALS & names:
        return False
    broken = _BROKEN_CONNECTIONS & names or getattr(error, "errno", None) in _BUSY_ERRNOS
    return bool(broken or _BUSY & _codes(error))


def _permanent(error: BaseException, path: UPath) -> str:
    codes = _codes(error)
    if _NO_CREDENTIALS & _class_names(error):
        return (
            "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for gs:// "
            "GOOGLE_APPLICATION_CREDENTIALS) in the environment, or give the machine a role"
        )
    if "NoSuchBucket" in codes:
        return f"there is no bucket {path.path.split('/', 1)[0]!r}; make it, or correct the address"
    if isinstance(error, PermissionError) or _DENIED & codes or str(error).startswith("Forbidden"):
        return (
            f"access was denied ({_words(error)}); check that the credentials in the environment are those of this "
            "store, are not expired and may do this here, then run the same command again: it continues"
        )
    return f"the store refused ({_words(error)}); correct that, then run the same command again: it continues"


def _words(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
