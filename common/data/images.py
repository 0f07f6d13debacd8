"""Reading of images, and the facts of a model's image processor that data preparation needs.

Teacher and student must see the same picture, so both get it from `load_image`: by default padded to a square with
the image processor's mean colour, as LLaVA-1.5 and LLaVA-MoD train. Each model's own image processor resizes and
normalises it.
"""

import functools
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from common.data.samples import ImageRef
from common.errors import DataError, ModelError
from common.storage.files import Location, is_file, list_files, read_bytes

AspectRatio = Literal["pad", "keep"]

# Larger images are refused before they are decoded, because a small file can decompress to any size.
MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class ImageSpec:
    """Facts of an image processor and a vision tower that data preparation needs.

    `tokens_per_image` is the number of placeholders of an image; `mean_rgb` the padding colour in 0..255; `sha256`
    (hex) covers the processor's settings that change pixels.
    """

    tokens_per_image: int
    mean_rgb: tuple[int, int, int]
    sha256: str

    @classmethod
    def load(cls, model_dir: Path) -> "ImageSpec | None":
        """Reads config.json and preprocessor_config.json. Returns None for a model without a vision tower.

        Raises:
            ModelError: one of the files is missing or broken, or the vision tower has no fixed number of tokens.
        """
        config = read_json(model_dir / "config.json")
        vision = config.get("vision_config")
        if vision is None:
            return None
        processor = read_json(_find_processor_file(model_dir))
        processor = processor.get("image_processor", processor)
        try:
            num_patches = (vision["image_size"] // vision["patch_size"]) ** 2
        except KeyError as error:
            raise ModelError(
                f"{model_dir}/config.json: vision_config has no {error}; expected a CLIP-like tower"
            ) from error
        # CLIP puts a class token first, SigLIP does not. "default" drops the first token, "full" keeps all.
        num_class_tokens = 0 if "siglip" in vision.get("model_type", "clip_vision_model") else 1
        num_dropped = 0 if config.get("vision_feature_select_strategy") == "full" else 1
        mean = processor.get("image_mean") or [0.5, 0.5, 0.5]
        relevant = {
            key: value for key, value in processor.items() if key not in ("processor_class", "image_processor_type")
        }
        return cls(
            tokens_per_image=num_patches + num_class_tokens - num_dropped,
            mean_rgb=(int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)),
            sha256=hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest(),
        )


def load_image(
    ref: ImageRef,
    image_root: Location | None,
    aspect_ratio: AspectRatio,
    mean_rgb: tuple[int, int, int],
    where: str,
) -> Image.Image:
    """Opens an image as RGB; "pad" puts it into the middle of a square of the colour `mean_rgb`.

    Transparency is dropped and EXIF rotation is not applied, as when LLaVA was trained.

    Raises:
        DataError: the image is missing, unreadable, too large, or outside `image_root`. No other image replaces it.
        StorageError: the store failed.
    """
    source = None if ref.data is not None else _resolve_path(ref.path, image_root, where)
    try:
        with Image.open(_open_source(ref, source)) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DataError(
                    f"{where}: image {ref.path} is {opened.width} x {opened.height}, the limit is {MAX_PIXELS:,} pixels"
                )
            image = opened.convert("RGB")
    except FileNotFoundError as error:
        raise DataError(f"{where}: image {source} does not exist; check image_root") from error
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{where}: image {ref.path} cannot be decoded ({error}); replace it or drop the sample"
        ) from error
    return pad_to_square(image, mean_rgb) if aspect_ratio == "pad" else image


def read_image(ref: ImageRef, image_root: Location | None, where: str) -> ImageRef:
    """Returns the reference with the bytes of the encoded file beside its path.

    Raises:
        DataError: the file is missing, unreadable, or outside `image_root`.
        StorageError: the store failed.
    """
    if ref.data is not None:
        return ref
    path = _resolve_path(ref.path, image_root, where)
    try:
        return ImageRef(ref.path, read_bytes(path))
    except FileNotFoundError as error:
        raise DataError(f"{where}: image {path} does not exist; check image_root") from error
    except OSError as error:
        raise DataError(f"{where}: image {path} cannot be read ({error.strerror})") from error


def read_image_and_digest(path: str, image_root: Location | None, where: str) -> tuple[str, bytes]:
    """Returns the SHA-256 (hex) and the bytes of an image's file. Raises DataError or StorageError, as `read_image`."""
    data = read_image(ImageRef(path), image_root, where).data
    assert data is not None
    return hashlib.sha256(data).hexdigest(), data


def check_image_exists(ref: ImageRef, image_root: Location | None, where: str) -> None:
    """Checks that the file of an image exists, without reading it.

    Raises:
        DataError: there is no such file, or it lies outside `image_root`.
        StorageError: the store failed.
    """
    if ref.data is None and not _exists(path := _resolve_path(ref.path, image_root, where)):
        raise DataError(f"{where}: image {path} does not exist; check image_root")


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
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read as JSON ({error}); expected a Hugging Face model directory"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{path}: found a JSON {type(found).__name__}, expected an object")
    return found


def _find_processor_file(model_dir: Path) -> Path:
    separate = model_dir / "preprocessor_config.json"
    return separate if separate.is_file() else model_dir / "processor_config.json"


def _open_source(ref: ImageRef, source: Location | None) -> io.BytesIO | Path:
    """Returns what Pillow opens: a local path, so that it may read only the header, or the bytes of an object."""
    if isinstance(source, Path):
        return source
    return io.BytesIO(read_bytes(source) if source is not None else ref.data or b"")


def _exists(path: Location) -> bool:
    """Returns True if there is such a file or object.

    An object is looked up in a cached listing, because one request for each of a million images would take hours. One
    that the listing lacks is requested, because it may have been added since.
    """
    return (not isinstance(path, Path) and path.name in _list_cached(path.parent)) or is_file(path)


@functools.lru_cache(maxsize=256)
def _list_cached(directory: Location) -> frozenset[str]:
    return frozenset(list_files(directory))


def _resolve_path(path: str | None, image_root: Location | None, where: str) -> Location:
    if path is None:
        raise DataError(f"{where}: an image has neither a path nor bytes")
    if image_root is None:
        raise DataError(f"{where}: has image {path}, but no image_root is configured")
    if not isinstance(image_root, Path):
        parts = path.split("/")
        if ".." in parts or "" in parts or "://" in path or "\0" in path:
            raise DataError(
                f"{where}: image {path!r} is no plain path below image_root {image_root}; only keys below it are read"
            )
        return image_root / path
    root = image_root.resolve()
    try:
        found = (root / path).resolve()
    except (ValueError, RuntimeError) as error:  # such as for a zero byte or a loop of links
        raise DataError(f"{where}: image {path!r} is not a usable path ({error}); correct it") from error
    if not found.is_relative_to(root):
        raise DataError(f"{where}: image {path} lies outside image_root {image_root}; only files below it are opened")
    return found
