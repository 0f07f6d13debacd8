"""Collates examples into one batch, padded or packed, and finds the rows of the output layer that the losses need.

Legend: B sequences, L lines, T positions of a line, S tokens of all sequences before images are expanded, N the same
after it, R scored rows of all sequences, K kept entries, P preference pairs, I images.

A preference batch holds the chosen conversations first, then the rejected ones, so B = 2P.

Padded, each sequence is a line and the longest one sets T. Packed, all sequences stand end to end in the only line, and
there is no padding: positions that begin again at 0 say where the next sequence starts, and attention ends there
(train/model/packing.py lists the models for which that holds). Rows, targets and all other inputs of the losses are
equal and in the same order both ways, so losses and gradients are equal too, up to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.data.chat_encoding import expand_placeholders, predicting_positions
from common.data.images import ImageRoot
from common.data.samples import Kind
from common.errors import DataError
from common.shards.scores import TeacherScores
from train.data.image_cache import BatchImages, ImageRequest, ImageSource
from train.data.sources import Example

_IMAGES = "images."


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    num_sequences                  B, dummies included
    input_ids                      int64 [L, T], padded on the right; packed, L = 1
    attention_mask                 int64 [L, T] of 0 and 1; None where packed, because with any mask transformers does
                                   not look for borders
    position_ids                   int64 [L, T], beginning at 0 with each sequence; None where padded
    images                         arguments of the student's forward that come with images: of a LLaVA `pixel_values`,
                                   float32 [I, 3, height, width], in the order of the placeholders, or cached features
                                   [I, patches, channels] in the student's dtype; of others what their processors
                                   return, and token types, int64 [L, T]
    token_mask                     bool [L, T]: True for real tokens, False for padding and dummies
    image_mask                     bool [L, T]: True for tokens of images
    rows                           int64 [R]: position in [L * T] whose output predicts each scored token
    targets                        int64 [R]: the scored tokens
    row_sequence                   int64 [R]: which of the B sequences a row belongs to, ascending
    topk_ids, topk_logprobs        int64, float32 [R, K]: the teacher's kept entries; empty slots 0, -inf
    rest_mass                      float32 [R]
    reference_logprobs             float64 [B]: the teacher's log-prob of each sequence's scored tokens
    """

    sample_ids: tuple[str, ...]
    num_pairs: int
    num_sequences: int
    input_ids: Tensor
    attention_mask: Tensor | None
    token_mask: Tensor
    rows: Tensor
    targets: Tensor
    row_sequence: Tensor
    image_mask: Tensor
    position_ids: Tensor | None = None
    images: Mapping[str, Tensor] = field(default_factory=dict)
    topk_ids: Tensor | None = None
    topk_logprobs: Tensor | None = None
    rest_mass: Tensor | None = None
    reference_logprobs: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Returns R, the number of scored tokens."""
        return len(self.rows)

    @property
    def num_tokens(self) -> int:
        """Returns the number of real tokens, images and prompts included."""
        return int(self.token_mask.sum())

    @property
    def num_padding(self) -> Tensor:
        """Returns the number of positions that no sequence fills, a float32 scalar; 0 where packed."""
        if self.attention_mask is None:
            return self.token_mask.new_zeros((), dtype=torch.float32)
        return (self.attention_mask == 0).sum().float()

    @property
    def model_inputs(self) -> dict[str, Any]:
        """Returns the arguments of a model's forward.

        The cache, which transformers uses by default, is off, because with it packed sequences see each other.
        """
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "use_cache": False,
            **self.images,
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Returns all tensors by name; those of `images` have names that begin with "images."."""
        own = {each.name: value for each in fields(self) if isinstance(value := getattr(self, each.name), Tensor)}
        return own | {f"{_IMAGES}{name}": value for name, value in self.images.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """Returns the same batch with other tensors, named as in `tensors`."""
        own = {name: value for name, value in tensors.items() if not name.startswith(_IMAGES)}
        images = {name.removeprefix(_IMAGES): value for name, value in tensors.items() if name not in own}
        return replace(self, **own, images=images)

    def to(self, device: torch.device) -> Self:
        """Returns the same batch with its tensors on a device."""
        return self.with_tensors({name: value.to(device, non_blocking=True) for name, value in self.tensors.items()})


@dataclass(frozen=True)
class StudentInputs:
    """The part of a batch that depends on the student.

    images            source of the batch's images, None for a student without a vision tower
    image_token_id    id of an image's placeholder, None for a student without a vision tower
    pad_token_id      id at positions that no sequence fills
    """

    images: ImageSource | None
    image_token_id: int | None
    pad_token_id: int


class Collator:
    """Makes batches for one student.

    For a multimodal student, a micro-batch without an image gets a dummy sequence with a dummy image. For any student,
    a micro-batch without a sample gets a dummy sequence. So every rank runs the same modules, which ZeRO's collectives
    need. Dummies have no scored row and no real token, so they change neither loss nor gradient.
    """

    def __init__(
        self,
        student: StudentInputs,
        *,
        kind: Kind,
        image_root: ImageRoot | None,
        max_tokens: int,
        packed: bool = False,
    ) -> None:
        self._kind = kind
        self._images = student.images
        self._image_token_id = student.image_token_id
        self._pad_token_id = student.pad_token_id
        self.image_root = image_root
        self._max_tokens = max_tokens
        self._packed = packed

    def __call__(self, examples: Sequence[Example]) -> Batch:
        """Returns the batch of the examples.

        Raises:
            DataError: an image cannot be opened, a sequence is longer than `max_tokens`, or there are images but the
                student has no vision tower; the message names the sample.
        """
        conversations = range(2 if self._kind == "dpo" else 1)
        encoded = [example.conversations[c] for c in conversations for example in examples]
        scores = [None if example.scores is None else example.scores[c] for c in conversations for example in examples]
        images = self._read_images(examples)
        # All sequences stand end to end: places_S is the position of each of the S tokens after images are expanded.
        unexpanded_lengths_B = np.array([len(e.input_ids) for e in encoded], np.int64)
        unexpanded_starts_B = np.cumsum(unexpanded_lengths_B) - unexpanded_lengths_B
        has_images = any(example.sample.images for example in examples)
        expanded = expand_placeholders(
            _concatenate([e.input_ids for e in encoded]),
            self._image_token_id,
            images.token_ids if images is not None and has_images else (),
        )
        expanded_N, image_N, places_S = expanded.ids, expanded.is_image, expanded.positions
        lengths_B = np.diff(places_S[unexpanded_starts_B + unexpanded_lengths_B - 1] + 1, prepend=0)
        self._check_lengths(examples, lengths_B)
        num_real = len(expanded_N)
        if not encoded or (images is not None and not has_images):
            dummy = np.full(2, self._pad_token_id, np.int32) if images is None else images.token_ids[0]
            expanded_N = np.concatenate([expanded_N, dummy])
            image_N = np.append(image_N, np.full(len(dummy), images is not None))
            lengths_B = np.append(lengths_B, len(dummy))
        if self._packed:
            filled_LT = np.ones((1, len(expanded_N)), bool)
        else:
            filled_LT = np.arange(lengths_B.max()) < lengths_B[:, None]
        position_ids = torch.from_numpy(_concatenate([np.arange(n) for n in lengths_B]))[None]

        def spread(values_N: npt.NDArray[Any], padding: int) -> Tensor:
            values_LT = np.full(filled_LT.shape, padding, bool if values_N.dtype == bool else np.int64)
            values_LT[filled_LT] = values_N
            return torch.from_numpy(values_LT)

        sequence_R = np.repeat(np.arange(len(encoded)), [len(e.response_ids) for e in encoded])
        scored_R = _concatenate([e.response_positions for e in encoded]) + unexpanded_starts_B[sequence_R]
        rows_R = np.flatnonzero(filled_LT)[places_S[predicting_positions(scored_R)]]
        return Batch(
            sample_ids=tuple(example.sample.id for example in examples),
            num_pairs=len(examples) if self._kind == "dpo" else 0,
            num_sequences=len(lengths_B),
            input_ids=spread(expanded_N, self._pad_token_id),
            attention_mask=None if self._packed else torch.from_numpy(filled_LT.astype(np.int64)),
            position_ids=position_ids if self._packed else None,
            token_mask=spread(np.arange(len(expanded_N)) < num_real, 0),
            image_mask=spread(image_N, 0),
            rows=torch.from_numpy(rows_R),
            targets=torch.from_numpy(_concatenate([e.response_ids for e in encoded])),
            row_sequence=torch.from_numpy(sequence_R),
            images={} if images is None else self._image_inputs(images, image_N, spread),
            **_teacher_tensors(scores, len(lengths_B)),
        )

    def check(self, example: Example) -> None:
        """Checks an example as far as that is possible without decoding an image; its scores are not needed.

        Raises:
            DataError: as for a batch.
        """
        added = 0
        for request in self._image_requests([example]):
            assert self._images is not None
            added += self._images.check(request) - 1
        lengths = [len(encoded.input_ids) + added for encoded in example.conversations]
        self._check_lengths([example], np.array(lengths, np.int64))

    def _check_lengths(self, examples: Sequence[Example], lengths_B: npt.NDArray[np.int64]) -> None:
        for sequence in np.flatnonzero(lengths_B > self._max_tokens):
            where = f"sample {examples[sequence % len(examples)].sample.id!r}"
            raise DataError(
                f"{where}: {lengths_B[sequence]:,} tokens for this student, images included; data.max_tokens is "
                f'{self._max_tokens:,}; raise it, remove the sample, or set data.on_bad_sample = "skip"'
            )

    def _read_images(self, examples: Sequence[Example]) -> BatchImages | None:
        """Returns the images in batch order; both conversations of a pair have the same, so pairs get theirs twice."""
        requests = self._image_requests(examples)
        if self._images is None:
            return None
        if not requests:
            return self._images.dummy()
        return self._images.read(requests * 2 if self._kind == "dpo" else requests)

    def _image_inputs(
        self, images: BatchImages, image_N: npt.NDArray[np.bool_], spread: Callable[[npt.NDArray[Any], int], Tensor]
    ) -> dict[str, Tensor]:
        """Returns the images' tensors, and the types of all tokens if the student wants them."""
        assert self._images is not None
        argument = self._images.types_argument
        if argument is None or images.token_types is None:
            return images.tensors
        types_N = np.zeros(len(image_N), np.int64)
        types_N[image_N] = np.concatenate(images.token_types)
        return {**images.tensors, argument: spread(types_N, 0)}

    def _image_requests(self, examples: Sequence[Example]) -> list[ImageRequest]:
        if self._images is None:
            for example in examples:
                if example.sample.images:
                    raise DataError(f"sample {example.sample.id!r}: has images, but the student has no vision tower")
        return [
            ImageRequest(ref, example.image_root or self.image_root, f"sample {example.sample.id!r}")
            for example in examples
            for ref in example.sample.images
        ]


def _concatenate(parts: Sequence[Any]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _teacher_tensors(scores: Sequence[TeacherScores | None], num_sequences: int) -> dict[str, Tensor]:
    """Returns the fields of a batch that come from the teacher; none of them if a sample has no scores."""
    present = [s for s in scores if s is not None]
    if len(present) < len(scores):
        return {}
    counts_R = _concatenate([s.counts for s in present])
    filled_RK = np.arange(counts_R.max(initial=0)) < counts_R[:, None]
    ids_RK = np.zeros(filled_RK.shape, np.int64)
    logprobs_RK = np.full(filled_RK.shape, -np.inf, np.float32)
    if present:
        ids_RK[filled_RK] = np.concatenate([s.ids for s in present])
        logprobs_RK[filled_RK] = np.concatenate([s.logprobs for s in present])
    reference = np.zeros(num_sequences)
    reference[: len(present)] = [s.total_logprob for s in present]
    return {
        "topk_ids": torch.from_numpy(ids_RK),
        "topk_logprobs": torch.from_numpy(logprobs_RK),
        "rest_mass": torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *(s.rest_mass for s in present)])),
        "reference_logprobs": torch.from_numpy(reference),
    }
