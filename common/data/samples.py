"""Samples: conversations to distil, or preference pairs, with references to their images."""

from dataclasses import dataclass
from typing import Literal

IMAGE_MARKER = "<image>"

Kind = Literal["kd", "dpo"]
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """Message of a conversation; `content` holds an `<image>` marker at each image's place.

    A turn of the assistant whose `scored` is False is read by the models, and enters no loss.
    """

    role: Role
    content: str
    scored: bool = True


@dataclass(frozen=True)
class ImageRef:
    """Reference to an image: a path relative to the image root, or the bytes of the encoded file, or both.

    Where both are there the bytes count, and the path is a name.
    """

    path: str | None
    data: bytes | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return self.path
        return "without a path" if self.data is None else f"of {len(self.data):,} bytes inside the dataset"


@dataclass(frozen=True)
class Sample:
    """Dataset record. `conversations` is (conversation,) for the kind "kd" and (chosen, rejected) for "dpo".

    `id` is unique; `source_id` is what the dataset has, None if it has none.
    """

    id: str
    kind: Kind
    images: tuple[ImageRef, ...]
    conversations: tuple[tuple[Turn, ...], ...]
    source_id: str | None = None


def without_last_response(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Returns the turns that a model answers: all but the last response, or all if the last turn is not a response."""
    return turns[:-1] if turns[-1].role == "assistant" else turns
