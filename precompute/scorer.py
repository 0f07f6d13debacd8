"""What passes between the loop and a teacher, so that the loop knows no engine."""

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
    """A conversation to score, or a prompt to answer. `key` is (position in the dataset, number of the conversation).

    `sample_id` and the key's second part seed what is drawn for it.
    """

    key: RequestKey
    sample_id: str
    encoded: EncodedChat
    images: tuple[Image.Image, ...]
    where: str


@dataclass(frozen=True)
class RejectedRequest:
    """A request that the teacher will not score, such as one whose images it cannot process; `reason` names it."""

    reason: str


@dataclass(frozen=True)
class GeneratedResponse:
    """Response `number` that the teacher wrote to a prompt: its ids, int32 [R], and their scores."""

    number: int
    response_ids: npt.NDArray[np.int32]
    scores: TeacherScores


ScoringResult = TeacherScores | GeneratedResponse | RejectedRequest


@dataclass(frozen=True)
class ScorerSettings:
    """What a teacher must know before it starts.

    `max_tokens` bounds the expanded sequence, `max_images` a sequence's images (0: no vision tower);
    `output_vocab_size` is the size of the output layer, `vocab_size` the tokenizer's, `top_k` at most the former.
    With `top_p`, a row keeps the least number of its best entries that hold this mass, from `min_k` to `top_k`;
    with `num_draws`, so many draws instead, which `seed` and the request decide. With `generate` requests are prompts.
    `node_rank` is this process's number among those that share the output.
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


class Scorer(Protocol):
    """A started teacher."""

    def score(self, requests: Iterable[ScoreRequest]) -> Generator[tuple[RequestKey, ScoringResult], None, None]:
        """Draws requests as there is room, in a thread of its own if it likes, and yields answers in any order.

        A conversation has one answer, a prompt as many as responses are to be written; either may be refused instead,
        once. Closing the generator stops the drawing.
        """
        ...

    def close(self) -> None:
        """Frees what the teacher holds."""
        ...
