"""One process trains into an output."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import ConfigError, StorageError
from tests.support.training import ROOT, environment
from train.run.output_lock import LOCK_NAME, lock_output

HOLDER = """
import os, sys, time
from pathlib import Path
from train.run.output_lock import lock_output
with lock_output(Path(sys.argv[1])):
    # A forked child outlives its parent, as a data worker may.
    if child := os.fork():
        print(child, flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(output: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Starts a process that holds the lock, and a child of it; yields the process and the child's id."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(output)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        yield process, child
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    output = tmp_path / "run"
    with holder(output) as (process, child):
        named = rf"another train writes into it \(process {process.pid} on .+, since 20"
        with pytest.raises(ConfigError, match=named), lock_output(output):
            pytest.fail("two processes hold the lock")
        # The lock goes with the directory.
        moved = output.rename(tmp_path / "moved")
        with pytest.raises(ConfigError, match="choose another output"), lock_output(moved):
            pytest.fail("two processes hold the lock")
        process.kill()
        process.wait()
        os.kill(child, 0)
        with lock_output(moved):
            assert f'"pid": {os.getpid()}' in (moved / LOCK_NAME).read_text()


def test_the_lock_ends_with_its_block(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_output(tmp_path / "a" / "run"):
        raise KeyError
    with lock_output(tmp_path / "a" / "run"):
        pass


def test_a_holder_that_has_not_written_its_name_yet_is_still_a_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(ConfigError, match=r"\(a process that has just started\)"), lock_output(tmp_path):
        pytest.fail("not reached")


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with lock_output(tmp_path):
        pass
    assert "cannot be locked (No locks available); make sure that no other train writes" in caplog.text


def test_an_output_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(StorageError, match=r"cannot be written \(Not a directory\)"),
        lock_output(tmp_path / "file" / "x"),
    ):
        pytest.fail("not reached")


def test_a_block_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with lock_output(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK_NAME).is_file()
    assert not (tmp_path / "run").exists()
    with lock_output(tmp_path / "run"):
        (tmp_path / "run" / "config.json").touch()
    assert (tmp_path / "run" / LOCK_NAME).is_file()


def test_a_directory_that_was_there_stays(tmp_path: Path) -> None:
    with lock_output(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]


def test_a_lock_on_a_file_that_was_removed_meanwhile_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run" / LOCK_NAME
    lock = fcntl.lockf
    calls: list[int] = []

    def remove_first(descriptor: int, operation: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            path.unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    with lock_output(tmp_path / "run"):
        assert len(calls) == 2
        assert f'"pid": {os.getpid()}' in path.read_text()
