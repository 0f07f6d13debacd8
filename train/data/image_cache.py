"""Opens images and processes them for the student; recent results stay in memory.

A small dataset is therefore decoded once instead of once an epoch, and neighbouring samples of a large one, which
often share an image, do not decode it twice.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from common.data.images import AspectRatio, ImageRoot, load_image
from common.data.model_images import (
    ModelImages,
    ProcessedImage,
    count_image_tokens,
    find_model_images,
    merge_arrays,
)
from common.data.samples import ImageRef
from common.errors import DataError

# Limit of each process that makes batches. Holds 190 images of 336 x 336 pixels, or 6,800 of 56 x 56.
_MAX_CACHED_BYTES = 256 << 20


class ImageRequest(NamedTuple):
    """An image of a sample; `where` names the sample in error messages."""

    ref: ImageRef
    image_root: ImageRoot | None
    where: str


@dataclass(frozen=True)
class BatchImages:
    """The images of a batch.

    token_ids    int32 [N] of each image: what replaces its placeholder
    token_types  int64 [N] of each image; None for a student that wants no types
    tensors      arguments of the student's forward, such as `pixel_values`, of all images together
    """

    token_ids: list[npt.NDArray[np.int32]]
    token_types: list[npt.NDArray[np.int64]] | None
    tensors: dict[str, Tensor]


class ImageSource(Protocol):
    """Gives a collator the images of its batches. `types_argument` is as in ModelImages."""

    types_argument: str | None

    def read(self, requests: Sequence[ImageRequest]) -> BatchImages:
        """Returns the images. Raises DataError, which names the sample."""

    def check(self, request: ImageRequest) -> int:
        """Checks that an image can be read, without decoding it; returns its number of tokens. Raises DataError."""

    def dummy(self) -> BatchImages:
        """Returns one image for a dummy sequence, whose output enters no loss."""


class ImageCache:
    """Opens and processes images for one student.

    `aspect_ratio` None stands for the student's own choice.
    """

    @classmethod
    def load(cls, model_dir: Path, aspect_ratio: AspectRatio | None) -> Self | None:
        """Loads the processor of a model directory; returns None for a model without a vision tower.

        Raises:
            ModelError: the settings of the processor or of the vision tower are missing or broken.
        """
        images = find_model_images(model_dir)
        return None if images is None else cls(images, aspect_ratio)

    def __init__(self, images: ModelImages, aspect_ratio: AspectRatio | None) -> None:
        self._images = images
        self._aspect_ratio: AspectRatio = aspect_ratio or images.default_aspect_ratio
        self.types_argument = images.types_argument
        self._cached: OrderedDict[tuple[ImageRef, ImageRoot | None], ProcessedImage] = OrderedDict()
        self._cached_bytes = 0

    def read(self, requests: Sequence[ImageRequest]) -> BatchImages:
        """Returns the images of a batch.

        Raises:
            DataError: an image cannot be opened or processed, or takes too much memory; the message names the sample.
        """
        found = [self._process(request) for request in requests]
        while self._cached_bytes > _MAX_CACHED_BYTES:
            (ref, _), image = self._cached.popitem(last=False)
            self._cached_bytes -= _num_bytes(ref, image)
        return join_images(found)

    def check(self, request: ImageRequest) -> int:
        """Checks that an image is there and what its header says; returns its number of tokens.

        Raises:
            DataError: it cannot be used; the message names the sample.
        """
        ref, root, where = request
        return count_image_tokens(self._images, ref, root, self._aspect_ratio, where)

    def dummy(self) -> BatchImages:
        """Returns a small image of the padding colour."""
        return join_images([dummy_image(self._images)])

    def _process(self, request: ImageRequest) -> ProcessedImage:
        ref, root, where = request
        key = ref, root
        if key not in self._cached:
            opened = load_image(ref, root, self._aspect_ratio, self._images.mean_rgb, where)
            try:
                image = self._images.process(opened, f"{where}: image {ref}")
            except MemoryError as error:
                raise DataError(
                    f"{where}: the image processor takes more memory than there is; free some, or use a smaller "
                    "micro_batch_size"
                ) from error
            self._cached[key] = image
            self._cached_bytes += _num_bytes(ref, image)
        self._cached.move_to_end(key)
        return self._cached[key]


def dummy_image(images: ModelImages) -> ProcessedImage:
    """Returns a small image of the padding colour."""
    return images.process(Image.new("RGB", (32, 32), images.mean_rgb), "a dummy image")


def join_images(images: Sequence[ProcessedImage]) -> BatchImages:
    """Returns the images of a batch."""
    types = [image.token_types for image in images if image.token_types is not None]
    return BatchImages(
        [image.token_ids for image in images],
        types or None,
        {name: torch.from_numpy(array) for name, array in merge_arrays(images).items()},
    )


def _num_bytes(ref: ImageRef, image: ProcessedImage) -> int:
    return len(ref.data or b"") + image.num_bytes
