"""Object stores: requests, retries and errors, against moto's S3 server behind a proxy that makes requests fail."""

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
from upath import UPath

from common.data.dataset import Dataset
from common.data.images import check_image, load_image
from common.data.samples import ImageRef, Kind
from common.errors import DataError, ProvenanceError, ShardError, StorageError
from common.shards.manifest import Manifest, open_output, published_shards, read_manifest, read_receipts, shard_path
from common.shards.score_shard import ShardFile, write_shard
from common.storage import object_store
from common.storage.files import (
    Location,
    directory_lock,
    file_size,
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
from tests.support.builders import make_manifest, make_rows
from tests.support.object_store import BUCKET, DENIED, SLOW_DOWN, Fault, Store

# Slow, because a server is started and many tests wait for retries.
pytestmark = pytest.mark.slow

TRANSIENT: list[Fault] = [SLOW_DOWN, (500, "InternalError"), (429, "TooManyRequests"), "drop", "drop answer"]


@pytest.fixture
def root(store: Store) -> UPath:  # noqa: ARG001 - requested, because it starts the server
    """Returns an address that no other test uses."""
    found = parse_location(f"s3://{BUCKET}/{uuid4()}")
    assert isinstance(found, UPath)
    return found


def fail_first(store: Store, fault: Fault, num_times: int) -> None:
    store.clear()
    store.fault = lambda number, *_: fault if number < num_times else None


def test_publish_is_one_put_at_any_size(store: Store, root: UPath) -> None:
    for num_bytes in (0, 5, 110 * 2**20):
        store.clear()
        publish(root / "x", bytes(num_bytes))
        assert [(r.method, r.key, r.query, r.num_sent) for r in store.requests] == [
            ("PUT", f"{root.name}/x", (), num_bytes)
        ]
        assert file_size(root / "x") == num_bytes


def test_objects_are_read_and_listed_after_any_process_wrote_them(root: UPath) -> None:
    assert list_files(root) == {}
    assert not is_file(root / "a")
    publish(root / "a", b"12")
    publish(root / "below" / "b", b"3")
    assert (read_bytes(root / "a"), is_file(root / "a"), is_file(root / "below")) == (b"12", True, False)
    assert list_files(root) == {"a": 2}
    # An object that another process writes is listed at once.
    object_store.filesystem.__wrapped__("s3", 0).pipe_file(f"{BUCKET}/{root.name}/c", b"456")
    assert list_files(root) == {"a": 2, "c": 3}
    with pytest.raises(FileNotFoundError):
        read_bytes(root / "d")
    with pytest.raises(FileNotFoundError):
        open_ranged(root / "d")
    with directory_lock(root):
        remove_partials(root)
    assert list_files(root) == {"a": 2, "c": 3}


def test_reading_a_whole_object_is_one_request(store: Store, root: UPath) -> None:
    publish(root / "x", b"content")
    store.clear()
    assert read_bytes(root / "x") == b"content"
    assert len(store.requests) == 1


def test_a_ranged_file_reads_what_a_local_one_reads(store: Store, root: UPath, tmp_path: Path) -> None:
    data = os.urandom(10_000)
    publish(root / "x", data)
    publish(tmp_path / "x", data)
    store.clear()
    with open_ranged(root / "x") as remote, open_ranged(tmp_path / "x") as local:
        for offset, whence, num_bytes in (
            (0, 0, 10),
            (5, 1, 7),
            (-3, 2, 99),
            (0, 2, 5),
            (9_999, 0, -1),
            (20_000, 0, 3),
        ):
            assert remote.seek(offset, whence) == local.seek(offset, whence)
            assert remote.read(num_bytes) == local.read(num_bytes)
            assert remote.tell() == local.tell()
        remote.seek(0)
        assert remote.read() == data
    assert sum(request.num_received for request in store.requests) == 10 + 7 + 3 + 1 + 10_000


@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_shards_come_back_as_they_were_written(root: UPath, tmp_path: Path, kind: Kind) -> None:
    manifest = make_manifest(kind, num_samples=70, samples_per_shard=70)
    rows = make_rows(kind, 70)
    for output in (root, tmp_path):
        open_output(output, manifest)
        write_shard(output, 0, manifest, rows, [])
    assert read_manifest(root) == manifest
    assert read_receipts(root, manifest) == read_receipts(tmp_path, manifest)
    assert read_bytes(shard_path(root, 0)) == read_bytes(shard_path(tmp_path, 0))
    shard, local = (ShardFile(shard_path(output, 0), manifest, 0) for output in (root, tmp_path))
    for row, expected in zip(shard, local, strict=True):
        assert (row.index, row.sample) == (expected.index, expected.sample)
        for scored, other in zip(row.conversations, expected.conversations, strict=True):
            assert scored.encoded.input_ids.tolist() == other.encoded.input_ids.tolist()
            assert scored.scores.ids.tolist() == other.scores.ids.tolist()
            assert scored.scores.logprobs.tolist() == other.scores.logprobs.tolist()


def test_a_row_group_is_one_request_for_its_own_bytes(store: Store, root: UPath) -> None:
    manifest = make_manifest(num_samples=256, samples_per_shard=256)
    write_shard(root, 0, manifest, make_rows("kd", 256, top_k=32, num_tokens=60), [])
    num_bytes = file_size(shard_path(root, 0))
    store.clear()
    shard = ShardFile(shard_path(root, 0), manifest, 0, check="size")
    # Requests for the receipt, its size to compare, its size on opening, its last 64 KiB, and the rest of the footer if
    # that is longer.
    expected = ["GET", "HEAD", "HEAD", "GET"]
    assert [request.method for request in store.requests] in (expected, [*expected, "GET"])
    assert sum(request.num_received for request in store.requests) < num_bytes / 5
    store.clear()
    assert len(shard.read_group(2)) == 64
    (request,) = store.requests
    assert num_bytes / 5 < request.num_received < num_bytes / 3


def test_threads_may_read_one_open_shard(root: UPath) -> None:
    manifest = make_manifest(num_samples=256, samples_per_shard=256)
    write_shard(root, 0, manifest, make_rows("kd", 256), [])
    shard = ShardFile(shard_path(root, 0), manifest, 0)
    with ThreadPoolExecutor(4) as pool:
        groups = list(pool.map(shard.read_group, [0, 1, 2, 3] * 4))
    assert [group[0].index for group in groups] == [0, 64, 128, 192] * 4


def test_an_open_shard_can_be_read_after_a_fork(root: UPath) -> None:
    manifest = make_manifest(num_samples=70, samples_per_shard=70)
    write_shard(root, 0, manifest, make_rows("kd", 70), [])
    shard = ShardFile(shard_path(root, 0), manifest, 0)
    assert len(shard.read_group(0)) == 64
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put([row.index for row in shard.read_group(1)]))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == list(range(64, 70))


@pytest.mark.parametrize("fault", [*TRANSIENT, "cut"])
def test_transient_failures_are_retried_until_the_request_works(
    store: Store, root: UPath, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    publish(root / "x", b"old" * 1000)

    def read_ranged() -> bytes:
        with open_ranged(root / "x") as file:
            file.seek(3)
            return file.read(3)

    fail_first(store, fault, 2)
    publish(root / "x", b"new" * 1000)
    fail_first(store, fault, 2)
    assert read_bytes(root / "x") == b"new" * 1000
    fail_first(store, fault, 2)
    assert list_files(root) == {"x": 3000}
    fail_first(store, fault, 2)
    assert is_file(root / "x")
    fail_first(store, fault, 2)
    assert read_ranged() == b"new"
    assert f"{root / 'x'}: could not read" in caplog.text
    assert "trying again in" in caplog.text


def test_pauses_grow_and_retries_end(store: Store, root: UPath, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(object_store, "MIN_WAIT_S", 1.0)
    monkeypatch.setattr(time, "sleep", pauses.append)
    fail_first(store, SLOW_DOWN, 1000)
    with pytest.raises(StorageError, match=rf"{root}/x: could not read: 8 tries in .* s failed.*SlowDown.*again later"):
        read_bytes(root / "x")
    assert len(store.requests) == 8, "the client library tries again by itself"
    assert len(pauses) == 7
    for pause, longest in zip(pauses, (1, 2, 4, 8, 8, 8, 8), strict=True):
        assert longest / 2 <= pause <= longest


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (DENIED, "access was denied"),
        ((403, "InvalidAccessKeyId"), "access was denied"),
        ((404, "NoSuchBucket"), "there is no bucket"),
        ((400, "InvalidArgument"), "the store refused"),
    ],
)
def test_permanent_failures_name_the_key_at_once(store: Store, root: UPath, fault: Fault, words: str) -> None:
    publish(root / "x", b"old")
    file = open_ranged(root / "x")
    for call in (
        lambda: publish(root / "x", b"new"),
        lambda: publish_new(root / "x", b"new"),
        lambda: read_bytes(root / "x"),
        lambda: file.read(),
    ):
        fail_first(store, fault, 1000)
        with pytest.raises(StorageError, match=f"{root}/x: could not .*{words}"):
            call()
        assert len(store.requests) == 1
    fail_first(store, fault, 1000)
    with pytest.raises(StorageError, match=f"{root}: could not list"):
        list_files(root)
    store.clear()
    assert read_bytes(root / "x") == b"old"


def test_a_bucket_that_is_not_there_is_not_an_empty_output() -> None:
    output = parse_location("s3://decant-nobody/out")
    for call in (published_shards, read_manifest, lambda output: publish(output / "x", b"")):
        with pytest.raises(StorageError, match="there is no bucket 'decant-nobody'"):
            call(output)


@pytest.mark.parametrize("value", [None, ""])
def test_missing_credentials_are_named(
    root: UPath, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str | None
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    object_store.filesystem.cache_clear()
    try:
        with pytest.raises(StorageError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
            read_bytes(root / "x")
    finally:
        object_store.filesystem.cache_clear()


def test_any_other_file_system_of_fsspec_serves() -> None:
    root = parse_location(f"memory://{uuid4()}")
    assert list_files(root) == {}
    assert publish_new(root / "x", b"old")
    assert not publish_new(root / "x", b"newer")
    publish(root / "x", b"new")
    with open_ranged(root / "x") as file:
        assert file.seek(-2, 2) == 1
        assert file.read() == b"ew"
    assert (read_bytes(root / "x"), is_file(root / "y"), list_files(root)) == (b"new", False, {"x": 3})
    with pytest.raises(FileNotFoundError):
        read_bytes(root / "y")


def test_of_two_that_begin_one_output_one_decides(root: UPath) -> None:
    ours, theirs = make_manifest(), make_manifest(top_k=8)

    def begin(manifest: Manifest) -> str:
        try:
            open_output(root, manifest)
        except ProvenanceError:
            return "refused"
        return "began"

    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(begin, [ours, theirs]))
    assert sorted(outcomes) == ["began", "refused"]
    assert read_manifest(root) == (ours if outcomes[0] == "began" else theirs)
    assert begin(ours) == outcomes[0], "the same run may continue"


def test_a_manifest_whose_answer_got_lost_is_not_taken_for_another_run(store: Store, root: UPath) -> None:
    fail_first(store, "drop answer", 1)
    open_output(root, make_manifest())
    assert store.count("PUT") >= 2
    assert read_manifest(root) == make_manifest()


def test_a_store_without_conditional_writes_takes_plain_ones(store: Store, root: UPath) -> None:
    fail_first(store, (501, "NotImplemented"), 1)
    assert publish_new(root / "x", b"new")
    assert read_bytes(root / "x") == b"new"


@pytest.mark.parametrize("fault", [DENIED, "drop"])
def test_a_store_that_fails_is_not_a_damaged_shard(
    store: Store, root: UPath, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(object_store, "MAX_TRIES", 2)
    manifest = make_manifest(num_samples=70, samples_per_shard=70)
    write_shard(root, 0, manifest, make_rows("kd", 70), [])
    shard = ShardFile(shard_path(root, 0), manifest, 0)
    fail_first(store, fault, 1000)
    with pytest.raises(StorageError, match=r"shard-00000.parquet: could not read.*again"):
        shard.read_group(0)
    with pytest.raises(StorageError, match=r"shard-00000.json: could not read"):
        ShardFile(shard_path(root, 0), manifest, 0)
    # Listings, whose requests have no key, work.
    store.fault = lambda _number, _method, key: fault if key else None
    with pytest.raises(StorageError, match=r"shard-00000.json: could not read"):
        read_receipts(root, manifest)


def test_damaged_bytes_are_a_damaged_shard(root: UPath) -> None:
    manifest = make_manifest(num_samples=70, samples_per_shard=70)
    write_shard(root, 0, manifest, make_rows("kd", 70), [])
    data = bytearray(read_bytes(shard_path(root, 0)))
    data[200:300] = bytes(100)
    publish(shard_path(root, 0), bytes(data))
    with pytest.raises(ShardError, match=r"shard-00000.parquet: has SHA-256"):
        ShardFile(shard_path(root, 0), manifest, 0)
    shard = ShardFile(shard_path(root, 0), manifest, 0, check="size")
    with pytest.raises(ShardError, match="cannot be read"):
        shard.read_group(0)


def test_a_dataset_is_read_from_a_store(root: UPath) -> None:
    publish(root / "data.jsonl", b'{"id": "1", "conversations": [{"from": "human", "value": "x"}]}\n')
    assert tuple(Dataset.open(root / "data.jsonl", "kd").ids) == ("1",)
    with pytest.raises(DataError, match=r"nothing.jsonl: the dataset cannot be read"):
        Dataset.open(root / "nothing.jsonl", "kd")


def test_images_are_found_by_listing_their_directories(store: Store, root: UPath) -> None:
    for number in range(20):
        publish(root / "coco" / f"{number}.png", b"not a picture")
    store.clear()
    for number in range(20):
        check_image(ImageRef(f"coco/{number}.png"), root, "pad", "here")
    assert len(store.requests) == 1
    with pytest.raises(DataError, match=r"here: image s3://.*/coco/20.png does not exist"):
        check_image(ImageRef("coco/20.png"), root, "pad", "here")
    publish(root / "coco" / "20.png", b"late")
    check_image(ImageRef("coco/20.png"), root, "pad", "here")
    with pytest.raises(DataError, match=r"here: image coco/0.png cannot be decoded"):
        load_image(ImageRef("coco/0.png"), root, "pad", (0, 0, 0), "here")
    with pytest.raises(DataError, match=r"here: image s3://.*/coco/21.png does not exist"):
        load_image(ImageRef("coco/21.png"), root, "pad", (0, 0, 0), "here")


@pytest.mark.parametrize("path", ["../x.png", "a/../../x.png", "/x.png", "s3://other/x.png", "a//x.png", "a\0.png"])
def test_an_image_may_not_leave_a_remote_root(root: Location, path: str) -> None:
    for call in (
        lambda: check_image(ImageRef(path), root, "pad", "here"),
        lambda: load_image(ImageRef(path), root, "pad", (0, 0, 0), "here"),
    ):
        with pytest.raises(DataError, match=r"here: image .* is no plain path below image_root"):
            call()


def test_an_object_is_copied_before_it_is_deleted(store: Store, root: UPath) -> None:
    publish(root / "a", b"12")
    fail_first(store, SLOW_DOWN, 2)
    move(root / "a", root / "below" / "b")
    assert store.objects(root.name) == {"below/b": b"12"}
    publish(root / "a", b"3")
    store.fault = lambda _number, method, _key: DENIED if method in ("DELETE", "POST") else None
    with pytest.raises(StorageError, match="could not delete"):
        move(root / "a", root / "c")
    assert store.objects(root.name) == {"below/b": b"12", "a": b"3", "c": b"3"}
    store.clear()
    with pytest.raises(StorageError, match="could not be moved, it is gone"):
        move(root / "nowhere", root / "d")
