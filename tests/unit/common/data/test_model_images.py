"""Tests of how models take images: LLaVA's by its configuration, others by their own processors."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.model_images import LlavaImages, ProcessedImage, find_model_images, merge_arrays
from common.errors import ModelError

MEAN = (122, 116, 104)
CLIP = {"image_size": 336, "patch_size": 14}
PROCESSOR = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "size": {"shortest_edge": 336}}


def model_dir(directory: Path, config: dict[str, Any], processor: Any, name: str = "preprocessor_config.json") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llava"} | config))
    if processor is not None:
        (directory / name).write_text(json.dumps(processor))
    return directory


@pytest.mark.parametrize(
    ("strategy", "vision", "tokens"),
    [
        # CLIP has 24 x 24 patches and a class token, which "default" drops; SigLIP has 27 x 27 and no class token.
        ({}, CLIP, 576),
        ({"vision_feature_select_strategy": "default"}, CLIP, 576),
        ({"vision_feature_select_strategy": "full"}, CLIP | {"model_type": "clip_vision_model"}, 577),
        (
            {"vision_feature_select_strategy": "full"},
            {"image_size": 384, "patch_size": 14, "model_type": "siglip_vision_model"},
            729,
        ),
    ],
)
def test_tokens_an_image_follow_the_tower_and_the_strategy(
    tmp_path: Path, strategy: dict[str, str], vision: dict[str, Any], tokens: int
) -> None:
    spec = LlavaImages.load(model_dir(tmp_path, {"vision_config": vision, **strategy}, PROCESSOR))
    assert spec.tokens_per_image == tokens
    assert spec.mean_rgb == MEAN


def test_both_layouts_of_the_processor_give_the_same_spec(tmp_path: Path) -> None:
    config = {"vision_config": CLIP}
    separate = LlavaImages.load(model_dir(tmp_path / "a", config, PROCESSOR | {"processor_class": "LlavaProcessor"}))
    joined = {"processor_class": "LlavaProcessor", "patch_size": 14, "image_processor": PROCESSOR}
    found = LlavaImages.load(model_dir(tmp_path / "b", config, joined, "processor_config.json"))
    assert replace(found, model_dir=separate.model_dir) == separate


def test_the_fingerprint_sees_each_setting_that_changes_pixels(tmp_path: Path) -> None:
    variants = [PROCESSOR, PROCESSOR | {"do_resize": False}, PROCESSOR | {"image_mean": [0.5, 0.5, 0.5]}]
    specs = [LlavaImages.load(model_dir(tmp_path, {"vision_config": CLIP}, variant)) for variant in variants]
    assert len({spec.sha256 for spec in specs}) == 3
    assert specs[2].mean_rgb == (127, 127, 127)


def test_a_text_model_takes_no_images(tmp_path: Path) -> None:
    assert find_model_images(model_dir(tmp_path, {"model_type": "qwen2"}, None)) is None


def test_a_tower_with_an_image_size_of_two_numbers_is_refused(tmp_path: Path) -> None:
    vision = {"image_size": [448, 448], "patch_size": [14, 14]}
    with pytest.raises(ModelError, match="vision_config needs image_size and patch_size, one number each"):
        LlavaImages.load(model_dir(tmp_path, {"vision_config": vision}, PROCESSOR))


@pytest.mark.parametrize("config", [{"vision_config": {"image_size": 336}}, {"vision_config": CLIP}])
def test_an_incomplete_model_directory_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    processor = PROCESSOR if len(config["vision_config"]) == 1 else None
    with pytest.raises(ModelError, match=str(tmp_path)):
        LlavaImages.load(model_dir(tmp_path, config, processor))


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        find_model_images(tmp_path)


def test_a_model_without_a_processor_is_refused_by_its_type(tmp_path: Path) -> None:
    config = {"model_type": "internvl_chat", "vision_config": {"image_size": [448, 448]}}
    with pytest.raises(ModelError, match="the processor of this 'internvl_chat' cannot be loaded"):
        find_model_images(model_dir(tmp_path, config, PROCESSOR))


def test_arrays_of_several_shapes_are_joined_with_zeros() -> None:
    ids = np.zeros(1, np.int32)
    first, second = np.ones((1, 2, 3)), np.full((2, 3, 1), 2.0)
    merged = merge_arrays([ProcessedImage(ids, None, {"x": each}) for each in (first, second)])["x"]
    assert merged.shape == (3, 3, 3)
    assert (merged[0, :2] == 1).all()
    assert (merged[1:, :, 0] == 2).all()
    assert merged.sum() == first.sum() + second.sum()
