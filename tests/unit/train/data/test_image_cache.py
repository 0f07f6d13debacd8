"""Tests of processed images and the cache of recent ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from common.data.images import load_image
from common.data.samples import ImageRef
from common.errors import DataError
from tests.support.models import tiny_causal_lm, tiny_llava
from train.data.image_cache import ImageCache, ImageRequest

IMAGE_BYTES = 3 * 56 * 56 * 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    tiny_llava(root / "model", num_layers=1)
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 30), colour).save(root / f"{number}.png")
    return root


def pixels(images: ImageCache, root: Path, *numbers: int) -> Tensor:
    requests = [ImageRequest(ImageRef(f"{number}.png"), root, "sample 's'") for number in numbers]
    return images.read(requests).tensors["pixel_values"]


def load(root: Path) -> ImageCache:
    images = ImageCache.load(root / "model", "pad")
    assert images is not None
    return images


def test_only_recent_images_are_not_opened_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pixels(load(root), root, 0, 1, 2, 0)
    opened: list[str] = []

    def load_and_record(ref: ImageRef, *args: Any) -> Image.Image:
        opened.append(str(ref.path))
        return load_image(ref, *args)

    monkeypatch.setattr("train.data.image_cache.load_image", load_and_record)
    monkeypatch.setattr("train.data.image_cache._MAX_CACHED_BYTES", 2 * IMAGE_BYTES)
    images = load(root)
    assert torch.equal(pixels(images, root, 0, 1, 2, 0), expected)
    assert opened == ["0.png", "1.png", "2.png"]
    # Image 1 was used least recently and is the one that was dropped.
    assert torch.equal(pixels(images, root, 2, 0), expected[2:])
    assert torch.equal(pixels(images, root, 1), expected[1:2])
    assert opened == ["0.png", "1.png", "2.png", "1.png"]


def test_a_dummy_image_has_the_shape_of_a_real_one(root: Path) -> None:
    images = load(root)
    assert images.dummy().tensors["pixel_values"].shape == pixels(images, root, 0).shape == (1, 3, 56, 56)
    assert [len(ids) for ids in images.dummy().token_ids] == [16]
    assert images.check(ImageRequest(ImageRef("0.png"), root, "sample 's'")) == 16


def test_a_processor_that_runs_out_of_memory_names_the_samples(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load(root)

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("common.data.model_images.LlavaImages.process", fail)
    with pytest.raises(DataError, match=r"^sample 's': the image processor takes more memory than there is"):
        pixels(images, root, 0)


def test_a_text_model_has_no_image_processor(tmp_path: Path) -> None:
    assert ImageCache.load(tiny_causal_lm(tmp_path, num_layers=1), "pad") is None
