"""A teacher without an engine: scores are a function of a conversation's tokens and images alone."""

import hashlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.data.chat_encoding import EncodedChat
from common.shards.scores import TeacherScores, scores_from_draws, scores_from_topk
from precompute.config import PrecomputeConfig
from precompute.scorer import RequestKey, ScoreRequest, ScorerSettings, ScoringResult
from tests.support.real_weights import write_jsonl


class FakeTeacher:
    """Yields scores in batches, those of a batch's last request first; `before` is called with each request."""

    def __init__(
        self,
        settings: ScorerSettings,
        before: Callable[[ScoreRequest], None] | None = None,
        batch_size: int = 3,
        delay_s: float = 0.0,
    ) -> None:
        self._settings = settings
        self._before = before
        self._batch_size = batch_size
        self._delay_s = delay_s
        self.num_requests = 0
        self.closed = False

    def score(self, requests: Iterable[ScoreRequest]) -> Generator[tuple[RequestKey, ScoringResult], None, None]:
        batch: list[ScoreRequest] = []
        for request in requests:
            if self._before:
                self._before(request)
            self.num_requests += 1
            batch.append(request)
            if len(batch) == self._batch_size:
                yield from self._score_batch(batch)
        yield from self._score_batch(batch)

    def close(self) -> None:
        self.closed = True

    def _score_batch(self, batch: list[ScoreRequest]) -> Iterator[tuple[RequestKey, ScoringResult]]:
        while batch:
            time.sleep(self._delay_s)
            request = batch.pop()
            yield request.key, self.make_scores(request.encoded, request.images)

    def make_scores(self, encoded: EncodedChat, images: tuple[Image.Image, ...]) -> TeacherScores:
        """Returns the scores of a conversation, random numbers that its tokens and images seed."""
        seed = hashlib.sha256(encoded.input_ids.tobytes() + b"".join(image.tobytes() for image in images)).digest()
        content = np.frombuffer(seed, np.uint32)
        settings, num_rows = self._settings, len(encoded.response_ids)
        logits_RV = np.random.default_rng(content).normal(0, 2, (num_rows, settings.output_vocab_size))
        logits_RV = logits_RV[:, : settings.vocab_size]
        logprobs_RV = logits_RV - np.log(np.exp(logits_RV).sum(axis=1, keepdims=True))
        own_R = logprobs_RV[np.arange(num_rows), encoded.response_ids]
        if settings.num_draws is not None:
            rng = np.random.default_rng([settings.seed, *content])
            drawn_RD = [rng.choice(len(row), settings.num_draws, p=np.exp(row)) for row in logprobs_RV]
            return scores_from_draws(own_R, np.stack(drawn_RD))
        ids_RK = np.argsort(-logprobs_RV, axis=1)[:, : settings.top_k]
        kept_RK = np.take_along_axis(logprobs_RV, ids_RK, axis=1)
        return scores_from_topk(own_R, ids_RK, kept_RK, top_p=settings.top_p, min_k=settings.min_k)


def random_pixels(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.uint8]:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def conversation_records(root: Path, n: int) -> list[dict[str, Any]]:
    """Makes LLaVA records of every shape: no image, one, two; one turn or two. Writes the images into `root`."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(n):
        names = [f"{number}-{image}.png" for image in range(number % 3)]
        for name in names:
            Image.fromarray(random_pixels(rng, *rng.integers(8, 40, 2))).save(root / name)
        turns = [
            {"from": "human", "value": "<image>\n" * len(names) + f"the image {number}?"},
            {"from": "gpt", "value": f"the digit is {rng.integers(1000)}"},
        ]
        if number % 4 == 1:
            turns += [{"from": "human", "value": "is it?"}, {"from": "gpt", "value": "it is the digit"}]
        record: dict[str, Any] = {"id": f"s{number}", "conversations": turns}
        if names:
            record["image"] = names[0] if len(names) == 1 else names
        records.append(record)
    return records


def preference_records(root: Path, n: int) -> list[dict[str, Any]]:
    """Preference pairs over the same images and questions."""
    pairs = []
    for record in conversation_records(root, n):
        question = record.pop("conversations")[0]
        chosen, rejected = ([question, {"from": "gpt", "value": text}] for text in ("the digit", f"no {record['id']}"))
        pairs.append({**record, "chosen": chosen, "rejected": rejected})
    return pairs


def make_config(root: Path, teacher: Path, records: list[dict[str, Any]], **settings: Any) -> PrecomputeConfig:
    """Makes a configuration with small shards for `records`, which it writes to `root`."""
    dataset = write_jsonl(root / "data.jsonl", records)
    defaults = {"top_k": 8, "samples_per_shard": 4, "max_tokens": 512, "max_skipped": 1.0}
    own = {"teacher": teacher, "dataset": dataset, "image_root": root, "output": root / "out"}
    return PrecomputeConfig.model_validate({**defaults, **own, **settings})
