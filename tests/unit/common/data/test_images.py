import hashlib
import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from upath import UPath

from common.data import images
from common.data.images import (
    ImageSpec,
    check_image_exists,
    load_image,
    pad_to_square,
    read_image,
    read_image_and_digest,
)
from common.data.samples import ImageRef
from common.errors import DataError, ModelError

MEAN = (122, 116, 104)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def load_pixels(data: bytes) -> np.ndarray:
    return np.asarray(load_image(ImageRef(None, data), None, "keep", MEAN, "here"))


def error_message(ref: ImageRef, root: Path | None = None) -> str:
    with pytest.raises(DataError) as caught:
        load_image(ref, root, "pad", MEAN, "sample 'x'")
    assert str(caught.value).startswith("sample 'x': ")
    return str(caught.value)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_padding_centres_the_picture_on_the_colour_as_llava_does(width: int, height: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    # As LLaVA does: a square of the background colour; the short side starts at half of the difference, rounded down.
    side = max(width, height)
    expected = np.empty((side, side, 3), np.uint8)
    for y in range(side):
        for x in range(side):
            row, column = y - (side - height) // 2, x - (side - width) // 2
            inside = 0 <= row < height and 0 <= column < width
            expected[y, x] = pixels[row, column] if inside else MEAN
    np.testing.assert_array_equal(np.asarray(pad_to_square(Image.fromarray(pixels), MEAN)), expected)


def test_pad_pads_and_keep_keeps() -> None:
    data = encoded(Image.new("RGB", (4, 2), (1, 2, 3)))
    padded = load_image(ImageRef(None, data), None, "pad", MEAN, "here")
    assert (padded.mode, padded.size, padded.getpixel((0, 0))) == ("RGB", (4, 4), MEAN)
    assert load_image(ImageRef(None, data), None, "keep", MEAN, "here").size == (4, 2)


def test_every_colour_mode_becomes_rgb() -> None:
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    thrice = np.repeat(grey[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(load_pixels(encoded(Image.fromarray(grey, "L"))), thrice)
    one_bit = np.where(grey > 100, 255, 0).astype(np.uint8)
    np.testing.assert_array_equal(
        load_pixels(encoded(Image.fromarray(grey > 100))), np.repeat(one_bit[:, :, None], 3, axis=2)
    )
    colour = np.random.default_rng(0).integers(0, 256, (2, 3, 4), dtype=np.uint8)
    np.testing.assert_array_equal(load_pixels(encoded(Image.fromarray(colour, "RGBA"))), colour[:, :, :3])
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 9, 8, 7])
    variants: list[dict[str, Any]] = [{}, {"transparency": 1}]
    for options in variants:
        assert load_pixels(encoded(palette, **options)).tolist() == [[[255, 0, 0], [0, 255, 0], [9, 8, 7]]]


def test_exif_rotation_is_not_applied_as_in_llava() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)
    assert load_image(ImageRef(None, data), None, "keep", MEAN, "here").size == (4, 2)


def test_a_file_below_the_root_opens_also_through_links_inside_it(tmp_path: Path) -> None:
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "a" / "ü.png").write_bytes(encoded(Image.new("RGB", (1, 1), (5, 6, 7))))
    (root / "link.png").symlink_to("a/ü.png")
    (tmp_path / "root").symlink_to(root)
    for base, path in ((root, "a/ü.png"), (root, "a/../link.png"), (tmp_path / "root", "link.png")):
        assert load_image(ImageRef(path), base, "pad", MEAN, "here").getpixel((0, 0)) == (5, 6, 7)


def test_no_path_leaves_the_image_root(tmp_path: Path) -> None:
    root, beside = tmp_path / "images", tmp_path / "images-private"
    root.mkdir()
    beside.mkdir()
    secret = beside / "x.png"
    secret.write_bytes(encoded(Image.new("RGB", (1, 1))))
    (root / "link.png").symlink_to(secret)
    (root / "folder").symlink_to(beside)
    for path in ("../images-private/x.png", str(secret), "link.png", "folder/x.png", "folder/../images-private/x.png"):
        assert "outside image_root" in error_message(ImageRef(path), root), path


def test_a_reference_that_names_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "no image_root" in error_message(ImageRef("x.png"))
    assert "neither a path nor bytes" in error_message(ImageRef(None), tmp_path)
    assert "does not exist" in error_message(ImageRef("x.png"), tmp_path)
    for path in ("", "a\0b", "loop", "loop/x.png", "x" * 5000):
        error_message(ImageRef(path), tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"])
def test_damaged_files_are_refused_or_decoded_and_never_crash(form: str) -> None:
    rng = np.random.default_rng(1)
    whole = encoded(Image.fromarray(rng.integers(0, 256, (16, 11, 3), dtype=np.uint8)), form)
    assert "cannot be decoded" in error_message(ImageRef("x", whole[: len(whole) // 2]))
    for _ in range(60):
        data = bytearray(whole)
        data[rng.integers(len(data) if rng.random() < 0.5 else 100)] ^= 1 << int(rng.integers(8))
        try:
            load_image(ImageRef("x", bytes(data)), None, "keep", MEAN, "here")
        except DataError as error:
            assert str(error).startswith("here: image x")


@pytest.mark.parametrize("data", [b"", b"not an image", b"<svg/>"])
def test_bytes_that_are_no_image_are_refused(data: bytes) -> None:
    assert "cannot be decoded" in error_message(ImageRef("x", data))


def png_of_claimed_size(width: int, height: int) -> bytes:
    """Makes a PNG of about 60 bytes whose header claims this size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_001, 60_000])
def test_a_picture_over_the_pixel_limit_is_refused_before_it_is_decoded(side: int) -> None:
    assert "pixels" in error_message(ImageRef("x", png_of_claimed_size(side, side)))


def test_the_pixel_limit_is_inclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (3, 2)))
    monkeypatch.setattr(images, "MAX_PIXELS", 6)
    assert load_image(ImageRef("x", data), None, "keep", MEAN, "here").size == (3, 2)
    monkeypatch.setattr(images, "MAX_PIXELS", 5)
    assert "x is 3 x 2, the limit is 5" in error_message(ImageRef("x", data))


CLIP = {"image_size": 336, "patch_size": 14}
PROCESSOR = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "size": {"shortest_edge": 336}}


def model_dir(directory: Path, config: dict[str, Any], processor: Any, name: str = "preprocessor_config.json") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
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
    spec = ImageSpec.load(model_dir(tmp_path, {"vision_config": vision, **strategy}, PROCESSOR))
    assert spec is not None
    assert spec.tokens_per_image == tokens
    assert spec.mean_rgb == MEAN


def test_both_layouts_of_the_processor_give_the_same_spec(tmp_path: Path) -> None:
    config = {"vision_config": CLIP}
    separate = ImageSpec.load(model_dir(tmp_path / "a", config, PROCESSOR | {"processor_class": "LlavaProcessor"}))
    joined = {"processor_class": "LlavaProcessor", "patch_size": 14, "image_processor": PROCESSOR}
    assert ImageSpec.load(model_dir(tmp_path / "b", config, joined, "processor_config.json")) == separate


def test_the_fingerprint_sees_each_setting_that_changes_pixels(tmp_path: Path) -> None:
    variants = [PROCESSOR, PROCESSOR | {"do_resize": False}, PROCESSOR | {"image_mean": [0.5, 0.5, 0.5]}]
    specs = [ImageSpec.load(model_dir(tmp_path, {"vision_config": CLIP}, variant)) for variant in variants]
    assert len({spec.sha256 for spec in specs if spec}) == 3
    assert specs[2] is not None
    assert specs[2].mean_rgb == (127, 127, 127)


def test_a_text_model_has_no_image_spec(tmp_path: Path) -> None:
    assert ImageSpec.load(model_dir(tmp_path, {"model_type": "qwen2"}, None)) is None


@pytest.mark.parametrize("config", [{"vision_config": {"image_size": 336}}, {"vision_config": CLIP}])
def test_an_incomplete_model_directory_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    processor = PROCESSOR if len(config["vision_config"]) == 1 else None
    with pytest.raises(ModelError, match=str(tmp_path)):
        ImageSpec.load(model_dir(tmp_path, config, processor))


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff"])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        ImageSpec.load(tmp_path)


def test_an_encoded_file_is_read_unchanged_with_its_digest(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"any bytes")
    assert read_image(ImageRef("x.png"), tmp_path, "here") == ImageRef("x.png", b"any bytes")
    assert read_image(ImageRef("x.png", b"other"), tmp_path, "here") == ImageRef("x.png", b"other")
    digest = hashlib.sha256(b"any bytes").hexdigest()
    assert read_image_and_digest("x.png", tmp_path, "here") == (digest, b"any bytes")
    with pytest.raises(DataError, match=r"here: image .*y\.png does not exist; check image_root"):
        read_image(ImageRef("y.png"), tmp_path, "here")
    with pytest.raises(DataError, match=r"here: image .* cannot be read \(Is a directory\)"):
        read_image(ImageRef("."), tmp_path, "here")


def test_an_image_of_a_store_may_appear_after_its_directory_was_listed() -> None:
    root = UPath(f"memory://{uuid4()}")
    (root / "a" / "x.png").write_bytes(encoded(Image.new("RGB", (1, 1), (5, 6, 7))))
    check_image_exists(ImageRef("a/x.png"), root, "here")
    with pytest.raises(DataError, match=r"here: image .*a/y\.png does not exist"):
        check_image_exists(ImageRef("a/y.png"), root, "here")
    (root / "a" / "y.png").write_bytes(b"late")
    check_image_exists(ImageRef("a/y.png"), root, "here")
    check_image_exists(ImageRef(None, b"bytes need no file"), None, "here")
    assert load_image(ImageRef("a/x.png"), root, "keep", MEAN, "here").getpixel((0, 0)) == (5, 6, 7)


@pytest.mark.parametrize("path", ["../x.png", "a/../../x.png", "/x.png", "memory://other/x.png", "a//x.png", "a\0.png"])
def test_no_path_leaves_the_image_root_of_a_store(path: str) -> None:
    with pytest.raises(DataError, match=r"here: image .* is no plain path below image_root"):
        load_image(ImageRef(path), UPath("memory://images"), "pad", MEAN, "here")
