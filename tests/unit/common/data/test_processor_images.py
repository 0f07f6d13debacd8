"""Tests of images as the processors of other models than LLaVA take them."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from common.data.model_images import find_model_images
from common.errors import DataError
from demo.families import FAMILIES, build_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["qwen2.5-vl", "internvl", "gemma4", "smolvlm"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a model whose processor counts rightly (twice), leaves out two tokens, and does not count at all."""
    path = tmp_path_factory.mktemp("family")
    build_model(FAMILIES[request.param], path, ["What is in the picture?", "A red circle."], seed=0)
    return path


def test_the_number_of_tokens_by_size_is_that_of_the_processed_image(family: Path) -> None:
    images = find_model_images(family)
    assert images is not None
    assert images.tokens_per_image is None
    assert images.default_aspect_ratio == "keep"
    for size in [(28, 28), (300, 20), (33, 210), (640, 480)]:
        processed = images.process(Image.new("RGB", size, "red"), "here")
        assert images.count_tokens(*size, "here") == len(processed.token_ids)
        assert processed.num_bytes == sum(array.nbytes for array in processed.arrays.values()) > 0
        if processed.token_types is not None:
            # Gemma 4 puts a token of text before and after.
            around = int(processed.token_ids[0] != processed.token_ids[1]) if len(processed.token_ids) > 2 else 0
            inside = len(processed.token_ids) - 2 * around
            assert processed.token_types.tolist() == [0] * around + [1] * inside + [0] * around


def test_the_fingerprint_is_that_of_the_whole_processor(family: Path, tmp_path: Path) -> None:
    found = find_model_images(family)
    assert found is not None
    changed = Path(shutil.copytree(family, tmp_path / "changed"))
    name = next(name for name in ("preprocessor_config.json", "processor_config.json") if (changed / name).is_file())
    settings = json.loads((changed / name).read_text())
    assert find_model_images(changed).sha256 == found.sha256  # type: ignore[union-attr]
    settings.get("image_processor", settings)["image_mean"] = [0.1, 0.2, 0.3]
    (changed / name).write_text(json.dumps(settings))
    assert find_model_images(changed).sha256 != found.sha256  # type: ignore[union-attr]


def test_an_image_that_the_processor_cannot_take_is_named(tmp_path: Path) -> None:
    build_model(FAMILIES["qwen2.5-vl"], tmp_path, ["text"], seed=0)
    images = find_model_images(tmp_path)
    assert images is not None
    for attempt in (
        lambda: images.count_tokens(9000, 28, "here"),
        lambda: images.process(Image.new("RGB", (9000, 28)), "here"),
    ):
        with pytest.raises(DataError, match=r"^here: the model's processor cannot take this image \(.*ratio"):
            attempt()
