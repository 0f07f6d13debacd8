"""Verifies a feature cache, an output of precompute-features (`verify-shards`). Needs no torch.

    manifest ─> images.parquet ─> for each shard: receipt ─> SHA-256 ─> columns ─> footer ─> rows ─> coverage

With --dataset, its images must be those of the cache; with --image-root, their files must be unchanged.
"""

import functools
import hashlib
from collections.abc import Iterator
from contextlib import closing

import numpy as np
from tqdm import tqdm

from common.concurrency import prefetch_map
from common.data.images import ImageRoot, LinkedImageRoot, read_image_and_digest
from common.errors import DataError, DecantError, ShardError, StorageError
from common.shards.feature_shard import (
    INDEX_NAME,
    CachedImage,
    FeatureFile,
    FeatureRow,
    images_per_group,
    read_index,
    unpack_features,
)
from common.shards.manifest import FEATURE_SCHEMA_VERSION, FeatureManifest, Receipt
from common.storage.files import Location
from precompute.report import Report
from precompute.verify.base import MEANINGS, OutputVerifier
from precompute.verify.manifest_checks import group_problems, metadata_problems

_MEANINGS = {
    **MEANINGS,
    "coverage": "all shards are there, and each holds every image of its range",
    "index": "images.parquet is the list that the manifest names; files and paths are unique",
    "footers": "footers repeat the manifest, and row groups have the size that readers count on",
    "rows": "each row is the image that the list has there",
    "features": "features have the shape that the manifest says, and every value is finite",
    "dataset": "the images are those of the dataset, in the order in which it first names them",
    "sources": "image files are those that the features were computed from",
}

_NUM_READERS = 8


def verify_features(
    output: Location,
    dataset: Location | None = None,
    image_root: ImageRoot | None = None,
    *,
    progress: bool = True,
) -> Report:
    """Checks all that can be checked without the vision tower.

    With `dataset`, also compares the cached images with those that it names; with `image_root`, with their files.

    Raises:
        ShardError: there is no output at all.
        StorageError: the disk or the store refused, so that nothing is known of the output.
    """
    return _FeatureVerifier(output).run(dataset, image_root, progress)


class _FeatureVerifier(OutputVerifier[FeatureManifest]):
    """Verifier of one feature cache."""

    def __init__(self, output: Location) -> None:
        super().__init__(output, FeatureManifest, _MEANINGS)
        self._images: list[CachedImage] | None = None

    def run(self, dataset: Location | None, image_root: ImageRoot | None, progress: bool) -> Report:
        manifest = self.verify_manifest(_manifest_problems)
        if manifest is not None:
            self._images = self._verify_index(manifest)
            with tqdm(self.verify_files(manifest), desc="verifying", unit=" shards", disable=not progress) as shown:
                for number in shown:
                    verify_rows = functools.partial(self._verify_rows, number, manifest)
                    self.verify_shard(number, manifest, FeatureFile, verify_rows)
            if dataset is not None:
                self._compare_with_dataset(dataset, manifest)
            if image_root is not None:
                self._verify_sources(image_root, progress)
        for name, wanted in (("dataset", dataset), ("sources", image_root)):
            if wanted is None:
                del self.checks[name]
        return self.report()

    def _verify_index(self, manifest: FeatureManifest) -> list[CachedImage] | None:
        check, path = self.checks["index"], self.output / INDEX_NAME
        check.passed()
        try:
            images = read_index(self.output, manifest)
        except StorageError:
            raise
        except ShardError as error:
            check.failed(path, str(error))
            return None
        for what, names in (
            ("the file with SHA-256", [image.sha256 for image in images]),
            ("the path", [name for image in images for name in image.paths]),
        ):
            seen: set[str] = set()
            for name in names:
                if name in seen:
                    check.failed(path, f"{what} {name} is listed twice")
                seen.add(name)
        if len(images) != manifest.num_images:
            check.failed(path, f"lists {len(images):,} images, the manifest has {manifest.num_images:,}")
        return images

    def _verify_rows(self, number: int, manifest: FeatureManifest, shard: FeatureFile, receipt: Receipt) -> None:
        self.add_problems("footers", shard.path, "footer", _footer_problems(shard, manifest))
        expected = manifest.shard_range(number)
        indices = []
        for group in range(shard.num_groups):
            self.checks["pages"].passed()
            try:
                rows = shard.read_group(group)
            except ShardError as error:
                self.checks["pages"].failed(shard.path, f"row group {group}: {error}")
                return
            for row in rows:
                indices.append(row.index)
                where = f"image {row.index}"
                self.add_problems("rows", shard.path, where, self._row_problems(row, expected))
                self.add_problems("features", shard.path, where, _feature_problems(row, manifest))
        if indices != list(expected) or receipt.num_rows != len(indices):
            self.checks["coverage"].failed(
                shard.path,
                f"{len(indices)} rows, {receipt.num_rows} by the receipt, are not the images {expected.start} to "
                f"{expected.stop - 1} in their order",
            )

    def _row_problems(self, row: FeatureRow, expected: range) -> Iterator[str]:
        if row.index not in expected:
            yield f"this shard holds images {expected.start} to {expected.stop - 1}"
        elif self._images is not None and row.image != self._images[row.index]:
            yield f"is {row.image.sha256} ({row.image.name}), the list has {self._images[row.index].sha256} there"

    def _compare_with_dataset(self, path: Location, manifest: FeatureManifest) -> None:
        expected = manifest.dataset
        dataset = self.open_dataset(path, "kd", expected.sha256, expected.num_samples)
        if dataset is None or self._images is None:
            return
        check = self.checks["dataset"]
        cached_paths = {name for image in self._images for name in image.paths}
        cached_digests = {image.sha256 for image in self._images}
        # By path, or for an image inside the dataset by its digest. No path is named by a pair.
        found: dict[str | tuple[str], None] = {}
        for index in range(len(dataset)):
            check.passed()
            try:
                refs = dataset.images(index)
            except DataError as error:
                check.failed(path, str(error))
                continue
            for ref in refs:
                digest = None if ref.data is None else hashlib.sha256(ref.data).hexdigest()
                is_cached = ref.path in cached_paths if digest is None else digest in cached_digests
                if not is_cached:
                    check.failed(path, f"sample {dataset.ids[index]!r}: its image {ref} is not in the cache")
                found.setdefault(str(ref.path) if digest is None else (digest,))
        for name in sorted(cached_paths - found.keys()):
            check.failed(self.output / INDEX_NAME, f"has {name}, which no sample of the dataset names")
        order = {name: position for position, name in enumerate(found)}
        keys = [(*image.paths, (image.sha256,)) for image in self._images]
        positions = [min((order[name] for name in names if name in order), default=0) for names in keys]
        if positions != sorted(positions):
            check.failed(self.output / INDEX_NAME, "is not in the order in which the dataset first names its images")

    def _verify_sources(self, image_root: ImageRoot, progress: bool) -> None:
        """Checks the file of each path. All paths of an image are read, because one file may have been changed."""
        check = self.checks["sources"]
        folder = image_root.path if isinstance(image_root, LinkedImageRoot) else image_root
        paths = [(name, image.sha256) for image in self._images or () for name in image.paths]

        def find_problem(item: tuple[str, str]) -> tuple[str, str | None]:
            name, expected = item
            try:
                found, _ = read_image_and_digest(name, image_root, "images.parquet")
            except StorageError:
                raise
            except DecantError as error:
                return name, str(error)
            if found != expected:
                return name, f"{name}: has SHA-256 {found}, features were computed from {expected}"
            return name, None

        with closing(prefetch_map(find_problem, paths, num_threads=_NUM_READERS, ahead=8 * _NUM_READERS)) as problems:
            for name, problem in tqdm(problems, "reading", len(paths), unit=" images", disable=not progress):
                check.passed()
                if problem is not None:
                    check.failed(folder / name, problem)


def _manifest_problems(manifest: FeatureManifest) -> Iterator[str]:
    """Yields sizes that no cache can have."""
    encoder = manifest.encoder
    rows = 1 if encoder.tokens_per_image is None else encoder.tokens_per_image
    sizes = manifest.num_images, manifest.images_per_shard, rows, encoder.num_channels
    if min(sizes) < 1:
        yield f"has {sizes[0]} images, {sizes[1]} a shard, of {sizes[2]} x {sizes[3]} values"
    elif manifest.images_per_group != images_per_group(encoder.tokens_per_image, encoder.num_channels):
        yield f"has row groups of {manifest.images_per_group} images"


def _footer_problems(shard: FeatureFile, manifest: FeatureManifest) -> Iterator[str]:
    yield from metadata_problems(shard, manifest, FEATURE_SCHEMA_VERSION)
    yield from group_problems(shard, manifest.images_per_group, "images")


def _feature_problems(row: FeatureRow, manifest: FeatureManifest) -> Iterator[str]:
    try:
        features_PD = unpack_features(row.packed, manifest, "it")
    except ShardError as error:
        yield str(error)
        return
    if num_bad := features_PD.size - int(np.isfinite(features_PD).sum()):
        yield f"{num_bad:,} of {features_PD.size:,} values are not finite"
