"""Evaluates a model on held-out images: its greedy answers, and its distributions against the teacher's.

Legend: B sequences, T positions, R scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.data.chat_encoding import ChatEncoder, expand_placeholders
from common.data.dataset import Dataset
from common.data.images import load_image
from common.data.model_images import ModelImages, find_model_images, merge_arrays
from common.data.samples import Sample
from demo.data import MAX_NEW_TOKENS, contradicts, named_digit, read_lines
from train.data.collator import Collator, StudentInputs
from train.data.image_cache import ImageCache
from train.data.sources import ShardSource
from train.loss.functional import distillation_loss
from train.loss.fused_output import FusedOutput
from train.model.student import load_student

BATCH_SIZE = 64


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one model: shares of held-out questions, and NLL and KL in nats a held-out response token."""

    accuracy: float
    hallucination_rate: float
    nll: float
    kl_to_teacher: float
    answers: tuple[str, ...]


@dataclass(frozen=True)
class _LoadedModel:
    """Model in float32 with its encoder and its treatment of images."""

    model: PreTrainedModel
    encoder: ChatEncoder
    images: ModelImages

    @classmethod
    def load(cls, model_dir: Path) -> "_LoadedModel":
        images = find_model_images(model_dir)
        assert images is not None
        return cls(
            model=load_student(model_dir, dtype=torch.float32).eval(),
            encoder=ChatEncoder.load(model_dir, placeholder=images.placeholder),
            images=images,
        )


def evaluate(model_dir: Path, questions: Path, scores: Path) -> Evaluation:
    """Evaluates a model directory with transformers in float32.

    `questions` is a file of `demo.data`, its folder the image root; `scores` is an output of `precompute-logits` with
    every entry kept, so that the KL is that of the whole distributions.
    """
    loaded = _LoadedModel.load(model_dir)
    nll, kl = _nll_and_kl(loaded, scores, questions.parent)
    dataset = Dataset.open(questions, "kd")
    digits = [int(line["digit"]) for line in read_lines(questions)]
    answers: list[str] = []
    for start in range(0, len(dataset), BATCH_SIZE):
        batch = [dataset[i] for i in range(start, min(start + BATCH_SIZE, len(dataset)))]
        answers += _generate_answers(loaded, batch, questions.parent)
    right = [named_digit(answer) == digit for answer, digit in zip(answers, digits, strict=True)]
    wrong = [contradicts(answer, digit) for answer, digit in zip(answers, digits, strict=True)]
    return Evaluation(float(np.mean(right)), float(np.mean(wrong)), nll, kl, tuple(answers))


@torch.no_grad()
def _nll_and_kl(loaded: _LoadedModel, scores: Path, image_root: Path) -> tuple[float, float]:
    """Returns NLL and KL to the teacher over all scored tokens, in nats a token."""
    encoder = loaded.encoder
    student = StudentInputs(ImageCache(loaded.images, None), encoder.image_token_id, encoder.tokenizer.pad_token_id)
    collator = Collator(student, kind="kd", image_root=image_root, max_tokens=256)
    source = ShardSource(scores, encoder, loaded.images.default_aspect_ratio, cached_groups=64)
    nll, kl, count = 0.0, 0.0, 0
    output = FusedOutput(loaded.model, encoder.vocab_size)
    for start in range(0, len(source), BATCH_SIZE):
        batch = collator([source[i] for i in range(start, min(start + BATCH_SIZE, len(source)))])
        with output.scoring(batch, kept=True):
            loaded.model(**batch.model_inputs)
            logits = output.read()
        assert batch.topk_logprobs is not None
        assert batch.rest_mass is not None
        kl_R = distillation_loss(logits, batch.topk_logprobs, batch.rest_mass, vocab_size=encoder.vocab_size)
        nll -= float(logits.own_logprobs.double().sum())
        kl += float(kl_R.double().sum())
        count += batch.num_rows
    return nll / count, kl / count


@torch.no_grad()
def _generate_answers(loaded: _LoadedModel, samples: Sequence[Sample], image_root: Path) -> list[str]:
    """Returns greedy answers to each sample's last question."""
    encoder, model_images = loaded.encoder, loaded.images
    prompts, types, images = [], [], []
    for sample in samples:
        ids = encoder.encode_prompt(sample.conversations[0][:-1])
        opened = [
            load_image(ref, image_root, model_images.default_aspect_ratio, model_images.mean_rgb, sample.id)
            for ref in sample.images
        ]
        own = [model_images.process(image, sample.id) for image in opened]
        expanded = expand_placeholders(ids, encoder.image_token_id, [image.token_ids for image in own])
        prompts.append(expanded.ids)
        types.append(expanded.place_types([image.token_types for image in own]))
        images += own
    width = max(map(len, prompts))
    pad = encoder.tokenizer.pad_token_id
    # Padding on the left lets every answer begin in the same column.

    def stack(rows: Sequence[Any], padding: int) -> Tensor:
        padded = [np.pad(row, (width - len(row), 0), constant_values=padding) for row in rows]
        return torch.from_numpy(np.stack(padded).astype(np.int64))

    inputs = {name: torch.from_numpy(values) for name, values in merge_arrays(images).items()}
    if model_images.types_argument is not None:
        inputs[model_images.types_argument] = stack(types, 0)
    generated = loaded.model.generate(
        input_ids=stack(prompts, pad),
        attention_mask=stack([np.ones(len(prompt)) for prompt in prompts], 0),
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=encoder.tokenizer.eos_token_id,
    )
    texts: list[str] = encoder.tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    return texts
