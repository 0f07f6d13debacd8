"""`verify-shards` on a feature cache: each damage is found by its check, moved aside, and written again."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import cli
from common.errors import DataError, ProvenanceError
from common.shards.feature_shard import (
    FeatureFile,
    FeatureRow,
    images_digest,
    read_index,
    write_feature_shard,
    write_index,
)
from common.shards.manifest import MANIFEST_NAME, read_feature_manifest, receipt_path, shard_path, write_with_digest
from precompute.features.run import FeatureSettings, run_features
from precompute.verify.features import verify_features
from precompute.verify.recompute_features import recompute_features
from precompute.verify.repair import repair_output
from tests.support import outputs
from tests.support.models import tiny_llava
from tests.support.outputs import copy_file, first_problems, flip_bit, render_text
from tests.support.training import ROOT, write_mixed_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of seven images in three shards."""
    root = tmp_path_factory.mktemp("checked")
    tiny_llava(root / "model", num_layers=1)
    write_mixed_dataset(root / "data", 14)
    run_features(settings(root, root / "out"), progress=False)
    return root


def settings(root: Path, output: Path) -> FeatureSettings:
    return FeatureSettings(root / "model", root / "data" / "kd.json", root / "data", output, images_per_shard=3)


@pytest.fixture
def output(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "out", tmp_path / "out")


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("*")) if path.is_file()}


def read_rows(output: Path, number: int) -> list[FeatureRow]:
    shard = FeatureFile(shard_path(output, number), read_feature_manifest(output), number)
    rows = [row for group in range(shard.num_groups) for row in shard.read_group(group)]
    shard.close()
    return rows


def rewrite_shard(output: Path, change: Callable[[list[FeatureRow]], list[FeatureRow]], number: int = 1) -> None:
    """Writes a shard again with other rows, and a matching receipt."""
    write_feature_shard(output, number, read_feature_manifest(output), change(read_rows(output, number)))


def replace_packed(row: FeatureRow, name: str, data: bytes) -> FeatureRow:
    return dataclasses.replace(row, packed={**row.packed, name: data})


def put_infinity(rows: list[FeatureRow]) -> list[FeatureRow]:
    low, high = (bytearray(rows[1].packed[name]) for name in ("features_low", "features_high"))
    low[7], high[7] = 0x80, 0x7F
    changed = replace_packed(replace_packed(rows[1], "features_low", bytes(low)), "features_high", bytes(high))
    return [rows[0], changed, rows[2]]


def list_image_twice(output: Path) -> None:
    """Lists an image twice, with a manifest that agrees with the list."""
    manifest = read_feature_manifest(output)
    images = read_index(output, manifest)
    images[4] = images[3]
    write_index(output, images, manifest)
    write_with_digest(output / MANIFEST_NAME, manifest.model_copy(update={"images_sha256": images_digest(images)}))


SHARD_1 = ["shard-00001.json", "shard-00001.parquet"]

# For each damage: what causes it, the check that finds it, its message, and the files that a repair moves.
DAMAGE: dict[str, tuple[Callable[[Path], object], str, str, list[str]]] = {
    "a flipped bit": (lambda out: flip_bit(shard_path(out, 1), 900), "checksums", "its receipt says", SHARD_1),
    "a truncated shard": (
        lambda out: shard_path(out, 1).write_bytes(shard_path(out, 1).read_bytes()[:-9]),
        "checksums",
        "its receipt says",
        SHARD_1,
    ),
    "a shard is gone": (
        lambda out: shard_path(out, 1).unlink(),
        "files",
        "receipt of a shard that is not there",
        SHARD_1[:1],
    ),
    "a receipt is gone": (lambda out: receipt_path(out, 1).unlink(), "files", "has no receipt", SHARD_1[1:]),
    "a receipt is broken": (lambda out: receipt_path(out, 1).write_bytes(b"{}"), "receipts", "damaged", SHARD_1),
    "another shard's file": (
        lambda out: copy_file(shard_path(out, 0), shard_path(out, 1)),
        "checksums",
        "its receipt says",
        SHARD_1,
    ),
    "an infinite value": (
        lambda out: rewrite_shard(out, put_infinity),
        "features",
        "image 4: 1 of 1,024 values",
        SHARD_1,
    ),
    "another shape": (
        lambda out: rewrite_shard(out, lambda rows: [replace_packed(row, "features_low", b"") for row in rows]),
        "features",
        "features_low has 0 bytes, expected 1,024",
        SHARD_1,
    ),
    "another image's row": (
        lambda out: rewrite_shard(out, lambda rows: [dataclasses.replace(rows[0], image=rows[1].image), *rows[1:]]),
        "rows",
        "the list has",
        SHARD_1,
    ),
    "a lost row": (
        lambda out: rewrite_shard(out, lambda rows: rows[1:]),
        "coverage",
        "are not the images 3 to 5",
        SHARD_1,
    ),
    "the list is gone": (lambda out: (out / "images.parquet").unlink(), "index", "cannot be read", []),
    "the list is broken": (
        lambda out: flip_bit(out / "images.parquet", 300),
        "index",
        "run precompute-features again",
        ["images.parquet"],
    ),
    "the list of other images": (
        lambda out: write_index(out, read_index(out, read_feature_manifest(out))[::-1], read_feature_manifest(out)),
        "index",
        "not the list of images that the manifest names",
        ["images.parquet"],
    ),
}


def test_an_intact_cache_passes_every_check(root: Path) -> None:
    data = root / "data"
    report = verify_features(root / "out", data / "kd.json", data, progress=False)
    assert report.ok
    assert all(check.num_checked for check in report.checks)
    assert (report.num_shards, report.num_rows) == (3, 7)


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found_and_moved(output: Path, what: str) -> None:
    damage, name, message, moved = DAMAGE[what]
    damage(output)
    report = verify_features(output, progress=False)
    assert message in first_problems(report)[name]
    assert sorted(repair_output(report).moved) == moved


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGE)
def test_a_rerun_after_a_repair_writes_what_was_moved(root: Path, output: Path, what: str) -> None:
    damage, *_ = DAMAGE[what]
    damage(output)
    repair_output(verify_features(output, progress=False))
    summary = run_features(settings(root, output), progress=False)
    assert summary.complete
    assert contents(output) == contents(root / "out")


@pytest.mark.parametrize("how", ["gone", "edited", "rubbish"])
def test_the_manifest_is_restored_from_the_shards(root: Path, output: Path, how: str) -> None:
    path = output / MANIFEST_NAME
    match how:
        case "gone":
            path.unlink()
        case "edited":
            path.write_text(path.read_text().replace('"pad"', '"keep"'))
        case _:
            path.write_bytes(b"\xff")
    runner = CliRunner()
    found = runner.invoke(cli.app, ["verify-shards", str(output), "--repair", "--json"])
    assert found.exit_code == 1
    report = json.loads(found.stdout)
    assert [check["name"] for check in report["verify"]["checks"] if not check["ok"]] == ["manifest"]
    assert report["repair"]["restored"]
    assert contents(output) == contents(root / "out")


def test_an_image_that_is_listed_twice_is_found(output: Path) -> None:
    list_image_twice(output)
    problems = first_problems(verify_features(output, progress=False))
    # The edited manifest is replaced by that of the shards, with which the list does not agree.
    assert "is not the manifest of the shards" in problems["manifest"]
    assert "not the list of images" in problems["index"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"num_images": 0}, "has 0 images, 3 a shard"), ({"images_per_group": 7}, "has row groups of 7 images")],
)
def test_impossible_sizes_are_found(output: Path, changes: dict[str, int], message: str) -> None:
    manifest = read_feature_manifest(output).model_copy(update=changes)
    write_with_digest(output / MANIFEST_NAME, manifest)
    assert message in first_problems(verify_features(output, progress=False))["manifest"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": "9"}, "its footer has schema version '9'"),
        ({"manifest": "{}"}, "the manifest in its footer is not that of the output"),
        ({"row_group_size": 1}, r"its row groups hold [1, 1, 1] images"),
    ],
)
def test_damage_to_a_footer_is_found(output: Path, changes: dict[str, Any], message: str) -> None:
    outputs.rewrite_shard(output, 1, **changes)
    assert message in first_problems(verify_features(output, progress=False))["footers"]


def test_a_flipped_bit_behind_a_matching_receipt_is_found_by_the_page_checksum(output: Path) -> None:
    column = pq.ParquetFile(shard_path(output, 1)).metadata.row_group(0).column(0)
    flip_bit(shard_path(output, 1), column.data_page_offset + column.total_compressed_size - 1)
    outputs.rewrite_receipt(output, 1)
    assert "row group 0" in first_problems(verify_features(output, progress=False))["pages"]


def test_rows_of_another_shard_are_found(output: Path) -> None:
    rewrite_shard(output, lambda rows: [dataclasses.replace(row, index=row.index - 3) for row in rows])
    assert "this shard holds images 3 to 5" in first_problems(verify_features(output, progress=False))["rows"]


def test_a_dataset_that_names_the_images_in_another_order_is_found(root: Path, output: Path, tmp_path: Path) -> None:
    records = json.loads((root / "data" / "kd.json").read_text())
    other = tmp_path / "kd.json"
    other.write_text(json.dumps(records[::-1]))
    report = verify_features(output, other, progress=False)
    messages = [problem.what for check in report.checks if check.name == "dataset" for problem in check.problems]
    assert "is not in the order in which the dataset first names its images" in messages


def test_a_repair_says_what_to_run_next(output: Path) -> None:
    flip_bit(shard_path(output, 1), 900)
    (output / "images.parquet").unlink()
    text = render_text(repair_output(verify_features(output, progress=False)).render())
    assert "run the same precompute-features again (decant precompute-features): it writes shards 1 and no" in text


def test_another_dataset_and_changed_images_are_found_and_nothing_is_moved(
    root: Path, output: Path, tmp_path: Path
) -> None:
    records = json.loads((root / "data" / "kd.json").read_text())
    records[2]["image"] = "new.png"
    other = tmp_path / "kd.json"
    other.write_text(json.dumps(records))
    images = shutil.copytree(root / "data", tmp_path / "images")
    shutil.copy(images / "0.png", images / "6.png")
    (images / "8.png").unlink()
    report = verify_features(output, other, images, progress=False)
    checks = {check.name: check for check in report.checks}
    messages = [problem.what for problem in checks["dataset"].problems]
    assert any("the output was made from" in what for what in messages)
    assert any("sample 's2': its image new.png is not in the cache" in what for what in messages)
    assert any("has 2.png, which no sample of the dataset names" in what for what in messages)
    messages = [problem.what for problem in checks["sources"].problems]
    assert len(messages) == 2
    assert any("6.png: has SHA-256" in what for what in messages)
    assert any("8.png does not exist" in what for what in messages)
    assert repair_output(report).moved == ()
    assert contents(output) == contents(root / "out")


def test_features_are_computed_again_and_compared(root: Path, output: Path, tmp_path: Path) -> None:
    data, model = root / "data", root / "model"
    again = recompute_features(output, model, 100, image_root=data, progress=False)
    assert (again.num_images, again.num_exact, again.max_difference, again.ok) == (7, 7, 0.0, True)
    # Swapped features of two images pass every check.
    rewrite_shard(
        output,
        lambda rows: [
            dataclasses.replace(rows[0], packed=rows[1].packed),
            dataclasses.replace(rows[1], packed=rows[0].packed),
            rows[2],
        ],
    )
    assert verify_features(output, progress=False).ok
    again = recompute_features(output, model, 7, image_root=data, progress=False)
    assert not again.ok
    assert json.loads(again.to_json())["ok"] is False
    assert again.num_exact == 5
    assert again.worst in ("6.png", "8.png")
    other = tiny_llava(tmp_path / "other", num_layers=1, seed=1)
    with pytest.raises(ProvenanceError, match=r"weights_sha256: the cache has .* the model has"):
        recompute_features(output, other, 1, image_root=data, progress=False)
    images = shutil.copytree(data, tmp_path / "images")
    for path in images.glob("*.png"):
        shutil.copy(data / "0.png", path)
    with pytest.raises(DataError, match="is another file than features were computed from"):
        recompute_features(output, model, 7, image_root=images, progress=False)


def test_the_command_recognises_a_feature_cache(root: Path, output: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})
        return done.exit_code, done.output + str(done.exception or "")

    data = ["--dataset", str(root / "data" / "kd.json"), "--image-root", str(root / "data")]
    again = ["--recompute", "2", "--teacher", str(root / "model")]
    code, shown = run("verify-shards", str(output), *data, *again)
    assert code == 0, shown
    assert "verified" in shown
    assert "2 images through the vision tower again" in shown
    flip_bit(shard_path(output, 0), 900)
    assert run("verify-shards", str(output))[0] == 1
    assert run("verify-shards", str(output), "--against", "x.json")[0] == 2
    assert run("verify-shards", str(output), *again)[0] == 2
    for command in (
        ["inspect-shards", str(output)],
        ["merge-shards", str(output), "--out", str(output / "new")],
    ):
        code, shown = run(*command)
        assert code == 1
        assert "belongs to a feature cache" in shown


def test_the_command_computes_a_cache(root: Path, output: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(root / "model"), "--dataset", str(root / "data" / "kd.json")]
    arguments += ["--image-root", str(root / "data"), "--images-per-shard", "3", "--output", str(tmp_path / "new")]
    done = CliRunner().invoke(cli.app, ["precompute-features", *arguments])
    assert done.exit_code == 0, done.output
    assert "all shards are complete" in done.output
    assert contents(tmp_path / "new") == contents(output)


@pytest.mark.slow
def test_verifying_needs_no_torch(root: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from precompute.verify.features import verify_features; "
        f"assert verify_features(Path({str(root / 'out')!r}), progress=False).ok; "
        "print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_random_damage_never_makes_verification_crash(root: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(40):
        output = shutil.copytree(root / "out", tmp_path / str(number))
        path = sorted(path for path in output.iterdir() if path.stat().st_size)[rng.integers(8)]
        flip_bit(path, int(rng.integers(path.stat().st_size)))
        # The digest of images.parquet covers its rows, not its Parquet metadata.
        assert not verify_features(output, progress=False).ok or path.name == "images.parquet"
