"""Recomputes the features of random images with the vision tower (`verify-shards --recompute` on a feature cache).

Legend: P tokens that the tower gives an image, D channels.

The difference of an image is |stored - recomputed| / |recomputed|, Euclidean norms over all its values.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from tqdm import tqdm

from common.console import plain_text
from common.data.images import ImageRoot, load_image, read_image_and_digest
from common.data.model_images import find_model_images
from common.data.samples import ImageRef
from common.errors import DataError, ShardError
from common.shards.encoder_identity import check_encoder
from common.shards.feature_shard import FeatureCache
from common.storage.files import Location
from precompute.features.model_tower import ModelTower
from precompute.features.vision_tower import VisionTower, single_threaded_torch

# Devices round differently in each of dozens of bfloat16 layers, and q8 adds the rounding of its codes. Features of
# another image or another tower differ by about 1.
TOLERANCE = 0.1


@dataclass(frozen=True)
class RecomputedFeatures:
    """Comparison of stored with recomputed features. All values of `num_exact` images are equal."""

    num_images: int
    num_exact: int
    mean_difference: float
    max_difference: float
    worst: str
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        """True if no difference exceeds the tolerance or is not a number."""
        return self.max_difference <= self.tolerance

    def to_json(self) -> str:
        """Returns the result as one JSON object."""
        return json.dumps(asdict(self) | {"ok": self.ok}, indent=1)

    def render(self) -> RenderableType:
        """Returns the result as a table."""
        table = Table(title=f"{self.num_images} images through the vision tower again", title_justify="left")
        table.add_column("measure")
        table.add_column("found", justify="right")
        table.add_column("at most", justify="right")
        table.add_row("images with the very same values", f"{self.num_exact:,}", "")
        table.add_row("relative difference, mean", f"{self.mean_difference:.2e}", "")
        style = "" if self.ok else "red"
        worst = plain_text(f"largest ({self.worst})")
        table.add_row(worst, f"{self.max_difference:.2e}", f"{self.tolerance}", style=style)
        return table


def recompute_features(  # noqa: PLR0913 - its arguments are the options of verify-shards --recompute
    output: Location,
    model_dir: Path,
    num_images: int,
    *,
    image_root: ImageRoot | None,
    seed: int = 0,
    progress: bool = True,
) -> RecomputedFeatures:
    """Computes the features of `num_images` random images, one at a time, and compares them with the stored ones.

    Raises:
        ProvenanceError: `model_dir` has another vision tower, or processes images differently.
        ShardError: the cache is damaged.
        DataError: an image is gone or was changed.
    """
    cache = FeatureCache(output)
    encoder = cache.manifest.encoder
    aspect_ratio = encoder.aspect_ratio
    check_encoder(cache.manifest, output, model_dir, aspect_ratio)
    images = find_model_images(model_dir)
    assert images is not None
    is_fixed = encoder.tokens_per_image is not None
    tower = VisionTower(model_dir, encoder) if is_fixed else ModelTower(model_dir, images)
    with_path = [index for index, image in enumerate(cache.images) if image.paths]
    if not with_path:
        raise DataError(f"{output}: all its images are inside the dataset; --recompute needs image files")
    chosen = np.random.default_rng(seed).choice(with_path, min(num_images, len(with_path)), replace=False)
    found: list[tuple[float, bool, str]] = []
    indices = np.sort(chosen).tolist()
    with single_threaded_torch():
        for index in tqdm(indices, desc="recomputing", unit=" images", disable=not progress):
            image = cache.images[index]
            path = image.paths[0]
            digest, data = read_image_and_digest(path, image_root, str(output))
            if digest != image.sha256:
                raise DataError(f"{output}: image {path} is another file than features were computed from")
            opened = load_image(ImageRef(path, data), image_root, aspect_ratio, images.mean_rgb, str(output))
            group = cache.group_range(index)
            stored_PD = cache.read(group)[index - group.start]
            recomputed_PD = tower.encode(tower.preprocess([opened]))[0]
            if stored_PD.shape != recomputed_PD.shape:
                raise ShardError(
                    f"{output}: image {path} has features {list(stored_PD.shape)}, the model gives "
                    f"{list(recomputed_PD.shape)}; begin another output"
                )
            difference = float(np.linalg.norm(stored_PD - recomputed_PD) / np.linalg.norm(recomputed_PD))
            found.append((difference, bool((stored_PD == recomputed_PD).all()), path))
    worst = max(found, key=lambda entry: np.nan_to_num(entry[0], nan=np.inf))
    return RecomputedFeatures(
        num_images=len(found),
        num_exact=sum(exact for _, exact, _ in found),
        mean_difference=float(np.mean([difference for difference, _, _ in found])),
        max_difference=worst[0],
        worst=worst[2],
    )
