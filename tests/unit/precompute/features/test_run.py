"""Feature caches against the inputs of transformers' own projector; interrupted runs and unusable inputs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from common.data.images import load_image, read_image_and_digest
from common.data.model_images import LlavaImages
from common.data.samples import ImageRef
from common.errors import DataError, ModelError, ProvenanceError
from common.shards.feature_shard import FeatureCache, write_feature_shard
from common.shards.manifest import published_shards, read_feature_manifest
from common.storage.files import parse_location
from precompute.features.run import FeatureSettings, FeatureSummary, run_features
from tests.support.captures import rendered
from tests.support.models import randomise, tiny_llava
from tests.support.object_store import BUCKET

NUM_FILES = 7


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA, and datasets of both kinds whose images repeat, by name and as two files of the same bytes."""
    root = tmp_path_factory.mktemp("features")
    tiny_llava(root / "model", num_layers=1)
    rng = np.random.default_rng(0)
    for number in range(NUM_FILES):
        pixels = rng.integers(0, 255, (20 + 5 * number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    shutil.copy(root / "2.png", root / "same-as-2.png")
    named = [
        ["3.png"],
        [],
        ["2.png", "0.png"],
        ["3.png"],
        ["same-as-2.png"],
        ["1.png"],
        ["4.png"],
        ["5.png"],
        ["6.png"],
    ]
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    records: list[dict[str, Any]] = [{"id": str(i), "images": images} for i, images in enumerate(named)]
    (root / "kd.json").write_text(json.dumps([record | {"conversations": turns} for record in records]))
    (root / "dpo.json").write_text(json.dumps([record | {"chosen": turns, "rejected": turns} for record in records]))
    return root


# The distinct images in order of first appearance.
ORDER = ["3.png", "2.png", "0.png", "1.png", "4.png", "5.png", "6.png"]


def compute(root: Path, output: Any, **changes: Any) -> FeatureSummary:
    settings = {
        "model": root / "model",
        "dataset": root / "kd.json",
        "image_root": root,
        "output": output,
        "batch_size": 2,
        "images_per_shard": 3,
    }
    return run_features(FeatureSettings(**{**settings, **changes}), progress=False)


def read_features(output: Any) -> dict[str, npt.NDArray[np.float32]]:
    """Returns features by the first path of each image."""
    cache = FeatureCache(output)
    groups = {cache.group_range(index) for index in range(len(cache))}
    found = {index: features for group in groups for index, features in zip(group, cache.read(group), strict=True)}
    return {cache.images[index].paths[0]: found[index] for index in range(len(cache))}


def projector_inputs(model_dir: Path, paths: list[Path]) -> list[npt.NDArray[np.float32]]:
    """Returns what transformers' own LLaVA in bfloat16 gives its projector for images, one at a time."""
    model = LlavaForConditionalGeneration.from_pretrained(model_dir, dtype=torch.bfloat16).eval()
    processor, spec = AutoImageProcessor.from_pretrained(model_dir), LlavaImages.load(model_dir)
    assert spec is not None
    seen: list[torch.Tensor] = []
    model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for path in paths:
        image = load_image(ImageRef(path.name), path.parent, "pad", spec.mean_rgb, "")
        with torch.no_grad():
            model.get_image_features(pixel_values=processor(images=[image], return_tensors="pt")["pixel_values"])
    return [features[0].float().numpy() for features in seen]


def contents(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def test_features_are_what_transformers_gives_its_projector_bit_for_bit(root: Path, tmp_path: Path) -> None:
    compute(root, tmp_path / "out")
    found = read_features(tmp_path / "out")
    expected = projector_inputs(root / "model", [root / name for name in ORDER])
    assert list(found) == ORDER
    assert all(np.array_equal(found[name], features) for name, features in zip(ORDER, expected, strict=True))
    assert len({features.tobytes() for features in expected}) == NUM_FILES


def test_the_8_bit_form_is_off_by_less_than_a_hundredth(root: Path, tmp_path: Path) -> None:
    compute(root, tmp_path / "out", form="q8")
    found = read_features(tmp_path / "out")
    for name, expected in zip(ORDER, projector_inputs(root / "model", [root / name for name in ORDER]), strict=True):
        assert 0 < np.linalg.norm(found[name] - expected) < 0.01 * np.linalg.norm(expected)


def test_several_layers_stand_side_by_side_as_llava_joins_them(root: Path, tmp_path: Path) -> None:
    model = shutil.copytree(root / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"vision_feature_layer": [1, -1]}
    (model / "config.json").write_text(json.dumps(config))
    weights = load_file(model / "model.safetensors")
    projector = "multi_modal_projector.linear_1.weight"
    weights[projector] = torch.cat([weights[projector], weights[projector]], dim=1)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    compute(root, tmp_path / "out", model=model)
    found, (expected,) = read_features(tmp_path / "out"), projector_inputs(model, [root / "0.png"])
    assert expected.shape == (16, 128)
    assert np.array_equal(found["0.png"], expected)


def test_a_siglip_tower_has_no_class_token_to_drop(root: Path, tmp_path: Path) -> None:
    model_dir = shutil.copytree(root / "model", tmp_path / "model")
    config = LlavaConfig.from_pretrained(model_dir)
    config.vision_config = SiglipVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )
    config.vision_feature_select_strategy = "full"
    model = LlavaForConditionalGeneration(config)
    randomise(model.named_parameters(), 0)
    model.save_pretrained(model_dir)
    compute(root, tmp_path / "out", model=model_dir)
    found, (expected,) = read_features(tmp_path / "out"), projector_inputs(model_dir, [root / "0.png"])
    assert expected.shape == (16, 64)
    assert np.array_equal(found["0.png"], expected)


def test_each_distinct_image_is_computed_once_under_all_its_names(root: Path, tmp_path: Path) -> None:
    summary = compute(root, tmp_path / "kd")
    assert (summary.manifest.num_images, summary.num_new_images, summary.manifest.num_shards) == (7, 7, 3)
    assert summary.complete
    images = FeatureCache(tmp_path / "kd").images
    assert [image.paths[0] for image in images] == ORDER
    assert images[1].paths == ("2.png", "same-as-2.png")
    compute(root, tmp_path / "dpo", dataset=root / "dpo.json")
    assert FeatureCache(tmp_path / "dpo").images == images


@pytest.fixture(scope="module")
def wide(root: Path) -> Path:
    """A LLaVA whose tower is wide enough that torch splits its matrix products over threads."""
    directory = shutil.copytree(root / "model", root / "wide")
    config = LlavaConfig.from_pretrained(directory)
    config.vision_config = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
    )
    model = LlavaForConditionalGeneration(config)
    randomise(model.named_parameters(), 0)
    model.save_pretrained(directory)
    images = CLIPImageProcessor(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})
    images.save_pretrained(directory)
    (directory / "processor_config.json").unlink()
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_neither_batches_nor_threads_change_a_byte(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: Path, batch_size: int
) -> None:
    compute(root, tmp_path / "a", model=wide)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compute(root, tmp_path / "b", model=wide, batch_size=batch_size)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_language_model_is_not_needed(root: Path, tmp_path: Path) -> None:
    model = shutil.copytree(root / "model", tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "vision_tower" in name}, model / "model.safetensors")
    compute(root, tmp_path / "a")
    compute(root, tmp_path / "b", model=model)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_rerun_writes_what_is_missing_and_reads_no_other_image(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    compute(root, output)
    whole = contents(output)
    (output / "shard-00001.json").unlink()
    (output / "shard-00002.parquet").write_bytes(whole["shard-00002.parquet"][:-1])
    read: list[str] = []

    def counting(path: str, *rest: Any) -> tuple[str, bytes]:
        read.append(path)
        return read_image_and_digest(path, *rest)

    monkeypatch.setattr("precompute.features.run.read_image_and_digest", counting)
    assert compute(root, output).num_new_images == 4
    assert sorted(read) == sorted(ORDER[3:])
    assert contents(output) == whole
    read.clear()
    assert compute(root, output).num_new_images == 0
    assert read == []


def test_an_interrupt_keeps_complete_shards_and_the_next_run_continues(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    compute(root, whole)

    def interrupted(*arguments: Any) -> Any:
        write_feature_shard(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("precompute.features.run.write_feature_shard", interrupted)
        summary = compute(root, output)
    assert summary.interrupted
    assert not summary.complete
    assert 1 <= len(published_shards(output)) < 3
    assert compute(root, output).complete
    assert contents(output) == contents(whole)


def test_another_tower_dataset_or_setting_is_refused_and_nothing_is_written(root: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    compute(root, output)
    before = contents(output)
    other = shutil.copytree(root / "model", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["vision_tower.vision_model.embeddings.class_embedding"] += 1
    save_file(weights, other / "model.safetensors")
    for changes, named in (
        ({"model": other}, "encoder.weights_sha256"),
        ({"aspect_ratio": "keep"}, "encoder.aspect_ratio: the output has 'pad', this run has 'keep'"),
        ({"dataset": root / "dpo.json"}, "dataset.sha256"),
        ({"form": "q8", "images_per_shard": 2}, "form: the output has 'bf16', this run has 'q8'"),
    ):
        with pytest.raises(ProvenanceError) as caught:
            compute(root, output, **changes)
        assert named in str(caught.value)
    assert contents(output) == before


def test_an_image_that_was_changed_since_the_cache_was_begun_is_refused(root: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in root.glob("*.png"):
        shutil.copy(path, images)
    output = tmp_path / "out"
    compute(root, output, image_root=images)
    (output / "shard-00001.json").unlink()
    shutil.copy(images / "0.png", images / "4.png")
    with pytest.raises(DataError, match=r"image 4\.png: has SHA-256 .* the file was changed since"):
        compute(root, output, image_root=images)


def test_an_image_that_is_missing_or_broken_stops_the_run_and_is_named(root: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in root.glob("*.png"):
        shutil.copy(path, images)
    (images / "5.png").unlink()
    with pytest.raises(DataError, match=r"sample '7' .*: image .*5\.png does not exist"):
        compute(root, tmp_path / "a", image_root=images)
    (images / "5.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"image 5\.png cannot be decoded"):
        compute(root, tmp_path / "b", image_root=images)
    # The shard before it stays.
    assert published_shards(tmp_path / "b") == (0,)


def test_a_dataset_without_images_has_nothing_to_compute(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.json"
    path.write_text(json.dumps([json.loads((root / "kd.json").read_text())[1]]))
    with pytest.raises(DataError, match="no sample has an image"):
        compute(root, tmp_path / "out", dataset=path)


@pytest.mark.parametrize("damage", ["missing", "another shape", "not finite"])
def test_a_tower_with_a_wrong_weight_computes_nothing(root: Path, tmp_path: Path, damage: str) -> None:
    model, name = shutil.copytree(root / "model", tmp_path / "model"), "vision_tower.vision_model.post_layernorm.bias"
    weights = load_file(model / "model.safetensors")
    match damage:
        case "missing":
            del weights[name]
        case "another shape":
            weights[name] = weights[name][:-1]
        case _:
            weights["vision_tower.vision_model.embeddings.class_embedding"] *= float("nan")
    save_file(weights, model / "model.safetensors")
    expected = "values that are no numbers for the image" if damage == "not finite" else "post_layernorm.bias"
    with pytest.raises(ModelError, match=expected):
        compute(root, tmp_path / "out", model=model)
    assert published_shards(tmp_path / "out") == ()


def test_an_image_processor_that_does_not_fit_the_tower_is_refused(root: Path, wide: Path, tmp_path: Path) -> None:
    model = shutil.copytree(wide, tmp_path / "model")
    shutil.copy(root / "model" / "preprocessor_config.json", model)
    with pytest.raises(ModelError, match="its image processor and its vision tower do not fit"):
        compute(root, tmp_path / "out", model=model)


@pytest.mark.slow
@pytest.mark.usefixtures("store")
def test_images_and_cache_may_be_in_an_object_store(root: Path, tmp_path: Path) -> None:
    local, remote = tmp_path / "out", parse_location(f"s3://{BUCKET}/features")
    compute(root, local)
    for path in root.glob("*.png"):
        parse_location(f"s3://{BUCKET}/images/{path.name}").write_bytes(path.read_bytes())
    compute(root, remote, image_root=parse_location(f"s3://{BUCKET}/images"))
    assert read_feature_manifest(remote) == read_feature_manifest(local)
    expected, found = read_features(local), read_features(remote)
    assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_the_summary_says_whether_shards_are_missing(root: Path, tmp_path: Path) -> None:
    summary = compute(root, tmp_path / "out")
    assert "7 distinct, 7 new" in rendered(summary)
    assert "all shards are complete" in rendered(summary)
    stopped = replace(summary, num_complete_shards=1, interrupted=True)
    assert "interrupted: shards are missing; run the same command again to continue" in rendered(stopped)
    assert "interrupted" not in rendered(replace(stopped, interrupted=False))
