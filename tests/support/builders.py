"""Manifests and scored rows for tests, drawn from a seed."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.data.chat_encoding import EncodedChat
from common.data.samples import ImageRef, Kind, Sample, Turn
from common.shards.manifest import (
    CaptureSettings,
    DatasetIdentity,
    EngineIdentity,
    ImageIdentity,
    Manifest,
    TeacherIdentity,
    TokenizerIdentity,
)
from common.shards.score_shard import ScoredConversation, ShardRow
from common.shards.scores import TeacherScores, scores_from_draws, scores_from_topk

VOCAB_SIZE = 151_936
IMAGE_TOKEN_ID = 151_646


def make_manifest(kind: Kind = "kd", num_samples: int = 200, samples_per_shard: int = 200, **capture: Any) -> Manifest:
    """Makes a manifest; `capture` replaces settings of the capture."""
    settings: dict[str, Any] = {
        "top_k": 64,
        "top_p": None,
        "min_k": 1,
        "num_draws": None,
        "precision": None if capture.get("num_draws") else "fp32",
        "images": "path",
        "seed": None,
        "generate": None,
        "score": "response",
        "max_tokens": 2048,
        "on_bad_sample": "skip",
    }
    return Manifest(
        kind=kind,
        teacher=TeacherIdentity(
            architecture="LlavaForConditionalGeneration",
            weights_sha256="1" * 64,
            config_sha256="2" * 64,
            vocab_size=152_064,
        ),
        tokenizer=TokenizerIdentity(sha256="3" * 64, vocab_size=VOCAB_SIZE, template_sha256="4" * 64),
        image=ImageIdentity(processor_sha256="5" * 64, aspect_ratio="pad", tokens_per_image=576),
        dataset=DatasetIdentity(name="mélange.jsonl", sha256="6" * 64, num_samples=num_samples),
        capture=CaptureSettings.model_validate(settings | capture),
        engine=EngineIdentity(name="vllm", version="0.32.0", dtype="bfloat16"),
        samples_per_shard=samples_per_shard,
    )


def read_table(path: Path) -> pa.Table:
    """Reads a shard's table with the footer's metadata, so that the table can be written as a shard again."""
    return pq.read_table(path).replace_schema_metadata(pq.read_metadata(path).metadata)


def make_scores(rng: np.random.Generator, num_rows: int, top_k: int) -> TeacherScores:
    """Makes random rows; a tenth of their slots is empty, so that counts differ."""
    logprobs_RK = np.log(rng.dirichlet(np.full(top_k + 1, 0.3), num_rows)[:, :top_k] + 1e-12).astype(np.float32)
    logprobs_RK[rng.random(logprobs_RK.shape) < 0.1] = -np.inf
    ids_RK = np.stack([rng.choice(VOCAB_SIZE, top_k, replace=False) for _ in range(num_rows)])
    return scores_from_topk(-rng.exponential(1, num_rows).astype(np.float32), ids_RK, logprobs_RK)


def make_draws(rng: np.random.Generator, num_rows: int, num_draws: int) -> TeacherScores:
    """Makes random draws of few ids, so that some are drawn often."""
    own = -rng.exponential(1, num_rows).astype(np.float32)
    drawn_RD = VOCAB_SIZE // 20 * rng.zipf(2, (num_rows, num_draws)).clip(max=19)
    return scores_from_draws(own, drawn_RD)


def make_rows(  # noqa: PLR0913 - a test names the one or two properties of rows that matter to it
    kind: Kind, num_rows: int, *, seed: int = 0, top_k: int = 5, num_tokens: int = 12, num_draws: int | None = None
) -> list[ShardRow]:
    """Makes rows of one or two conversations with two spans each, and no image, one by path, or a second by bytes."""
    rng = np.random.default_rng(seed)
    rows = []
    for index in range(num_rows):
        turns = [(Turn("user", f"<image>\nQuestion {index}?"), Turn("assistant", answer)) for answer in ("ja 🐈", "")]
        images = (ImageRef(f"a/{index}.png"), ImageRef(None, rng.bytes(9)))[: index % 3]
        conversations = []
        for _ in range(1 if kind == "kd" else 2):
            input_ids = rng.integers(0, VOCAB_SIZE, num_tokens).astype(np.int32)
            spans = np.array([[2, 5], [7, num_tokens]], np.int32)
            num_scored = 3 + num_tokens - 7
            scores = make_draws(rng, num_scored, num_draws) if num_draws else make_scores(rng, num_scored, top_k)
            conversations.append(ScoredConversation(EncodedChat(input_ids, spans, IMAGE_TOKEN_ID), scores))
        sample = Sample(f"s{index}", kind, images, tuple(turns[: len(conversations)]), f"s{index}")
        rows.append(ShardRow(index, sample, tuple(conversations)))
    return rows
