import errno
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path, PosixPath

import pytest
from pydantic import ValidationError
from upath import UPath

from common.config import StrictModel, load_config
from common.errors import ConfigError, StorageError
from common.storage.files import (
    PARTIAL_SUFFIX,
    LocalPath,
    LocationField,
    directory_lock,
    file_size,
    find_special_kind,
    is_file,
    list_files,
    move,
    open_ranged,
    parse_location,
    publish,
    publish_new,
    read_bytes,
    remove_partials,
)

ROOT = Path(__file__).parents[4]


def test_publish_makes_the_directory_and_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "shard-00000.parquet"
    for content in (b"old", b"", b"new"):
        publish(path, content)
        assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.open"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "manifest.json"
    publish(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, full)
    with pytest.raises(StorageError, match=f"{path}: 3 bytes.*No space left"):
        publish(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        publish(tmp_path / "file" / "x", b"new")


def run(program: str, path: Path) -> int:
    return subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=False, timeout=60).returncode


def test_a_write_that_stops_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.parquet"
    publish(path, b"old")
    program = """
import pathlib, resource, sys
from common.errors import StorageError
from common.storage.files import publish
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    publish(pathlib.Path(sys.argv[1]), bytes(5000))
except StorageError:
    sys.exit(7)
"""
    assert run(program, path) == 7
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_killed_write_leaves_the_old_file_and_no_partial_under_the_shards_names(tmp_path: Path, step: str) -> None:
    path = tmp_path / "shard-00000.parquet"
    publish(path, b"old")
    program = f"""
import os, pathlib, signal, sys
from common.storage.files import publish
{step} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
publish(pathlib.Path(sys.argv[1]), bytes(5000))
"""
    assert run(program, path) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    assert list(tmp_path.glob("shard-*")) == [path]
    (partial,) = set(tmp_path.iterdir()) - {path}
    remove_partials(tmp_path)
    assert partial.exists(), "it may belong to a living process"
    os.utime(partial, (time.time() - 7200,) * 2)
    remove_partials(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_a_whole_file_while_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x"
    contents = [bytes([value]) * 300_000 for value in (1, 2)]
    publish(path, contents[0])

    def replace_often() -> None:
        for number in range(20):
            publish(path, contents[number % 2])

    writer = threading.Thread(target=replace_often)
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(path.read_bytes())
    writer.join()
    assert seen <= set(contents)
    assert not list(tmp_path.glob(f".*{PARTIAL_SUFFIX}"))


@pytest.mark.parametrize(
    "text", ["a/b", "/a/b", "file:///a/b", "local:///a/b", Path("/a/b"), "s3:/a", "./s3:x", UPath("/a/b")]
)
def test_a_location_on_this_machine_is_a_plain_path(text: str | Path | UPath) -> None:
    location = parse_location(text)
    assert type(location) is PosixPath
    assert str(location) == str(text).removeprefix("file://").removeprefix("local://").removeprefix("./")


@pytest.mark.parametrize("text", ["s3://bucket/a/b.json", "memory://bucket/a/b.json"])
def test_an_address_is_no_local_path(text: str) -> None:
    location = parse_location(text)
    assert not isinstance(location, Path)
    assert (str(location), location.name) == (text, "b.json")
    assert parse_location(location) is location


@pytest.mark.parametrize(
    "text", ["s3://key:secret@bucket/a", "s3://bucket/a?key=secret", "gs://bucket/a?x=1&token=secret"]
)
def test_credentials_in_an_address_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError, match="credentials come from the environment") as caught:
        parse_location(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense://a/b", "no protocol nonsense:// is known"),
        ("s3:///a", "names no bucket"),
        ("s3://", "names no bucket"),
        ("zip://x::s3://bucket/a.zip", "addresses in addresses"),
        ("http://[bad", "is no address of http://"),
        ("generic://a", "is no address of generic://"),
        ("", "found an empty one"),
        ("a\0b", r"found 'a\\x00b', which holds a NUL character"),
        ("x" * 5000 + "://a/" + "b" * 5000, r"^.{200}: no protocol x{200}:// is known"),
    ],
    ids=lambda text: text[:20].encode("unicode_escape").decode(),
)
@pytest.mark.filterwarnings("ignore:UPath")
def test_an_address_that_cannot_be_used_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_location(text)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(protocol: str) -> None:
        raise ImportError(f"Install {protocol}fs")

    monkeypatch.setattr("fsspec.get_filesystem_class", absent)
    with pytest.raises(ConfigError, match=r"gs://bucket/a: gs:// needs a package.*pip install '\.\[gs\]'"):
        parse_location("gs://bucket/a")


@pytest.mark.slow
def test_local_storage_loads_no_store() -> None:
    program = """
import pathlib, sys
from common.storage.files import parse_location, publish, read_bytes
path = parse_location(sys.argv[1])
publish(path, b"x")
assert read_bytes(path) == b"x"
sys.exit(3 if {"s3fs", "gcsfs", "botocore", "aiohttp"} & set(sys.modules) else 0)
"""
    with tempfile.TemporaryDirectory() as directory:
        assert run(program, Path(directory) / "x") == 0


class Settings(StrictModel):
    data: LocationField
    model: LocalPath


def test_a_configuration_keeps_addresses_and_refuses_them_for_models() -> None:
    settings = Settings.model_validate({"data": "s3://bucket/a", "model": "b"})
    assert settings.model_dump(mode="json") == {"data": "s3://bucket/a", "model": "b"}
    assert Settings.model_validate_json(settings.model_dump_json()) == settings
    assert isinstance(Settings.model_validate({"data": "x", "model": "b"}).data, Path)
    for wrong in ({"data": "s3://key@bucket/a", "model": "b"}, {"data": 3, "model": "b"}):
        with pytest.raises(ValidationError, match="1 validation error"):
            Settings.model_validate(wrong)
    with pytest.raises(ValidationError, match="models, checkpoints and training outputs are local directories"):
        Settings.model_validate({"data": "a", "model": "s3://bucket/model"})


def test_a_configuration_error_does_not_repeat_credentials(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('data = "s3://key:secret@bucket/a"\nmodel = "b"\n')
    with pytest.raises(ConfigError, match=r"data: an address that begins with s3:// holds credentials") as caught:
        load_config(Settings, tmp_path / "run.toml")
    assert "secret" not in str(caught.value)


def test_a_file_is_made_once(tmp_path: Path) -> None:
    assert publish_new(tmp_path / "x", b"1")
    assert not publish_new(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_files_are_listed_with_their_bytes(tmp_path: Path) -> None:
    assert list_files(tmp_path / "nowhere") == {}
    publish(tmp_path / "x", b"12")
    (tmp_path / "below").mkdir()
    assert list_files(tmp_path) == {"x": 2}


def test_a_file_is_moved_into_a_new_directory(tmp_path: Path) -> None:
    publish(tmp_path / "x", b"12")
    move(tmp_path / "x", tmp_path / "below" / "deeper" / "y")
    assert list_files(tmp_path) == {}
    assert list_files(tmp_path / "below" / "deeper") == {"y": 2}
    with pytest.raises(StorageError, match=r"x: could not be moved to .*y \(No such file or directory\)"):
        move(tmp_path / "x", tmp_path / "y")


def test_a_local_file_is_read_whole_and_by_ranges(tmp_path: Path) -> None:
    publish(tmp_path / "x", b"0123")
    assert (read_bytes(tmp_path / "x"), file_size(tmp_path / "x"), is_file(tmp_path / "x")) == (b"0123", 4, True)
    with open_ranged(tmp_path / "x") as file:
        assert (file.seek(1), file.read(2)) == (1, b"12")
    assert not is_file(tmp_path)
    for call in (read_bytes, file_size, open_ranged):
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "y")


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENAMETOOLONG, errno.EIO, errno.ELOOP])
def test_a_look_up_that_fails_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(path: Path, **_: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    (tmp_path / ".x.1-0.partial").write_bytes(b"")
    monkeypatch.setattr(Path, "stat", fail)
    message = rf"{tmp_path}/x: cannot be looked up \({os.strerror(code)}\)"
    for call in (is_file, file_size, read_bytes, open_ranged, lambda path: publish_new(path, b"")):
        with pytest.raises(StorageError, match=message):
            call(tmp_path / "x")
    remove_partials(tmp_path)


def test_a_path_that_no_file_can_have_is_a_storage_error(tmp_path: Path) -> None:
    for call in (is_file, file_size, read_bytes, open_ranged, lambda path: publish_new(path, b"")):
        with pytest.raises(StorageError, match=r"a\\x00b': is no path \(embedded null byte\)"):
            call(tmp_path / "a\0b")
    (tmp_path / "file").write_bytes(b"")
    assert not is_file(tmp_path / "file" / "x")
    for path_call in (file_size, read_bytes, open_ranged):
        with pytest.raises(FileNotFoundError):
            path_call(tmp_path / "file" / "x")


def test_a_special_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    for path, kind in ((tmp_path / "manifest.json", "a FIFO"), (Path("/dev/zero"), "a device")):
        assert not is_file(path)
        assert find_special_kind(path) == kind
        for call in (read_bytes, open_ranged):
            with pytest.raises(StorageError, match=f"{path}: is {kind}; expected a regular file"):
                call(path)
    assert find_special_kind(tmp_path) == "a directory"
    with pytest.raises(IsADirectoryError):
        read_bytes(tmp_path)


def test_a_directory_is_locked_for_one_holder_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    def hold_second() -> None:
        with directory_lock(tmp_path / "out"):
            order.append("second")

    with directory_lock(tmp_path / "out"):
        other = threading.Thread(target=hold_second)
        other.start()
        other.join(0.1)
        assert other.is_alive()
        order.append("first")
    other.join(10)
    assert order == ["first", "second"]


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), directory_lock(tmp_path):
        raise KeyError
    with directory_lock(tmp_path):
        pass


def test_a_directory_that_cannot_be_locked_or_listed_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(StorageError, match="file/below: cannot be written"),
        directory_lock(tmp_path / "file" / "below"),
    ):
        pass

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(StorageError, match=r"cannot be locked \(No locks available\)"), directory_lock(tmp_path):
        pass
    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(StorageError, match=r"cannot be listed .*; check its permissions"):
        list_files(tmp_path)
