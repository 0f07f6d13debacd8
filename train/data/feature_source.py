"""Images as a frozen vision tower sees them, read from feature caches: no image is opened, no tower is loaded.

Takes the place of train.data.image_cache.ImageCache in a collator. Recent features are kept, as pixels are there.

Legend: I images, P tokens that the tower gives an image, D channels.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.data.images import ImageSpec
from common.data.samples import ImageRef
from common.errors import ConfigError, DataError
from common.shards.encoder_identity import check_encoder
from common.shards.feature_shard import FeatureCache
from common.storage.files import Location
from train.config import TrainConfig
from train.data.image_cache import Wanted

_log = logging.getLogger(__name__)

# In each process that makes batches: 220 images of CLIP ViT-L/14 at 336 pixels.
_KEPT_BYTES = 256 << 20


class FeatureSource:
    """Finds images in feature caches: by content where a sample holds the file, else by the path as it stands there.

    `caches` has those in which paths of an image root are looked for. `dtype` is that of the student.
    """

    def __init__(self, caches: Mapping[Location | None, Sequence[FeatureCache]], dtype: torch.dtype) -> None:
        self._caches = caches
        self._dtype = dtype
        encoder = next(iter(caches.values()))[0].manifest.encoder
        self._shape = encoder.tokens_per_image, encoder.num_channels
        self._kept: OrderedDict[tuple[Location, int], Tensor] = OrderedDict()
        self._kept_bytes = 0

    def pixels(self, wanted: Sequence[Wanted]) -> Tensor:
        """[I, P, D] in the student's dtype, of I images: (reference, image root, what to call its sample).

        Raises:
            DataError: an image that no cache has; names the sample. ShardError: a damaged cache.
        """
        return torch.stack([self._read(*self._find(*each)) for each in wanted])

    def blank(self) -> Tensor:
        """Zeros [1, P, D], for stand-ins: nothing that counts is computed from them."""
        return torch.zeros(1, *self._shape, dtype=self._dtype)

    def _find(self, ref: ImageRef, image_root: Location | None, where: str) -> tuple[FeatureCache, int]:
        caches = self._caches.get(image_root, ())
        content = None if ref.data is None else hashlib.sha256(ref.data).hexdigest()
        for cache in caches:
            index = cache.by_path.get(ref.path or "") if content is None else cache.by_content.get(content)
            if index is not None:
                return cache, index
        what = f"image {ref.path}" + ("" if content is None else f" (SHA-256 {content})")
        changed = content is not None and any(ref.path in cache.by_path for cache in caches)
        raise DataError(
            f"{where}: {what} is in no feature cache ({', '.join(str(cache.output) for cache in caches)})"
            + ("; there it is another file" if changed else "")
            + "; make one of this dataset: decant precompute-features --model STUDENT --dataset FILE --image-root DIR "
            "--output OUT, and name it in data.features"
        )

    def _read(self, cache: FeatureCache, index: int) -> Tensor:
        key = cache.output, index
        if key not in self._kept:
            group = cache.group_of(index)
            for position, features_PD in zip(group, cache.read(group), strict=True):
                self._keep((cache.output, position), torch.from_numpy(features_PD).to(self._dtype))
        self._kept.move_to_end(key)
        found = self._kept[key]
        while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return found

    def _keep(self, key: tuple[Location, int], features: Tensor) -> None:
        if key not in self._kept:
            self._kept_bytes += features.nbytes
        self._kept[key] = features


def open_feature_source(config: TrainConfig) -> FeatureSource | None:
    """The caches that a stage is to train from, if any, after a check that they are of its student's vision tower.

    Raises:
        ConfigError: a student without a vision tower. ProvenanceError: features of another tower, or of images that
            were treated otherwise; lists every difference. ShardError: a cache is incomplete or damaged.
    """
    if not config.data.has_features:
        return None
    model: Path = config.model.path
    if ImageSpec.load(model) is None:
        raise ConfigError(f"data.features: {model} is a student without a vision tower; leave the key out")
    opened: dict[Location, FeatureCache] = {}
    caches: dict[Location | None, list[FeatureCache]] = {}
    for root, outputs in config.data.feature_caches:
        for output in outputs:
            if output not in opened:
                opened[output] = FeatureCache(output)
                check_encoder(opened[output].manifest, output, model, config.data.image_aspect_ratio)
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
    return FeatureSource(caches, torch.bfloat16 if config.run.precision == "bf16" else torch.float32)
