"""Every read and write of a capture fails in turn, on an object store and on a disk."""

import errno
import functools
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from typer.testing import CliRunner
from upath import UPath

from cli import app
from common.data.chat_encoding import ChatEncoder
from common.errors import StorageError
from common.shards.manifest import published_shards, shard_path
from common.storage import object_store
from common.storage.files import Location, parse_location, publish
from precompute.config import PrecomputeConfig
from precompute.logits.run import run_capture
from precompute.verify.logits import verify_logits
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config
from tests.support.object_store import BUCKET, DENIED, SLOW_DOWN, Fault, Store
from train.data.sources import ShardSource

# The tests start a server.
pytestmark = pytest.mark.slow

NUM_SAMPLES = 6


def capture(config: PrecomputeConfig) -> None:
    assert run_capture(config, progress=False, start_teacher=FakeTeacher).complete


def upload(local: PrecomputeConfig, root: Path) -> PrecomputeConfig:
    """Uploads dataset and images; returns the same configuration with addresses in the store."""
    prefix = parse_location(f"s3://{BUCKET}/{uuid4()}")
    for path in (path for path in root.iterdir() if path.is_file()):
        publish(prefix / "data" / path.name, path.read_bytes())
    places = {"dataset": prefix / "data" / "data.jsonl", "image_root": prefix / "data", "output": prefix / "out"}
    return local.model_copy(update=places)


@pytest.fixture
def local(tmp_path: Path, llava_dir: Path) -> PrecomputeConfig:
    return make_config(tmp_path, llava_dir, conversation_records(tmp_path, NUM_SAMPLES), num_loader_threads=1)


@pytest.fixture(scope="module")
def _published(_running_store: Store, tmp_path_factory: pytest.TempPathFactory, llava_dir: Path) -> PrecomputeConfig:
    root = tmp_path_factory.mktemp("published")
    local = make_config(root, llava_dir, conversation_records(root, NUM_SAMPLES), num_loader_threads=1)
    _running_store.clear()
    remote = upload(local, root)
    capture(remote)
    return remote


@pytest.fixture
def remote(
    _published: PrecomputeConfig,
    store: Store,  # noqa: ARG001 - clears the server of the faults that the test before set
) -> PrecomputeConfig:
    """A complete output in the store."""
    return _published


def without_config(files: dict[str, bytes]) -> dict[str, bytes]:
    """Returns all files but the configuration, which differs because it names the output."""
    return {name: data for name, data in files.items() if name not in ("config.json", ".lock")}


def read_from_disk(output: Location) -> dict[str, bytes]:
    return without_config({path.name: path.read_bytes() for path in output.iterdir()}) if output.is_dir() else {}


def read_from_store(store: Store, config: PrecomputeConfig) -> dict[str, bytes]:
    assert isinstance(config.output, UPath)
    return without_config(store.objects(config.output.path.removeprefix(f"{BUCKET}/")))


def assert_nothing_is_half_published(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    assert {name: expected[name] for name in found} == found
    for name in found:
        assert not name.startswith("shard-") or "manifest.json" in found
        assert not name.endswith(".json") or name.replace(".json", ".parquet") in found or name == "manifest.json"


def test_dataset_images_and_shards_may_all_be_in_a_store(
    local: PrecomputeConfig, tmp_path: Path, llava_dir: Path, store: Store
) -> None:
    capture(local)
    remote = upload(local, tmp_path)
    store.clear()
    capture(remote)
    assert read_from_store(store, remote) == read_from_disk(local.output)
    for number in range(2):
        assert store.count("PUT", f"shard-{number:05d}.parquet") == 1
        assert store.count("PUT", f"shard-{number:05d}.json") == 1
    assert not store.count("POST"), "a part of an object was sent"
    assert verify_logits(remote.output, remote.dataset, progress=False).ok
    encoder = ChatEncoder.load(llava_dir)
    here, there = (ShardSource(output, encoder, "pad", 1) for output in (local.output, remote.output))
    assert len(here) == len(there) == NUM_SAMPLES
    for index in range(NUM_SAMPLES):
        ours, theirs = here[index], there[index]
        assert ours.sample == theirs.sample
        assert ours.scores is not None
        assert theirs.scores is not None
        assert [s.logprobs.tolist() for s in ours.scores] == [s.logprobs.tolist() for s in theirs.scores]


def test_a_run_that_is_repeated_finds_its_shards_in_the_store(remote: PrecomputeConfig, store: Store) -> None:
    summary = run_capture(remote, progress=False, start_teacher=FakeTeacher)
    assert "nothing was left to do" in summary.message
    assert not store.count("PUT", ".parquet")


def test_each_call_to_a_store_fails_in_turn_and_a_rerun_completes(
    local: PrecomputeConfig, tmp_path: Path, store: Store
) -> None:
    """At every second position, all later calls fail too."""
    capture(local)
    expected = read_from_disk(local.output)
    remote = upload(local, tmp_path)
    for failing in itertools.count():
        config = remote.model_copy(update={"output": remote.output.with_name(f"out-{failing}")})
        store.clear()
        failed = deny_requests(store, failing, lasting=failing % 2 == 1)
        try:
            capture(config)
        except StorageError as error:
            assert any(f"s3://{BUCKET}/{key}" in str(error) for key in failed)
            assert "run the same command again" in str(error)
        else:
            assert not failed
            break
        assert_nothing_is_half_published(read_from_store(store, config), expected)
        store.clear()
        capture(config)
        assert read_from_store(store, config) == expected
    assert failing > 20


def deny_requests(store: Store, failing: int, lasting: bool) -> list[str]:
    """Makes the store deny request number `failing`, and all later ones if `lasting`; lists their keys."""
    failed: list[str] = []

    def fault(number: int, _: str, key: str) -> Fault:
        if number != failing and not (lasting and number > failing):
            return None
        failed.append(key)
        return DENIED

    store.fault = fault
    return failed


def test_a_run_survives_throttling_and_dropped_connections(
    local: PrecomputeConfig, tmp_path: Path, store: Store
) -> None:
    capture(local)
    remote = upload(local, tmp_path)
    store.clear()
    faults: list[Fault] = [SLOW_DOWN, "drop", "drop answer", "cut", (500, "InternalError")]
    store.fault = lambda number, *_: faults[number // 3 % 5] if number % 3 == 1 else None
    capture(remote)
    assert sum(request.status == 503 for request in store.requests) > 2
    assert read_from_store(store, remote) == read_from_disk(local.output)


def fault_at(key_end: str, fault: Fault, _number: int, _method: str, key: str) -> Fault:
    """Returns the fault for keys that end with `key_end`, None for others."""
    return fault if key.endswith(key_end) else None


@pytest.mark.parametrize("fault", [DENIED, "drop"])
def test_verify_shards_does_not_take_a_failing_store_for_damage(
    remote: PrecomputeConfig, store: Store, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(object_store, "MAX_TRIES", 2)
    for key_end in ("manifest.json", "shard-00001.json", "shard-00001.parquet", "data.jsonl"):
        store.clear()
        store.fault = functools.partial(fault_at, key_end, fault)
        with pytest.raises(StorageError, match=f"{key_end}: could not .* again"):
            verify_logits(remote.output, remote.dataset, progress=False)


def test_verify_shards_finds_damage_in_a_store(remote: PrecomputeConfig) -> None:
    path = shard_path(remote.output, 1)
    publish(path, b"PAR1 damaged PAR1")
    report = verify_logits(remote.output, progress=False)
    assert [check.name for check in report.checks if not check.ok] == ["checksums"]
    capture(remote)
    assert verify_logits(remote.output, progress=False).ok


def test_verify_shards_takes_addresses(remote: PrecomputeConfig) -> None:
    command = ["verify-shards", str(remote.output), "--dataset", str(remote.dataset), "--json"]
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, json.loads(result.stdout)["verify"]["ok"]) == (0, True)


class FullDisk:
    """Makes step number `failing` of writing fail: opening, flushing or renaming a file, or flushing its directory."""

    def __init__(self, patch: pytest.MonkeyPatch, failing: int) -> None:
        self._count = 0
        self._failing = failing
        self.failed = False
        patch.setattr("common.storage.files.os.fsync", self._or_full(os.fsync))
        patch.setattr("common.storage.files.Path.replace", self._or_full(Path.replace))
        real_open = Path.open
        full_open = self._or_full(Path.open)
        patch.setattr(
            "common.storage.files.Path.open",
            lambda path, mode="r", *rest, **named: (full_open if "w" in mode else real_open)(
                path, mode, *rest, **named
            ),
        )

    def _or_full(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self._count += 1
            if self._count - 1 == self._failing:
                self.failed = True
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return step(*arguments, **named)

        return call


def test_a_disk_is_full_at_each_write_in_turn_and_a_rerun_completes(
    local: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture(local)
    expected = read_from_disk(local.output)
    for failing in itertools.count():
        config = local.model_copy(update={"output": local.output.with_name(f"out-{failing}")})
        with monkeypatch.context() as patch:
            disk = FullDisk(patch, failing)
            try:
                capture(config)
            except StorageError as error:
                assert "No space left on device" in str(error)
                assert "run the same command again" in str(error)
            else:
                assert not disk.failed
                break
        assert_nothing_is_half_published(read_from_disk(config.output), expected)
        capture(config)
        assert read_from_disk(config.output) == expected
    # Manifest, configuration and card, and two files a shard.
    assert failing == 4 * (3 + 2 * len(published_shards(local.output)))
