"""Evaluates a model on held-out images: its greedy answers, and its distributions against the teacher's.

Legend: B sequences, T positions, R scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, PreTrainedModel

from common.data.chat_encoding import ChatEncoder, expand_placeholders
from common.data.dataset import Dataset
from common.data.images import ImageSpec, load_image
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
    """Model in float32 with its encoder and image processor."""

    model: PreTrainedModel
    encoder: ChatEncoder
    image_spec: ImageSpec
    image_processor: Any

    @classmethod
    def load(cls, model_dir: Path) -> "_LoadedModel":
        image_spec = ImageSpec.load(model_dir)
        assert image_spec is not None
        return cls(
            model=load_student(model_dir, dtype=torch.float32).eval(),
            encoder=ChatEncoder.load(model_dir),
            image_spec=image_spec,
            image_processor=AutoImageProcessor.from_pretrained(model_dir, local_files_only=True),
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
    images = ImageCache(loaded.image_processor, loaded.image_spec, "pad")
    student = StudentInputs(images, encoder.image_token_id, encoder.tokenizer.pad_token_id)
    collator = Collator(student, kind="kd", image_root=image_root, max_tokens=256)
    source = ShardSource(scores, encoder, "pad", cached_groups=64)
    nll, kl, count = 0.0, 0.0, 0
    output = FusedOutput(loaded.model, encoder.vocab_size)
    for start in range(0, len(source), BATCH_SIZE):
        batch = collator([source[i] for i in range(start, min(start + BATCH_SIZE, len(source)))])
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with output.scoring(batch, kept=True):
            loaded.model(**inputs, pixel_values=batch.pixel_values)
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
    encoder, spec = loaded.encoder, loaded.image_spec
    prompts, images = [], []
    for sample in samples:
        ids = encoder.encode_prompt(sample.conversations[0][:-1])
        prompts.append(expand_placeholders(ids, encoder.image_token_id, spec.tokens_per_image)[0])
        images += [load_image(ref, image_root, "pad", spec.mean_rgb, sample.id) for ref in sample.images]
    width = max(map(len, prompts))
    pad = encoder.tokenizer.pad_token_id
    # Padding on the left lets every answer begin in the same column.
    input_ids = np.stack([np.pad(p, (width - len(p), 0), constant_values=pad) for p in prompts]).astype(np.int64)
    mask = np.stack([np.pad(np.ones(len(p), np.int64), (width - len(p), 0)) for p in prompts])
    generated = loaded.model.generate(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask),
        pixel_values=loaded.image_processor(images=images, return_tensors="pt")["pixel_values"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=encoder.tokenizer.eos_token_id,
    )
    texts: list[str] = encoder.tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    return texts
