"""The interface between the capture's loop and a teacher, so that the loop knows no engine."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from common.data.chat_encoding import EncodedChat
from common.shards.scores import TeacherScores
from precompute.config import EngineConfig, GenerateConfig

RequestKey = tuple[int, int]


@dataclass(frozen=True)
class ScoreRequest:
    """A conversation to score, or a prompt to answer.

    `key` is (position in the dataset, number of the conversation); its second part and `sample_id` seed what is drawn.
    `where` names the conversation in errors.
    """

    key: RequestKey
    sample_id: str
    encoded: EncodedChat
    images: tuple[Image.Image, ...]
    where: str


@dataclass(frozen=True)
class RejectedRequest:
    """A request that the teacher refuses, such as one whose images it cannot process; `reason` names it too."""

    reason: str


@dataclass(frozen=True)
class GeneratedResponse:
    """Response number `number` of a prompt, written by the teacher: its ids, int32 [R], and their scores."""

    number: int
    response_ids: npt.NDArray[np.int32]
    scores: TeacherScores


ScoringResult = TeacherScores | GeneratedResponse | RejectedRequest


@dataclass(frozen=True)
class ScorerSettings:
    """Settings that a teacher starts with.

    `max_tokens` bounds the expanded sequence, `max_images` a sequence's images (0: no vision tower);
    `output_vocab_size` is the size of the output layer, `vocab_size` the tokenizer's, `top_k` at most the former.
    With `top_p`, a row keeps the smallest number of its best entries that hold this mass, from `min_k` to `top_k`. With
    `num_draws` it keeps that many draws instead, which depend on `seed` and the request alone. With `generate`,
    requests are prompts. `node_rank` is this process's number among those that share the output. `probes` are
    conversations with images, on which a started teacher is checked.
    """

    model_dir: Path
    engine: EngineConfig
    max_tokens: int
    max_images: int
    top_k: int
    top_p: float | None
    min_k: int
    num_draws: int | None
    seed: int
    generate: GenerateConfig | None
    node_rank: int
    vocab_size: int
    output_vocab_size: int
    probes: tuple[ScoreRequest, ...] = ()


class Scorer(Protocol):
    """A started teacher."""

    def score(self, requests: Iterable[ScoreRequest]) -> Generator[tuple[RequestKey, ScoringResult], None, None]:
        """Scores requests and yields their results in any order.

        Requests are taken when there is room, possibly in another thread; none is taken after the generator is closed.
        A conversation has one result, a prompt one for each response that is to be written; instead of them, either may
        have one RejectedRequest.
        """
        ...

    def close(self) -> None:
        """Frees the teacher's memory and processes."""
        ...
