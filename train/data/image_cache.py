"""Images as the student's image processor leaves them; recent ones are kept.

A small dataset is decoded once and not once an epoch; of a large one, samples near each other often share an image.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.data.images import AspectRatio, ImageSpec, load_image
from common.data.samples import ImageRef
from common.storage.files import Location

# In each process that makes batches: 190 images of 336 x 336 pixels, or 6,800 of 56 x 56.
_KEPT_BYTES = 256 << 20

Wanted = tuple[ImageRef, Location | None, str]


class ImageCache:
    """Opens and processes images for one student."""

    def __init__(self, processor: Any, spec: ImageSpec, aspect_ratio: AspectRatio) -> None:
        self._processor = processor
        self._spec = spec
        self._aspect_ratio = aspect_ratio
        self._kept: OrderedDict[tuple[ImageRef, Location | None], Tensor] = OrderedDict()
        self._kept_bytes = 0

    def pixels(self, wanted: Sequence[Wanted]) -> Tensor:
        """float32 [I, 3, height, width] of I images: (reference, image root, what to call its sample).

        Raises:
            DataError: an image that cannot be opened; the message names the sample.
        """
        keys = [(ref, root) for ref, root, _ in wanted]
        new = {(ref, root): where for ref, root, where in wanted if (ref, root) not in self._kept}
        if new:
            opened = [
                load_image(ref, root, self._aspect_ratio, self._spec.mean_rgb, where)
                for (ref, root), where in new.items()
            ]
            for key, pixels in zip(new, self._process(opened), strict=True):
                # A copy, so that keeping one image does not keep those beside it.
                self._kept[key] = pixels.clone()
                self._kept_bytes += _num_bytes(key[0], pixels)
        found = torch.stack([self._kept[key] for key in keys])
        for key in keys:
            self._kept.move_to_end(key)
        while self._kept_bytes > _KEPT_BYTES:
            (ref, _), pixels = self._kept.popitem(last=False)
            self._kept_bytes -= _num_bytes(ref, pixels)
        return found

    def blank(self) -> Tensor:
        """float32 [1, 3, height, width] of an image of the padding colour."""
        return self._process([Image.new("RGB", (32, 32), self._spec.mean_rgb)])

    def _process(self, images: list[Image.Image]) -> Tensor:
        pixels: Tensor = self._processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels


def _num_bytes(ref: ImageRef, pixels: Tensor) -> int:
    return len(ref.data or b"") + pixels.numel() * pixels.element_size()
