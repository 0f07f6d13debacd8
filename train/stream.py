"""From an output of `precompute-logits`, or a dataset file, to the examples of any training step.

    ShardSource | DatasetSource ── source[i] ──> Example
    sample_order(seed, epoch) ──> permutation of the samples
    StepPlan ── micro_batch(step, m) ──> positions of the samples of micro-batch m of global step `step`

The order is a function of (seed, epoch) alone and the position of a run is its global step, so resuming needs no
state: any number of ranks and workers asks the plan for its own micro-batches from any step on. Each sample is
seen once an epoch; the last step of an epoch is shorter.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from common.encoding import Encoded, Encoder
from common.errors import ConfigError, DataError, ProvenanceError, ShardError
from common.images import AspectRatio
from common.manifest import Manifest, read_manifest, read_receipt, receipt_path, shard_path
from common.samples import Dataset, Kind, Sample
from common.scores import TeacherScores
from common.shards import ROWS_PER_GROUP, ShardFile, ShardRow


@dataclass(frozen=True)
class Example:
    """A sample in the student's tokens, one entry a conversation; `scores` is None without a teacher."""

    sample: Sample
    conversations: tuple[Encoded, ...]
    scores: tuple[TeacherScores, ...] | None


class Source(Protocol):
    """Random access to examples; `sha256` stands for all of them and their order.

    `sampled`: the teacher's kept entries were drawn from its distribution, they are not its best ones.
    """

    sha256: str
    sampled: bool

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...


class DatasetSource:
    """Examples of a dataset file, without teacher scores."""

    sampled = False

    def __init__(self, path: Path, kind: Kind, encoder: Encoder) -> None:
        self._dataset = Dataset.open(path, kind)
        self.sha256 = self._dataset.sha256
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Example:
        sample = self._dataset[index]
        return Example(sample, self._encoder.encode_sample(sample), None)


class ShardSource:
    """Examples of a complete output of `precompute-logits`.

    Where the teacher wrote the responses itself, an example holds its tokens as they are stored: their text may give
    other tokens when it is encoded again.

    Row groups are decoded when first asked for; the `cached_groups` most recent ones stay.

    Raises:
        ShardError: damaged or incomplete output.
        ProvenanceError: made for another tokenizer, image treatment or choice of scored tokens.
    """

    def __init__(self, output: Path, encoder: Encoder, aspect_ratio: AspectRatio, cached_groups: int) -> None:
        self.output = output
        self.manifest = read_manifest(output)
        self.sha256 = self.manifest.sha256
        self.sampled = self.manifest.capture.num_draws is not None
        self._encoder = encoder
        _check_provenance(output, self.manifest, encoder, aspect_ratio)
        self._cache: OrderedDict[tuple[int, int], list[ShardRow]] = OrderedDict()
        self._cached_groups = cached_groups
        self._files: dict[int, ShardFile] = {}
        missing = [n for n in range(self.manifest.num_shards) if not receipt_path(output, n).exists()]
        if missing:
            raise ShardError(
                f"{output}: {len(missing)} of {self.manifest.num_shards} shards are missing, the first is "
                f"{missing[0]:05d}; run precompute-logits again to complete the output"
            )
        rows = [read_receipt(output, n, self.manifest).num_rows for n in range(self.manifest.num_shards)]
        self._first_row = np.concatenate([[0], np.cumsum(rows)])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __getitem__(self, index: int) -> Example:
        shard = int(np.searchsorted(self._first_row, index, side="right")) - 1
        group, position = divmod(index - int(self._first_row[shard]), ROWS_PER_GROUP)
        row = self._group(shard, group)[position]
        generated = self.manifest.capture.generate is not None
        encoded = self._stored(row) if generated else self._encoded_again(row)
        return Example(row.sample, encoded, tuple(scored.scores for scored in row.conversations))

    def _encoded_again(self, row: ShardRow) -> tuple[Encoded, ...]:
        encoded = self._encoder.encode_sample(row.sample)
        for own, scored in zip(encoded, row.conversations, strict=True):
            if not np.array_equal(own.response_ids, scored.encoded.response_ids):
                raise self._mismatch(
                    row,
                    f"the student's encoding has {len(own.response_ids)} scored tokens, the teacher scored "
                    f"{len(scored.encoded.response_ids)} others",
                )
        return encoded

    def _stored(self, row: ShardRow) -> tuple[Encoded, ...]:
        for turns, scored in zip(row.sample.conversations, row.conversations, strict=True):
            prompt_T = self._encoder.encode_prompt(turns[:-1])
            if not np.array_equal(prompt_T, scored.encoded.input_ids[: len(prompt_T)]):
                raise self._mismatch(
                    row, f"the student's prompt of {len(prompt_T)} tokens is not the one that the teacher answered"
                )
        return tuple(scored.encoded for scored in row.conversations)

    def _mismatch(self, row: ShardRow, what: str) -> ProvenanceError:
        return ProvenanceError(
            f"{self.output}: sample {row.sample.id!r}: {what}; use the chat template that the teacher used "
            "(model.chat_template = FILE)"
        )

    def _group(self, shard: int, group: int) -> list[ShardRow]:
        key = (shard, group)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        if shard not in self._files:
            self._files[shard] = ShardFile(shard_path(self.output, shard), self.manifest, shard)
        rows = self._cache[key] = self._files[shard].read_group(group)
        if len(self._cache) > self._cached_groups:
            self._cache.popitem(last=False)
        return rows


def open_source(
    shards: Path | None,
    dataset: Path | None,
    kind: Kind,
    encoder: Encoder,
    aspect_ratio: AspectRatio,
    shuffle_window: int,
) -> Source:
    """The source that a configuration names; `kind` is what the objective needs.

    Raises:
        ConfigError: shards of the other kind.
    """
    if shards is None:
        assert dataset is not None
        return DatasetSource(dataset, kind, encoder)
    source = ShardSource(shards, encoder, aspect_ratio, cached_groups=2 * -(-shuffle_window // ROWS_PER_GROUP))
    if source.manifest.kind != kind:
        raise ConfigError(f'{shards}: holds shards of kind "{source.manifest.kind}", this objective needs "{kind}"')
    return source


def sample_order(num_samples: int, seed: int, epoch: int, window: int) -> npt.NDArray[np.int64]:
    """Order of an epoch: runs of neighbouring samples shuffled, then samples within each `window` of them.

    Neighbours share a row group on disk, so a window touches few; a window of all samples is a plain shuffle.
    """
    rng = np.random.default_rng([seed, epoch])
    runs = np.arange(0, num_samples, ROWS_PER_GROUP)
    rng.shuffle(runs)
    order = np.concatenate([np.arange(start, min(start + ROWS_PER_GROUP, num_samples)) for start in runs])
    for start in range(0, num_samples, window):
        rng.shuffle(order[start : start + window])
    return order


class StepPlan:
    """Which samples make up which micro-batch of which global step.

    `selected` are the source's positions to train on. Micro-batch m of a step holds the same samples on any
    number of ranks.
    """

    def __init__(
        self, selected: Sequence[int], global_batch_size: int, micro_batch_size: int, seed: int, window: int
    ) -> None:
        if not selected:
            raise DataError("no sample is left to train on; the dataset is empty or all of it is held out")
        if global_batch_size % micro_batch_size:
            raise ConfigError(
                f"optim.global_batch_size {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size}"
            )
        self._selected = np.asarray(selected, np.int64)
        self._global = global_batch_size
        self._micro = micro_batch_size
        self._seed = seed
        self._window = window
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None
        self.steps_per_epoch = -(-len(self._selected) // global_batch_size)
        self.micro_batches_per_step = global_batch_size // micro_batch_size

    def micro_batch(self, step: int, number: int) -> npt.NDArray[np.int64]:
        """Source positions of a micro-batch; fewer, or none, at the end of an epoch."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, sample_order(len(self._selected), self._seed, epoch, self._window)
        start = step_in_epoch * self._global + number * self._micro
        stop = min(start + self._micro, (step_in_epoch + 1) * self._global)
        return self._selected[self._order[1][start:stop]]


def split_validation(num_samples: int, fraction: float) -> tuple[list[int], list[int]]:
    """Evenly spread positions held out, the rest to train on: (train, validation)."""
    held_out = set(np.linspace(0, num_samples - 1, round(num_samples * fraction)).astype(int).tolist())
    return [i for i in range(num_samples) if i not in held_out], sorted(held_out)


def _check_provenance(output: Path, manifest: Manifest, encoder: Encoder, aspect_ratio: AspectRatio) -> None:
    expected: dict[str, tuple[object, object]] = {
        "tokenizer (SHA-256)": (manifest.tokenizer.sha256, encoder.tokenizer_sha256),
        "tokenizer size": (manifest.tokenizer.vocab_size, encoder.vocab_size),
        "scored tokens (data.score)": (manifest.capture.score, encoder.score),
    }
    if manifest.image is not None:
        expected["image_aspect_ratio"] = (manifest.image.aspect_ratio, aspect_ratio)
    differences = [f"  {name}: teacher {a!r}, student {b!r}" for name, (a, b) in expected.items() if a != b]
    if differences:
        raise ProvenanceError(
            f"{output}: these scores do not fit this student\n"
            + "\n".join(differences)
            + "\nids of one tokenizer mean nothing in another; use a student of the teacher's family, "
            "and the settings of the capture"
        )
