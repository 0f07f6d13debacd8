"""Feature shards are as exact as documented, readable with numpy and pyarrow alone, and refused if damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch

from common.errors import ProvenanceError, ShardError
from common.shards.feature_shard import (
    CachedImage,
    FeatureCache,
    FeatureFile,
    FeatureRow,
    from_bfloat16,
    images_digest,
    images_per_group,
    is_feature_cache,
    pack_features,
    read_index,
    to_bfloat16,
    unpack_features,
    write_feature_shard,
    write_index,
)
from common.shards.manifest import (
    DatasetIdentity,
    EncoderIdentity,
    EngineIdentity,
    FeatureForm,
    FeatureManifest,
    open_output,
    read_feature_manifest,
    read_manifest,
    shard_path,
)
from tests.support.builders import make_manifest

NUM_PATCHES, NUM_CHANNELS, NUM_IMAGES = 5, 12, 7


def make_feature_manifest(images: list[CachedImage], **changes: Any) -> FeatureManifest:
    encoder = EncoderIdentity(
        architecture="clip_vision_model",
        weights_sha256="w",
        config_sha256="c",
        layers=(2,),
        select_strategy="default",
        processor_sha256="p",
        aspect_ratio="pad",
        dtype="bfloat16",
        tokens_per_image=NUM_PATCHES,
        num_channels=NUM_CHANNELS,
    )
    settings: dict[str, Any] = {
        "encoder": encoder,
        "dataset": DatasetIdentity(name="d.json", sha256="d", num_samples=9),
        "engine": EngineIdentity(name="transformers", version="5", dtype="bfloat16"),
        "num_images": len(images),
        "images_sha256": images_digest(images),
        "form": "bf16",
        "images_per_shard": 3,
        "images_per_group": 2,
    }
    return FeatureManifest(**{**settings, **changes})


def make_features(seed: int) -> npt.NDArray[np.float32]:
    """Makes bfloat16 numbers of which one channel is tens of times larger than the others, as in CLIP."""
    values = np.random.default_rng(seed).normal(size=(NUM_PATCHES, NUM_CHANNELS)).astype(np.float32)
    values[:, 3] *= 40
    return from_bfloat16(to_bfloat16(values))


def write_cache(output: Path, form: FeatureForm = "bf16") -> list[npt.NDArray[np.float32]]:
    images = [CachedImage(f"{number:064x}", (f"{number}.png", f"copy/{number}.png")) for number in range(NUM_IMAGES)]
    manifest = make_feature_manifest(images, form=form)
    open_output(output, manifest)
    write_index(output, images, manifest)
    features = [make_features(number) for number in range(NUM_IMAGES)]
    for number in range(manifest.num_shards):
        rows = [FeatureRow(i, images[i], pack_features(features[i], form)) for i in manifest.shard_range(number)]
        write_feature_shard(output, number, manifest, rows)
    return features


def test_numbers_are_rounded_to_bfloat16_as_torch_rounds_them() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    ties = (np.arange(2**15, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([values, ties[np.isfinite(ties)]])
    expected = torch.from_numpy(values).bfloat16()
    assert np.array_equal(to_bfloat16(values), expected.view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(from_bfloat16(to_bfloat16(values)), expected.float().numpy())


def test_bf16_columns_hold_each_value_in_two_bytes(tmp_path: Path) -> None:
    features = write_cache(tmp_path / "out")
    table = pq.read_table(shard_path(tmp_path / "out", 1))
    assert table.column_names == ["index", "sha256", "paths", "features_low", "features_high"]
    for row in table.to_pylist():
        bits = np.array([*zip(row["features_low"], row["features_high"], strict=True)], np.uint8).view("<u2").ravel()
        values = torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float()
        assert np.array_equal(values.reshape(NUM_PATCHES, NUM_CHANNELS).numpy(), features[row["index"]])
        assert row["paths"] == [f"{row['index']}.png", f"copy/{row['index']}.png"]


@pytest.mark.parametrize("form", ["bf16", "q8"])
def test_images_of_various_sizes_have_as_many_rows_as_their_own(tmp_path: Path, form: FeatureForm) -> None:
    images = [CachedImage(f"{n:064x}", (f"{n}.png",), (20 + n, 10)) for n in range(5)]
    encoder = make_feature_manifest([]).encoder.model_copy(
        update={"tokens_per_image": None, "layers": (), "select_strategy": "model"}
    )
    manifest = make_feature_manifest(images, form=form, encoder=encoder, images_per_group=images_per_group(None, 12))
    open_output(tmp_path, manifest)
    write_index(tmp_path, images, manifest)
    features = [make_features(n)[: n + 1] for n in range(5)]
    for number in range(manifest.num_shards):
        rows = [FeatureRow(i, images[i], pack_features(features[i], form)) for i in manifest.shard_range(number)]
        write_feature_shard(tmp_path, number, manifest, rows)
    assert pq.read_table(tmp_path / "images.parquet").to_pylist()[3] == {
        "sha256": images[3].sha256,
        "paths": ["3.png"],
        "width": 23,
        "height": 10,
    }
    second = pq.read_table(shard_path(tmp_path, 1)).to_pylist()
    assert [(row["index"], row["width"], row["height"]) for row in second] == [(3, 23, 10), (4, 24, 10)]
    cache = FeatureCache(tmp_path)
    assert cache.images == images
    for number, expected in enumerate(features):
        assert cache.group_range(number) == range(number, number + 1)
        (found,) = cache.read(range(number, number + 1))
        assert found.shape == (number + 1, NUM_CHANNELS)
        assert np.abs(found - expected).max() <= (0 if form == "bf16" else 0.02 * np.abs(expected).max())
    column = "features_high" if form == "bf16" else "codes"
    packed = pack_features(features[4], form)
    for broken in (packed[column][:-1], b""):
        with pytest.raises(ShardError, match=r"here: \w+ has [\d,]+ bytes, expected"):
            unpack_features({**packed, column: broken}, manifest, "here")


def test_q8_columns_hold_a_code_and_the_scales_of_patch_and_channel(tmp_path: Path) -> None:
    features = write_cache(tmp_path / "out", "q8")
    for row in pq.read_table(shard_path(tmp_path / "out", 0)).to_pylist():
        codes = np.frombuffer(row["codes"], np.int8).reshape(NUM_PATCHES, NUM_CHANNELS)
        patches, channels = np.frombuffer(row["patch_scales"], "<f4"), np.frombuffer(row["channel_scales"], "<f4")
        step = np.outer(patches, channels)
        # The error is half a step, plus the rounding of float32.
        assert (np.abs(codes * step - features[row["index"]]) <= 0.5001 * step).all()
        assert np.abs(codes).max(axis=1).tolist() == [127] * NUM_PATCHES


def test_a_large_channel_takes_no_codes_from_the_others() -> None:
    features = make_features(0)
    manifest = make_feature_manifest([], form="q8")
    error = unpack_features(pack_features(features, "q8"), manifest, "") - features
    # The reference is a plain 8-bit form with one scale for each patch.
    scale = np.abs(features).max(axis=1, keepdims=True) / 127
    plain = np.rint(features / scale) * scale - features
    others = np.arange(NUM_CHANNELS) != 3
    assert np.square(error[:, others]).mean() < np.square(plain[:, others]).mean() / 100


@pytest.mark.parametrize("form", ["bf16", "q8"])
def test_zeros_come_back_as_zeros(form: FeatureForm) -> None:
    features = make_features(1)
    features[2] = 0
    features[:, 4] = 0
    found = unpack_features(pack_features(features, form), make_feature_manifest([], form=form), "")
    assert not found[2].any()
    assert not found[:, 4].any()
    assert not unpack_features(pack_features(features * 0, form), make_feature_manifest([], form=form), "").any()


def test_same_rows_make_the_same_bytes(tmp_path: Path) -> None:
    write_cache(tmp_path / "a")
    write_cache(tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize("form", ["bf16", "q8"])
def test_an_image_is_found_by_any_of_its_paths_and_by_its_content(tmp_path: Path, form: FeatureForm) -> None:
    features = write_cache(tmp_path / "out", form)
    cache = FeatureCache(tmp_path / "out")
    assert len(cache) == NUM_IMAGES
    for number, expected in enumerate(features):
        assert cache.by_path[f"{number}.png"] == cache.by_path[f"copy/{number}.png"] == number
        assert cache.by_content[f"{number:064x}"] == number
        group = cache.group_range(number)
        assert number in group
        assert len(group) <= 2
        found = cache.read(group)[number - group.start]
        if form == "bf16":
            assert np.array_equal(found, expected)
        else:
            assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()
    # Groups never cross a shard of three images.
    assert {tuple(cache.group_range(n)) for n in range(NUM_IMAGES)} == {(0, 1), (2,), (3, 4), (5,), (6,)}


def test_an_incomplete_cache_and_a_changed_list_are_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    write_cache(output)
    manifest = read_feature_manifest(output)
    images = read_index(output, manifest)
    write_index(output, images[::-1], manifest)
    with pytest.raises(ShardError, match="not the list of images that the manifest names"):
        FeatureCache(output)
    (output / "images.parquet").write_bytes(b"?")
    with pytest.raises(ShardError, match="run precompute-features again"):
        FeatureCache(output)
    write_index(output, images, manifest)
    (output / "shard-00001.json").unlink()
    with pytest.raises(ShardError, match=r"1 of 3 shards are missing, the first is 00001"):
        FeatureCache(output)


def test_rows_that_are_not_those_of_the_list_are_never_handed_out(tmp_path: Path) -> None:
    output = tmp_path / "out"
    features = write_cache(output)
    manifest = read_feature_manifest(output)
    images = read_index(output, manifest)
    swapped = [
        FeatureRow(i, images[j], pack_features(features[j], "bf16")) for i, j in zip((3, 4, 5), (4, 3, 5), strict=True)
    ]
    write_feature_shard(output, 1, manifest, swapped)
    cache = FeatureCache(output)
    with pytest.raises(ShardError, match=r"images 3 to 4 are not those of images\.parquet"):
        cache.read(cache.group_range(3))


@pytest.mark.parametrize("form", ["bf16", "q8"])
def test_a_column_of_another_size_is_refused(form: FeatureForm) -> None:
    manifest, packed = make_feature_manifest([], form=form), pack_features(make_features(0), form)
    for name in packed:
        with pytest.raises(ShardError, match=f"here: {name} has"):
            unpack_features({**packed, name: packed[name][:-1]}, manifest, "here")


def test_scores_and_features_are_told_apart(tmp_path: Path) -> None:
    features, scores = tmp_path / "features", tmp_path / "scores"
    write_cache(features)
    open_output(scores, make_manifest())
    assert is_feature_cache(features)
    assert not is_feature_cache(scores)
    assert not is_feature_cache(tmp_path / "nothing")
    with pytest.raises(ShardError, match=r"belongs to a feature cache.*which holds no scores"):
        read_manifest(features)
    with pytest.raises(ShardError, match="expected one of precompute-features"):
        FeatureCache(scores)
    with pytest.raises(ShardError, match="belongs to a feature cache"):
        open_output(features, make_manifest())
    # With a broken manifest the first shard's footer decides.
    (features / "manifest.json").write_bytes(b"\xff")
    assert is_feature_cache(features)
    with pytest.raises(ProvenanceError, match=r"shard-00000\.json: belongs to an output with another manifest"):
        FeatureFile(shard_path(features, 0), make_feature_manifest([], form="q8"), 0)


def test_a_broken_shard_without_a_manifest_is_no_feature_cache(tmp_path: Path) -> None:
    write_cache(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    assert is_feature_cache(tmp_path / "out")
    shard_path(tmp_path / "out", 0).write_bytes(b"?")
    assert not is_feature_cache(tmp_path / "out")


def test_a_row_group_holds_a_mebibyte_of_bfloat16_and_at_least_one_image() -> None:
    # CLIP ViT-L/14 at 336 pixels: 576 x 1024 values of 2 bytes are 1.125 MiB.
    assert images_per_group(576, 1024) == 1
    assert images_per_group(64, 1024) == 8


def test_a_code_that_is_never_written_is_refused() -> None:
    manifest, packed = make_feature_manifest([], form="q8"), pack_features(make_features(0), "q8")
    with pytest.raises(ShardError, match="here: has a code below -127"):
        unpack_features({**packed, "codes": b"\x80" + packed["codes"][1:]}, manifest, "here")


def test_a_list_of_images_with_other_columns_is_refused(tmp_path: Path) -> None:
    write_cache(tmp_path / "out")
    manifest = read_feature_manifest(tmp_path / "out")
    path = tmp_path / "out" / "images.parquet"
    pq.write_table(pq.read_table(path).rename_columns(["sha256", "names"]), path)
    with pytest.raises(ShardError, match=r"images\.parquet: its columns are not sha256, paths"):
        read_index(tmp_path / "out", manifest)


def test_a_cache_of_many_shards_keeps_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.shards.feature_shard._MAX_OPEN_FILES", 1)
    features = write_cache(tmp_path / "out")
    closed: list[Path] = []
    monkeypatch.setattr(FeatureFile, "close", lambda self: closed.append(self.path))
    cache = FeatureCache(tmp_path / "out")
    for number in (0, 3, 4, 0):
        group = cache.group_range(number)
        assert np.array_equal(cache.read(group)[number - group.start], features[number])
    assert [path.name for path in closed] == ["shard-00000.parquet", "shard-00001.parquet"]
