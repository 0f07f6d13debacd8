"""The contract of an output directory, and the receipts of its shards.

    output/
      manifest.json       what made this output; written once, before the first shard
      shard-00042.parquet the rows of samples [42 S, 43 S) of the dataset
      shard-00042.json    its receipt: rows, tokens, bytes, SHA-256, skipped samples

A feature cache has the same form; its items are images (common/shards/feature_shard.py).

The receipt is published last and is the commit: a shard without one does not exist. There is no list of shards
to update, so any number of processes can work on one output without a coordinator. Both kinds of JSON carry a
SHA-256 of their own content, so a changed bit in them is found too.
"""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import ValidationError

from common.config import StrictModel, digest
from common.data.chat_encoding import ScoredTokens
from common.data.images import AspectRatio
from common.data.samples import Kind
from common.errors import ProvenanceError, ShardError
from common.shards.quantization import Quantizer, StoredPrecision
from common.storage.files import Location, file_size, is_file, list_files, open_ranged, publish, publish_new, read_bytes

SCHEMA_VERSION = 5
FEATURE_SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"

# Receipts that are read at once.
NUM_READERS = 16

# Read at once to be hashed: one request, of an object.
_HASHED_BYTES = 2**24

_SHARD_NAME = re.compile(r"shard-(\d{5,})\.(parquet|json)")


class TeacherIdentity(StrictModel):
    """Which model spoke. `vocab_size` is the size of its output layer, padding included."""

    architecture: str
    weights_sha256: str
    config_sha256: str
    vocab_size: int


class TokenizerIdentity(StrictModel):
    """Which tokenizer, and which chat template, turned conversations into tokens."""

    sha256: str
    vocab_size: int
    template_sha256: str


class ImageIdentity(StrictModel):
    """What the teacher saw of an image."""

    processor_sha256: str
    aspect_ratio: AspectRatio
    tokens_per_image: int


class DatasetIdentity(StrictModel):
    """Which samples, in which order."""

    name: str
    sha256: str
    num_samples: int


class GenerateSettings(StrictModel):
    """How the teacher wrote the responses."""

    temperature: float
    top_p: float
    num_samples: int
    max_new_tokens: int


class CaptureSettings(StrictModel):
    """What is kept of the distribution. `top_k` 0 keeps no best entries; the vocabulary's size keeps all.

    With `top_p` a row keeps from `min_k` to `top_k` of them; with `num_draws` the drawn ids and their counts. `seed` is
    null unless something is drawn or generated. `precision` is that of the kept log-probs, null where ids are drawn.
    `images`: whether rows hold the encoded image files or their paths alone.
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
    def coding(self) -> Quantizer:
        """How shards store what is kept."""
        return Quantizer(self.precision, self.top_k, self.num_draws)

    @property
    def max_kept(self) -> int:
        """Most entries that a row may keep."""
        return self.top_k if self.num_draws is None else self.num_draws


class EngineIdentity(StrictModel):
    """What computed the scores."""

    name: str
    version: str
    dtype: str


class EncoderIdentity(StrictModel):
    """What made features of an image: the frozen vision tower, and what of its output is taken.

    `weights_sha256` covers the tower's tensors by name, in bfloat16, in which `dtype` says they computed; not how files
    hold them. `layers` are numbers of hidden states from 0, the embeddings; several stand side by side in the channels.
    """

    architecture: str
    weights_sha256: str
    config_sha256: str
    layers: tuple[int, ...]
    select_strategy: Literal["default", "full"]
    processor_sha256: str
    aspect_ratio: AspectRatio
    dtype: Literal["bfloat16"]
    tokens_per_image: int
    num_channels: int


class ShardedManifest(StrictModel):
    """What any output is: shard n holds items [n S, (n + 1) S) of a sequence that is known from the start.

    `command` writes such outputs.
    """

    command: ClassVar[str]

    @property
    def extent(self) -> tuple[int, int]:
        """How many items there are, and S."""
        raise NotImplementedError

    @property
    def num_shards(self) -> int:
        """How many shards a complete output has."""
        num_items, each = self.extent
        return -(-num_items // each)

    @property
    def sha256(self) -> str:
        """Digest that every shard and receipt of this output carries."""
        return digest(self)

    def shard_range(self, number: int) -> range:
        """Positions of the items of shard `number`."""
        num_items, each = self.extent
        return range(number * each, min((number + 1) * each, num_items))


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
    samples_per_shard: int

    @property
    def extent(self) -> tuple[int, int]:
        """Samples of the dataset, and of a shard."""
        return self.dataset.num_samples, self.samples_per_shard


class FeatureManifest(ShardedManifest):
    """Provenance of a feature cache; its items are the dataset's distinct images, in the order of their appearance.

    `images_sha256` stands for the list of them (common/shards/feature_shard.py). `form`: how features are stored. A row
    group holds `images_per_group` images.
    """

    command: ClassVar[str] = "precompute-features"

    schema_version: int = FEATURE_SCHEMA_VERSION
    kind: Literal["features"] = "features"
    encoder: EncoderIdentity
    dataset: DatasetIdentity
    engine: EngineIdentity
    num_images: int
    images_sha256: str
    form: Literal["bf16", "q8"]
    images_per_shard: int
    images_per_group: int

    @property
    def extent(self) -> tuple[int, int]:
        """Distinct images, and those of a shard."""
        return self.num_images, self.images_per_shard


class SkippedSample(StrictModel):
    """A sample that was left out by explicit choice."""

    index: int
    id: str
    reason: str


class Receipt(StrictModel):
    """What shard `shard` holds and what its bytes are."""

    shard: int
    manifest_sha256: str
    num_rows: int
    num_scored_tokens: int
    num_bytes: int
    sha256: str
    skipped: tuple[SkippedSample, ...] = ()


ModelT = TypeVar("ModelT", bound=StrictModel)


def write_with_digest(path: Location, content: StrictModel) -> None:
    """Publishes a model as JSON together with the digest of its content."""
    publish(path, _with_digest(content))


def _with_digest(content: StrictModel) -> bytes:
    body = content.model_dump(mode="json")
    return (json.dumps({**body, "content_sha256": digest(content)}, indent=1) + "\n").encode()


def read_with_digest(path: Location, schema: type[ModelT]) -> ModelT:
    """Reads what `write_with_digest` wrote.

    Raises:
        ShardError: missing, unreadable, of another schema, or not the bytes that were written.
        StorageError: the store did not give it; nothing is known of its content.
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
    """Another version, or a manifest of the other kind of output."""
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
    """Path of a shard's Parquet file."""
    return output / f"shard-{number:05d}.parquet"


def receipt_path(output: Location, number: int) -> Location:
    """Path of a shard's receipt."""
    return shard_path(output, number).with_suffix(".json")


def read_manifest(output: Location) -> Manifest:
    """Reads and checks manifest.json of an output."""
    return read_with_digest(output / MANIFEST_NAME, Manifest)


def read_feature_manifest(output: Location) -> FeatureManifest:
    """Reads and checks manifest.json of a feature cache."""
    return read_with_digest(output / MANIFEST_NAME, FeatureManifest)


def published_shards(output: Location) -> tuple[int, ...]:
    """Numbers of the shards that have a receipt, ascending."""
    return tuple(
        sorted(n for name in list_files(output) if (n := shard_number(name)) is not None and name.endswith(".json"))
    )


def shard_number(name: str) -> int | None:
    """The number in the name of a shard's file or receipt; None for other names, and for numbers written otherwise."""
    match = _SHARD_NAME.fullmatch(name)
    return int(match[1]) if match and name == f"shard-{int(match[1]):05d}.{match[2]}" else None


def read_receipt(output: Location, number: int, manifest: ShardedManifest) -> Receipt:
    """Reads a shard's receipt and checks that it belongs to this manifest and number."""
    path = receipt_path(output, number)
    receipt = read_with_digest(path, Receipt)
    if receipt.shard != number:
        raise ShardError(f"{path}: is the receipt of shard {receipt.shard}; the file was renamed")
    if receipt.manifest_sha256 != manifest.sha256:
        raise ProvenanceError(f"{path}: belongs to an output with another manifest; remove it and run again")
    return receipt


def read_receipts(output: Location, manifest: ShardedManifest) -> list[Receipt]:
    """The receipts of the published shards, ascending; several are read at once, since a store takes its time."""
    numbers = [number for number in published_shards(output) if number < manifest.num_shards]
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(lambda number: read_receipt(output, number, manifest), numbers))


def is_complete(output: Location, number: int, manifest: ShardedManifest) -> bool:
    """Whether a shard is published. One whose file is gone, or is not of the size that was written, is not.

    Raises:
        ShardError: its receipt is damaged.
    """
    if not is_file(receipt_path(output, number)):
        return False
    try:
        size = file_size(shard_path(output, number))
    except FileNotFoundError:
        return False
    return size == read_receipt(output, number, manifest).num_bytes


def open_output(output: Location, manifest: ShardedManifest) -> None:
    """Begins an output, or checks that `manifest` is what began it.

    Raises:
        ProvenanceError: with every difference, if another teacher, dataset or setting began it.
    """
    if publish_new(output / MANIFEST_NAME, _with_digest(manifest)):
        return
    there = read_with_digest(output / MANIFEST_NAME, type(manifest))
    differences = list_differences(there.model_dump(), manifest.model_dump())
    if differences:
        raise ProvenanceError(
            f"{output}: was begun with other settings; nothing was written\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nchoose another output, or restore what began this one"
        )


def list_differences(
    there: dict[str, Any],
    here: dict[str, Any],
    prefix: str = "",
    names: tuple[str, str] = ("the output", "this run"),
) -> list[str]:
    """Every leaf in which two nested dictionaries differ, one line each; `names` are what the two are called."""
    lines = []
    for key in sorted({*there, *here}):
        a, b = there.get(key), here.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += list_differences(a, b, f"{prefix}{key}.", names)
        elif a != b:
            lines.append(f"{prefix}{key}: {names[0]} has {a!r}, {names[1]} has {b!r}")
    return lines


def file_sha256(path: Location) -> str:
    """SHA-256 (hex) of a file's bytes.

    Raises:
        ShardError: it cannot be read. StorageError: the store did not give it.
    """
    sha256 = hashlib.sha256()
    try:
        with open_ranged(path) as file:
            while chunk := file.read(_HASHED_BYTES):
                sha256.update(chunk)
        return sha256.hexdigest()
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from error
