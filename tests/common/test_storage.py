import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from common.errors import StorageError
from common.storage import PARTIAL_SUFFIX, publish, remove_partials

ROOT = Path(__file__).parents[2]


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
from common.storage import publish
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
from common.storage import publish
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
    writer = threading.Thread(target=lambda: [publish(path, contents[i % 2]) for i in range(20)])
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(path.read_bytes())
    writer.join()
    assert seen <= set(contents)
    assert not list(tmp_path.glob(f".*{PARTIAL_SUFFIX}"))
