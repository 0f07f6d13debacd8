"""Reads examples by position from outputs of `precompute-logits` or from dataset files.

    ShardSource | DatasetSource ── source[i] ──> Example
    MixtureSource   several sources of one kind, concatenated

train/data/sampling.py chooses the positions of each step.
"""

import datetime
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from common.data.chat_encoding import ChatEncoder, EncodedChat
from common.data.dataset import Dataset
from common.data.images import AspectRatio, ImageRoot
from common.data.sample_ids import IdPolicy
from common.data.samples import Kind, Sample
from common.errors import ConfigError, ProvenanceError, ShardError
from common.shards.manifest import Manifest, ShardCheck, published_shards, read_manifest, read_receipts, shard_path
from common.shards.score_shard import ROWS_PER_GROUP, ScoredConversation, ShardFile, ShardRow
from common.shards.scores import NO_SCORES, TeacherScores
from common.storage.files import Location
from train.config import DataConfig, SetConfig

# A training set may have more shards than a process may have open files.
_MAX_OPEN_FILES = 64

# Average of English text. The value matters only where samples with and without images are compared.
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class Example:
    """A sample in the student's tokens.

    conversations    one entry a conversation; a preference pair has the chosen one first
    scores           the teacher's, one entry a conversation; None without a teacher
    image_root       the image root of the sample's own set, None if the set has none
    """

    sample: Sample
    conversations: tuple[EncodedChat, ...]
    scores: tuple[TeacherScores, ...] | None
    image_root: ImageRoot | None = None


class ExampleSource(Protocol):
    """Random access to examples.

    sha256     digest of all examples and their order
    sampled    True if the teacher's kept entries were drawn from its distribution, False if they are its best ones
    """

    sha256: str
    sampled: bool

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...

    def read_unscored(self, index: int) -> Example:
        """Returns an example without its scores, which take the longest to decode."""

    def length(self, index: int, tokens_per_image: int) -> int:
        """Returns about how many tokens a sample has; of a preference pair, the longer conversation.

        The value is for sorting samples by length.
        """


class DatasetSource:
    """Examples of a dataset file, without teacher scores."""

    sampled = False

    def __init__(self, path: Location, kind: Kind, encoder: ChatEncoder, ids: IdPolicy = "any") -> None:
        self._dataset = Dataset.open(path, kind, ids)
        self.sha256 = self._dataset.sha256
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example:
        sample = self._dataset[index]
        return Example(sample, self._encoder.encode_sample(sample), None)

    def read_unscored(self, index: int) -> Example:
        """Returns the example."""
        return self[index]

    def length(self, index: int, tokens_per_image: int) -> int:
        """Returns an estimate from the number of characters, because encoding all samples of a step would take long."""
        sample = self._dataset[index]
        num_characters = max(sum(len(turn.content) for turn in turns) for turns in sample.conversations)
        return num_characters // _CHARACTERS_PER_TOKEN + len(sample.images) * tokens_per_image


class ShardSource:
    """Examples of a complete output of `precompute-logits`.

    The student's encoding of a sample must have the tokens that the teacher scored. If the student uses the teacher's
    chat template, only the first sample of each row group is encoded again; if this gives the stored tokens, the stored
    encodings of the whole group are used. If the teacher generated the responses, their stored tokens are always used,
    because encoding their text again may give other tokens.

    Row groups are decoded when first needed; the `cached_groups` most recent ones stay in memory.

    Raises:
        ShardError: the output is damaged or incomplete.
        ProvenanceError: it was made for another tokenizer, image treatment or choice of scored tokens.
    """

    def __init__(
        self,
        output: Location,
        encoder: ChatEncoder,
        aspect_ratio: AspectRatio | None,
        cached_groups: int = 4,
        *,
        check: ShardCheck = "sha256",
    ) -> None:
        self.output = output
        self._check: ShardCheck = check
        self.manifest = read_manifest(output)
        self.sha256 = self.manifest.sha256
        self.sampled = self.manifest.capture.num_draws is not None
        self._cached_groups = cached_groups
        date = self.manifest.tokenizer.template_date
        self._encoder = encoder.with_date(None if date is None else datetime.date.fromisoformat(date))
        _check_provenance(output, self.manifest, encoder, aspect_ratio)
        self._groups: OrderedDict[tuple[int, int], _RowGroup] = OrderedDict()
        self._files: OrderedDict[int, ShardFile] = OrderedDict()
        self._unscored: tuple[tuple[int, int], _RowGroup] | None = None
        # Sizes are never dropped, because they take only about 12 bytes a sample.
        self._sizes: dict[tuple[int, int], npt.NDArray[np.int32]] = {}
        missing = self.manifest.missing_shards(published_shards(output))
        if missing:
            raise ShardError(
                f"{output}: {sum(map(len, missing))} of {self.manifest.num_shards} shards are missing, the first is "
                f"{missing[0].start:05d}; run precompute-logits again to complete the output"
            )
        rows = [receipt.num_rows for receipt in read_receipts(output, self.manifest)]
        self._first_row = np.concatenate([[0], np.cumsum(rows)])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __getitem__(self, index: int) -> Example:
        shard, number, position = self._locate(index)
        group = self._group(shard, number)
        row = group.rows[position]
        encoded = _stored_encoding(row) if group.uses_stored_encoding else self._encode(row)
        return Example(row.sample, encoded, tuple(scored.scores for scored in row.conversations))

    def read_unscored(self, index: int) -> Example:
        """Returns an example without its scores; the row group that was read last stays in memory."""
        shard, group, position = self._locate(index)
        if self._unscored is None or self._unscored[0] != (shard, group):
            rows = [
                ShardRow(number, sample, tuple(ScoredConversation(chat, NO_SCORES) for chat in chats))
                for number, sample, chats in self._file(shard).read_unscored(group)
            ]
            self._unscored = (shard, group), _RowGroup(rows, self._encodes_as_stored(rows[0]))
        read = self._unscored[1]
        row = read.rows[position]
        return Example(row.sample, _stored_encoding(row) if read.uses_stored_encoding else self._encode(row), None)

    def length(self, index: int, tokens_per_image: int) -> int:
        """Returns the length up to the last scored token, without what a chat template writes after it."""
        shard, group, position = self._locate(index)
        if (shard, group) not in self._sizes:
            self._sizes[shard, group] = self._file(shard).read_sizes(group)
        num_tokens, num_images = self._sizes[shard, group][position].tolist()
        return int(num_tokens + num_images * (tokens_per_image - 1))

    def set_cache_window(self, window: int) -> None:
        """Sets the number of cached row groups to what a shuffle window of `window` samples may touch."""
        # A window may begin and end within a row group.
        self._cached_groups = -(-window // ROWS_PER_GROUP) + 2

    def _encode(self, row: ShardRow) -> tuple[EncodedChat, ...]:
        """Returns the student's encoding of a row, after a check that its scored tokens are the teacher's."""
        if self.manifest.capture.generate is not None:
            self._check_prompts(row)
            return _stored_encoding(row)
        encoded = self._encoder.encode_sample(row.sample)
        self._check_responses(row, encoded)
        return encoded

    def _check_responses(self, row: ShardRow, encoded: Sequence[EncodedChat]) -> None:
        for own, scored in zip(encoded, row.conversations, strict=True):
            if not np.array_equal(own.response_ids, scored.encoded.response_ids):
                raise self._mismatch(
                    row,
                    f"the student's encoding has {len(own.response_ids)} scored tokens, the teacher scored "
                    f"{len(scored.encoded.response_ids)} others",
                )

    def _check_prompts(self, row: ShardRow) -> None:
        for turns, scored in zip(row.sample.conversations, row.conversations, strict=True):
            prompt_T = self._encoder.encode_prompt(turns[:-1])
            if not np.array_equal(prompt_T, scored.encoded.input_ids[: len(prompt_T)]):
                raise self._mismatch(
                    row, f"the student's prompt of {len(prompt_T)} tokens is not the one that the teacher answered"
                )

    def _mismatch(self, row: ShardRow, what: str) -> ProvenanceError:
        return ProvenanceError(
            f"{self.output}: sample {row.sample.id!r}: {what}; use the chat template that the teacher used "
            "(model.chat_template = FILE)"
        )

    def _locate(self, index: int) -> tuple[int, int, int]:
        """Returns (shard, row group, position within the row group) of a sample."""
        shard = int(np.searchsorted(self._first_row, index, side="right")) - 1
        return shard, *divmod(index - int(self._first_row[shard]), ROWS_PER_GROUP)

    def _group(self, shard: int, number: int) -> "_RowGroup":
        key = (shard, number)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        file = self._file(shard)
        rows = file.read_group(number)
        _check_finite(rows, file.path)
        group = self._groups[key] = _RowGroup(rows, self._encodes_as_stored(rows[0]))
        while len(self._groups) > self._cached_groups:
            self._groups.popitem(last=False)
        return group

    def _file(self, shard: int) -> ShardFile:
        """Opens a shard at its first use, because a worker process may not share its parent's open files."""
        if shard not in self._files:
            self._files[shard] = ShardFile(shard_path(self.output, shard), self.manifest, shard, check=self._check)
            if len(self._files) > _MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard]

    def _encodes_as_stored(self, row: ShardRow) -> bool:
        return self.manifest.tokenizer.template_sha256 == self._encoder.template_sha256 and all(
            np.array_equal(own.input_ids, stored.input_ids) and np.array_equal(own.spans, stored.spans)
            for own, stored in zip(self._encode(row), _stored_encoding(row), strict=True)
        )


class MixtureSource:
    """Concatenation of several sources; `image_roots` has the image root of each, None for those without one.

    Raises:
        ConfigError: some sources hold the teacher's best entries and others drawn ones, which one loss cannot fit.
    """

    def __init__(self, sources: Sequence[ExampleSource], image_roots: Sequence[ImageRoot | None]) -> None:
        if len({source.sampled for source in sources}) > 1:
            kinds = ", ".join(
                f"set {number} {'drawn' if source.sampled else 'best'}" for number, source in enumerate(sources, 1)
            )
            raise ConfigError(
                f"data.mix: the sets' entries are not of one kind ({kinds}); a loss fits the teacher's best entries or "
                "entries drawn from its distribution, so train on them one after the other"
            )
        self.sampled = sources[0].sampled
        self.sha256 = hashlib.sha256(" ".join(source.sha256 for source in sources).encode()).hexdigest()
        self.sources = tuple(sources)
        self._image_roots = tuple(image_roots)
        self._first = np.concatenate([[0], np.cumsum([len(source) for source in sources])])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Example:
        number, position = self._locate(index)
        return replace(self.sources[number][position], image_root=self._image_roots[number])

    def read_unscored(self, index: int) -> Example:
        """Returns the example of the sample's own source without its scores."""
        number, position = self._locate(index)
        return replace(self.sources[number].read_unscored(position), image_root=self._image_roots[number])

    def length(self, index: int, tokens_per_image: int) -> int:
        """Returns the length that the sample's own source gives."""
        number, position = self._locate(index)
        return self.sources[number].length(position, tokens_per_image)

    def _locate(self, index: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        return number, index - int(self._first[number])


@dataclass(frozen=True)
class _RowGroup:
    """A decoded row group; `uses_stored_encoding` is True if the student encodes its samples as they are stored."""

    rows: list[ShardRow]
    uses_stored_encoding: bool


def _check_finite(rows: Sequence[ShardRow], path: Location) -> None:
    """Raises ShardError if a score is no finite number, also where the loss at hand would not use it."""
    for row in rows:
        scores = [scored.scores for scored in row.conversations]
        for what, values in (
            ("own log-probs", [each.own_logprobs for each in scores]),
            ("rest masses", [each.rest_mass for each in scores]),
            ("kept log-probs", [each.logprobs for each in scores]),
        ):
            num_bad = sum(len(each) - np.count_nonzero(np.isfinite(each)) for each in values)
            if num_bad:
                raise ShardError(
                    f"{path}: sample {row.sample.id!r}: {num_bad} of {sum(map(len, values))} {what} are not finite, "
                    "expected numbers; capture this shard again (verify-shards --repair moves it away), and look at "
                    "the teacher's weights and engine.dtype"
                )


def _stored_encoding(row: ShardRow) -> tuple[EncodedChat, ...]:
    return tuple(scored.encoded for scored in row.conversations)


def open_source(
    where: SetConfig, kind: Kind, encoder: ChatEncoder, data: DataConfig, aspect_ratio: AspectRatio | None
) -> ExampleSource:
    """Opens one of the sources of `data`; `kind` is the kind of samples that the objective needs.

    `aspect_ratio` is the student's choice, None if it takes no images.

    Raises:
        ConfigError: the shards are of the other kind.
    """
    if where.shards is None:
        return DatasetSource(where.location, kind, encoder, data.ids)
    source = ShardSource(where.shards, encoder, aspect_ratio, check=data.check)
    if source.manifest.kind != kind:
        raise ConfigError(
            f'{where.shards}: holds shards of kind "{source.manifest.kind}", this objective needs "{kind}"'
        )
    return source


def _check_provenance(
    output: Location, manifest: Manifest, encoder: ChatEncoder, aspect_ratio: AspectRatio | None
) -> None:
    expected: dict[str, tuple[object, object]] = {
        "tokenizer (SHA-256)": (manifest.tokenizer.sha256, encoder.tokenizer_sha256),
        "tokenizer size": (manifest.tokenizer.vocab_size, encoder.vocab_size),
        "scored tokens (data.score)": (manifest.capture.score, encoder.score),
    }
    if manifest.image is not None and aspect_ratio is not None:
        expected["shape of images (data.image_aspect_ratio)"] = (manifest.image.aspect_ratio, aspect_ratio)
    differences = [f"  {name}: teacher {a!r}, student {b!r}" for name, (a, b) in expected.items() if a != b]
    if differences:
        raise ProvenanceError(
            f"{output}: these scores do not fit this student\n"
            + "\n".join(differences)
            + "\nids of one tokenizer mean nothing in another; use a student of the teacher's family, "
            "and the settings of the capture"
        )
