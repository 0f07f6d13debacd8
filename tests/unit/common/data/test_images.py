import contextlib
import errno
import functools
import hashlib
import io
import os
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from upath import UPath

from common.data import images
from common.data.images import (
    ImageRoot,
    check_image,
    image_root_of,
    load_image,
    pad_to_square,
    read_image,
    read_image_and_digest,
)
from common.data.samples import ImageRef
from common.errors import DataError

MEAN = (122, 116, 104)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def load_pixels(data: bytes) -> np.ndarray:
    return np.asarray(load_image(ImageRef(None, data), None, "keep", MEAN, "here"))


def error_message(ref: ImageRef, root: ImageRoot | None = None) -> str:
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


def scaled(values: npt.NDArray[Any], full_scale: float) -> npt.NDArray[np.uint8]:
    """Computes the right grey levels, as RGB."""
    grey = np.array([[round(255 * float(value) / full_scale) for value in row] for row in values], np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def tiff(values: npt.NDArray[Any], bits: int, sample_format: int, photometric: int = 1, order: str = "<") -> bytes:
    """Makes an uncompressed greyscale TIFF; sample formats are 1 unsigned, 2 signed, 3 float."""
    body = values.tobytes()
    tags = [
        (256, values.shape[1]),
        (257, values.shape[0]),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8),
        (277, 1),
        (278, values.shape[0]),
        (279, len(body)),
        (339, sample_format),
    ]
    # A SHORT stands in the first two of the four bytes of a value.
    entries = b"".join(struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4)
    return magic + struct.pack(order + "I", 8 + len(body)) + body + directory


LEVELS_16 = np.array([[0, 1, 128, 129], [257, 32_767, 65_406, 65_535]])
LEVELS_FLOAT = np.array([[0, 0.001, 0.25, 0.5], [0.499, 0.75, 0.999, 1]], np.float32)


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.fromarray(LEVELS_16.astype(np.uint16)), "PNG"),
        encoded(Image.fromarray(LEVELS_16.astype(np.uint16)), "TIFF"),
        encoded(Image.fromarray(LEVELS_16.astype(np.int32)), "TIFF"),
        encoded(Image.fromarray(LEVELS_16.astype(np.uint16)), "PPM"),
        tiff(LEVELS_16.astype(">u2"), 16, 1, order=">"),
        tiff(LEVELS_16.astype("<u4"), 32, 1),
        tiff((65_535 - LEVELS_16).astype("<u2"), 16, 1, photometric=0),
    ],
    ids=["png", "tiff", "tiff int32", "ppm", "tiff big-endian", "tiff uint32", "tiff white is 0"],
)
def test_grey_of_16_bits_is_scaled_by_65535(data: bytes) -> None:
    np.testing.assert_array_equal(load_pixels(data), scaled(LEVELS_16, 65_535))


def test_dark_grey_of_16_bits_stays_dark() -> None:
    dark = np.array([[0, 100, 255]], np.uint16)
    for form in ("PNG", "TIFF", "PPM"):
        assert load_pixels(encoded(Image.fromarray(dark), form))[0, :, 0].tolist() == [0, 0, 1]


def test_other_integers_are_scaled_by_the_range_that_holds_them() -> None:
    small = np.array([[0, 3, 128, 255]])
    np.testing.assert_array_equal(
        load_pixels(encoded(Image.fromarray(small.astype(np.int32)), "TIFF")), scaled(small, 255)
    )
    np.testing.assert_array_equal(load_pixels(tiff(small.astype("<i2"), 16, 2)), scaled(small, 255))
    signed = np.array([[0, 300, 16_000, 32_767]])
    np.testing.assert_array_equal(load_pixels(tiff(signed.astype("<i2"), 16, 2)), scaled(signed, 32_767))
    # Two values of 12 bits lie in three bytes.
    twelve = np.array([[0, 4095, 2048, 17]])
    packed = np.array([[0x00, 0x0F, 0xFF, 0x80, 0x00, 0x11]], np.uint8)
    data = bytearray(tiff(packed, 12, 1))
    data[data.index(struct.pack("<HHIH", 256, 3, 1, 6)) + 8] = 4
    np.testing.assert_array_equal(load_pixels(bytes(data)), scaled(twelve, 4095))


def test_float_grey_is_scaled_by_1_or_by_255() -> None:
    def load_float(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        return load_pixels(encoded(Image.fromarray(values.astype(np.float32)), "TIFF"))

    np.testing.assert_array_equal(load_float(LEVELS_FLOAT), scaled(LEVELS_FLOAT, 1))
    np.testing.assert_array_equal(load_float(LEVELS_FLOAT * 0.5), scaled(LEVELS_FLOAT * 0.5, 1))
    np.testing.assert_array_equal(load_float(LEVELS_FLOAT * 255), scaled(LEVELS_FLOAT * 255, 255))
    white_is_0 = tiff(LEVELS_FLOAT.astype("<f4"), 32, 3, photometric=0)
    np.testing.assert_array_equal(load_pixels(white_is_0), 255 - scaled(LEVELS_FLOAT, 1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([[-1, 5]], np.int32), "integer greyscale from -1 to 5, expected values of 0 to 65,535"),
        (np.array([[0, 65_536]], np.int32), "integer greyscale from 0 to 65,536, expected values of 0 to 65,535"),
        (np.array([[0, 1.5]], np.float32), "float greyscale from 0 to 1.5, expected values of 0 to 1 or 0 to 255"),
        (np.array([[0, 255.5]], np.float32), "float greyscale from 0 to 255.5, expected"),
        (np.array([[-0.25, 1]], np.float32), "float greyscale from -0.25 to 1, expected"),
        (np.array([[0, np.nan]], np.float32), "float greyscale from nan to nan, expected"),
        (np.array([[0, np.inf]], np.float32), "float greyscale from 0 to inf, expected"),
    ],
)
def test_grey_without_a_known_full_scale_is_refused(values: npt.NDArray[Any], message: str) -> None:
    assert message in error_message(ImageRef("x.tif", encoded(Image.fromarray(values), "TIFF")))


def test_what_transparency_hides_keeps_its_colours() -> None:
    # Black text on transparent black has no pixel but black ones, as LLaVA's training saw it: nothing is put behind.
    for mode, colour in (("RGBA", (0, 0, 0)), ("LA", (0,))):
        picture = Image.new(mode, (4, 2), (*colour, 0))
        picture.putpixel((1, 1), (*colour, 255))
        assert not load_pixels(encoded(picture)).any()


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
    for path in ("../images-private/x.png", str(secret), "folder/../../images-private/x.png"):
        assert f"image {path} lies outside image_root {root}" in error_message(ImageRef(path), root)
    for path in ("link.png", "folder/x.png", "folder/nothing.png"):
        message = error_message(ImageRef(path), root)
        assert f"{path} is a symbolic link, or lies behind one, to {beside}/" in message
        assert f"outside image_root {root}" in message
        assert "set follow_symlinks = true" in message
    # Links may be followed; a path may not lead out by itself.
    followed = image_root_of(root, True)
    for path in ("link.png", "folder/x.png", f"{root}/link.png"):
        assert read_image(ImageRef(path), followed, "here").data == secret.read_bytes()
        check_image(ImageRef(path), followed, "pad", "here")
    for path in ("../images-private/x.png", str(secret), "folder/../../images-private/x.png", "a\0b"):
        assert "lies outside image_root" in error_message(ImageRef(path), followed)


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
    message = error_message(ImageRef("x", data))
    assert "image x cannot be decoded (it is none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM, " in message
    assert " object at " not in message


def test_a_format_that_starts_a_program_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    for name in ("x.jpg", "x.eps"):
        (tmp_path / name).write_bytes(text)
        assert "is none of JPEG" in error_message(ImageRef(name), tmp_path)
    assert "is none of JPEG" in error_message(ImageRef("x.jpg", text))
    assert "is none of JPEG" in error_message(ImageRef("x.ico", encoded(Image.new("RGB", (16, 16)), "ICO")))


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_each_format_is_read_whatever_its_name(tmp_path: Path, form: str) -> None:
    (tmp_path / "x.eps").write_bytes(encoded(Image.new("RGB", (4, 2), (250, 0, 0)), form))
    pixels = np.asarray(load_image(ImageRef("x.eps"), tmp_path, "keep", MEAN, "here"))
    assert np.allclose(pixels, (250, 0, 0), atol=6)


@contextlib.contextmanager
def special_file(path: Path, kind: str) -> Iterator[None]:
    """Makes a file of a kind that no image has."""
    if kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        if kind == "socket":
            server.bind(path.name)
        yield


check_padded = functools.partial(check_image, aspect_ratio="pad")


@pytest.mark.parametrize("kind", ["directory", "FIFO", "socket", "device"])
def test_what_is_no_regular_file_is_refused_unopened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with special_file(tmp_path / "x.png", kind):
        # A device below the root cannot be made without privileges; one behind a link lies outside of it.
        root = Path("/") if kind == "device" else tmp_path
        ref = ImageRef(str((tmp_path / "x.png").relative_to(root)))
        monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("it was opened"))
        assert f"is a {kind}; expected a regular file" in error_message(ref, root)
        for call in (read_image, check_padded):
            with pytest.raises(DataError, match=f"here: image .* is a {kind}; expected a regular file"):
                call(ref, root, where="here")


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENAMETOOLONG, errno.EIO])
def test_a_look_up_that_fails_names_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    look_up = Path.stat

    def fail(path: Path, **options: Any) -> os.stat_result:
        if path.name == "x.png":
            raise OSError(code, os.strerror(code), str(path))
        return look_up(path, **options)

    monkeypatch.setattr(Path, "stat", fail)
    for call in (check_padded, read_image):
        with pytest.raises(DataError, match=rf"here: image .*x\.png: cannot be looked up \({os.strerror(code)}\)"):
            call(ImageRef("x.png"), tmp_path, where="here")
    assert os.strerror(code) in error_message(ImageRef("x.png"), tmp_path)


def test_a_name_that_no_file_can_have_names_the_sample(tmp_path: Path) -> None:
    for path in ("a\0b.png", "x" * 5000, "x" * 300 + ".png"):
        for call in (check_padded, read_image):
            with pytest.raises(DataError, match=r"^here: image "):
                call(ImageRef(path), tmp_path, where="here")
    for call in (check_padded, read_image):
        with pytest.raises(DataError, match=r"^here: image "):
            call(ImageRef("x.png"), Path("a\0b"), where="here")


def test_a_file_that_does_not_fit_into_memory_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(b"")

    def fail(_: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DataError, match=r"here: image .*x\.png takes more memory than there is"):
        read_image(ImageRef("x.png"), tmp_path, "here")


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(encoded(Image.new("RGB", (1, 1))))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("PIL.Image.open", fail)
    assert "image x.png cannot be read (Input/output error); check the file" in error_message(
        ImageRef("x.png"), tmp_path
    )


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
    monkeypatch.setattr(images, "MAX_PIXELS", 9)
    assert load_image(ImageRef("x", data), None, "pad", MEAN, "here").size == (3, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 8)
    assert "x is 3 x 2, padded to a square 3 x 3, the limit is 8 pixels" in error_message(ImageRef("x", data))
    monkeypatch.setattr(images, "MAX_PIXELS", 6)
    assert load_image(ImageRef("x", data), None, "keep", MEAN, "here").size == (3, 2)
    monkeypatch.setattr(images, "MAX_PIXELS", 5)
    assert "x is 3 x 2, the limit is 5" in error_message(ImageRef("x", data))


def test_padding_counts_before_anything_is_decoded_or_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "pad_to_square", lambda *_: pytest.fail("memory was taken"))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("the image was decoded"))
    for width, height in ((60_000, 1), (1, 60_000), (1_242, 26_000), (10_001, 9)):
        side = max(width, height)
        message = f"is {width:,} x {height:,}, padded to a square {side:,} x {side:,}, the limit is 100,000,000 pixels"
        assert message in error_message(ImageRef("x", png_of_claimed_size(width, height)))


def test_an_unpadded_image_may_not_be_too_long_for_a_processor_that_scales_its_shorter_side() -> None:
    for size in ((500, 1), (1, 500)):
        data = encoded(Image.new("RGB", size))
        assert load_image(ImageRef("x", data), None, "keep", MEAN, "here").size == size
    for width, height in ((501, 1), (2, 1001), (60_000, 1)):
        with pytest.raises(
            DataError, match=f"here: image x is {width:,} x {height:,}, the longer side may be 500 times"
        ):
            load_image(ImageRef("x", png_of_claimed_size(width, height)), None, "keep", MEAN, "here")


@pytest.mark.parametrize("step", ["PIL.Image.Image.convert", "common.data.images.pad_to_square"])
def test_an_image_for_which_memory_does_not_suffice_is_named(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    data = encoded(Image.new("RGB", (3, 2)))
    monkeypatch.setattr(step, fail)
    assert "image x.png takes more memory than there is" in error_message(ImageRef("x.png", data))


def test_an_encoded_file_is_read_unchanged_with_its_digest(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"any bytes")
    assert read_image(ImageRef("x.png"), tmp_path, "here") == ImageRef("x.png", b"any bytes")
    assert read_image(ImageRef("x.png", b"other"), tmp_path, "here") == ImageRef("x.png", b"other")
    digest = hashlib.sha256(b"any bytes").hexdigest()
    assert read_image_and_digest("x.png", tmp_path, "here") == (digest, b"any bytes")
    with pytest.raises(DataError, match=r"here: image .*y\.png does not exist; check image_root"):
        read_image(ImageRef("y.png"), tmp_path, "here")


def test_an_image_of_a_store_may_appear_after_its_directory_was_listed() -> None:
    root = UPath(f"memory://{uuid4()}")
    (root / "a" / "x.png").write_bytes(encoded(Image.new("RGB", (1, 1), (5, 6, 7))))
    check_image(ImageRef("a/x.png"), root, "pad", "here")
    with pytest.raises(DataError, match=r"here: image .*a/y\.png does not exist"):
        check_image(ImageRef("a/y.png"), root, "pad", "here")
    (root / "a" / "y.png").write_bytes(b"late")
    check_image(ImageRef("a/y.png"), root, "pad", "here")
    with pytest.raises(DataError, match="here: image of 5 bytes inside the dataset cannot be decoded"):
        check_image(ImageRef(None, b"bytes"), None, "pad", "here")
    assert load_image(ImageRef("a/x.png"), root, "keep", MEAN, "here").getpixel((0, 0)) == (5, 6, 7)


@pytest.mark.parametrize("path", ["../x.png", "a/../../x.png", "/x.png", "memory://other/x.png", "a//x.png", "a\0.png"])
def test_no_path_leaves_the_image_root_of_a_store(path: str) -> None:
    with pytest.raises(DataError, match=r"here: image .* is no plain path below image_root"):
        load_image(ImageRef(path), UPath("memory://images"), "pad", MEAN, "here")
