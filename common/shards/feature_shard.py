"""Feature caches: the features of each distinct image from a frozen vision tower, computed once.

    output/
      manifest.json         the encoder, the images and the form of the features
      images.parquet        the distinct images, in order of first appearance: SHA-256 of the file, paths, and their
                            sizes if the number of rows depends on them
      shard-00042.parquet   features of images [42 S, 43 S), with its receipt shard-00042.json beside it

Legend: P rows of an image's features (patches), D channels.

Features are the input of the model's adapter. They are stored in one of two forms:

    bf16   bfloat16, exact for a tower that computes in it; low and high bytes are separate columns, because only the
           high bytes repeat
    q8     x = code * patch_scale * channel_scale with code in -127..127; a channel's scale is its root mean square over
           the image's patches, because a few channels are tens of times larger than the others and would else leave
           these few codes
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

from common.errors import ShardError
from common.shards.manifest import (
    MANIFEST_NAME,
    FeatureForm,
    FeatureManifest,
    Receipt,
    ShardCheck,
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

# A row group is read whole even for one image, so it holds only as many as fit into this, but at least one. Images of
# various sizes have one each.
_MAX_GROUP_BYTES = 1 << 20

# Limited, because a cache may have more shards than a process may have open files.
_MAX_OPEN_FILES = 64

_MAX_CODE = 127

_PACKED_COLUMNS: dict[FeatureForm, tuple[str, ...]] = {
    "bf16": ("features_low", "features_high"),
    "q8": ("codes", "patch_scales", "channel_scales"),
}
_INDEX_FIELDS = (
    pa.field("sha256", pa.string(), nullable=False),
    pa.field("paths", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
)
_SIZE_FIELDS = (pa.field("width", pa.int32(), nullable=False), pa.field("height", pa.int32(), nullable=False))


@dataclass(frozen=True)
class CachedImage:
    """Distinct image: SHA-256 (hex) of its encoded file, and the paths by which the dataset names it.

    One whose file only the dataset itself holds has no path. `size` is width and height of what the processor gets, or
    None where all images have the same number of rows.
    """

    sha256: str
    paths: tuple[str, ...]
    size: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """Its first path, otherwise its digest, for messages."""
        return self.paths[0] if self.paths else f"with SHA-256 {self.sha256}"


@dataclass(frozen=True)
class FeatureRow:
    """Features of an image as they are stored; `index` is its position among the distinct images."""

    index: int
    image: CachedImage
    packed: Mapping[str, bytes]


def images_digest(images: Iterable[CachedImage]) -> str:
    """Returns the SHA-256 (hex) of a list of images, their sizes and their paths."""
    sha256 = hashlib.sha256()
    for image in images:
        sha256.update((json.dumps([image.sha256, *(image.size or ()), *image.paths]) + "\n").encode())
    return sha256.hexdigest()


def images_per_group(tokens_per_image: int | None, num_channels: int) -> int:
    """Returns the number of images of a row group."""
    return 1 if tokens_per_image is None else max(1, _MAX_GROUP_BYTES // (2 * tokens_per_image * num_channels))


def _index_schema(manifest: FeatureManifest) -> pa.Schema:
    return pa.schema([*_INDEX_FIELDS, *(_SIZE_FIELDS if manifest.encoder.tokens_per_image is None else ())])


def feature_schema(manifest: FeatureManifest) -> pa.Schema:
    """Returns the Arrow schema of a shard."""
    packed = [pa.field(name, pa.binary(), nullable=False) for name in _PACKED_COLUMNS[manifest.form]]
    return pa.schema([pa.field("index", pa.int64(), nullable=False), *_index_schema(manifest), *packed])


def pack_features(features_PD: npt.NDArray[np.float32], form: FeatureForm) -> dict[str, bytes]:
    """Packs the features of one image into binary columns; the module's docstring describes both forms."""
    if form == "bf16":
        halves_PD2 = to_bfloat16(features_PD).astype("<u2").view(np.uint8).reshape(*features_PD.shape, 2)
        return {name: halves_PD2[..., half].tobytes() for half, name in enumerate(_PACKED_COLUMNS[form])}
    channels_D = np.sqrt(np.mean(np.square(features_PD, dtype=np.float64), axis=0)).astype("<f4")
    scaled_PD = features_PD / np.where(channels_D > 0, channels_D, np.float32(1))
    patches_P = (np.abs(scaled_PD).max(axis=1) / _MAX_CODE).astype("<f4")
    codes_PD = np.rint(scaled_PD / np.where(patches_P > 0, patches_P, np.float32(1))[:, None])
    codes_PD = np.clip(codes_PD, -_MAX_CODE, _MAX_CODE).astype(np.int8)
    return dict(zip(_PACKED_COLUMNS[form], (x.tobytes() for x in (codes_PD, patches_P, channels_D)), strict=True))


def unpack_features(packed: Mapping[str, bytes], manifest: FeatureManifest, where: str) -> npt.NDArray[np.float32]:
    """Inverts `pack_features`; returns float32 [P, D]. In the form bf16 each value is a bfloat16 number.

    Raises:
        ShardError: a column has not the size that the manifest implies, or a code is out of range; names `where`.
    """
    num_patches, num_channels = manifest.encoder.tokens_per_image, manifest.encoder.num_channels
    if num_patches is None:
        # Another number of bytes than that of whole rows is found below.
        num_patches = max(1, len(packed[_PACKED_COLUMNS[manifest.form][0]]) // num_channels)
    shape, num_values = (num_patches, num_channels), num_patches * num_channels
    sizes = {"patch_scales": 4 * num_patches, "channel_scales": 4 * num_channels}
    for name in _PACKED_COLUMNS[manifest.form]:
        if len(packed[name]) != (expected := sizes.get(name, num_values)):
            raise ShardError(f"{where}: {name} has {len(packed[name]):,} bytes, expected {expected:,}")
    columns = [packed[name] for name in _PACKED_COLUMNS[manifest.form]]
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
    """Returns the bits of each finite value in bfloat16, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Inverts `to_bfloat16`."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def write_feature_shard(
    output: Location, number: int, manifest: FeatureManifest, rows: Sequence[FeatureRow]
) -> Receipt:
    """Publishes a shard, then its receipt. The same rows always give the same bytes.

    Raises:
        StorageError: the shard or its receipt was not written, so the shard does not exist.
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
                *_index_columns([row.image for row in group], manifest),
                *(
                    pa.array([row.packed[name] for row in group], pa.binary())
                    for name in _PACKED_COLUMNS[manifest.form]
                ),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=table_schema))
        writer.add_key_value_metadata(footer_metadata(manifest, number))
    return publish_shard(output, number, manifest, ShardContents(buffer.getvalue(), len(rows)))


class FeatureFile(ParquetShard):
    """Open shard of features.

    Raises:
        ShardError: on opening or reading, if the file is damaged or not this shard of the manifest; names the file.
    """

    def __init__(self, path: Location, manifest: FeatureManifest, number: int, check: ShardCheck = "sha256") -> None:
        what = f"feature shard of the form {manifest.form}"
        # Without a number of rows there is the limit for columns that the manifest says nothing of.
        self._num_values = (manifest.encoder.tokens_per_image or 0) * manifest.encoder.num_channels
        super().__init__(path, manifest, number, feature_schema(manifest), what, check)
        self._names = _PACKED_COLUMNS[manifest.form]

    def max_column_bytes(self, num_rows: int) -> int:
        """Returns the bytes of a float32 for each value of so many images."""
        return 4 * num_rows * self._num_values

    def read_group(self, group: int) -> list[FeatureRow]:
        """Reads the rows of one row group."""
        with self.shard_errors():
            table = self._read(group)
            columns = [table.column(name).to_pylist() for name in ("index", *self._names)]
            return [
                FeatureRow(index, image, dict(zip(self._names, packed, strict=True)))
                for image, index, *packed in zip(_read_images(table), *columns, strict=True)
            ]


def write_index(output: Location, images: Sequence[CachedImage], manifest: FeatureManifest) -> None:
    """Publishes images.parquet. Raises StorageError."""
    buffer = io.BytesIO()
    table = pa.Table.from_arrays(_index_columns(images, manifest), schema=_index_schema(manifest))
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    publish(output / INDEX_NAME, buffer.getvalue())


def read_index(output: Location, manifest: FeatureManifest) -> list[CachedImage]:
    """Reads the distinct images of a cache, in order.

    Raises:
        ShardError: the list is missing, damaged, or not the one that the manifest names.
        StorageError: the store failed.
    """
    path = output / INDEX_NAME
    try:
        with open_ranged(path) as file:
            table = pq.read_table(pa.PythonFile(file, "r"), page_checksum_verification=True)
        if not table.schema.equals(schema := _index_schema(manifest)):
            raise ShardError(f"{path}: its columns are not {', '.join(schema.names)}")
        images = _read_images(table)
    except (OSError, pa.ArrowException, ValueError, TypeError) as error:
        raise ShardError(f"{path}: cannot be read ({error}); run precompute-features again, it writes it") from error
    if images_digest(images) != manifest.images_sha256:
        raise ShardError(f"{path}: is not the list of images that the manifest names; run precompute-features again")
    return images


class FeatureCache:
    """Complete cache, open for reading by image.

    Shards are opened on the first read, so that each worker process has file handles of its own.

    Raises:
        ShardError: the output is no feature cache, or an incomplete or damaged one.
    """

    def __init__(self, output: Location, check: ShardCheck = "sha256") -> None:
        self.output = output
        self._check: ShardCheck = check
        self.manifest = read_feature_manifest(output)
        missing = self.manifest.missing_shards(published_shards(output))
        if missing:
            raise ShardError(
                f"{output}: {sum(map(len, missing))} of {self.manifest.num_shards} shards are missing, the first is "
                f"{missing[0].start:05d}; run precompute-features again to complete the cache"
            )
        self.images = read_index(output, self.manifest)
        self._files: OrderedDict[int, FeatureFile] = OrderedDict()

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def by_path(self) -> dict[str, int]:
        """Position of each image, by each path in the dataset."""
        return {path: index for index, image in enumerate(self.images) for path in image.paths}

    @cached_property
    def by_content(self) -> dict[str, int]:
        """Position of each image, by the SHA-256 (hex) of its file."""
        return {image.sha256: index for index, image in enumerate(self.images)}

    def group_range(self, index: int) -> range:
        """Returns the positions of the images in the row group of image `index`, which are read together."""
        shard = self.manifest.shard_range(index // self.manifest.images_per_shard)
        start = index - (index - shard.start) % self.manifest.images_per_group
        return range(start, min(start + self.manifest.images_per_group, shard.stop))

    def read(self, group: range) -> list[npt.NDArray[np.float32]]:
        """Reads the features of each image of a group that `group_range` returned, float32 [P, D] each.

        Raises:
            ShardError: the shard is damaged or holds other images.
        """
        number, position = divmod(group.start, self.manifest.images_per_shard)
        path = shard_path(self.output, number)
        rows = self._open_shard(number).read_group(position // self.manifest.images_per_group)
        if [(row.index, row.image.sha256) for row in rows] != [(i, self.images[i].sha256) for i in group]:
            raise ShardError(
                f"{path}: its images {group.start} to {group.stop - 1} are not those of {INDEX_NAME}; run verify-shards"
            )
        return [unpack_features(row.packed, self.manifest, f"{path}: image {row.index}") for row in rows]

    def _open_shard(self, number: int) -> FeatureFile:
        if number not in self._files:
            self._files[number] = FeatureFile(shard_path(self.output, number), self.manifest, number, self._check)
            if len(self._files) > _MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(number)
        return self._files[number]


def is_feature_cache(output: Location) -> bool:
    """Returns True if an output holds features, by its manifest, or by its first shard if the manifest is broken.

    Raises:
        StorageError: the store failed.
    """
    try:
        return bool(json.loads(read_bytes(output / MANIFEST_NAME))["kind"] == "features")
    except (OSError, ValueError, KeyError, TypeError):
        for number in published_shards(output)[:1]:
            return bool(_read_footer_kind(shard_path(output, number)) == "features")
    return False


def _read_footer_kind(path: Location) -> Any:
    try:
        return json.loads(read_footer(path)["manifest"])["kind"]
    except (ShardError, ValueError, KeyError, TypeError):
        return None


def _index_columns(images: Sequence[CachedImage], manifest: FeatureManifest) -> list[pa.Array]:
    values = [(image.sha256, image.paths, *(image.size or ())) for image in images]
    return [
        pa.array([value[number] for value in values], field.type)
        for number, field in enumerate(_index_schema(manifest))
    ]


def _read_images(table: pa.Table) -> list[CachedImage]:
    names = [field.name for field in (*_INDEX_FIELDS, *_SIZE_FIELDS) if field.name in table.column_names]
    columns = [table.column(name).to_pylist() for name in names]
    return [
        CachedImage(sha256, tuple(paths), (size[0], size[1]) if size else None)
        for sha256, paths, *size in zip(*columns, strict=True)
    ]
