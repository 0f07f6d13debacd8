"""Manifest of an output directory, and the receipts of its shards.

    output/
      manifest.json       provenance of the output; written once, before the first shard
      shard-00042.parquet rows of samples [42 S, 43 S) of the dataset
      shard-00042.json    its receipt: rows, tokens, bytes, SHA-256, skipped samples

A feature cache has the same layout; its items are images (common/shards/feature_shard.py).

The receipt is published last and is the commit: a shard without one does not exist. No list of shards has to be
updated, so any number of processes can work on one output without a coordinator. Manifest and receipts hold a SHA-256
of their own content, so that a changed bit in them is found too.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, ValidationError

from common.config import FROM_LIST, StrictModel, digest
from common.data.chat_encoding import ScoredTokens
from common.data.images import AspectRatio
from common.data.samples import Kind
from common.errors import ProvenanceError, ShardError
from common.shards.quantization import Quantizer, StoredPrecision
from common.storage.files import Location, file_size, is_file, list_files, open_ranged, publish, publish_new, read_bytes

SCHEMA_VERSION = 6
FEATURE_SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

# Number of receipts that are read at the same time.
NUM_RECEIPT_READERS = 16

# Bytes of a file that are read and hashed at once; of an object, one request.
_HASH_CHUNK_BYTES = 2**24

FeatureForm = Literal["bf16", "q8"]

# How a shard is compared with its receipt before it is parsed: "sha256" reads all of its bytes, "size" none.
ShardCheck = Literal["sha256", "size"]

# Numbers of a manifest or receipt: what is counted, and what is divided by.
Count = Annotated[int, Field(ge=0, le=2**62)]
Size = Annotated[int, Field(ge=1, le=2**62)]

_SHARD_NAME = re.compile(r"shard-(\d{5,})\.(parquet|json)")


class TeacherIdentity(StrictModel):
    """Teacher model. `vocab_size` is the size of its output layer, padding included."""

    architecture: str
    weights_sha256: str
    config_sha256: str
    vocab_size: int


class TokenizerIdentity(StrictModel):
    """Tokenizer and chat template that turned conversations into tokens.

    `template_date` (ISO 8601) is the date that the template showed, null if it shows none. `ends_turns` is false if
    responses end with nothing that is scored, `has_generation_prompt` if they begin with their role.
    """

    sha256: str
    vocab_size: int
    template_sha256: str
    template_date: str | None = None
    ends_turns: bool = True
    has_generation_prompt: bool = True


class ImageIdentity(StrictModel):
    """Processor of the teacher, the aspect ratio, and the number of tokens of an image, None if that varies."""

    processor_sha256: str
    aspect_ratio: AspectRatio
    tokens_per_image: int | None


class DatasetIdentity(StrictModel):
    """Dataset file, which fixes the samples and their order."""

    name: str
    sha256: str
    num_samples: Count


class GenerateSettings(StrictModel):
    """Settings with which the teacher generated responses."""

    temperature: float
    top_p: float
    num_samples: int
    max_new_tokens: int


class CaptureSettings(StrictModel):
    """Settings of the capture: which entries of a distribution are kept, and what else a row holds.

    `top_k` 0 keeps no best entries, the vocabulary's size keeps all. With `top_p` a row keeps from `min_k` to `top_k`
    of them, with `num_draws` the drawn ids and their counts. `seed` is null unless ids are drawn or responses
    generated. `precision` is that of the kept log-probs, null if ids are drawn. `images` says if rows hold all encoded
    image files, or only paths and those files that the dataset itself holds.
    """

    top_k: int
    top_p: float | None
    min_k: int
    num_draws: int | None
    precision: StoredPrecision
    seed: int | None
    generate: GenerateSettings | None
    images: Literal["path", "bytes"]
    score: ScoredTokens
    max_tokens: int
    on_bad_sample: Literal["stop", "skip"]

    @property
    def quantizer(self) -> Quantizer:
        """Quantizer of the kept entries."""
        return Quantizer(self.precision, self.top_k, self.num_draws)

    @property
    def max_kept(self) -> int:
        """Largest number of entries that a row may keep."""
        return self.top_k if self.num_draws is None else self.num_draws


class EngineIdentity(StrictModel):
    """Engine that computed the scores or features."""

    name: str
    version: str
    dtype: str


class EncoderIdentity(StrictModel):
    """Frozen vision tower, and the part of its output that is taken as features.

    `weights_sha256` covers the tower's tensors by name, in bfloat16, but not how files hold them. `dtype` is the type
    in which the tower computed. `layers` are numbers of hidden states, of which 0 is the embeddings; several are
    concatenated along the channels. Under the strategy "model", `layers` is empty: the features are what the model's
    own code gives its adapter. `tokens_per_image` is None if an image's number of rows depends on its size.
    """

    architecture: str
    weights_sha256: str
    config_sha256: str
    layers: Annotated[tuple[int, ...], FROM_LIST]
    select_strategy: Literal["default", "full", "model"]
    processor_sha256: str
    aspect_ratio: AspectRatio
    dtype: Literal["bfloat16"]
    tokens_per_image: int | None
    num_channels: int


class ShardedManifest(StrictModel):
    """Manifest of any output: shard n holds items [n S, (n + 1) S) of a sequence that is known from the start.

    `command` is the command that writes such outputs.
    """

    command: ClassVar[str]

    @property
    def num_items(self) -> int:
        """Number of items of a complete output."""
        raise NotImplementedError

    @property
    def items_per_shard(self) -> int:
        """Number of items of each shard but the last, S."""
        raise NotImplementedError

    @property
    def num_shards(self) -> int:
        """Number of shards of a complete output."""
        return -(-self.num_items // self.items_per_shard)

    @property
    def sha256(self) -> str:
        """Digest of this manifest, which every shard and receipt of the output holds."""
        return digest(self)

    def missing_shards(self, published: Iterable[int]) -> tuple[range, ...]:
        """Returns the gaps between the ascending numbers of the published shards.

        The missing shards are not listed one by one, because a hostile manifest may name 10^12 of them.
        """
        gaps: list[range] = []
        start = 0
        for number in published:
            if number >= self.num_shards:
                break
            if number > start:
                gaps.append(range(start, number))
            start = number + 1
        if start < self.num_shards:
            gaps.append(range(start, self.num_shards))
        return tuple(gaps)

    def shard_range(self, number: int) -> range:
        """Returns the positions of the items of shard `number`."""
        start = number * self.items_per_shard
        return range(start, min(start + self.items_per_shard, self.num_items))


class Manifest(ShardedManifest):
    """Provenance of all shards of one output of `precompute-logits`; its items are the dataset's samples."""

    command: ClassVar[str] = "precompute-logits"

    schema_version: int = SCHEMA_VERSION
    kind: Kind
    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    image: ImageIdentity | None
    dataset: DatasetIdentity
    capture: CaptureSettings
    engine: EngineIdentity
    samples_per_shard: Size

    @property
    def num_items(self) -> int:
        """Number of samples of the dataset."""
        return self.dataset.num_samples

    @property
    def items_per_shard(self) -> int:
        """Number of samples of each shard but the last."""
        return self.samples_per_shard


class FeatureManifest(ShardedManifest):
    """Provenance of a feature cache; its items are the dataset's distinct images, in order of first appearance.

    `images_sha256` is the digest of the list of images, and `form` the form of the stored features
    (common/shards/feature_shard.py). A row group holds `images_per_group` images.
    """

    command: ClassVar[str] = "precompute-features"

    schema_version: int = FEATURE_SCHEMA_VERSION
    kind: Literal["features"] = "features"
    encoder: EncoderIdentity
    dataset: DatasetIdentity
    engine: EngineIdentity
    num_images: Count
    images_sha256: str
    form: FeatureForm
    images_per_shard: Size
    images_per_group: Size

    @property
    def num_items(self) -> int:
        """Number of distinct images."""
        return self.num_images

    @property
    def items_per_shard(self) -> int:
        """Number of images of each shard but the last."""
        return self.images_per_shard


class SkippedSample(StrictModel):
    """Sample that was left out, because the configuration says to skip bad samples."""

    index: Count
    id: str
    reason: str


class Receipt(StrictModel):
    """Receipt of the published shard `shard`: what it holds, and the size and SHA-256 of its file."""

    shard: Count
    manifest_sha256: str
    num_rows: Count
    num_scored_tokens: Count
    num_bytes: Count
    sha256: str
    skipped: Annotated[tuple[SkippedSample, ...], FROM_LIST] = ()


ModelT = TypeVar("ModelT", bound=StrictModel)


def write_with_digest(path: Location, content: StrictModel) -> None:
    """Publishes a model as JSON that includes the digest of its content."""
    publish(path, _with_digest(content))


def _with_digest(content: StrictModel) -> bytes:
    body = content.model_dump(mode="json")
    return (json.dumps({**body, "content_sha256": digest(content)}, indent=1) + "\n").encode()


def read_with_digest(path: Location, schema: type[ModelT]) -> ModelT:
    """Reads a file that `write_with_digest` wrote.

    Raises:
        ShardError: the file is missing, unreadable, of another schema, or was changed after it was written.
        StorageError: the store failed, which says nothing about the file.
    """
    try:
        raw: dict[str, Any] = json.loads(read_bytes(path))
        claimed = raw.pop("content_sha256")
        _check_schema(path, raw, schema)
        content = schema.model_validate(raw)
    except FileNotFoundError as error:
        wanted = schema.command if issubclass(schema, ShardedManifest) else Manifest.command
        raise ShardError(f"{path}: does not exist; expected an output of {wanted} there") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ValidationError) as error:
        raise ShardError(f"{path}: is damaged or of another version ({error})") from error
    if claimed != digest(content):
        raise ShardError(
            f"{path}: its content does not match its own SHA-256; the file was changed after it was written"
        )
    return content


def _check_schema(path: Location, raw: dict[str, Any], schema: type[StrictModel]) -> None:
    """Raises ShardError if `raw` is of another schema version, or a manifest of the other kind of output."""
    if issubclass(schema, ShardedManifest) and (raw["kind"] == "features") != (schema is FeatureManifest):
        raise ShardError(
            f"{path}: belongs to an output of precompute-logits, expected one of precompute-features"
            if schema is FeatureManifest
            else f"{path}: belongs to a feature cache, an output of precompute-features, which holds no scores; "
            "expected one of precompute-logits (verify-shards checks either, data.features trains with a cache)"
        )
    version = schema.model_fields.get("schema_version")
    if version is not None and raw.get("schema_version", version.default) != version.default:
        raise ShardError(
            f"{path}: has schema version {raw['schema_version']}, this program reads {version.default}; "
            "use the release that wrote it, or capture again"
        )


def shard_path(output: Location, number: int) -> Location:
    """Returns the path of a shard's Parquet file."""
    return output / f"shard-{number:05d}.parquet"


def receipt_path(output: Location, number: int) -> Location:
    """Returns the path of a shard's receipt."""
    return shard_path(output, number).with_suffix(".json")


def read_manifest(output: Location) -> Manifest:
    """Reads and checks manifest.json of an output of scores. Raises ShardError or StorageError."""
    return read_with_digest(output / MANIFEST_NAME, Manifest)


def read_feature_manifest(output: Location) -> FeatureManifest:
    """Reads and checks manifest.json of a feature cache. Raises ShardError or StorageError."""
    return read_with_digest(output / MANIFEST_NAME, FeatureManifest)


def published_shards(output: Location) -> tuple[int, ...]:
    """Returns the numbers of the shards that have a receipt, ascending. Raises StorageError."""
    return tuple(
        sorted(n for name in list_files(output) if (n := shard_number(name)) is not None and name.endswith(".json"))
    )


def shard_number(name: str) -> int | None:
    """Returns the number in the name of a shard's file or receipt; None for a name that this program does not write."""
    match = _SHARD_NAME.fullmatch(name)
    return int(match[1]) if match and name == f"shard-{int(match[1]):05d}.{match[2]}" else None


def read_receipt(output: Location, number: int, manifest: ShardedManifest) -> Receipt:
    """Reads a shard's receipt, and checks that it belongs to this manifest and number.

    Raises:
        ShardError: the receipt is missing or damaged, or was renamed. StorageError: the store failed.
        ProvenanceError: it belongs to an output with another manifest.
    """
    path = receipt_path(output, number)
    receipt = read_with_digest(path, Receipt)
    if receipt.shard != number:
        raise ShardError(f"{path}: is the receipt of shard {receipt.shard}; the file was renamed")
    if receipt.manifest_sha256 != manifest.sha256:
        raise ProvenanceError(f"{path}: belongs to an output with another manifest; remove it and run again")
    return receipt


def read_receipts(output: Location, manifest: ShardedManifest) -> list[Receipt]:
    """Reads the receipts of the published shards, ascending. Raises the same errors as `read_receipt`.

    Several are read at a time, because a request to a store takes long.
    """
    numbers = [number for number in published_shards(output) if number < manifest.num_shards]
    with ThreadPoolExecutor(NUM_RECEIPT_READERS) as pool:
        return list(pool.map(lambda number: read_receipt(output, number, manifest), numbers))


def is_complete(output: Location, number: int, manifest: ShardedManifest) -> bool:
    """Returns True if a shard has a receipt, and its file exists and has the size that was written.

    Raises:
        ShardError: the receipt is damaged.
    """
    if not is_file(receipt_path(output, number)):
        return False
    try:
        size = file_size(shard_path(output, number))
    except FileNotFoundError:
        return False
    return size == read_receipt(output, number, manifest).num_bytes


def open_output(output: Location, manifest: ShardedManifest) -> None:
    """Writes the manifest of a new output, or checks that an existing output has the same manifest.

    Raises:
        ProvenanceError: the output was begun with another teacher, dataset or setting; names every difference.
    """
    if publish_new(output / MANIFEST_NAME, _with_digest(manifest)):
        return
    existing = read_with_digest(output / MANIFEST_NAME, type(manifest))
    differences = list_differences(existing.model_dump(), manifest.model_dump())
    if differences:
        raise ProvenanceError(
            f"{output}: was begun with other settings; nothing was written\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nchoose another output, or restore what began this one"
        )


def list_differences(
    first: dict[str, Any],
    second: dict[str, Any],
    prefix: str = "",
    names: tuple[str, str] = ("the output", "this run"),
) -> list[str]:
    """Returns a line for each leaf in which two nested dictionaries differ; `names` are their names in these lines."""
    lines = []
    for key in sorted({*first, *second}):
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += list_differences(a, b, f"{prefix}{key}.", names)
        elif a != b:
            lines.append(f"{prefix}{key}: {names[0]} has {a!r}, {names[1]} has {b!r}")
    return lines


def file_sha256(path: Location) -> str:
    """Returns the SHA-256 (hex) of a file's bytes.

    Raises:
        ShardError: the file cannot be read. StorageError: the store failed.
    """
    sha256 = hashlib.sha256()
    try:
        with open_ranged(path) as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                sha256.update(chunk)
        return sha256.hexdigest()
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
