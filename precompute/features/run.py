"""`precompute-features`: from a dataset's images to a feature cache.

    dataset ─> distinct images, by the SHA-256 of their files ─> manifest, images.parquet ─> missing shards
        ─> read and decode (threads) ─> batches through the vision tower ─> writer's thread: shard, receipt

A batch never crosses a shard, so that a rerun computes the same batches as the first run. Until its receipt is
published a shard does not exist: a run that is stopped loses only the shards under way.

Legend: I images, P tokens that the tower gives an image, D channels.
"""

import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL.Image import Image
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from common.concurrency import prefetch_map
from common.console import plain_text
from common.data.dataset import Dataset
from common.data.images import AspectRatio, ImageRoot, check_image, load_image, read_image_and_digest
from common.data.model_images import ModelImages, describe_aspect_ratio, find_model_images
from common.data.samples import ImageRef
from common.errors import DataError, ModelError, ShardError
from common.shards.encoder_identity import compute_encoder_identity
from common.shards.feature_shard import (
    CachedImage,
    FeatureRow,
    images_digest,
    images_per_group,
    pack_features,
    read_index,
    write_feature_shard,
    write_index,
)
from common.shards.manifest import (
    DatasetIdentity,
    EncoderIdentity,
    EngineIdentity,
    FeatureForm,
    FeatureManifest,
    is_complete,
    open_output,
    read_feature_manifest,
    read_receipts,
)
from common.shards.output_files import output_kind
from common.storage.files import Location, directory_lock, remove_partials
from common.storage.output_check import check_output
from precompute.shard_writer import ShardWriter

logger = logging.getLogger(__name__)

# Threads that read files; several, because each read of an object store waits for its answer.
_READERS = 8

# Shards that wait for the writer besides the one it writes; each takes as much memory as its file.
_WAITING_SHARDS = 1


@dataclass(frozen=True)
class FeatureSettings:
    """Options of `precompute-features`. `aspect_ratio` None stands for the model's own choice."""

    model: Path
    dataset: Location
    image_root: ImageRoot | None
    output: Location
    form: FeatureForm = "bf16"
    aspect_ratio: AspectRatio | None = None
    batch_size: int = 16
    images_per_shard: int = 128


@dataclass(frozen=True)
class FeatureSummary:
    """Contents of a cache after a run, and what the run added; `compute_s` is from the first image to the last."""

    output: Location
    manifest: FeatureManifest
    num_complete_shards: int
    num_new_images: int
    num_bytes: int
    compute_s: float
    interrupted: bool

    @property
    def complete(self) -> bool:
        """True if every shard is published."""
        return self.num_complete_shards == self.manifest.num_shards

    def render(self) -> RenderableType:
        """Returns the totals and the outcome for the terminal."""
        table = Table(show_header=False, box=None)
        encoder, num_shards = self.manifest.encoder, self.manifest.num_shards
        table.add_row("output", plain_text(self.output))
        table.add_row("images", f"{self.manifest.num_images:,} distinct, {self.num_new_images:,} new")
        rows = "various" if encoder.tokens_per_image is None else f"{encoder.tokens_per_image:,}"
        shape = f"{rows} x {encoder.num_channels:,}"
        table.add_row("features", f"{shape} an image, {self.manifest.form}, {self.num_bytes:,} bytes in all")
        table.add_row("shards", f"{self.num_complete_shards:,} of {num_shards:,}")
        if self.num_new_images:
            speed = f"{self.num_new_images / max(self.compute_s, 1e-9):,.1f} images/s"
            table.add_row("computed in", f"{self.compute_s:,.0f} s, {speed}")
        if self.complete:
            state = "all shards are complete"
        else:
            state = "shards are missing; run the same command again to continue"
            if self.interrupted:
                state = f"interrupted: {state}"
        return Group(table, Text(state))


@dataclass(frozen=True)
class _FeatureJob:
    """All that is known before the vision tower starts.

    `embedded` says of the images inside the dataset, by SHA-256 (hex), in which sample they stand, and as which image.
    `tower` is the vision tower if it had to be loaded already.
    """

    settings: FeatureSettings
    manifest: FeatureManifest
    dataset: Dataset
    images: list[CachedImage]
    embedded: dict[str, tuple[int, int]]
    model_images: ModelImages
    tower: Any


def run_features(settings: FeatureSettings, *, progress: bool = True) -> FeatureSummary:
    """Computes the features of every image that has none yet. Ctrl-C ends the run early with `interrupted` set.

    Raises:
        ConfigError: the output holds what this command did not write.
        DataError: an image is missing, unreadable or not the one that the cache was begun with.
        ModelError: no usable vision tower, or one whose output is no number.
        ProvenanceError: another tower, dataset or setting began this output; every difference is listed.
        StorageError: the disk or the store refused; complete shards stay.
    """
    inputs = {"model": settings.model, "dataset": settings.dataset}
    check_output(settings.output, output_kind("precompute-features"), inputs)
    job = _prepare(settings, progress)
    with directory_lock(settings.output):
        open_output(settings.output, job.manifest)
        if _known_images(settings.output) != job.images:
            write_index(settings.output, job.images, job.manifest)
    remove_partials(settings.output)
    missing = [n for n in range(job.manifest.num_shards) if not is_complete(settings.output, n, job.manifest)]
    num_new, interrupted, started_s = 0, False, time.monotonic()
    if missing:
        counted: list[int] = []
        try:
            _compute_shards(job, missing, counted, progress)
        except KeyboardInterrupt:
            interrupted = True
        num_new = sum(counted)
    receipts = read_receipts(settings.output, job.manifest)
    return FeatureSummary(
        output=settings.output,
        manifest=job.manifest,
        num_complete_shards=len(receipts),
        num_new_images=num_new,
        num_bytes=sum(receipt.num_bytes for receipt in receipts),
        compute_s=time.monotonic() - started_s,
        interrupted=interrupted,
    )


def _prepare(settings: FeatureSettings, progress: bool) -> _FeatureJob:
    """Returns the distinct images, and the manifest that they and the tower give."""
    model_images = find_model_images(settings.model)
    if model_images is None:
        raise ModelError(f"{settings.model}: takes no images, so it has no features; name a model that does")
    aspect_ratio = settings.aspect_ratio or model_images.default_aspect_ratio
    logger.info("%s: %s", settings.model, describe_aspect_ratio(model_images, aspect_ratio))
    varies = model_images.tokens_per_image is None
    num_channels, tower = _known_channels(settings.output), None
    if varies and num_channels is None:
        tower = _load_tower(settings.model, model_images, None)
        num_channels = tower.num_channels
    encoder = compute_encoder_identity(settings.model, aspect_ratio, num_channels)
    # The kind does not matter, because only images are read.
    dataset = Dataset.open(settings.dataset, "kd")
    # If the output lists the images of another dataset, its manifest differs from the one below and is refused.
    images = _known_images(settings.output)
    if images is None:
        images = distinct_images(dataset, settings.image_root, aspect_ratio if varies else None, progress=progress)
    if not images:
        raise DataError(f"{settings.dataset}: no sample has an image, so there are no features to compute")
    manifest = FeatureManifest(
        encoder=encoder,
        dataset=DatasetIdentity(name=settings.dataset.name, sha256=dataset.sha256, num_samples=len(dataset)),
        engine=EngineIdentity(name="transformers", version=version("transformers"), dtype=encoder.dtype),
        num_images=len(images),
        images_sha256=images_digest(images),
        form=settings.form,
        images_per_shard=settings.images_per_shard,
        images_per_group=images_per_group(encoder.tokens_per_image, encoder.num_channels),
    )
    embedded = {} if all(image.paths for image in images) else _find_embedded(dataset)
    return _FeatureJob(settings, manifest, dataset, images, embedded, model_images, tower)


def _load_tower(model_dir: Path, images: ModelImages, encoder: EncoderIdentity | None) -> Any:
    """Loads the vision tower of a LLaVA, CLIP or SigLIP, whose fingerprint is `encoder`, or of another model."""
    # Imported here, because loading torch takes seconds, which a run with nothing to do should not spend.
    if encoder is not None:
        from precompute.features.vision_tower import VisionTower

        return VisionTower(model_dir, encoder)
    from precompute.features.model_tower import ModelTower

    return ModelTower(model_dir, images)


def _known_channels(output: Location) -> int | None:
    """Returns the channels of a cache that was begun already, so that no model is loaded to find them."""
    try:
        return read_feature_manifest(output).encoder.num_channels
    except ShardError:
        return None


def _known_images(output: Location) -> list[CachedImage] | None:
    """Returns the images of a cache that was begun already, so that files are not read twice; None if it lists none."""
    try:
        return read_index(output, read_feature_manifest(output))
    except ShardError:
        # A damaged manifest or index is reported where it is compared or read.
        return None


def distinct_images(
    dataset: Dataset, image_root: ImageRoot | None, aspect_ratio: AspectRatio | None, *, progress: bool
) -> list[CachedImage]:
    """Returns the images of a dataset, each once, in the order in which their files first appear.

    With `aspect_ratio` they have the sizes that it gives them.

    Raises:
        DataError: an image is missing or unreadable; names the sample. StorageError: the store refused.
    """
    # By path, or for an image inside the dataset by its digest, which is no path.
    first_index: dict[str | bytes, tuple[int, int]] = {}
    for index in range(len(dataset)):
        for position, ref in enumerate(dataset.images(index)):
            key = hashlib.sha256(ref.data).digest() if ref.data is not None else ref.path
            assert key is not None
            first_index.setdefault(key, (index, position))

    def read(item: tuple[str | bytes, tuple[int, int]]) -> tuple[str, tuple[int, int] | None]:
        key, (index, position) = item
        where = dataset.where(index)
        if isinstance(key, str):
            digest, data = read_image_and_digest(key, image_root, where)
            ref = ImageRef(key, data)
        elif aspect_ratio is None:
            return key.hex(), None
        else:
            digest, ref = key.hex(), dataset.images(index)[position]
        size = None if aspect_ratio is None else check_image(ref, image_root, aspect_ratio, where, need_size=True)
        return digest, size

    paths: dict[tuple[str, tuple[int, int] | None], list[str]] = {}
    with (
        closing(prefetch_map(read, first_index.items(), num_threads=_READERS, ahead=8 * _READERS)) as found,
        tqdm(total=len(first_index), desc="reading", unit=" images", disable=not progress) as bar,
    ):
        for key, image in zip(first_index, found, strict=True):
            names = paths.setdefault(image, [])
            if isinstance(key, str):
                names.append(key)
            bar.update()
    return [CachedImage(digest, tuple(names), size) for (digest, size), names in paths.items()]


def _find_embedded(dataset: Dataset) -> dict[str, tuple[int, int]]:
    """Returns where each image inside the dataset stands first: the sample's position, and the image's in it."""
    found: dict[str, tuple[int, int]] = {}
    for index in range(len(dataset)):
        for position, ref in enumerate(dataset.images(index)):
            if ref.data is not None:
                found.setdefault(hashlib.sha256(ref.data).hexdigest(), (index, position))
    return found


def _compute_shards(job: _FeatureJob, missing: Sequence[int], counted: list[int], progress: bool) -> None:
    """Writes the missing shards; appends the number of images of each to `counted`."""
    settings, manifest = job.settings, job.manifest
    tower = job.tower or _load_tower(settings.model, job.model_images, manifest.encoder)
    from precompute.features.vision_tower import single_threaded_torch

    logger.info("%s: %s; features as %s", settings.model, tower.description, settings.form)

    def load(batch: range) -> tuple[range, Any]:
        return batch, tower.preprocess([_open_image(job, index) for index in batch])

    def compute(loaded: tuple[range, Any]) -> list[FeatureRow]:
        batch, pixels = loaded
        return _make_rows(job, batch, tower.encode(pixels))

    def write(number: int, rows: Sequence[FeatureRow]) -> None:
        write_feature_shard(settings.output, number, manifest, rows)
        counted.append(len(rows))

    num_parallel = tower.num_threads
    num_images = sum(len(manifest.shard_range(number)) for number in missing)
    # Contexts are left in reverse order, so that no batch is computed any more when the source of batches is closed.
    with (
        tqdm(total=num_images, desc="computing", unit=" images", disable=not progress) as bar,
        single_threaded_torch(),
        ShardWriter[FeatureRow](settings.output, manifest, write, bar, max_waiting=_WAITING_SHARDS) as writer,
        closing(
            prefetch_map(load, _begin_batches(job, missing, writer), num_threads=_READERS, ahead=2 + num_parallel)
        ) as loaded,
        closing(prefetch_map(compute, loaded, num_threads=num_parallel, ahead=1 + num_parallel)) as computed,
    ):
        for rows in computed:
            writer.check()
            for row in rows:
                writer.add(row.index, row)


def _begin_batches(job: _FeatureJob, numbers: Iterable[int], writer: ShardWriter[FeatureRow]) -> Iterator[range]:
    """Begins the shards one after the other and yields batches of their images, none of which crosses a shard."""
    size = job.settings.batch_size
    for number in numbers:
        if writer.begin(number):
            shard = job.manifest.shard_range(number)
            for start in range(shard.start, shard.stop, size):
                yield range(start, min(start + size, shard.stop))


def _make_rows(job: _FeatureJob, batch: range, features_IPD: Iterable[npt.NDArray[np.float32]]) -> list[FeatureRow]:
    """Returns the rows of a batch's features.

    Raises:
        ModelError: a feature is not finite.
    """
    rows = []
    for index, features_PD in zip(batch, features_IPD, strict=True):
        if not np.isfinite(features_PD).all():
            raise ModelError(
                f"{job.settings.model}: its vision tower gives values that are no numbers for the image "
                f"{job.images[index].name}; it may be damaged, or too large for bfloat16"
            )
        rows.append(FeatureRow(index, job.images[index], pack_features(features_PD, job.settings.form)))
    return rows


def _open_image(job: _FeatureJob, index: int) -> Image:
    """Returns the image as the tower's processor is to see it.

    Raises:
        DataError: the file is missing or unreadable, or not the one that the cache was begun with.
    """
    known, root = job.images[index], job.settings.image_root
    where = f"{job.settings.dataset}: image {known.name}"
    if not known.paths:
        if known.sha256 not in job.embedded:
            raise DataError(f"{where}: is no longer in the dataset; begin another output")
        sample, position = job.embedded[known.sha256]
        ref = job.dataset.images(sample)[position]
        return load_image(ref, root, job.manifest.encoder.aspect_ratio, job.model_images.mean_rgb, where)
    path = known.paths[0]
    digest, data = read_image_and_digest(path, root, where)
    if digest != known.sha256:
        raise DataError(
            f"{where}: has SHA-256 {digest}, the cache was begun with {known.sha256}: the file was changed since; put "
            "the old one back, or begin another output"
        )
    return load_image(ImageRef(path, data), root, job.manifest.encoder.aspect_ratio, job.model_images.mean_rgb, where)
