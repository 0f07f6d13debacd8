"""How good a model is on held-out images: what it says, and what it believes.

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
from common.data.images import ImageSpec, load_image
from common.data.samples import Dataset, Sample
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
    """Shares are of held-out questions; NLL and KL are nats a response token of held-out conversations."""

    accuracy: float
    hallucination_rate: float
    nll: float
    kl_to_teacher: float
    answers: tuple[str, ...]


def evaluate(model_dir: Path, questions: Path, scores: Path) -> Evaluation:
    """Evaluates a model directory with transformers in float32.

    `questions` is a file of `demo.data`, its folder the image root; `scores` an output of `precompute-logits` with
    every entry kept, so that the KL is that of the whole distributions.
    """
    model = load_student(model_dir, dtype=torch.float32).eval()
    encoder = ChatEncoder.load(model_dir)
    image_root = questions.parent
    spec = ImageSpec.load(model_dir)
    assert spec is not None
    processor = AutoImageProcessor.from_pretrained(model_dir, local_files_only=True)
    student = StudentInputs(ImageCache(processor, spec, "pad"), encoder.image_token_id, encoder.tokenizer.pad_token_id)
    collator = Collator(student, kind="kd", image_root=image_root, max_tokens=256)
    nll, kl = _belief(model, encoder, collator, ShardSource(scores, encoder, "pad", cached_groups=64))
    dataset = Dataset.open(questions, "kd")
    digits = [int(line["digit"]) for line in read_lines(questions)]
    answers: list[str] = []
    for start in range(0, len(dataset), BATCH_SIZE):
        batch = [dataset[i] for i in range(start, min(start + BATCH_SIZE, len(dataset)))]
        answers += _answers(model, encoder, spec, processor, image_root, batch)
    right = [named_digit(answer) == digit for answer, digit in zip(answers, digits, strict=True)]
    wrong = [contradicts(answer, digit) for answer, digit in zip(answers, digits, strict=True)]
    return Evaluation(float(np.mean(right)), float(np.mean(wrong)), nll, kl, tuple(answers))


@torch.no_grad()
def _belief(
    model: PreTrainedModel, encoder: ChatEncoder, collator: Collator, source: ShardSource
) -> tuple[float, float]:
    """Mean negative log-likelihood of the responses, and mean KL(teacher || model), a response token."""
    nll, kl, count = 0.0, 0.0, 0
    output = FusedOutput(model, encoder.vocab_size)
    for start in range(0, len(source), BATCH_SIZE):
        batch = collator([source[i] for i in range(start, min(start + BATCH_SIZE, len(source)))])
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with output.scoring(batch, kept=True):
            logits = output.read(model(**inputs, pixel_values=batch.pixel_values).logits)
        assert batch.topk_logprobs is not None
        assert batch.rest_mass is not None
        kl_R = distillation_loss(logits, batch.topk_logprobs, batch.rest_mass, vocab_size=encoder.vocab_size)
        nll -= float(logits.own_logprobs.double().sum())
        kl += float(kl_R.double().sum())
        count += batch.num_rows
    return nll / count, kl / count


@torch.no_grad()
def _answers(
    model: PreTrainedModel,
    encoder: ChatEncoder,
    spec: ImageSpec,
    processor: Any,
    image_root: Path,
    samples: Sequence[Sample],
) -> list[str]:
    """Greedy answers in place of each sample's last turn."""
    prompts, images = [], []
    for sample in samples:
        ids = encoder.encode_prompt(sample.conversations[0][:-1])
        prompts.append(expand_placeholders(ids, encoder.image_token_id, spec.tokens_per_image)[0])
        images += [load_image(ref, image_root, "pad", spec.mean_rgb, sample.id) for ref in sample.images]
    width = max(map(len, prompts))
    pad = encoder.tokenizer.pad_token_id
    # Padded on the left, so that every answer begins in the same column.
    input_ids = np.stack([np.pad(p, (width - len(p), 0), constant_values=pad) for p in prompts]).astype(np.int64)
    mask = np.stack([np.pad(np.ones(len(p), np.int64), (width - len(p), 0)) for p in prompts])
    generated = model.generate(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask),
        pixel_values=processor(images=images, return_tensors="pt")["pixel_values"],
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=encoder.tokenizer.eos_token_id,
    )
    texts: list[str] = encoder.tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    return texts
