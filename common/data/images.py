"""Reading of images.

Teacher and student must see the same picture, so both get it from `load_image`: for LLaVA padded to a square with the
image processor's mean colour, as LLaVA-1.5 and LLaVA-MoD train, for others as it is. Each model's own processor resizes
and normalises it (common/data/model_images.py).

A file is opened only if it is a regular one of a format in `FORMATS`, and decoded only if what is made of it is within
`MAX_PIXELS`.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from common.data.samples import ImageRef
from common.errors import DataError, ModelError, StorageError
from common.storage.files import Location, find_special_kind, is_file, list_files, read_bytes

AspectRatio = Literal["pad", "keep"]

# Images are refused before they are decoded if more pixels than this are made of them, because a small file can
# decompress, or be padded, to any size.
MAX_PIXELS = 100_000_000

# An image that is not padded is scaled by its shorter side, to 336 or 384 pixels, before it is cropped. At this ratio
# of its sides that makes at most 74 million pixels.
MAX_KEPT_RATIO = 500

# Pillow's names. Other formats are never opened, because some start programs: EPS starts Ghostscript. "JPEG" includes
# MPO, the JPEGs of phones with more than one picture. AVIF needs Pillow 11.3.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")

_GREY_OF_MANY_LEVELS = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_TIFF_BITS_PER_SAMPLE, _TIFF_PHOTOMETRIC = 258, 262


@dataclass(frozen=True)
class LinkedImageRoot:
    """A local image root whose symbolic links are followed, also out of it."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


ImageRoot = Location | LinkedImageRoot


def image_root_of(location: Location | None, follow_symlinks: bool) -> ImageRoot | None:
    """Returns the image root at a location. Object stores have no links."""
    return LinkedImageRoot(location) if follow_symlinks and isinstance(location, Path) else location


def load_image(
    ref: ImageRef,
    image_root: ImageRoot | None,
    aspect_ratio: AspectRatio,
    mean_rgb: tuple[int, int, int],
    where: str,
) -> Image.Image:
    """Opens an image as RGB; "pad" puts it into the middle of a square of the colour `mean_rgb`.

    Transparency is dropped and EXIF rotation is not applied, as when LLaVA was trained. Of an animation the first frame
    is taken. Greyscale of more than 8 bits is scaled by the full scale of its range (`_to_8_bit`).

    Raises:
        DataError: the image is missing, unreadable, too large, of another format, no regular file, or outside
            `image_root`. No other image replaces it.
        StorageError: the store failed.
    """
    source = _open_source(ref, image_root, where)
    with _image_errors(ref, where):
        with open_image(source) as opened:
            _check_size(opened, aspect_ratio, ref, where)
            image = _to_8_bit(opened) if opened.mode in _GREY_OF_MANY_LEVELS else opened
            image = image.convert("RGB")
        return pad_to_square(image, mean_rgb) if aspect_ratio == "pad" else image


def open_image(source: Path | BinaryIO) -> Image.Image:
    """Opens a file of one of `FORMATS`, and reads only its header. Raises whatever Pillow raises."""
    formats = _readable_formats()
    try:
        return Image.open(source, formats=formats)
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError(f"it is none of {', '.join(formats)}, or its header is damaged") from error


def find_size_problem(width: int, height: int, aspect_ratio: AspectRatio) -> str | None:
    """Returns what is wrong with the size of an image, None if nothing is.

    The limit holds for the pixels that are made of the image: under "pad" those of the square.
    """
    longer, shorter = max(width, height), min(width, height)
    size = f"is {width:,} x {height:,}"
    if shorter < 1:
        return f"{size}, expected one pixel at least"
    if width * height > MAX_PIXELS:
        return f"{size}, the limit is {MAX_PIXELS:,} pixels; make it smaller or drop the sample"
    if aspect_ratio == "keep":
        too_long = longer > MAX_KEPT_RATIO * shorter
        limit = f"the longer side may be {MAX_KEPT_RATIO} times the shorter one; crop or pad it or drop the sample"
        return f"{size}, {limit}" if too_long else None
    if longer * longer > MAX_PIXELS:
        return (
            f"{size}, padded to a square {longer:,} x {longer:,}, the limit is {MAX_PIXELS:,} pixels; make it smaller, "
            "crop it or drop the sample"
        )
    return None


def read_image(ref: ImageRef, image_root: ImageRoot | None, where: str) -> ImageRef:
    """Returns the reference with the bytes of the encoded file beside its path.

    Raises:
        DataError: the file is missing, unreadable, no regular file, or outside `image_root`.
        StorageError: the store failed.
    """
    if ref.data is not None:
        return ref
    path = _resolve_path(ref.path, image_root, where)
    _check_regular_file(path, where)
    try:
        return ImageRef(ref.path, read_bytes(path))
    except FileNotFoundError as error:
        raise DataError(f"{where}: image {path} does not exist; check image_root") from error
    except (OSError, MemoryError) as error:
        raise DataError(f"{where}: image {path} {_describe_failure(error)}") from error


def read_image_and_digest(path: str, image_root: ImageRoot | None, where: str) -> tuple[str, bytes]:
    """Returns the SHA-256 (hex) and the bytes of an image's file. Raises DataError or StorageError, as `read_image`."""
    data = read_image(ImageRef(path), image_root, where).data
    assert data is not None
    return hashlib.sha256(data).hexdigest(), data


def check_image(
    ref: ImageRef, image_root: ImageRoot | None, aspect_ratio: AspectRatio, where: str, *, need_size: bool = False
) -> tuple[int, int] | None:
    """Checks that an image is there and what its header says, without decoding it.

    Returns:
        Width and height of what `load_image` makes of it. Of an object in a store it is only checked that it is there,
        and None is returned, unless `need_size`.

    Raises:
        DataError: there is no such file, it is no regular file or outside `image_root`, too large or of another format.
        StorageError: the store failed.
    """
    if ref.data is None:
        path = _resolve_path(ref.path, image_root, where)
        if not isinstance(path, Path):
            if not _object_exists(path):
                raise DataError(f"{where}: image {path} does not exist; check image_root")
            if not need_size:
                return None
    source = _open_source(ref, image_root, where)
    with _image_errors(ref, where), open_image(source) as opened:
        _check_size(opened, aspect_ratio, ref, where)
        width, height = opened.size
    side = max(width, height)
    return (side, side) if aspect_ratio == "pad" else (width, height)


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Centres the image on a square whose side is the image's longer one."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of a model directory.

    Raises:
        ModelError: the file is missing or broken, or holds no object.
    """
    try:
        found = json.loads(read_bytes(path).decode())
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read as JSON ({error}); expected a Hugging Face model directory"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: found a JSON {type(found).__name__}, expected an object")
    return found


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open_source(ref: ImageRef, image_root: ImageRoot | None, where: str) -> io.BytesIO | Path:
    """Returns what Pillow opens: a local path, so that it may read only the header, or the bytes of a file.

    Raises:
        DataError: there is no such file, or no regular one. StorageError: the store failed.
    """
    if ref.data is not None:
        return io.BytesIO(ref.data)
    path = _resolve_path(ref.path, image_root, where)
    if isinstance(path, Path):
        _check_regular_file(path, where)
        return path
    data = read_image(ref, image_root, where).data
    assert data is not None
    return io.BytesIO(data)


@contextlib.contextmanager
def _image_errors(ref: ImageRef, where: str) -> Iterator[None]:
    """Turns whatever Pillow's readers raise into a DataError that names the image."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{where}: image {ref} {_describe_failure(error)}") from error


def _check_size(opened: Image.Image, aspect_ratio: AspectRatio, ref: ImageRef, where: str) -> None:
    if problem := find_size_problem(opened.width, opened.height, aspect_ratio):
        raise DataError(f"{where}: image {ref} {problem}")


def _to_8_bit(opened: Image.Image) -> Image.Image:
    """Scales greyscale of more than 8 bits so that the full scale of its range becomes 255, rounded.

    The full scale is 65,535 for 16 bits and 4,095 for 12. For 32-bit and for signed integers it is 255 if no value
    exceeds that, else 65,535 (32,767 for signed 16 bits). For floats it is 1.0 if no value exceeds that, and 255 if the
    largest is 2 to 255. In a TIFF in which 0 is white the result is inverted, as Pillow does for 8 bits alone.

    Raises:
        ValueError: a value is negative or not finite, or no such range holds the values.
    """
    values = np.asarray(opened)
    lowest, highest = float(values.min()), float(values.max())
    full_scale = _find_full_scale(opened, highest)
    # Not a number compares false.
    if full_scale is None or not 0 <= lowest <= highest <= full_scale:
        kind, expected = ("float", "0 to 1 or 0 to 255") if opened.mode == "F" else ("integer", "0 to 65,535")
        raise ValueError(f"{kind} greyscale from {lowest:,.7g} to {highest:,.7g}, expected values of {expected}")
    if opened.mode == "F":
        grey = _round(values * np.float32(255 / full_scale))
    else:
        grey = _round(np.arange(int(full_scale) + 1) * (255 / full_scale))[values]
    return Image.fromarray(255 - grey if _tiff_tag(opened, _TIFF_PHOTOMETRIC) == 0 else grey)


def _round(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    rounded: npt.NDArray[np.uint8] = np.rint(values, out=values).astype(np.uint8)
    return rounded


def _find_full_scale(opened: Image.Image, highest: float) -> float | None:
    """Returns the value that is white, None if that is not known; `highest` is the largest value of the image."""
    bits = _tiff_tag(opened, _TIFF_BITS_PER_SAMPLE)
    if opened.mode == "F":
        # Between 1 and 2 it is an overshoot of the one range or next to black in the other.
        return 1.0 if highest <= 1 else 255.0 if 2 <= highest <= 255 else None
    if opened.mode != "I" or opened.format != "TIFF":
        return 4095.0 if bits == 12 else 65535.0
    if highest <= 255:
        return 255.0
    return 32767.0 if bits == 16 else 65535.0


def _tiff_tag(opened: Image.Image, tag: int) -> int | None:
    """Returns the first value of an integer tag; None for an image that is no TIFF or has no such tag."""
    value = getattr(opened, "tag_v2", {}).get(tag)
    return value[0] if isinstance(value, tuple) else value


def _describe_failure(error: Exception) -> str:
    """Returns what an error of reading or decoding means for an image, and what to do."""
    if isinstance(error, MemoryError):
        return "takes more memory than there is; free some, make the image smaller or drop the sample"
    if isinstance(error, Image.DecompressionBombError):
        return f"is too large ({error}); the limit is {MAX_PIXELS:,} pixels; make it smaller or drop the sample"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read ({error.strerror}); check the file and its permissions"
    return f"cannot be decoded ({error}); convert it, replace it or drop the sample"


def _check_regular_file(path: Location, where: str) -> None:
    """Checks that a local path names a regular file, without opening it. Raises DataError."""
    if not isinstance(path, Path):
        return
    try:
        kind = find_special_kind(path)
    except FileNotFoundError as error:
        raise DataError(f"{where}: image {path} does not exist; check image_root") from error
    except StorageError as error:
        raise DataError(f"{where}: image {error}") from error
    if kind is not None:
        raise DataError(f"{where}: image {path} is {kind}; expected a regular file")


def _object_exists(path: Location) -> bool:
    """Returns True if there is such an object.

    It is looked up in a cached listing, because one request for each of a million images would take hours. One that the
    listing lacks is requested, because it may have been added since.
    """
    return path.name in _list_cached(path.parent) or is_file(path)


@functools.lru_cache(maxsize=256)
def _list_cached(directory: Location) -> frozenset[str]:
    return frozenset(list_files(directory))


def _resolve_path(path: str | None, image_root: ImageRoot | None, where: str) -> Location:
    if path is None:
        raise DataError(f"{where}: an image has neither a path nor bytes")
    if image_root is None:
        raise DataError(f"{where}: has image {path}, but no image_root is configured")
    if isinstance(image_root, LinkedImageRoot):
        found = Path(os.path.normpath(image_root.path / path))
        if "\0" in path or not found.is_relative_to(os.path.normpath(image_root.path)):
            raise DataError(
                f"{where}: image {path!r} lies outside image_root {image_root}; only files below it are opened"
            )
        return found
    if not isinstance(image_root, Path):
        parts = path.split("/")
        if ".." in parts or "" in parts or "://" in path or "\0" in path:
            raise DataError(
                f"{where}: image {path!r} is no plain path below image_root {image_root}; only keys below it are read"
            )
        return image_root / path
    try:
        root = image_root.resolve()
        found = (root / path).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # such as for a zero byte or a loop of links
        raise DataError(f"{where}: image {path!r} is not a usable path ({error}); correct it") from error
    if found.is_relative_to(root):
        return found
    if Path(os.path.normpath(root / path)).is_relative_to(root):
        raise DataError(
            f"{where}: image {path} is a symbolic link, or lies behind one, to {found}, outside image_root "
            f"{image_root}; only files below it are opened: set follow_symlinks = true (--follow-symlinks), copy the "
            "files, or set image_root to the folder that the link names"
        )
    raise DataError(f"{where}: image {path} lies outside image_root {image_root}; only files below it are opened")
