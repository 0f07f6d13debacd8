"""Reads the output of a frozen vision tower from feature caches: no image is opened, no tower is loaded.

A FeatureSource replaces a train.data.image_cache.ImageCache in a collator. Recent features stay in memory.

Legend: I images, P tokens that the tower gives an image, D channels.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.data.images import ImageRoot
from common.data.model_images import LlavaImages, find_model_images
from common.data.samples import ImageRef
from common.errors import ConfigError, DataError
from common.shards.encoder_identity import check_encoder
from common.shards.feature_shard import FeatureCache
from common.storage.files import Location
from train.config import TrainConfig
from train.data.image_cache import BatchImages, ImageRequest

_log = logging.getLogger(__name__)

# Limit of each process that makes batches. Holds 220 images of CLIP ViT-L/14 at 336 pixels.
_MAX_CACHED_BYTES = 256 << 20


class FeatureSource:
    """Finds the features of images: by content if a sample holds the image file itself, otherwise by its path.

    `caches` lists for each image root the feature caches that are searched for its paths. `dtype` is the student's, and
    `images` says how many placeholders an image has, which may be less than P: the self-attention blocks of an adapter
    take the tower's class token too.
    """

    types_argument: str | None = None

    def __init__(
        self, caches: Mapping[ImageRoot | None, Sequence[FeatureCache]], dtype: torch.dtype, images: LlavaImages
    ) -> None:
        self._caches = caches
        self._dtype = dtype
        self._token_ids = np.full(images.tokens_per_image, images.image_token_id, np.int32)
        encoder = next(iter(caches.values()))[0].manifest.encoder
        self._shape = encoder.tokens_per_image, encoder.num_channels
        self._cached: OrderedDict[tuple[Location, int], Tensor] = OrderedDict()
        self._cached_bytes = 0

    def read(self, requests: Sequence[ImageRequest]) -> BatchImages:
        """Returns the features of I images as `pixel_values`, [I, P, D] in the student's dtype.

        Raises:
            DataError: no cache has an image; the message names the sample. ShardError: a cache is damaged.
        """
        return self._join([self._read(*self._locate(*request)) for request in requests])

    def check(self, request: ImageRequest) -> int:
        """Checks that a cache has an image; returns its number of tokens. Raises DataError, which names the sample."""
        self._locate(*request)
        return len(self._token_ids)

    def dummy(self) -> BatchImages:
        """Returns zeros [1, P, D] for a dummy sequence, whose output enters no loss."""
        return self._join([torch.zeros(self._shape, dtype=self._dtype)])

    def _join(self, features: Sequence[Tensor]) -> BatchImages:
        return BatchImages([self._token_ids] * len(features), None, {"pixel_values": torch.stack(list(features))})

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
    if not isinstance(images, LlavaImages):
        raise ConfigError(f"data.features: {model} is no LLaVA, the only student whose features are cached")
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
            "%s: %s images as %s features; the vision tower is not loaded",
            cache.output,
            f"{len(cache):,}",
            cache.manifest.form,
        )
    if config.run.precision != "bf16" or any(cache.manifest.form != "bf16" for cache in opened.values()):
        _log.info(
            "features were computed in bfloat16%s: losses are close to those of a live vision tower, not equal to them",
            " and stored in 8 bits" if any(cache.manifest.form == "q8" for cache in opened.values()) else "",
        )
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    return FeatureSource(caches, dtype, images)
