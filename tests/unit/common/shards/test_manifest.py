import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from common.config import StrictModel
from common.errors import ProvenanceError, ShardError
from common.shards.manifest import (
    MANIFEST_NAME,
    GenerateSettings,
    Receipt,
    SkippedSample,
    file_sha256,
    is_complete,
    list_differences,
    open_output,
    published_shards,
    read_manifest,
    read_receipt,
    read_receipts,
    receipt_path,
    shard_path,
    write_with_digest,
)
from tests.support.builders import make_manifest

MANIFEST = make_manifest(
    top_p=0.95,
    min_k=4,
    seed=7,
    generate=GenerateSettings(temperature=1.0, top_p=0.9, num_samples=2, max_new_tokens=64),
)


def make_receipt(number: int = 42, skipped: tuple[SkippedSample, ...] = ()) -> Receipt:
    return Receipt(
        shard=number,
        manifest_sha256=MANIFEST.sha256,
        num_rows=3,
        num_scored_tokens=40,
        num_bytes=5000,
        sha256="a" * 64,
        skipped=skipped,
    )


def test_manifest_and_receipt_are_read_as_they_were_written(tmp_path: Path) -> None:
    receipt = make_receipt(skipped=(SkippedSample(index=3, id="ключ", reason='image "x" does not exist'),))
    write_with_digest(receipt_path(tmp_path, 42), receipt)
    open_output(tmp_path, MANIFEST)
    assert read_manifest(tmp_path) == MANIFEST
    assert read_receipt(tmp_path, 42, MANIFEST) == receipt


def test_the_digest_is_that_of_canonical_json(tmp_path: Path) -> None:
    write_with_digest(tmp_path / "x.json", MANIFEST)
    content = json.loads((tmp_path / "x.json").read_bytes())
    claimed = content.pop("content_sha256")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert claimed == MANIFEST.sha256 == hashlib.sha256(canonical.encode("ascii")).hexdigest()


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        (MANIFEST_NAME, MANIFEST, read_manifest),
        (
            "shard-00042.json",
            make_receipt(skipped=(SkippedSample(index=3, id="x", reason="too long"),)),
            lambda output: read_receipt(output, 42, MANIFEST),
        ),
    ],
)
def test_every_changed_byte_is_found_or_changes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: StrictModel,
    read: Callable[[Path], StrictModel],
) -> None:
    path = tmp_path / name
    write_with_digest(path, content)
    whole = path.read_bytes()
    undetected = []
    for position in range(len(whole)):
        for bit in (0, 3, 5, 7):
            data = bytearray(whole)
            data[position] ^= 1 << bit
            monkeypatch.setattr(Path, "read_bytes", lambda _, changed=bytes(data): changed)
            try:
                assert read(tmp_path) == content
                undetected.append(chr(whole[position]))
            except (ShardError, ProvenanceError) as error:
                assert str(path) in str(error)
    # White space does not matter, and the hex digits of an escaped character (\u00e9) may have either case.
    assert set(undetected) <= {" ", "\n", "e"}


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"{}", b'"content_sha256"', b'{"content_sha256": 1}', b"\xff\xfe"]
)
def test_json_without_its_digest_is_a_shard_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(ShardError, match=MANIFEST_NAME):
        read_manifest(tmp_path)


def test_a_missing_output_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="precompute-logits"):
        read_manifest(tmp_path / "none")


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    write_with_digest(tmp_path / MANIFEST_NAME, MANIFEST.model_copy(update={"schema_version": 2}))
    with pytest.raises(ShardError, match="schema version 2, this program reads 6"):
        read_manifest(tmp_path)


def test_a_renamed_receipt_is_refused(tmp_path: Path) -> None:
    write_with_digest(receipt_path(tmp_path, 41), make_receipt(42))
    with pytest.raises(ShardError, match="receipt of shard 42"):
        read_receipt(tmp_path, 41, MANIFEST)


def test_a_receipt_of_another_output_is_refused(tmp_path: Path) -> None:
    write_with_digest(receipt_path(tmp_path, 42), make_receipt(42))
    with pytest.raises(ProvenanceError, match="another manifest"):
        read_receipt(tmp_path, 42, make_manifest(num_samples=201))


def test_an_output_is_continued_by_its_own_manifest_and_by_no_other(tmp_path: Path) -> None:
    open_output(tmp_path, MANIFEST)
    before = (tmp_path / MANIFEST_NAME).read_bytes()
    open_output(tmp_path, MANIFEST)
    other = MANIFEST.model_copy(
        update={
            "image": None,
            "samples_per_shard": 7,
            "teacher": MANIFEST.teacher.model_copy(update={"weights_sha256": "f" * 64}),
            "engine": MANIFEST.engine.model_copy(update={"dtype": "float32"}),
        }
    )
    with pytest.raises(ProvenanceError) as caught:
        open_output(tmp_path, other)
    message = str(caught.value)
    assert all(key in message for key in ("image", "samples_per_shard", "teacher.weights_sha256", "engine.dtype"))
    assert "'bfloat16'" in message
    assert "'float32'" in message
    assert (tmp_path / MANIFEST_NAME).read_bytes() == before


def test_each_differing_leaf_is_one_line() -> None:
    there = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": None, "same": {"x": 1}}
    here = {"a": 1, "b": {"c": 9, "d": {"e": 4}}, "f": {"g": 1}, "same": {"x": 1}}
    assert [line.partition(":")[0] for line in list_differences(there, here)] == ["b.c", "b.d.e", "f"]


@pytest.mark.parametrize(("num_samples", "size"), [(1, 1), (7, 3), (9, 3), (2, 10), (1000, 64)])
def test_shards_divide_the_dataset_in_order(num_samples: int, size: int) -> None:
    manifest = make_manifest(num_samples=num_samples, samples_per_shard=size)
    ranges = [manifest.shard_range(number) for number in range(manifest.num_shards)]
    assert [index for part in ranges for index in part] == list(range(num_samples))
    assert all(len(part) == size for part in ranges[:-1])
    assert 0 < len(ranges[-1]) <= size


def test_shards_without_a_receipt_do_not_exist(tmp_path: Path) -> None:
    for name in (
        "shard-00007.json",
        "shard-123456.json",
        "shard-00001.parquet",
        "shard-2.json",
        "shard-00003.json.bak",
    ):
        (tmp_path / name).write_text("")
    (tmp_path / "shard-000008.json").write_text("a copy under another spelling of 8")
    (tmp_path / ".shard-00009.json.12-ab.partial").write_text("")
    assert published_shards(tmp_path) == (7, 123456)
    assert shard_path(tmp_path, 123456).name == "shard-123456.parquet"


def test_file_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert file_sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ShardError, match="none"):
        file_sha256(tmp_path / "none")


def test_a_shard_is_complete_with_a_receipt_and_a_file_of_its_size(tmp_path: Path) -> None:
    assert not is_complete(tmp_path, 42, MANIFEST)
    write_with_digest(receipt_path(tmp_path, 42), make_receipt(42))
    assert not is_complete(tmp_path, 42, MANIFEST), "the file is missing"
    for num_bytes in (4999, 5000, 5001):
        shard_path(tmp_path, 42).write_bytes(bytes(num_bytes))
        assert is_complete(tmp_path, 42, MANIFEST) == (num_bytes == 5000)
    receipt_path(tmp_path, 42).write_text("{}")
    with pytest.raises(ShardError, match=r"shard-00042\.json: is damaged"):
        is_complete(tmp_path, 42, MANIFEST)


def test_receipts_are_read_in_order_and_only_of_shards_of_the_manifest(tmp_path: Path) -> None:
    manifest = make_manifest(num_samples=30, samples_per_shard=1)
    receipts = [make_receipt(n).model_copy(update={"manifest_sha256": manifest.sha256}) for n in (29, 3, 30, 17)]
    for receipt in receipts:
        write_with_digest(receipt_path(tmp_path, receipt.shard), receipt)
    assert [receipt.shard for receipt in read_receipts(tmp_path, manifest)] == [3, 17, 29]
    write_with_digest(receipt_path(tmp_path, 4), make_receipt(4))
    with pytest.raises(ProvenanceError, match=r"shard-00004\.json: belongs to an output with another manifest"):
        read_receipts(tmp_path, manifest)


def test_the_largest_number_of_kept_entries_is_top_k_or_the_draws() -> None:
    assert make_manifest(top_k=50, top_p=0.9).capture.max_kept == 50
    assert make_manifest(top_k=0, num_draws=7).capture.max_kept == 7


@pytest.mark.parametrize("size", [0, -1, 2**63])
def test_sizes_that_nothing_can_have_are_damage(tmp_path: Path, size: int) -> None:
    write_with_digest(tmp_path / "manifest.json", make_manifest().model_copy(update={"samples_per_shard": size}))
    with pytest.raises(ShardError, match=r"manifest\.json: is damaged or of another version"):
        read_manifest(tmp_path)


def test_missing_shards_are_runs_however_many_they_are() -> None:
    manifest = make_manifest(num_samples=10**12).model_copy(update={"samples_per_shard": 1})
    assert manifest.missing_shards([]) == (range(10**12),)
    assert manifest.missing_shards([0, 1, 4, 10**12 - 1]) == (range(2, 4), range(5, 10**12 - 1))
    small = make_manifest(num_samples=3).model_copy(update={"samples_per_shard": 1})
    assert small.missing_shards([0, 1, 2]) == ()
    assert small.missing_shards([1, 7]) == (range(1), range(2, 3))
