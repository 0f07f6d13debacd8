"""Checks of an output's provenance: manifest.json, and the copy of it in each shard's footer."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from common.errors import DecantError, ShardError, StorageError
from common.shards.manifest import (
    NUM_RECEIPT_READERS,
    SCHEMA_VERSION,
    Manifest,
    Receipt,
    ShardedManifest,
    published_shards,
    read_with_digest,
    receipt_path,
    shard_path,
)
from common.shards.parquet_shard import ParquetShard, read_footer
from common.shards.score_shard import ROWS_PER_GROUP, ShardFile
from common.shards.scores import MAX_DRAWS, MAX_VOCAB_SIZE
from common.storage.files import Location

ManifestT = TypeVar("ManifestT", bound=ShardedManifest)


def manifest_problems(manifest: Manifest) -> Iterator[str]:
    """Yields sizes that no output can have, and settings that exclude each other."""
    capture, generate, vocab_size = manifest.capture, manifest.capture.generate, manifest.tokenizer.vocab_size
    if manifest.dataset.num_samples < 1:
        yield "has no samples"
    if not 1 <= vocab_size <= MAX_VOCAB_SIZE:
        yield f"has a vocabulary of {vocab_size:,} tokens, expected 1 to {MAX_VOCAB_SIZE:,}"
    if manifest.teacher.vocab_size < vocab_size:
        yield f"has {manifest.teacher.vocab_size:,} rows in the output layer for {vocab_size:,} tokens"
    tokens_per_image = None if manifest.image is None else manifest.image.tokens_per_image
    if tokens_per_image is not None and tokens_per_image < 1:
        yield f"has images of {tokens_per_image} tokens"
    if capture.num_draws is None:
        if capture.top_k < 0 or capture.min_k < 1 or not 0 < (1 if capture.top_p is None else capture.top_p) <= 1:
            yield f"keeps entries by top_k {capture.top_k}, top_p {capture.top_p} and min_k {capture.min_k}"
        if capture.precision is None:
            yield "has no precision, which only drawn entries do without"
    elif not 1 <= capture.num_draws <= MAX_DRAWS or capture.top_k or capture.precision is not None:
        yield (
            f"has {capture.num_draws} draws, top_k {capture.top_k} and precision {capture.precision}; expected 1 to "
            f"{MAX_DRAWS:,} draws and neither best entries nor a precision"
        )
    if generate is not None and (manifest.kind != "kd" or capture.score != "response" or generate.num_samples < 1):
        yield f"generates {generate.num_samples} responses of kind {manifest.kind}, scored {capture.score}"


def footer_problems(shard: ShardFile, manifest: Manifest) -> Iterator[str]:
    """Yields problems of a shard's schema version, copy of the manifest, image token, and sizes of row groups.

    The digest, the number and the token classes are checked when a shard is opened.
    """
    yield from metadata_problems(shard, manifest, SCHEMA_VERSION)
    image_token_id = shard.image_token_id
    if image_token_id is not None and not 0 <= image_token_id < manifest.tokenizer.vocab_size:
        yield f"its image token is {image_token_id}, the tokenizer has {manifest.tokenizer.vocab_size}"
    yield from group_problems(shard, ROWS_PER_GROUP, "rows")


def metadata_problems(shard: ParquetShard, manifest: ShardedManifest, schema_version: int) -> Iterator[str]:
    """Yields problems of the schema version and the copy of the manifest in a shard's footer."""
    version = shard.footer.get("schema_version")
    if version != str(schema_version):
        yield f"its footer has schema version {version!r}, expected {schema_version}"
    if parse_manifest(shard.footer, type(manifest)) != manifest:
        yield "the manifest in its footer is not that of the output"


def group_problems(shard: ParquetShard, rows_per_group: int, items: str) -> Iterator[str]:
    """Yields a problem of the sizes of row groups, by which readers find rows; `items` says what a row is."""
    sizes = [shard.num_group_rows(group) for group in range(shard.num_groups)]
    if any(size != rows_per_group for size in sizes[:-1]) or not all(1 <= size <= rows_per_group for size in sizes):
        yield f"its row groups hold {sizes} {items}, expected {rows_per_group} each and at most so many in the last"


def restore_manifest(output: Location, schema: type[ManifestT]) -> ManifestT:
    """Returns the manifest on which all readable footers agree and whose digest all readable receipts have.

    Raises:
        ShardError: no shard can be read, or they do not agree. StorageError: the disk or the store refused.
    """
    numbers = published_shards(output)
    with ThreadPoolExecutor(NUM_RECEIPT_READERS) as pool:
        manifests = list(filter(None, pool.map(lambda n: _read_footer_manifest(output, n, schema), numbers)))
        digests = set(filter(None, pool.map(lambda n: _read_manifest_digest(output, n), numbers)))
    different = digests | {manifest.sha256 for manifest in manifests}
    if not manifests:
        raise ShardError(f"{output}: none of {len(numbers)} shards with a receipt has a readable copy of the manifest")
    if len(different) > 1 or not digests:
        raise ShardError(
            f"{output}: its shards and receipts name {len(different)} manifests, so none of them can be said to be "
            "the output's; remove those that do not belong there"
        )
    return manifests[0]


def _read_footer_manifest(output: Location, number: int, schema: type[ManifestT]) -> ManifestT | None:
    """Returns the manifest in a shard's footer, None if there is none that can be read."""
    try:
        return parse_manifest(read_footer(shard_path(output, number)), schema)
    except ShardError:
        return None


def _read_manifest_digest(output: Location, number: int) -> str | None:
    """Returns the manifest's digest in a shard's receipt, None if the receipt cannot be read."""
    try:
        return read_with_digest(receipt_path(output, number), Receipt).manifest_sha256
    except StorageError:
        raise
    except DecantError:
        return None


def parse_manifest(footer: dict[str, str], schema: type[ManifestT]) -> ManifestT | None:
    """Returns the manifest in a shard's footer; None unless it has the digest that is stored beside it."""
    try:
        manifest = schema.model_validate_json(footer.get("manifest", ""))
    except ValueError:
        return None
    return manifest if manifest.sha256 == footer.get("manifest_sha256") else None
