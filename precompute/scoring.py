"""What passes between the loop and a teacher, so that the loop knows no engine."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from common.encoding import Encoded
from common.scores import TeacherScores
from precompute.config import EngineConfig

Key = tuple[int, int]


@dataclass(frozen=True)
class ScoreRequest:
    """A conversation to score. `key` is (position in the dataset, number of the conversation in its sample)."""

    key: Key
    encoded: Encoded
    images: tuple[Image.Image, ...]
    where: str


@dataclass(frozen=True)
class ScoringPlan:
    """What a teacher must know before it starts.

    `max_tokens` bounds the expanded sequence, `max_images` a sequence's images (0: no vision tower);
    `output_vocab_size` is the size of the output layer, `vocab_size` the tokenizer's, `top_k` at most the former.
    """

    model_dir: Path
    engine: EngineConfig
    max_tokens: int
    max_images: int
    top_k: int
    vocab_size: int
    output_vocab_size: int


class Scorer(Protocol):
    """A started teacher."""

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[tuple[Key, TeacherScores]]:
        """Draws requests as there is room and yields each one's scores, in any order."""
        ...

    def close(self) -> None:
        """Frees what the teacher holds."""
        ...
