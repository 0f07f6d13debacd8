"""Scores and answers of transformers in float32, computed in another way than the project does.

The Hugging Face processor expands the images, and the scored tokens are found in a loop over the whole sequence.
Legend: R scored tokens, T expanded sequence, V ids of the tokenizer, K kept entries.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from common.shards.manifest import published_shards, read_manifest, shard_path
from common.shards.score_shard import ScoredConversation, ShardFile, ShardRow
from common.storage.files import Location

ENGINE = {"dtype": "float32", "kv_cache_gib": 1, "max_num_seqs": 4, "enforce_eager": True}
TOP_K = 16


def read_rows(output: Location) -> list[ShardRow]:
    manifest = read_manifest(output)
    return [row for n in published_shards(output) for row in ShardFile(shard_path(output, n), manifest, n)]


def padded(path: Path, mean: tuple[int, ...]) -> Image.Image:
    """Centres an image on a square of its longer side, in numpy."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    height, width = pixels.shape[:2]
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = mean
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return Image.fromarray(square)


def reference_rows(
    model: Any, processor: Any, row: ShardRow, conversation: int, image_root: Path | None
) -> tuple[list[int], np.ndarray]:
    """Returns the scored tokens and the distribution before each of them, found in the text token by token."""
    turns = row.sample.conversations[conversation]
    tokenizer = getattr(processor, "tokenizer", processor)
    text = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in turns], tokenize=False
    )
    if row.sample.images:
        mean = tuple(int(value * 255) for value in processor.image_processor.image_mean)
        assert image_root is not None
        images = [padded(image_root / str(image.path), mean) for image in row.sample.images]
        inputs = processor(text=text, images=images, return_tensors="pt")
    else:
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits_TV = model(**{k: v for k, v in inputs.items() if k != "token_type_ids"}).logits[0].double()
    # The distribution is over the tokenizer's ids; further rows of the output layer are padding.
    logprobs_TV = logits_TV[:, : len(tokenizer)].log_softmax(-1)
    ids = inputs["input_ids"][0].tolist()
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    # A template may begin with a system turn of its own.
    num_left = ids.count(start)
    tokens, rows = [], []
    header: list[int] | None = None
    answering = False
    for position, token in enumerate(ids):
        if answering:
            tokens.append(token)
            rows.append(logprobs_TV[position - 1].numpy())
            answering = token != end
        elif token == start:
            header, num_left = [], num_left - 1
        elif header is not None:
            header.append(token)
            if "\n" in tokenizer.decode([token]):
                scored = row.sample.kind == "kd" or num_left == 0
                answering = scored and tokenizer.decode(header) == "assistant\n"
                header = None
    return tokens, np.stack(rows)


def assert_agrees(  # noqa: PLR0913, PLR0917 - both sides of the comparison and its limits
    scored: ScoredConversation,
    tokens: list[int],
    logprobs_RV: np.ndarray,
    vocab_size: int,
    tolerance: float,
    top_k: int = TOP_K,
) -> None:
    scores = scored.scores
    assert scored.encoded.response_ids.tolist() == tokens
    np.testing.assert_allclose(scores.own_logprobs, logprobs_RV[np.arange(len(tokens)), tokens], atol=tolerance)
    ids_RK, stored_RK = scores.topk()
    for row, reference_V in enumerate(logprobs_RV):
        count = scores.counts[row]
        kept = ids_RK[row, :count]
        np.testing.assert_allclose(stored_RK[row, :count], reference_V[kept], atol=tolerance)
        # The K best of the whole output layer are kept, less its padding; those close to the K-th may swap.
        threshold = np.partition(reference_V, -top_k)[-top_k]
        certain = np.flatnonzero(reference_V[:vocab_size] > threshold + tolerance)
        assert set(certain) <= set(kept)
        assert (reference_V[kept] >= threshold - tolerance).all()
        assert abs(scores.rest_mass[row] - (1 - np.exp(reference_V[kept]).sum())) <= tolerance


def greedy_answers(model_dir: Path, samples: list[Any], image_root: Path) -> list[str]:
    """Returns transformers' greedy continuation of each prompt."""
    model = LlavaForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(model_dir)
    mean = tuple(int(value * 255) for value in processor.image_processor.image_mean)
    answers = []
    for sample in samples:
        messages = [{"role": turn.role, "content": turn.content} for turn in sample.conversations[0][:-1]]
        text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = [padded(image_root / str(image.path), mean) for image in sample.images]
        inputs = processor(text=text, images=images or None, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        answers.append(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers
