"""Retries, errors and ranged reads of object stores, on fsspec's file system in memory.

Requests to a real server are tested in tests/integration/storage/test_object_store.py.
"""

import errno
from typing import Any
from uuid import uuid4

import pytest
from upath import UPath

from common.errors import StorageError
from common.storage import object_store
from common.storage.files import file_size, is_file, list_files, move, open_ranged, publish, publish_new, read_bytes


@pytest.fixture
def root() -> UPath:
    return UPath(f"memory://{uuid4()}")


class ClientError(OSError):
    """Error with an answer of the server, as botocore's."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(f"{code} from the server\nsecond line")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class HttpError(Exception):
    """Error with a status, as gcsfs's."""

    def __init__(self, code: int) -> None:
        super().__init__(f"status {code}")
        self.code = code


class NoCredentialsError(Exception):
    """Error of the name that botocore's has."""


class ClientPayloadError(Exception):
    """Error of the name that aiohttp's has."""


def caused_by(cause: Exception) -> Exception:
    error = OSError("the request failed")
    error.__cause__ = cause
    return error


TRANSIENT = [
    ClientError("SlowDown", 503),
    ClientError("Unnamed", 500),
    HttpError(429),
    ClientPayloadError("cut off"),
    ConnectionResetError("reset"),
    OSError(errno.ENETUNREACH, "unreachable"),
    caused_by(ClientError("RequestTimeout", 400)),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_a_transient_error_is_retried(root: UPath, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(object_store, "MIN_WAIT_S", 0.0)
    errors = iter([error, error])

    def call(_fs: Any, key: str) -> str:
        for failure in errors:
            raise failure
        return key

    assert object_store.call_with_retries(root / "x", "read", call) == (root / "x").path


def test_retries_end_with_the_last_error(root: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_store, "MIN_WAIT_S", 0.0)

    def call(_fs: Any, _key: str) -> None:
        raise ClientError("SlowDown", 503)

    with pytest.raises(
        StorageError, match=r"x: could not read: 8 tries in 0 s failed, the last with SlowDown from the"
    ):
        object_store.call_with_retries(root / "x", "read", call)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NoCredentialsError("none"), "no credentials were found"),
        (ClientError("NoSuchBucket", 404), "there is no bucket"),
        (caused_by(ClientError("NoSuchBucket", 404)), "there is no bucket"),
        (PermissionError("not yours"), "access was denied .not yours."),
        (ClientError("ExpiredToken", 400), "access was denied .ExpiredToken from the server.;"),
        (ClientError("Unnamed", 403), "access was denied"),
        (OSError("Forbidden: no"), "access was denied"),
        (ClientError("InvalidArgument", 400), "the store refused"),
        (OSError(), "the store refused .OSError."),
    ],
    ids=repr,
)
def test_a_permanent_error_is_raised_at_once_with_the_key(root: UPath, error: Exception, message: str) -> None:
    calls = []

    def call(_fs: Any, key: str) -> None:
        calls.append(key)
        raise error

    with pytest.raises(StorageError, match=f"{root}/x: could not read: {message}"):
        object_store.call_with_retries(root / "x", "read", call)
    assert len(calls) == 1


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), FileExistsError("there"), KeyError("a defect")], ids=repr)
def test_other_errors_pass_unchanged(root: UPath, error: Exception) -> None:
    def call(_fs: Any, _key: str) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        object_store.call_with_retries(root / "x", "read", call)
    assert caught.value is error


def test_objects_are_written_read_listed_and_moved(root: UPath) -> None:
    assert list_files(root) == {}
    publish(root / "a", b"123")
    assert publish_new(root / "b", b"45")
    assert not publish_new(root / "b", b"6")
    publish(root / "below" / "c", b"")
    assert list_files(root) == {"a": 3, "b": 2}
    assert (read_bytes(root / "b"), file_size(root / "a")) == (b"45", 3)
    assert is_file(root / "a")
    assert not is_file(root / "below")
    move(root / "a", root / "below" / "d")
    assert list_files(root / "below") == {"c": 0, "d": 3}
    with pytest.raises(StorageError, match="could not be moved, it is gone"):
        move(root / "a", root / "e")


def test_a_ranged_read_returns_what_is_there(root: UPath) -> None:
    publish(root / "x", b"0123456789")
    with open_ranged(root / "x") as file:
        assert file.readable()
        assert file.seekable()
        assert (file.seek(-3, 2), file.read(2), file.tell()) == (7, b"78", 9)
        assert (file.read(), file.read()) == (b"9", b"")
        assert (file.seek(2), file.seek(1, 1)) == (2, 3)
        buffer = bytearray(4)
        assert object_store.RangedFile(root / "x").readinto(buffer) == 4
        assert buffer == b"0123"
        object_store.filesystem(root.protocol, 0).rm((root / "x").path)
        with pytest.raises(StorageError, match="is gone since it was opened"):
            file.read(1)
