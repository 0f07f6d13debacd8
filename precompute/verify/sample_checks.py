"""Checks of a row's sample: its messages and its images."""

import io
from collections.abc import Iterator
from typing import get_args

from common.data.images import AspectRatio, find_size_problem, open_image
from common.data.samples import IMAGE_MARKER, ImageRef, Role, Turn
from common.shards.manifest import Manifest
from common.shards.score_shard import ShardRow

_ROLES = frozenset(get_args(Role))


def message_problems(row: ShardRow, manifest: Manifest) -> Iterator[str]:
    """Yields problems of roles, texts, image markers and scored ranges, and prompts that differ within a pair."""
    conversations, capture = row.sample.conversations, manifest.capture
    broken = [turn for turns in conversations for turn in turns if not _is_valid(turn)]
    if broken or not all(conversations):
        yield f"turn {broken[0]}" if broken else "a conversation without turns"
        return
    ends_scored = manifest.kind == "dpo" or capture.generate is not None
    for turns, scored in zip(conversations, row.conversations, strict=True):
        num_markers = sum(turn.content.count(IMAGE_MARKER) for turn in turns)
        # A response that the teacher wrote may contain the marker as text.
        if num_markers != len(row.sample.images) and capture.generate is None:
            yield f"{num_markers} {IMAGE_MARKER} markers for {len(row.sample.images)} images"
        num_responses = sum(turn.role == "assistant" and turn.scored for turn in turns)
        num_spans, encoded = len(scored.encoded.spans), scored.encoded
        if ends_scored and (turns[-1].role != "assistant" or num_spans != 1):
            yield f"{num_spans} scored ranges and a last turn of {turns[-1].role}; expected the assistant's last alone"
        elif (
            not ends_scored
            and capture.score != "all"
            and num_spans > (min(1, num_responses) if capture.score == "last" else num_responses)
        ):
            yield f"{num_spans} scored ranges for {num_responses} responses"
        if capture.generate is not None and num_spans and encoded.spans[-1, 1] != len(encoded.input_ids):
            yield f"its response ends at {encoded.spans[-1, 1]} of {len(encoded.input_ids)} tokens"
    if len({turns[:-1] for turns in conversations}) > 1:
        yield "the prompts of its two answers differ"


def image_problems(row: ShardRow, manifest: Manifest) -> Iterator[str]:
    """Yields images whose stored file is not usable, and those without one that have no path or should have a file."""
    for number, image in enumerate(row.sample.images):
        if manifest.capture.images == "bytes" or image.data is not None:
            if problem := _find_file_problem(image, "pad" if manifest.image is None else manifest.image.aspect_ratio):
                yield f"image {number} ({image}): {problem}"
        elif not image.path:
            yield f"image {number}: expected a path or a file"


def images_as_in_dataset(stored: tuple[ImageRef, ...], expected: tuple[ImageRef, ...]) -> tuple[ImageRef, ...]:
    """Returns the images of a row without the files that the dataset only names by their paths."""
    held = [ref.data is not None for ref in expected] + [False] * max(0, len(stored) - len(expected))
    return tuple(ref if is_held else ImageRef(ref.path) for ref, is_held in zip(stored, held, strict=False))


def _is_valid(turn: Turn) -> bool:
    return turn.role in _ROLES and isinstance(turn.content, str) and isinstance(turn.scored, bool)


def _find_file_problem(image: ImageRef, aspect_ratio: AspectRatio) -> str | None:
    """Returns what is wrong with an image's file, None if nothing is. Reads its header and decodes no pixel."""
    if image.data is None:
        return "its file is not stored"
    try:
        with open_image(io.BytesIO(image.data)) as opened:
            return find_size_problem(opened.width, opened.height, aspect_ratio)
    except Exception as error:  # noqa: BLE001 - Pillow's readers raise whatever the first bytes lead them to
        return f"its file cannot be opened ({error})"
