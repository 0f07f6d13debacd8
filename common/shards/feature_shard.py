"""Feature caches: what a frozen vision tower makes of each distinct image, computed once.

    output/
      manifest.json         which encoder, which images, in what form
      images.parquet        the distinct images, in order of first appearance: SHA-256 of the file, paths
      shard-00042.parquet   features of images [42 S, 43 S), and their receipt beside them

Legend: P tokens that the tower gives an image (patches), D channels.

Features are what goes into the multi-modal projector. Two forms hold them:

    bf16   bfloat16, exact for a tower that computes in it; low and high bytes apart, since only the high ones repeat
    q8     x = code * patch_scale * channel_scale with code in -127..127; a channel's scale is its root mean square over
           the image's patches, so that the few channels that are tens of times the others do not take all the codes
"""

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from common.errors import ShardError, StorageError
from common.shards.manifest import (
    MANIFEST_NAME,
    FeatureManifest,
    Receipt,
    published_shards,
    read_feature_manifest,
    shard_path,
)
from common.shards.parquet_shard import (
    ZSTD_LEVEL,
    ParquetShard,
    ShardContents,
    footer_metadata,
    publish_shard,
    read_footer,
)
from common.storage.files import Location, open_ranged, publish, read_bytes

INDEX_NAME = "images.parquet"

# A row group is read whole to get one image of it; it holds as many as fit in this, and one at least.
_GROUP_BYTES = 1 << 20

# A cache may have more shards than a process may have open files.
_OPEN_FILES = 64

_MAX_CODE = 127

_PACKED: dict[str, tuple[str, ...]] = {
    "bf16": ("features_low", "features_high"),
    "q8": ("codes", "patch_scales", "channel_scales"),
}
_INDEX_SCHEMA = pa.schema(
    [
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("paths", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
    ]
)


@dataclass(frozen=True)
class CachedImage:
    """A distinct image: SHA-256 (hex) of its encoded file, and the paths under which the dataset names it."""

    sha256: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class FeatureRow:
    """An image's features as they are stored; `index` is its position among the distinct images."""

    index: int
    image: CachedImage
    packed: Mapping[str, bytes]


def images_digest(images: Iterable[CachedImage]) -> str:
    """SHA-256 (hex) of a list of images and their paths."""
    sha256 = hashlib.sha256()
    for image in images:
        sha256.update((json.dumps([image.sha256, *image.paths]) + "\n").encode())
    return sha256.hexdigest()


def images_per_group(tokens_per_image: int, num_channels: int) -> int:
    """How many images a row group holds."""
    return max(1, _GROUP_BYTES // (2 * tokens_per_image * num_channels))


def feature_schema(manifest: FeatureManifest) -> pa.Schema:
    """Arrow schema of a shard."""
    packed = [pa.field(name, pa.binary(), nullable=False) for name in _PACKED[manifest.form]]
    return pa.schema([pa.field("index", pa.int64(), nullable=False), *_INDEX_SCHEMA, *packed])


def pack_features(features_PD: npt.NDArray[np.float32], form: str) -> dict[str, bytes]:
    """The packed columns of one image; see the module's docstring."""
    if form == "bf16":
        halves_PD2 = to_bfloat16(features_PD).astype("<u2").view(np.uint8).reshape(*features_PD.shape, 2)
        return {name: halves_PD2[..., half].tobytes() for half, name in enumerate(_PACKED[form])}
    channels_D = np.sqrt(np.mean(np.square(features_PD, dtype=np.float64), axis=0)).astype("<f4")
    scaled_PD = features_PD / np.where(channels_D > 0, channels_D, np.float32(1))
    patches_P = (np.abs(scaled_PD).max(axis=1) / _MAX_CODE).astype("<f4")
    codes_PD = np.rint(scaled_PD / np.where(patches_P > 0, patches_P, np.float32(1))[:, None])
    codes_PD = np.clip(codes_PD, -_MAX_CODE, _MAX_CODE).astype(np.int8)
    return dict(zip(_PACKED[form], (x.tobytes() for x in (codes_PD, patches_P, channels_D)), strict=True))


def unpack_features(packed: Mapping[str, bytes], manifest: FeatureManifest, where: str) -> npt.NDArray[np.float32]:
    """Inverse of `pack_features`: float32 [P, D]; of the form bf16 each is a bfloat16 number.

    Raises:
        ShardError: a column is not of the size that the manifest implies, or a code is none; names `where`.
    """
    shape = num_patches, num_channels = manifest.encoder.tokens_per_image, manifest.encoder.num_channels
    values = num_patches * num_channels
    sizes = {"patch_scales": 4 * num_patches, "channel_scales": 4 * num_channels}
    for name in _PACKED[manifest.form]:
        if len(packed[name]) != (expected := sizes.get(name, values)):
            raise ShardError(f"{where}: {name} has {len(packed[name]):,} bytes, expected {expected:,}")
    columns = [packed[name] for name in _PACKED[manifest.form]]
    if manifest.form == "bf16":
        bits_PD = np.empty((*shape, 2), np.uint8)
        for half, column in enumerate(columns):
            bits_PD[..., half] = np.frombuffer(column, np.uint8).reshape(shape)
        return from_bfloat16(bits_PD.view("<u2")[..., 0])
    codes_PD = np.frombuffer(columns[0], np.int8).reshape(shape)
    if codes_PD.min() < -_MAX_CODE:
        raise ShardError(f"{where}: has a code below -{_MAX_CODE}")
    patches_P, channels_D = (np.frombuffer(column, "<f4") for column in columns[1:])
    features_PD: npt.NDArray[np.float32] = codes_PD.astype(np.float32) * patches_P[:, None] * channels_D
    return features_PD


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of each finite value in bfloat16, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Inverse of `to_bfloat16`."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_feature_shard(
    output: Location, number: int, manifest: FeatureManifest, rows: Sequence[FeatureRow]
) -> Receipt:
    """Publishes a shard, then its receipt. Deterministic: same rows, same bytes.

    Raises:
        StorageError: not written; no receipt exists then, so the shard does not either.
    """
    table_schema = feature_schema(manifest)
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer,
        table_schema,
        compression="zstd",
        compression_level=ZSTD_LEVEL,
        use_dictionary=False,
        write_page_checksum=True,
        write_statistics=["index"],
    ) as writer:
        for start in range(0, len(rows), manifest.images_per_group):
            group = rows[start : start + manifest.images_per_group]
            columns = [
                pa.array([row.index for row in group], pa.int64()),
                *_index_columns([row.image for row in group]),
                *(pa.array([row.packed[name] for row in group], pa.binary()) for name in _PACKED[manifest.form]),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=table_schema))
        writer.add_key_value_metadata(footer_metadata(manifest, number))
    return publish_shard(output, number, manifest, ShardContents(buffer.getvalue(), len(rows)))


class FeatureFile(ParquetShard):
    """An open shard of features.

    Raises:
        ShardError: on opening or reading, naming the file, if it is not a shard of this manifest or is damaged.
    """

    def __init__(self, path: Location, manifest: FeatureManifest, number: int) -> None:
        super().__init__(path, manifest, number, feature_schema(manifest), f"feature shard of the form {manifest.form}")
        self._names = _PACKED[manifest.form]

    def read_group(self, group: int) -> list[FeatureRow]:
        """The rows of one row group."""
        with self.shard_errors():
            table = self._read(group)
            columns = [table.column(name).to_pylist() for name in self._names]
            heads = (table.column(name).to_pylist() for name in ("index", "sha256", "paths"))
            return [
                FeatureRow(index, CachedImage(sha256, tuple(paths)), dict(zip(self._names, packed, strict=True)))
                for index, sha256, paths, *packed in zip(*heads, *columns, strict=True)
            ]


def write_index(output: Location, images: Sequence[CachedImage]) -> None:
    """Publishes images.parquet. Raises StorageError."""
    buffer = io.BytesIO()
    table = pa.Table.from_arrays(_index_columns(images), schema=_INDEX_SCHEMA)
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    publish(output / INDEX_NAME, buffer.getvalue())


def read_index(output: Location, manifest: FeatureManifest) -> list[CachedImage]:
    """The distinct images of a cache, in order.

    Raises:
        ShardError: missing, damaged, or not the list that the manifest names. StorageError: the store refused.
    """
    path = output / INDEX_NAME
    try:
        with open_ranged(path) as file:
            table = pq.read_table(pa.PythonFile(file, "r"), page_checksum_verification=True)
        if not table.schema.equals(_INDEX_SCHEMA):
            raise ShardError(f"{path}: its columns are not sha256 and paths")
        columns = (table.column(name).to_pylist() for name in ("sha256", "paths"))
        images = [CachedImage(sha256, tuple(paths)) for sha256, paths in zip(*columns, strict=True)]
    except (OSError, pa.ArrowException, ValueError, TypeError) as error:
        raise ShardError(f"{path}: cannot be read ({error}); run precompute-features again, it writes it") from error
    if images_digest(images) != manifest.images_sha256:
        raise ShardError(f"{path}: is not the list of images that the manifest names; run precompute-features again")
    return images


class FeatureCache:
    """A complete cache, open for reading by image.

    Files are opened when first read from, so that a worker process has its own.

    Raises:
        ShardError: no feature cache, an incomplete or a damaged one.
    """

    def __init__(self, output: Location) -> None:
        self.output = output
        self.manifest = read_feature_manifest(output)
        missing = sorted(set(range(self.manifest.num_shards)) - set(published_shards(output)))
        if missing:
            raise ShardError(
                f"{output}: {len(missing)} of {self.manifest.num_shards} shards are missing, the first is "
                f"{missing[0]:05d}; run precompute-features again to complete the cache"
            )
        self.images = read_index(output, self.manifest)
        self._files: OrderedDict[int, FeatureFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def by_path(self) -> dict[str, int]:
        """Position of the image that the dataset names so."""
        return {path: index for index, image in enumerate(self.images) for path in image.paths}

    @cached_property
    def by_content(self) -> dict[str, int]:
        """Position of the image whose file has this SHA-256 (hex)."""
        return {image.sha256: index for index, image in enumerate(self.images)}

    def group_of(self, index: int) -> range:
        """Positions of the images that are read together with this one."""
        shard = self.manifest.shard_range(index // self.manifest.images_per_shard)
        start = index - (index - shard.start) % self.manifest.images_per_group
        return range(start, min(start + self.manifest.images_per_group, shard.stop))

    def read(self, group: range) -> list[npt.NDArray[np.float32]]:
        """float32 [P, D] of each image of a group, as `group_of` gave it.

        Raises:
            ShardError: damaged.
        """
        number, position = divmod(group.start, self.manifest.images_per_shard)
        path = shard_path(self.output, number)
        rows = self._file(number).read_group(position // self.manifest.images_per_group)
        if [(row.index, row.image.sha256) for row in rows] != [(i, self.images[i].sha256) for i in group]:
            raise ShardError(
                f"{path}: its images {group.start} to {group.stop - 1} are not those of {INDEX_NAME}; run verify-shards"
            )
        return [unpack_features(row.packed, self.manifest, f"{path}: image {row.index}") for row in rows]

    def _file(self, number: int) -> FeatureFile:
        if number not in self._files:
            self._files[number] = FeatureFile(shard_path(self.output, number), self.manifest, number)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(number)
        return self._files[number]


def is_feature_cache(output: Location) -> bool:
    """Whether an output holds features: so its manifest says, or where that is broken its first shard.

    Raises:
        StorageError: the store did not say.
    """
    try:
        return bool(json.loads(read_bytes(output / MANIFEST_NAME))["kind"] == "features")
    except StorageError:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        for number in published_shards(output)[:1]:
            return bool(_kind_in_footer(shard_path(output, number)) == "features")
    return False


def _kind_in_footer(path: Location) -> Any:
    try:
        return json.loads(read_footer(path)["manifest"])["kind"]
    except (ShardError, ValueError, KeyError, TypeError):
        return None


def _index_columns(images: Sequence[CachedImage]) -> list[pa.Array]:
    return [
        pa.array([image.sha256 for image in images], pa.string()),
        pa.array([image.paths for image in images], _INDEX_SCHEMA.field("paths").type),
    ]
