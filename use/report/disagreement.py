"""Finds the held-out samples where a student is farthest from its teacher, token by token.

Legend: R scored tokens of a sample, V ids that the tokenizer knows, K kept entries of the teacher.
"""

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from common.data.chat_encoding import ChatEncoder
from common.data.images import load_image
from common.data.model_images import find_model_images, find_placeholder
from common.errors import DecantError
from train.config import TrainConfig
from train.data.collator import Batch, Collator
from train.data.feature_source import open_feature_source
from train.data.sources import Example
from train.loss.functional import NEGLIGIBLE_LOGIT, RowLogits, distillation_loss
from train.model.packing import rope_position_ids
from train.model.student import leave_out_tower, load_student
from train.run.history import StageHistory
from train.run.training_data import build_collator, open_data_splits

_log = logging.getLogger(__name__)

# Held-out samples that are looked at, evenly spread; all of a large set would take longer than anyone waits.
_MAX_CANDIDATES = 200


@dataclass(frozen=True)
class ComparedToken:
    """A scored token: KL(teacher || student) over kept entries and the rest, in nats, and the best id of each side."""

    text: str
    divergence: float
    teacher: str
    teacher_probability: float
    student: str
    student_probability: float


@dataclass(frozen=True)
class ComparedSample:
    """A held-out sample; `divergence` is the mean over its tokens."""

    id: str
    prompt: str
    image: Image.Image | None
    tokens: tuple[ComparedToken, ...]

    @property
    def divergence(self) -> float:
        """Returns the mean divergence of a token, in nats."""
        return sum(token.divergence for token in self.tokens) / max(1, len(self.tokens))


def find_disagreements(stage: StageHistory, num_samples: int) -> tuple[list[ComparedSample], str]:
    """Returns the held-out samples of a stage where its student differs most from the teacher, the worst one first.

    Returns:
        The samples, and one sentence on what was looked at, or on why there are none.
    """
    student = stage.output.resolve() / "final"
    try:
        config = TrainConfig.model_validate(stage.config)
    except ValidationError:
        return [], f"the configuration of {stage.name} is of another version, so its samples were not opened"
    if not config.data.has_scores or config.loss.sample_kind != "kd":
        return [], f"{stage.name} was not trained on a teacher's scores of conversations"
    if config.data.validation is None and not config.data.validation_fraction:
        return [], f"{stage.name} held no sample out (data.validation_fraction)"
    if not student.is_dir():
        return [], f"{student} is gone"
    try:
        with contextlib.chdir(stage.start_directory):
            return _compare(config, student, num_samples)
    except DecantError as error:
        _log.warning("held-out samples cannot be compared: %s", error)
        return [], f"the held-out samples cannot be read: {error}"


def _compare(config: TrainConfig, student: Path, num_samples: int) -> tuple[list[ComparedSample], str]:
    images = find_model_images(student)
    encoder = ChatEncoder.load(
        student, config.model.chat_template, config.data.score, placeholder=find_placeholder(images)
    )
    aspect_ratio = None if images is None else config.data.image_aspect_ratio or images.default_aspect_ratio
    features = open_feature_source(config)
    collator = build_collator(config, encoder, images, features)
    splits = open_data_splits(config, encoder, 1, aspect_ratio=aspect_ratio)
    assert splits.validation is not None
    source, positions = splits.validation.source, splits.validation.sampler.positions
    chosen = positions[:: -(-len(positions) // _MAX_CANDIDATES)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_student(student, dtype=torch.float32, tower=features is None)
    if features is not None:
        leave_out_tower(model)
    model.to(device)
    compared = []
    for position in chosen:
        example = source[int(position)]
        batch = collator([example]).to(device)
        compared.append(_compare_sample(example, batch, model, encoder, collator))
    worst = sorted(compared, key=lambda sample: -sample.divergence)[:num_samples]
    mean = sum(sample.divergence for sample in compared) / len(compared)
    return worst, f"of {len(chosen)} held-out samples, whose mean divergence is {mean:.4f} nats a token"


@torch.inference_mode()
def _compare_sample(
    example: Example, batch: Batch, model: PreTrainedModel, encoder: ChatEncoder, collator: Collator
) -> ComparedSample:
    inputs = batch.model_inputs
    positions = rope_position_ids(model, inputs)
    if positions is not None:
        inputs["position_ids"] = positions
    logits_RV = model(**inputs).logits.flatten(0, 1)[batch.rows][:, : encoder.vocab_size].float()
    divergence_R = _divergence(logits_RV, batch)
    student_R, student_ids_R = logits_RV.softmax(1).max(1)
    assert batch.topk_ids is not None
    assert batch.topk_logprobs is not None
    teacher_R, best_R = batch.topk_logprobs.exp().max(1)
    teacher_ids_R = batch.topk_ids.gather(1, best_R[:, None])[:, 0]
    text = encoder.tokenizer.decode
    tokens = tuple(
        ComparedToken(text([own]), divergence, text([teacher]), p_teacher, text([student]), p_student)
        for own, divergence, teacher, p_teacher, student, p_student in zip(
            batch.targets.tolist(),
            divergence_R.tolist(),
            teacher_ids_R.tolist(),
            teacher_R.tolist(),
            student_ids_R.tolist(),
            student_R.tolist(),
            strict=True,
        )
    )
    prompt = "\n".join(f"{turn.role}: {turn.content}" for turn in example.sample.conversations[0][:-1])
    return ComparedSample(example.sample.id, prompt, _open_first_image(example, collator), tokens)


def _divergence(logits_RV: Tensor, batch: Batch) -> Tensor:
    """Returns KL(teacher || student) of each row over the kept ids and the rest, [R] in nats."""
    assert batch.topk_ids is not None
    assert batch.topk_logprobs is not None
    assert batch.rest_mass is not None
    is_kept_RK = batch.topk_logprobs > -torch.inf
    kept_RK = logits_RV.gather(1, batch.topk_ids).masked_fill(~is_kept_RK, NEGLIGIBLE_LOGIT)
    rest_RV = logits_RV.clone()
    rows, slots = is_kept_RK.nonzero(as_tuple=True)
    rest_RV[rows, batch.topk_ids[rows, slots]] = NEGLIGIBLE_LOGIT
    own_R = logits_RV.gather(1, batch.targets[:, None])[:, 0]
    rows_logits = RowLogits(kept_RK, own_R, rest_RV.logsumexp(1))
    return distillation_loss(rows_logits, batch.topk_logprobs, batch.rest_mass, vocab_size=logits_RV.shape[1])


def _open_first_image(example: Example, collator: Collator) -> Image.Image | None:
    """Returns the first image of a sample, None if there is none or its file is not here."""
    for ref in example.sample.images[:1]:
        try:
            return load_image(ref, example.image_root or collator.image_root, "keep", (0, 0, 0), "a report")
        except DecantError:
            return None
    return None
