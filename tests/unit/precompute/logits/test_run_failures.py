"""Runs whose disk, writer, loader or teacher fails: published shards stay, and the first failure is reported."""

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from common.concurrency import Prefetcher
from common.errors import DataError, DecantError, ModelError, StorageError
from common.shards.manifest import Receipt, published_shards
from common.shards.score_shard import write_shard
from precompute.config import PrecomputeConfig
from precompute.logits.run import CaptureSummary, run_capture
from precompute.scorer import ScoreRequest
from precompute.verify.logits import verify_logits
from tests.support.captures import score
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config


@pytest.mark.slow
@pytest.mark.parametrize("failing_file", range(4))
def test_a_full_disk_stops_the_run_and_a_rerun_completes_it(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch, failing_file: int
) -> None:
    """The disk is full at the rows of the first shard that is written, at its receipt, and the same of the second."""
    count = 0

    def full(_: int) -> None:
        nonlocal count
        count += 1
        # Publishing a file flushes it and then its directory.
        if count > 4 + 2 * failing_file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("common.storage.files.os.fsync", full)
        with pytest.raises(StorageError, match=r"No space left on device.*run the same command again"):
            score(config)
    assert len(published_shards(config.output)) == failing_file // 2
    assert not list(config.output.glob(".*.partial"))
    score(config)
    assert verify_logits(config.output, config.dataset, progress=False).ok


def test_two_runs_on_one_output_write_each_shard_once(config: PrecomputeConfig) -> None:
    results: list[CaptureSummary] = []
    runs = [threading.Thread(target=lambda: results.append(score(config, delay_s=0.01))) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert [result.complete for result in results] == [True, True]
    assert sum(result.num_new_shards for result in results) == 3
    assert verify_logits(config.output, config.dataset, progress=False).ok


class StopError(Exception):
    pass


@pytest.mark.slow
def test_the_loop_waits_for_a_writer_that_falls_behind(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no shard can be written, one is under way, two wait, and the loop is blocked with the fourth."""
    monkeypatch.setattr("precompute.logits.pipeline._WINDOW", 4)
    may_write = threading.Event()
    num_scored = 0

    def write(*arguments: Any) -> Receipt:
        assert may_write.wait(30)
        return write_shard(*arguments)

    def count(_: ScoreRequest) -> None:
        nonlocal num_scored
        num_scored += 1

    monkeypatch.setattr("precompute.logits.pipeline.write_shard", write)
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 60))
    runner = threading.Thread(target=lambda: score(config, before=count))
    runner.start()
    time.sleep(1)
    assert 16 <= num_scored <= 16 + 3
    assert published_shards(config.output) == ()
    may_write.set()
    runner.join()
    assert len(published_shards(config.output)) == 15


def test_a_writer_that_fails_stops_the_run_at_the_next_result(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.logits.pipeline._WINDOW", 4)
    num_scored = 0

    def write(*_: Any) -> Receipt:
        raise StorageError("the disk is gone")

    def count(_: ScoreRequest) -> None:
        nonlocal num_scored
        num_scored += 1

    monkeypatch.setattr("precompute.logits.pipeline.write_shard", write)
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 60))
    with pytest.raises(StorageError, match=r"^the disk is gone$"):
        score(config, before=count, delay_s=0.01)
    assert num_scored < 12


@pytest.mark.slow
@pytest.mark.parametrize("failure", [ModelError("the engine died"), KeyboardInterrupt(), StopError("a defect")])
def test_full_shards_are_published_whatever_ends_the_run(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    monkeypatch.setattr("precompute.logits.pipeline._WINDOW", 4)

    def write(*arguments: Any) -> Receipt:
        time.sleep(0.2)
        return write_shard(*arguments)

    def fail(request: ScoreRequest) -> None:
        if request.key[0] >= 12:
            raise failure

    monkeypatch.setattr("precompute.logits.pipeline.write_shard", write)
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 20))
    if isinstance(failure, KeyboardInterrupt):
        assert score(config, before=fail, batch_size=1).interrupted
    else:
        with pytest.raises(type(failure), match=str(failure)):
            score(config, before=fail, batch_size=1)
    assert published_shards(config.output) == (0, 1, 2)
    assert not list(config.output.glob(".*.partial"))


def test_a_second_failure_while_finishing_does_not_hide_the_first(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("precompute.logits.pipeline._WINDOW", 4)

    def write(*_: Any) -> Receipt:
        time.sleep(0.3)
        raise StorageError("the disk is gone")

    def fail(request: ScoreRequest) -> None:
        if request.key[0] >= 4:
            raise ModelError("the engine died")

    monkeypatch.setattr("precompute.logits.pipeline.write_shard", write)
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 8))
    with pytest.raises(ModelError, match="the engine died"):
        score(config, before=fail, batch_size=1)
    assert "and while finishing: the disk is gone" in caplog.text


class PrefetchingTeacher(FakeTeacher):
    """Takes its requests in a thread, a few ahead of its results, as the real one does."""

    def score(self, requests: Any) -> Any:
        prefetcher = Prefetcher(requests, ahead=3)

        def taken() -> Iterator[ScoreRequest]:
            while not prefetcher.is_exhausted:
                yield from prefetcher.take(1, wait=True)

        try:
            yield from super().score(taken())
        finally:
            prefetcher.close()


@pytest.mark.parametrize("part", ["writer", "loader", "teacher"])
def test_a_failure_of_any_part_is_the_one_that_is_reported(
    part: str, tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: dict[str, DecantError] = {
        "writer": StorageError("the disk is gone"),
        "loader": DataError("the image is gone"),
        "teacher": ModelError("the engine is gone"),
    }
    count = 0

    def fail(*_: Any, **__: Any) -> Any:
        nonlocal count
        count += 1
        if part == "writer" or count > 9:
            raise failures[part]
        return ()

    targets = {
        "writer": "precompute.logits.pipeline.write_shard",
        "loader": "precompute.logits.job.CaptureJob.load_images",
    }
    if part in targets:
        monkeypatch.setattr(targets[part], fail)
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 40))
    with pytest.raises(type(failures[part]), match=f"{failures[part]}"):
        run_capture(
            config,
            progress=False,
            start_teacher=lambda settings: PrefetchingTeacher(
                settings, before=fail if part == "teacher" else None, delay_s=0.001
            ),
        )


def test_a_teacher_may_take_its_requests_in_another_thread(tmp_path: Path, llava_dir: Path) -> None:
    records = conversation_records(tmp_path, 40)
    for record in records[4:12] + records[13:40:2]:
        record["image"] = "nowhere.png"
    config = make_config(tmp_path, llava_dir, records, on_bad_sample="skip")
    summary = run_capture(config, progress=False, start_teacher=PrefetchingTeacher)
    assert (summary.complete, summary.num_new_shards, len(summary.skipped)) == (True, 10, 8 + 14)
    assert verify_logits(config.output, config.dataset, progress=False).ok
