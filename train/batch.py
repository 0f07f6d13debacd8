"""Examples as one padded batch, with the rows of the output layer that are wanted, aligned once.

Legend: B sequences, T positions, R scored rows over all sequences, K kept entries, P preference pairs, I images.

A preference batch holds the chosen conversations first, then the rejected ones, so B = 2P.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from common.encoding import Encoded, expand_placeholders, predicting_positions
from common.errors import DataError
from common.images import AspectRatio, ImageSpec, load_image
from common.samples import Kind
from common.scores import TeacherScores
from train.stream import Example


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    input_ids, attention_mask      int64 [B, T], padded on the right
    pixel_values                   float32 [I, 3, height, width], images in the order of their placeholders
    token_mask                     bool [B, T]: tokens that count, neither padding nor a stand-in
    rows                           int64 [R]: position in [B * T] whose output predicts each scored token
    targets                        int64 [R]: the scored tokens
    row_sequence                   int64 [R]: which of the B sequences a row belongs to, ascending
    topk_ids, topk_logprobs        int64, float32 [R, K]: the teacher's kept entries; empty slots 0, -inf
    rest_mass                      float32 [R]
    reference_logprobs             float64 [B]: the teacher's log-prob of each sequence's scored tokens
    """

    sample_ids: tuple[str, ...]
    num_pairs: int
    input_ids: Tensor
    attention_mask: Tensor
    token_mask: Tensor
    rows: Tensor
    targets: Tensor
    row_sequence: Tensor
    pixel_values: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    rest_mass: Tensor | None = None
    reference_logprobs: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """R, the number of scored tokens."""
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens that count, images and prompts included."""
        return int(self.token_mask.sum())

    @property
    def num_sequences(self) -> int:
        """B, stand-ins included."""
        return len(self.input_ids)

    def to(self, device: torch.device) -> Self:
        """The same batch with its tensors on a device."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class _Sequence:
    encoded: Encoded
    scores: TeacherScores | None
    images: tuple[Any, ...]


class Collator:
    """Makes batches for one student.

    A micro-batch without an image gets a stand-in sequence with a blank one for a multimodal student, and an
    empty one gets a stand-in as well: every rank then runs the same modules, which ZeRO's collectives need.
    Stand-ins have no scored row and no counting token, so they change neither loss nor gradient.
    """

    def __init__(
        self,
        *,
        kind: Kind,
        image_spec: ImageSpec | None,
        image_processor: Any,
        image_token_id: int | None,
        image_root: Path | None,
        aspect_ratio: AspectRatio,
        max_tokens: int,
        pad_token_id: int,
    ) -> None:
        self._kind = kind
        self._spec = image_spec
        self._processor = image_processor
        self._image_token_id = image_token_id
        self._image_root = image_root
        self._aspect_ratio = aspect_ratio
        self._max_tokens = max_tokens
        self._pad = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Builds the batch.

        Raises:
            DataError: an image that cannot be opened, a sequence longer than `max_tokens`, images for a student
                without a vision tower; the message names the sample.
        """
        sequences = self._sequences(examples)
        needs_image = self._spec is not None and not any(sequence.images for sequence in sequences)
        lengths, ids, rows, targets, row_sequence = [], [], [], [], []
        for number, sequence in enumerate(sequences):
            expanded, positions = self._expand(sequence.encoded)
            ids.append(expanded)
            lengths.append(len(expanded))
            response = sequence.encoded.response_positions
            rows.append(positions[predicting_positions(response)])
            targets.append(sequence.encoded.response_ids)
            row_sequence.append(np.full(len(response), number))
        num_real = len(sequences)
        if needs_image or not sequences:
            ids.append(self._stand_in())
            lengths.append(len(ids[-1]))
        width = max(lengths)
        input_ids = np.full((len(ids), width), self._pad, np.int64)
        attention_mask = np.zeros((len(ids), width), np.int64)
        for number, (row, length) in enumerate(zip(ids, lengths, strict=True)):
            input_ids[number, :length] = row
            attention_mask[number, :length] = 1
        token_mask = attention_mask.astype(bool)
        token_mask[num_real:] = False
        flat_rows = [number * width + row for number, row in enumerate(rows)]
        return Batch(
            sample_ids=tuple(example.sample.id for example in examples),
            num_pairs=len(examples) if self._kind == "dpo" else 0,
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(attention_mask),
            token_mask=torch.from_numpy(token_mask),
            rows=_joined(flat_rows),
            targets=_joined(targets),
            row_sequence=_joined(row_sequence),
            pixel_values=self._pixels(sequences, needs_image),
            **_teacher_tensors([s.scores for s in sequences], len(ids)),
        )

    def _sequences(self, examples: Sequence[Example]) -> list[_Sequence]:
        """Conversations in batch order: of pairs, all chosen ones before all rejected ones."""
        sequences = []
        for which in range(2 if self._kind == "dpo" else 1):
            for example in examples:
                where = f"sample {example.sample.id!r}"
                if example.sample.images and self._spec is None:
                    raise DataError(f"{where}: has images, but the student has no vision tower")
                images = tuple(
                    load_image(ref, self._image_root, self._aspect_ratio, self._spec.mean_rgb, where)
                    for ref in example.sample.images
                    if self._spec is not None
                )
                scores = None if example.scores is None else example.scores[which]
                encoded = example.conversations[which]
                length = len(self._expand(encoded)[0])
                if length > self._max_tokens:
                    raise DataError(
                        f"{where}: {length:,} tokens for this student, images included; data.max_tokens is "
                        f"{self._max_tokens:,}; raise it, or remove the sample from the dataset"
                    )
                sequences.append(_Sequence(encoded, scores, images))
        return sequences

    def _expand(self, encoded: Encoded) -> tuple[Any, Any]:
        tokens_per_image = 1 if self._spec is None else self._spec.tokens_per_image
        return expand_placeholders(encoded.input_ids, encoded.image_token_id, tokens_per_image)

    def _stand_in(self) -> Any:
        if self._spec is None:
            return np.full(2, self._pad, np.int32)
        return np.full(self._spec.tokens_per_image, self._image_token_id, np.int32)

    def _pixels(self, sequences: Sequence[_Sequence], blank: bool) -> Tensor | None:
        if self._spec is None:
            return None
        from PIL import Image

        images = [image for sequence in sequences for image in sequence.images]
        if blank:
            images.append(Image.new("RGB", (32, 32), self._spec.mean_rgb))
        pixels: Tensor = self._processor(images=images, return_tensors="pt")["pixel_values"]
        return pixels


def _joined(parts: Sequence[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64))


def _teacher_tensors(scores: Sequence[TeacherScores | None], num_sequences: int) -> dict[str, Tensor]:
    present = [s for s in scores if s is not None]
    if len(present) < len(scores):
        return {}
    topk = [s.topk() for s in present]
    num_rows, width = sum(s.num_rows for s in present), max((ids.shape[1] for ids, _ in topk), default=0)
    ids_RK = np.zeros((num_rows, width), np.int64)
    logprobs_RK = np.full((num_rows, width), -np.inf, np.float32)
    row = 0
    for ids, logprobs in topk:
        ids_RK[row : row + len(ids), : ids.shape[1]] = ids
        logprobs_RK[row : row + len(ids), : ids.shape[1]] = logprobs
        row += len(ids)
    reference = np.zeros(num_sequences)
    reference[: len(present)] = [s.total_logprob for s in present]
    return {
        "topk_ids": torch.from_numpy(ids_RK),
        "topk_logprobs": torch.from_numpy(logprobs_RK),
        "rest_mass": torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(s.rest_mass for s in present)])),
        "reference_logprobs": torch.from_numpy(reference),
    }
