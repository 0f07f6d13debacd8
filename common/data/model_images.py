"""Images as a model takes them: the tokens that stand for an image, their number, and the tensors beside them.

    find_model_images ─> ModelImages      of a LLaVA, or of any model whose processor transformers loads
        .count_tokens(width, height)      without pixels
        .process(image)                   ─> ProcessedImage
    merge_arrays(processed images)        arrays of all images of a batch

A conversation holds one placeholder an image. Which token that is, what it becomes, and which arrays a model wants
are answers of the model's own processor, so that no family is named here. LLaVA's images all have the same size and
number of tokens, which config.json tells; its directories need no processor beside the image processor.
"""

import functools
import hashlib
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.data.images import AspectRatio, ImageRoot, check_image, read_json
from common.data.samples import IMAGE_MARKER, ImageRef
from common.errors import DataError, ModelError
from common.storage.files import is_file

# Types of models whose images are taken as LLaVA takes them: scaled to one size, with as many tokens each.
_LLAVA_LIKE = ("llava", "clip", "siglip")
_LLAVA_TOWERS = ("clip_vision_model", "siglip_vision_model")

# transformers' default, for a configuration that names no image token.
_LLAVA_IMAGE_TOKEN_ID = 32000

# Keys of a processor's files that do not change what an image becomes.
_NOT_OF_IMAGES = ("processor_class", "image_processor_type", "feature_extractor", "video_processor", "chat_template")

# Sizes (width, height) at which a processor's counting is compared with its processing, see `count_tokens`.
_PROBED_SIZES = ((32, 32), (640, 480), (300, 1000), (1000, 300))

# Errors of transformers' processors for directories and images that they cannot use.
_PROCESSOR_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, IndexError, RuntimeError)


@dataclass(frozen=True)
class ProcessedImage:
    """One image as a model takes it.

    token_ids    int32 [N]: replaces the placeholder
    token_types  int64 [N]: 1 for tokens that the image's features are put in; None for models that want no types
    arrays       what the model's forward takes beside tokens, such as `pixel_values`; the first axis counts images or
                 pieces of them
    """

    token_ids: npt.NDArray[np.int32]
    token_types: npt.NDArray[np.int64] | None
    arrays: dict[str, npt.NDArray[Any]]

    @property
    def num_bytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())


class ModelImages(Protocol):
    """Says how a model takes images."""

    @property
    def placeholder(self) -> str:
        """Returns what stands for an image in the text of a conversation."""

    @property
    def default_aspect_ratio(self) -> AspectRatio:
        """Returns what becomes of an image before the processor gets it, where no choice is configured."""

    @property
    def mean_rgb(self) -> tuple[int, int, int]:
        """Returns the colour of padding, in 0..255."""

    @property
    def sha256(self) -> str:
        """Returns the SHA-256 (hex) of the settings of the whole processor."""

    @property
    def tokens_per_image(self) -> int | None:
        """Returns the number of tokens of any image, None where it depends on its size."""

    @property
    def min_tokens_per_image(self) -> int:
        """Returns the number of tokens of a small image."""

    @property
    def types_argument(self) -> str | None:
        """Returns the name of the argument of the model's forward that takes token types, None if it wants none."""

    def count_tokens(self, width: int, height: int, where: str) -> int:
        """Returns the number of tokens of an image of this size. Raises DataError if the model cannot take it."""

    def process(self, image: Image.Image, where: str) -> ProcessedImage:
        """Returns an RGB image as the model takes it. Raises DataError, which begins with `where`, if it cannot."""


@dataclass(frozen=True)
class LlavaImages:
    """Images of a LLaVA with a tower of one image size, or of a CLIP or SigLIP alone.

    `num_tower_tokens` is the number of all tokens of the tower's hidden states, class token included.
    """

    model_dir: Path
    num_tokens: int
    num_tower_tokens: int
    image_token_id: int
    mean_rgb: tuple[int, int, int]
    sha256: str
    placeholder: ClassVar[str] = IMAGE_MARKER
    default_aspect_ratio: ClassVar[AspectRatio] = "pad"
    types_argument: ClassVar[str | None] = None

    @classmethod
    def load(cls, model_dir: Path) -> "LlavaImages":
        """Reads config.json and preprocessor_config.json.

        Raises:
            ModelError: one of the files is missing or broken, or the model is no LLaVA, CLIP or SigLIP.
        """
        config = read_json(model_dir / "config.json")
        vision = config.get("vision_config") or {}
        if not _is_llava_like(config):
            raise ModelError(
                f"{model_dir}/config.json: found a model of type {config.get('model_type')!r} with a tower of type "
                f"{vision.get('model_type')!r}; expected a LLaVA, CLIP or SigLIP"
            )
        separate = model_dir / "preprocessor_config.json"
        processor = read_json(separate if is_file(separate) else model_dir / "processor_config.json")
        processor = processor.get("image_processor", processor)
        try:
            num_patches = (vision["image_size"] // vision["patch_size"]) ** 2
        except (KeyError, TypeError) as error:
            raise ModelError(
                f"{model_dir}/config.json: vision_config needs image_size and patch_size, one number each ({error})"
            ) from error
        # CLIP puts a class token first, SigLIP does not. "default" drops the first token, "full" keeps all.
        num_class_tokens = 0 if "siglip" in vision.get("model_type", "clip_vision_model") else 1
        num_dropped = 0 if config.get("vision_feature_select_strategy") == "full" else 1
        relevant = {
            key: value for key, value in processor.items() if key not in ("processor_class", "image_processor_type")
        }
        return cls(
            model_dir=model_dir,
            num_tokens=num_patches + num_class_tokens - num_dropped,
            num_tower_tokens=num_patches + num_class_tokens,
            image_token_id=config.get("image_token_id", config.get("image_token_index", _LLAVA_IMAGE_TOKEN_ID)),
            mean_rgb=_mean_rgb(processor.get("image_mean")),
            sha256=_digest(relevant),
        )

    @property
    def tokens_per_image(self) -> int:
        """Returns the number of tokens of any image."""
        return self.num_tokens

    @property
    def min_tokens_per_image(self) -> int:
        """Returns the number of tokens of any image."""
        return self.num_tokens

    def count_tokens(self, width: int, height: int, where: str) -> int:  # noqa: ARG002 - the protocol's signature
        """Returns the number of tokens of any image."""
        return self.num_tokens

    def process(self, image: Image.Image, where: str) -> ProcessedImage:
        """Returns `pixel_values` float32 [1, 3, height, width] with the placeholders of the image."""
        try:
            found = self._image_processor(images=[image], return_tensors="pt")
        except _PROCESSOR_ERRORS as error:
            raise _refused_image(where, error) from error
        ids = np.full(self.num_tokens, self.image_token_id, np.int32)
        return ProcessedImage(ids, None, {"pixel_values": found["pixel_values"].numpy()})

    @functools.cached_property
    def _image_processor(self) -> Any:
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(self.model_dir, local_files_only=True)
        except _PROCESSOR_ERRORS as error:
            raise ModelError(f"{self.model_dir}: its image processor cannot be loaded ({error})") from error


class ProcessorImages:
    """Images of any model whose processor transformers loads, as that processor takes them."""

    default_aspect_ratio: AspectRatio = "keep"
    tokens_per_image: int | None = None

    def __init__(self, model_dir: Path, model_type: str) -> None:
        """Loads the processor.

        Raises:
            ModelError: transformers cannot load one, or it has no token for images.
        """
        from transformers import AutoProcessor

        try:
            self._processor: Any = AutoProcessor.from_pretrained(model_dir, local_files_only=True)
        except _PROCESSOR_ERRORS as error:
            raise ModelError(
                f"{model_dir}: the processor of this {model_type!r} cannot be loaded, which says how it takes images "
                f"({error})"
            ) from error
        placeholder = getattr(self._processor, "image_token", None)
        image_processor = getattr(self._processor, "image_processor", None)
        if not isinstance(placeholder, str) or image_processor is None:
            raise ModelError(
                f"{model_dir}: {type(self._processor).__name__} names no image token (image_token), so it is not known "
                f"where images of this {model_type!r} stand; expected a model whose processor has one"
            )
        self.placeholder = placeholder
        self.mean_rgb = _mean_rgb(getattr(image_processor, "image_mean", None))
        files = [model_dir / name for name in ("processor_config.json", "preprocessor_config.json")]
        self.sha256 = _digest([_relevant_settings(read_json(file)) for file in files if is_file(file)])
        self._counts: dict[tuple[int, int], int] = {}
        # Fast tokenizers may not be called from two threads at once.
        self._lock = threading.Lock()
        try:
            probe = self._call(blank_image(*_PROBED_SIZES[0]))
        except _PROCESSOR_ERRORS as error:
            raise ModelError(
                f"{model_dir}: {type(self._processor).__name__} cannot process an image ({error}); check the files of "
                "the processor and the tokenizer's special tokens"
            ) from error
        self.min_tokens_per_image = len(probe["input_ids"][0])
        # Gemma 3 calls them token_type_ids.
        known = "mm_token_type_ids", "token_type_ids"
        self.types_argument: str | None = next((name for name in known if name in probe), None)

    def count_tokens(self, width: int, height: int, where: str) -> int:
        """Returns the number of tokens of an image of this size.

        A processor's own counting is used if it agrees with what its processing gives, but for a constant: some leave
        out the tokens around an image. Otherwise a blank image of the size is processed, once for each size.
        """
        if (width, height) not in self._counts:
            try:
                offset = self._count_offset
                if offset is None:
                    count = len(self._call(blank_image(width, height))["input_ids"][0])
                else:
                    count = self._count_fast(width, height) + offset
            except _PROCESSOR_ERRORS as error:
                raise _refused_image(where, error) from error
            self._counts[width, height] = count
        return self._counts[width, height]

    def process(self, image: Image.Image, where: str) -> ProcessedImage:
        """Returns an RGB image as the model takes it."""
        try:
            found = self._call(image)
        except _PROCESSOR_ERRORS as error:
            raise _refused_image(where, error) from error
        text = {"input_ids", "attention_mask", self.types_argument}
        types = None if self.types_argument is None else found[self.types_argument][0].numpy().astype(np.int64)
        # Llama 4's pixels are bfloat16, which numpy lacks.
        arrays = {
            name: (value.float() if value.is_floating_point() else value).numpy()
            for name, value in found.items()
            if name not in text
        }
        return ProcessedImage(found["input_ids"][0].numpy().astype(np.int32), types, arrays)

    @functools.cached_property
    def _count_offset(self) -> int | None:
        """The number of tokens by which a processor's counting falls short; None if it has none, or one that differs.

        It is private in transformers; vLLM uses it too.
        """
        if not hasattr(self._processor, "_get_num_multimodal_tokens"):
            return None
        offsets = {
            len(self._call(blank_image(*size))["input_ids"][0]) - self._count_fast(*size) for size in _PROBED_SIZES
        }
        return offsets.pop() if len(offsets) == 1 else None

    def _count_fast(self, width: int, height: int) -> int:
        found = self._processor._get_num_multimodal_tokens(image_sizes=[[height, width]])  # noqa: SLF001 - no public one
        return int(found["num_image_tokens"][0])

    def _call(self, image: Image.Image) -> Any:
        with self._lock:
            return self._processor(
                text=[self.placeholder], images=[image], add_special_tokens=False, return_tensors="pt"
            )


def find_model_images(model_dir: Path) -> ModelImages | None:
    """Returns how a model takes images, None for a model without a vision tower.

    Raises:
        ModelError: a file of the model directory is missing or broken, or its processor cannot be used.
    """
    config = read_json(model_dir / "config.json")
    if config.get("vision_config") is None:
        return None
    return (
        LlavaImages.load(model_dir)
        if _is_llava_like(config)
        else ProcessorImages(model_dir, str(config.get("model_type")))
    )


def count_image_tokens(
    images: ModelImages, ref: ImageRef, image_root: ImageRoot | None, aspect_ratio: AspectRatio, where: str
) -> int:
    """Checks an image as `check_image` does, and returns its number of tokens without decoding it.

    Raises:
        DataError: it cannot be used. StorageError: the store failed.
    """
    fixed = images.tokens_per_image
    size = check_image(ref, image_root, aspect_ratio, where, need_size=fixed is None)
    if fixed is not None:
        return fixed
    assert size is not None
    return images.count_tokens(*size, f"{where}: image {ref}")


def find_placeholder(images: ModelImages | None) -> str:
    """Returns what stands for an image in the model's text; the datasets' own marker for a model that takes none."""
    return IMAGE_MARKER if images is None else images.placeholder


def describe_aspect_ratio(images: ModelImages, aspect_ratio: AspectRatio) -> str:
    """Returns what becomes of an image's aspect ratio, and how many tokens of an image, in a few words."""
    shape = "padded to squares" if aspect_ratio == "pad" else "as they are"
    fixed = images.tokens_per_image
    count = "as many tokens as their sizes give" if fixed is None else f"{fixed:,} tokens each"
    return f"images {shape} ({aspect_ratio}), {count}"


def merge_arrays(images: Sequence[ProcessedImage]) -> dict[str, npt.NDArray[Any]]:
    """Returns the arrays of all images, joined on their first axis; on the others, shorter ones are padded with zeros.

    Models that take images of several shapes as one array find an image's own part by its size or mask, which stands
    beside it.
    """
    merged = {}
    for name in images[0].arrays:
        parts = [image.arrays[name] for image in images]
        shape = tuple(np.max([part.shape[1:] for part in parts], axis=0).tolist())
        padded = [_pad(part, shape) for part in parts]
        merged[name] = padded[0] if len(padded) == 1 else np.concatenate(padded)
    return merged


def _pad(array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    missing = [(0, want - have) for want, have in zip(shape, array.shape[1:], strict=True)]
    return np.pad(array, [(0, 0), *missing]) if any(after for _, after in missing) else array


def _is_llava_like(config: dict[str, Any]) -> bool:
    tower = (config.get("vision_config") or {}).get("model_type", _LLAVA_TOWERS[0])
    return config.get("model_type") in _LLAVA_LIKE and tower in _LLAVA_TOWERS


def _relevant_settings(settings: Any) -> Any:
    """Returns a processor's settings without class names, at any depth."""
    if not isinstance(settings, dict):
        return settings
    return {key: _relevant_settings(value) for key, value in settings.items() if key not in _NOT_OF_IMAGES}


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _mean_rgb(mean: Any) -> tuple[int, int, int]:
    red, green, blue = mean or [0.5, 0.5, 0.5]
    return int(red * 255), int(green * 255), int(blue * 255)


def blank_image(width: int, height: int) -> Image.Image:
    """Returns a grey RGB image."""
    return Image.new("RGB", (width, height), (128, 128, 128))


def _refused_image(where: str, error: Exception) -> DataError:
    return DataError(f"{where}: the model's processor cannot take this image ({error}); crop it or drop the sample")
