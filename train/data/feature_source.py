"""Reads the output of a frozen vision tower from feature caches: no image is opened.

A FeatureSource replaces a train.data.image_cache.ImageCache in a collator. Recent features stay in memory.

Of a LLaVA the features are all that the student takes. Other students also take what their processor makes of an image
beside pixels, and tokens; both depend on the image's size alone, so they are made of a blank image.

Legend: I images, P rows of features of an image, D channels, R rows of all images.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.adapter_inputs import CACHED_FEATURES
from common.data.images import ImageRoot
from common.data.model_images import (
    LlavaImages,
    ModelImages,
    ProcessedImage,
    blank_image,
    find_model_images,
)
from common.data.samples import ImageRef
from common.errors import ConfigError, DataError
from common.shards.encoder_identity import check_encoder
from common.shards.feature_shard import FeatureCache
from common.storage.files import Location
from train.config import TrainConfig
from train.data.image_cache import BatchImages, ImageRequest, dummy_image, join_images

_log = logging.getLogger(__name__)

# Limit of each process that makes batches. Holds 220 images of CLIP ViT-L/14 at 336 pixels.
_MAX_CACHED_BYTES = 256 << 20

# Sizes of images whose blank ones each of these processes keeps, a few megabytes each.
_MAX_BLANKS = 16


class FeatureSource:
    """Finds the features of images: by content if a sample holds the image file itself, otherwise by its path.

    `caches` lists for each image root the feature caches that are searched for its paths. `dtype` is the student's, and
    `images` says how many placeholders an image has. Of a LLaVA these may be fewer than P: the self-attention blocks of
    an adapter take the tower's class token too.
    """

    def __init__(
        self, caches: Mapping[ImageRoot | None, Sequence[FeatureCache]], dtype: torch.dtype, images: ModelImages
    ) -> None:
        self._caches = caches
        self._dtype = dtype
        self._images = images
        self._encoder = next(iter(caches.values()))[0].manifest.encoder
        self.types_argument = images.types_argument
        self._cached: OrderedDict[tuple[Location, int], Tensor] = OrderedDict()
        self._cached_bytes = 0
        self._blanks: OrderedDict[tuple[int, int], ProcessedImage] = OrderedDict()

    def read(self, requests: Sequence[ImageRequest]) -> BatchImages:
        """Returns the features of I images in the student's dtype.

        Of a LLaVA they are `pixel_values`, [I, P, D]; of other students `cached_features`, [R, D], beside the arrays
        that their processors make of blank images.

        Raises:
            DataError: no cache has an image; the message names the sample. ShardError: a cache is damaged.
        """
        found = [self._locate(*request) for request in requests]
        features = [self._read(cache, index) for cache, index in found]
        if isinstance(self._images, LlavaImages):
            return self._join(features, self._images)
        images = join_images([self._process_blank(cache, index) for cache, index in found])
        images.tensors[CACHED_FEATURES] = torch.cat(features)
        return images

    def check(self, request: ImageRequest) -> int:
        """Checks that a cache has an image; returns its number of tokens. Raises DataError, which names the sample."""
        cache, index = self._locate(*request)
        if (fixed := self._images.tokens_per_image) is not None:
            return fixed
        size = cache.images[index].size
        assert size is not None
        return self._images.count_tokens(*size, request.where)

    def dummy(self) -> BatchImages:
        """Returns an image for a dummy sequence, whose output enters no loss: for a LLaVA zeros [1, P, D]."""
        if not isinstance(self._images, LlavaImages):
            return join_images([dummy_image(self._images)])
        assert self._encoder.tokens_per_image is not None
        shape = self._encoder.tokens_per_image, self._encoder.num_channels
        return self._join([torch.zeros(shape, dtype=self._dtype)], self._images)

    @staticmethod
    def _join(features: Sequence[Tensor], images: LlavaImages) -> BatchImages:
        token_ids = np.full(images.tokens_per_image, images.image_token_id, np.int32)
        return BatchImages([token_ids] * len(features), None, {"pixel_values": torch.stack(list(features))})

    def _process_blank(self, cache: FeatureCache, index: int) -> ProcessedImage:
        image = cache.images[index]
        assert image.size is not None
        if image.size not in self._blanks:
            self._blanks[image.size] = self._images.process(blank_image(*image.size), f"{cache.output}: {image.name}")
            if len(self._blanks) > _MAX_BLANKS:
                self._blanks.popitem(last=False)
        self._blanks.move_to_end(image.size)
        return self._blanks[image.size]

    def _locate(self, ref: ImageRef, image_root: ImageRoot | None, where: str) -> tuple[FeatureCache, int]:
        caches = self._caches.get(image_root, ())
        content = None if ref.data is None else hashlib.sha256(ref.data).hexdigest()
        for cache in caches:
            index = cache.by_path.get(ref.path or "") if content is None else cache.by_content.get(content)
            if index is not None:
                return cache, index
        what = f"image {ref}" + ("" if content is None else f" (SHA-256 {content})")
        changed = content is not None and any(ref.path in cache.by_path for cache in caches)
        raise DataError(
            f"{where}: {what} is in no feature cache ({', '.join(str(cache.output) for cache in caches)})"
            + ("; there it is another file" if changed else "")
            + "; make one of this dataset: decant precompute-features --model STUDENT --dataset FILE --image-root DIR "
            "--output OUT, and name it in data.features"
        )

    def _read(self, cache: FeatureCache, index: int) -> Tensor:
        key = cache.output, index
        if key not in self._cached:
            group = cache.group_range(index)
            for position, features_PD in zip(group, cache.read(group), strict=True):
                self._insert((cache.output, position), torch.from_numpy(features_PD).to(self._dtype))
        self._cached.move_to_end(key)
        features = self._cached[key]
        while self._cached_bytes > _MAX_CACHED_BYTES and len(self._cached) > 1:
            self._cached_bytes -= self._cached.popitem(last=False)[1].nbytes
        return features

    def _insert(self, key: tuple[Location, int], features: Tensor) -> None:
        if key not in self._cached:
            self._cached_bytes += features.nbytes
        self._cached[key] = features


def open_feature_source(config: TrainConfig) -> FeatureSource | None:
    """Opens the feature caches of a stage and checks that its student's vision tower computed them.

    Returns:
        None for a stage that names no feature caches.

    Raises:
        ConfigError: the student has no vision tower.
        ProvenanceError: the features are of another tower, or of images that were treated differently; the message
            lists every difference.
        ShardError: a cache is incomplete or damaged.
    """
    if not config.data.has_features:
        return None
    model: Path = config.model.path
    images = find_model_images(model)
    if images is None:
        raise ConfigError(f"data.features: {model} is a student without a vision tower; leave the key out")
    aspect_ratio = config.data.image_aspect_ratio or images.default_aspect_ratio
    opened: dict[Location, FeatureCache] = {}
    caches: dict[ImageRoot | None, list[FeatureCache]] = {}
    for root, outputs in config.data.feature_caches:
        for output in outputs:
            if output not in opened:
                opened[output] = FeatureCache(output, config.data.check)
                check_encoder(opened[output].manifest, output, model, aspect_ratio)
            if opened[output] not in caches.setdefault(root, []):
                caches[root].append(opened[output])
    for cache in opened.values():
        _log.info(
            "%s: %s images as %s features; the vision tower is not %s",
            cache.output,
            f"{len(cache):,}",
            cache.manifest.form,
            "loaded" if isinstance(images, LlavaImages) else "run",
        )
    if config.run.precision != "bf16" or any(cache.manifest.form != "bf16" for cache in opened.values()):
        _log.info(
            "features were computed in bfloat16%s: losses are close to those of a live vision tower, not equal to them",
            " and stored in 8 bits" if any(cache.manifest.form == "q8" for cache in opened.values()) else "",
        )
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    return FeatureSource(caches, dtype, images)
