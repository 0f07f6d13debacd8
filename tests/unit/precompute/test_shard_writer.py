"""Shards of one output, written by one process or by several at once."""

import logging
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from common.errors import StorageError
from common.shards.manifest import Receipt, is_complete, receipt_path, shard_path, write_with_digest
from precompute.shard_writer import ShardWriter
from tests.support.builders import make_manifest

# Items 0 ... 6 in shards of three.
MANIFEST = make_manifest(num_samples=7, samples_per_shard=3)


class Output:
    """An output directory, and which writer published which results of each shard."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.published: list[tuple[str, int, list[str]]] = []
        self.bar = tqdm(total=7, disable=True)

    def writer(self, name: str = "one", max_waiting: int = 1) -> ShardWriter[str]:
        return ShardWriter(
            self.path,
            MANIFEST,
            lambda number, results: self.write(name, number, results),
            self.bar,
            max_waiting=max_waiting,
        )

    def write(self, name: str, number: int, results: list[str]) -> None:
        data = "".join(results).encode()
        shard_path(self.path, number).write_bytes(data)
        receipt = Receipt(
            shard=number,
            manifest_sha256=MANIFEST.sha256,
            num_rows=len(results),
            num_scored_tokens=0,
            num_bytes=len(data),
            sha256="",
        )
        write_with_digest(receipt_path(self.path, number), receipt)
        self.published.append((name, number, results))


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path)


def test_a_shard_is_published_with_its_last_result(output: Output) -> None:
    with output.writer() as writer:
        assert all(writer.begin(number) for number in range(3))
        assert writer.num_open == 3
        for index in (4, 0, 6, 3, 2):
            writer.add(index, f"<{index}>")
        assert writer.num_open == 2
        writer.add(5, "<5>")
    # The first shard lacks a result; leaving the context waited for the other two.
    assert output.published == [("one", 2, ["<6>"]), ("one", 1, ["<4>", "<3>", "<5>"])]
    assert not is_complete(output.path, 0, MANIFEST)


def test_a_published_shard_is_not_begun_again(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    updates: list[int] = []
    monkeypatch.setattr(output.bar, "update", lambda count=1: updates.append(count))
    for _ in range(2):
        with output.writer() as writer:
            if writer.begin(0):
                for index in range(3):
                    writer.add(index, "<>")
    assert len(output.published) == 1
    assert updates == [1, 1, 1, 3]


def test_of_two_writers_that_race_for_a_shard_one_publishes_it(
    output: Output, caplog: pytest.LogCaptureFixture
) -> None:
    barrier = threading.Barrier(2)

    def run(name: str) -> None:
        with output.writer(name) as writer:
            assert writer.begin(1)
            barrier.wait(10)
            for index in (3, 4, 5):
                writer.add(index, name)

    threads = [threading.Thread(target=run, args=(name,)) for name in ("one", "two")]
    with caplog.at_level(logging.INFO, "precompute"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(output.published) == 1
    assert shard_path(output.path, 1).read_bytes() == output.published[0][0].encode() * 3
    assert caplog.messages == ["shard 1 was written by another process meanwhile"]


def write_until_it_fails(output: Output, failed: threading.Event) -> None:
    """Fills a shard, waits until it was written, and goes on calling `check`."""
    with output.writer() as writer:
        writer.begin(2)
        writer.add(6, "<>")
        assert failed.wait(10)
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            writer.check()
            time.sleep(0.001)
        raise AssertionError("nothing was raised")


def write_and_interrupt(output: Output) -> None:
    with output.writer() as writer:
        for number in range(3):
            writer.begin(number)
        for index in (6, 0, 1, 2, 3):
            writer.add(index, "<>")
        raise KeyboardInterrupt


def write_one(output: Output) -> None:
    with output.writer() as writer:
        writer.begin(2)
        writer.add(6, "<>")


def test_a_failure_of_writing_is_raised_by_the_next_call(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def fail(*_: object) -> None:
        failed.set()
        raise StorageError("the disk is gone")

    monkeypatch.setattr(output, "write", fail)
    with pytest.raises(StorageError, match="the disk is gone"):
        write_until_it_fails(output, failed)


def test_a_failure_of_the_last_shard_is_raised_on_leaving(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageError("the disk is gone")

    monkeypatch.setattr(output, "write", fail)
    with pytest.raises(StorageError, match="the disk is gone"):
        write_one(output)


def test_full_shards_are_published_after_a_failure_of_the_caller(output: Output) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt(output)
    assert [number for _, number, _ in output.published] == [2, 0]
