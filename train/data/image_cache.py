"""Opens images and applies the student's image processor; recent results stay in memory.

A small dataset is therefore decoded once instead of once an epoch, and neighbouring samples of a large one, which
often share an image, do not decode it twice.
"""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from common.data.images import AspectRatio, ImageRoot, ImageSpec, check_image, load_image
from common.data.samples import ImageRef
from common.errors import DataError

# Limit of each process that makes batches. Holds 190 images of 336 x 336 pixels, or 6,800 of 56 x 56.
_MAX_CACHED_BYTES = 256 << 20


class ImageRequest(NamedTuple):
    """An image of a sample; `where` names the sample in error messages."""

    ref: ImageRef
    image_root: ImageRoot | None
    where: str


class ImageCache:
    """Opens and processes images for one student."""

    @classmethod
    def load(cls, model_dir: Path, aspect_ratio: AspectRatio) -> Self | None:
        """Loads the image processor of a model directory; returns None for a model without a vision tower.

        Raises:
            ModelError: the settings of the processor or of the vision tower are missing or broken.
        """
        spec = ImageSpec.load(model_dir)
        if spec is None:
            return None
        return cls(AutoImageProcessor.from_pretrained(model_dir, local_files_only=True), spec, aspect_ratio)

    def __init__(self, processor: Any, spec: ImageSpec, aspect_ratio: AspectRatio) -> None:
        self._processor = processor
        self._spec = spec
        self._aspect_ratio = aspect_ratio
        self._cached: OrderedDict[tuple[ImageRef, ImageRoot | None], Tensor] = OrderedDict()
        self._cached_bytes = 0

    @property
    def tokens_per_image(self) -> int:
        """Returns the number of placeholders of an image."""
        return self._spec.tokens_per_image

    def pixels(self, requests: Sequence[ImageRequest]) -> Tensor:
        """Returns the pixels of I images, float32 [I, 3, height, width].

        Raises:
            DataError: an image cannot be opened, or takes too much memory; the message names the sample.
        """
        keys = [(ref, root) for ref, root, _ in requests]
        new = {(ref, root): where for ref, root, where in requests if (ref, root) not in self._cached}
        if new:
            opened = [
                load_image(ref, root, self._aspect_ratio, self._spec.mean_rgb, where)
                for (ref, root), where in new.items()
            ]
            try:
                processed = self._process(opened)
            except MemoryError as error:
                raise DataError(
                    f"{', '.join(new.values())}: the image processor takes more memory than there is; free some, or "
                    "use a smaller micro_batch_size"
                ) from error
            for key, pixels in zip(new, processed, strict=True):
                # A copy, because a view would keep the memory of the whole batch.
                self._cached[key] = pixels.clone()
                self._cached_bytes += _num_bytes(key[0], pixels)
        stacked = torch.stack([self._cached[key] for key in keys])
        for key in keys:
            self._cached.move_to_end(key)
        while self._cached_bytes > _MAX_CACHED_BYTES:
            (ref, _), pixels = self._cached.popitem(last=False)
            self._cached_bytes -= _num_bytes(ref, pixels)
        return stacked

    def check(self, request: ImageRequest) -> None:
        """Checks that an image is there and what its header says. Raises DataError, which names the sample."""
        check_image(request.ref, request.image_root, self._aspect_ratio, request.where)

    def dummy(self) -> Tensor:
        """Returns the pixels of an image of the padding colour, float32 [1, 3, height, width]."""
        return self._process([Image.new("RGB", (32, 32), self._spec.mean_rgb)])

    def _process(self, images: list[Image.Image]) -> Tensor:
        pixels: Tensor = self._processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels


def _num_bytes(ref: ImageRef, pixels: Tensor) -> int:
    return len(ref.data or b"") + int(pixels.nbytes)
