"""A record of a dataset as a sample.

Forms of records, recognised by their keys:
    LLaVA        {"id", "image": str | [str, ...], "conversations": [{"from": "human" | "gpt" | "system", "value"}]}
    messages     {"id", "messages": [{"role", "content"}], "images": [...]}
    preference   {"id", "image", "chosen", "rejected"}, each a list of from/value or role/content, or the answer's text;
                 a "prompt" or "question" beside them is a text or a list of turns (RLAIF-V, TRL)

Keys that mean the same may stand together if only one is filled, or if they agree (common/data/record_keys.py).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from common.data.image_values import find_image, parse_images
from common.data.record_keys import (
    CHAT_KEYS,
    IMAGE_KEYS,
    PAIR_KEYS,
    PROMPT_KEYS,
    ROLE_KEYS,
    TEXT_KEYS,
    check_encodable,
    check_record_keys,
    check_turn_keys,
    find_other_image_keys,
    is_filled,
    is_scored,
    resolve_alternatives,
)
from common.data.samples import IMAGE_MARKER, ImageRef, Kind, Role, Turn
from common.errors import DataError, describe_value, shorten

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

# Types of content parts, with the names of OpenAI's two interfaces.
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url", "input_image")


@dataclass(frozen=True)
class _Message:
    """A turn with its content parts' images in order, None for a part that only marks the place of one."""

    turn: Turn
    images: tuple[ImageRef | None, ...] = ()


_Messages = tuple[_Message, ...]


def parse_record(
    record: dict[str, Any], kind: Kind, where: str
) -> tuple[tuple[ImageRef, ...], tuple[tuple[Turn, ...], ...]]:
    """Returns the images and the conversations of a record, as a `Sample` has them.

    Raises:
        DataError: the record is of another kind or malformed, or a key changes its meaning and is not supported.
    """
    _check_kind(record, kind, where)
    check_record_keys(record, where)
    conversations = (_parse_chat(record, where),) if kind == "kd" else _parse_pair(record, where)
    images = _resolve_images(record, conversations, where)
    return images, tuple(
        _insert_markers(_with_system(tuple(message.turn for message in messages), record, where), len(images), where)
        for messages in conversations
    )


def parse_record_images(record: dict[str, Any], where: str) -> tuple[ImageRef, ...]:
    """Returns the images of a record of either kind.

    Raises:
        DataError: the record's images, or the turns that hold them, are malformed.
    """
    is_pair = any(is_filled(record, key) for key in PAIR_KEYS)
    if not _has_parts(record):
        return _parse_column(record, where)
    return _resolve_images(record, _parse_pair(record, where) if is_pair else (_parse_chat(record, where),), where)


def _has_parts(record: dict[str, Any]) -> bool:
    """Returns True if a turn's content is a list of parts, which may hold images."""
    columns = [record.get(key) for key in (*CHAT_KEYS, *PAIR_KEYS, *PROMPT_KEYS)]
    turns = [turn for column in columns if isinstance(column, list | dict) for turn in _as_list(column)]
    return any(isinstance(turn, dict) and isinstance(turn.get(key), list) for turn in turns for key in TEXT_KEYS)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_kind(record: dict[str, Any], kind: Kind, where: str) -> None:
    """Raises DataError if the record is neither a conversation nor a preference pair, or is not of this kind."""
    is_pair = any(is_filled(record, key) for key in PAIR_KEYS)
    # An empty list is a conversation all the same, of which the error says that it is empty.
    if not is_pair and all(record.get(key) is None for key in CHAT_KEYS):
        raise DataError(f"{where}: {_list_keys(record)}; expected conversations, messages or chosen/rejected")
    if is_pair != (kind == "dpo"):
        expected = "chosen and rejected answers" if kind == "dpo" else "conversations or messages"
        raise DataError(f'{where}: {_list_keys(record)}; kind = "{kind}" expects {expected}')


def _list_keys(record: dict[str, Any]) -> str:
    return shorten(f"found keys {sorted(record)}")


def _resolve_images(record: dict[str, Any], conversations: tuple[_Messages, ...], where: str) -> tuple[ImageRef, ...]:
    """Returns the images of the record's column, or those that its content parts hold."""
    column = _parse_column(record, where)
    held = [tuple(image for message in messages for image in message.images) for messages in conversations]
    if not any(image is not None for images in held for image in images):
        return column
    if any(images != held[0] for images in held):
        raise DataError(f"{where}: chosen and rejected must share every image")
    images = tuple(image for image in held[0] if image is not None)
    if len(images) < len(held[0]):
        raise DataError(
            f"{where}: {len(images)} of {len(held[0])} content parts hold their image, the others do not; give all "
            'images there, or all in "images"'
        )
    if column and column != images:
        raise DataError(
            f"{where}: images are given beside the turns and in their parts, and differ; remove one of them"
        )
    return images


def _parse_column(record: dict[str, Any], where: str) -> tuple[ImageRef, ...]:
    # An empty path is no image, as in tables of text.
    named = {key: record[key] for key in IMAGE_KEYS if record.get(key, "") != ""}
    images = resolve_alternatives(named, IMAGE_KEYS, partial(parse_images, where=where), where)
    for key in find_other_image_keys(record):
        if not images or not _describes_images(record[key], images):
            raise DataError(
                f'{where}: "{key}" is given, but images are read from "image" or "images"; rename the key, or remove it'
            )
    return images


def _describes_images(value: Any, images: tuple[ImageRef, ...]) -> bool:
    """Returns True if the value of another key repeats the images' paths, or says where on the web they are from."""
    others = _as_list(value)
    if all(isinstance(other, str) and other.startswith(("http://", "https://")) for other in others):
        return True
    return len(others) == len(images) and all(
        ref.path in (None, other) for ref, other in zip(images, others, strict=True)
    )


def _parse_chat(record: dict[str, Any], where: str) -> _Messages:
    return resolve_alternatives(record, CHAT_KEYS, partial(_parse_turns, where=where), where)


def _parse_turns(messages: Any, where: str) -> _Messages:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: found {type(messages).__name__}, expected a non-empty list of turns")
    return tuple(_parse_turn(message, f"{where}: turn {position}") for position, message in enumerate(messages))


def _parse_turn(message: Any, where: str) -> _Message:
    if not isinstance(message, dict):
        raise DataError(f"{where}: found {type(message).__name__}, expected an object")
    check_turn_keys(message, where)
    role = resolve_alternatives(message, ROLE_KEYS, partial(_parse_role, where=where), where)
    content, images = resolve_alternatives(message, TEXT_KEYS, partial(_parse_content, where=where), where)
    if role == "user":
        _check_media_markers(content, where)
    return _Message(Turn(role, content, role != "assistant" or is_scored(message, where)), images)


def _parse_role(speaker: Any, where: str) -> Role:
    if not isinstance(speaker, str) or speaker not in _ROLES:
        raise DataError(f"{where}: role {describe_value(speaker)}; expected one of {', '.join(_ROLES)}")
    return _ROLES[speaker]


def _check_media_markers(content: str, where: str) -> None:
    for name in ("video", "audio"):
        # With an end tag it is a text about HTML.
        if f"<{name}>" in content and f"</{name}>" not in content:
            raise DataError(
                f"{where}: holds <{name}>, but only images and text are read; remove the sample, or write the marker "
                "in other words if it is none"
            )


def _with_system(turns: tuple[Turn, ...], record: dict[str, Any], where: str) -> tuple[Turn, ...]:
    """Returns the turns with the record's `system` text as the first one, if it has one."""
    text = record.get("system")
    if text is None or text == "":
        return turns
    if not isinstance(text, str):
        raise DataError(f'{where}: "system" is {describe_value(text)}; expected text')
    system = Turn("system", check_encodable(text, f"{where}: system"))
    if turns[0].role != "system":
        return (system, *turns)
    if turns[0] != system:
        raise DataError(f'{where}: "system" and the first turn are both given and differ; remove one of them')
    return turns


def _parse_content(content: Any, where: str) -> tuple[str, tuple[ImageRef | None, ...]]:
    """Returns a message's content as text, and the images of its parts; each of them becomes a marker."""
    images: list[ImageRef | None] = []
    if isinstance(content, list):
        content = "".join(_parse_part(part, images, where) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: content is {type(content).__name__}, expected text")
    return check_encodable(content, where), tuple(images)


def _parse_part(part: Any, images: list[ImageRef | None], where: str) -> str:
    """Returns a content part as text; the image of an image part is appended to `images`."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    if kind not in _IMAGE_PARTS:
        raise DataError(
            f'{where}: content part {describe_value(part)}; expected type "text" with its "text", or "image"'
        )
    images.append(find_image(part, where))
    if kind != "image" and images[-1] is None:
        raise DataError(f'{where}: content part {describe_value(part)}; expected its address in "image_url"')
    return IMAGE_MARKER


def _parse_pair(record: dict[str, Any], where: str) -> tuple[_Messages, _Messages]:
    """Returns the chosen and the rejected conversation."""
    for key in PAIR_KEYS:
        if not is_filled(record, key):
            raise DataError(f'{where}: "{key}" is missing or empty; expected two answers, chosen and rejected')
    prompt = resolve_alternatives(record, PROMPT_KEYS, partial(_parse_prompt, where=f"{where}: prompt"), where)
    chat = _parse_chat(record, where) if any(is_filled(record, key) for key in CHAT_KEYS) else ()
    if chat and chat[-1].turn.role != "assistant":
        if prompt and prompt != chat:
            raise DataError(f"{where}: the prompt and the conversation are both given and differ; remove one of them")
        prompt = chat
    chosen, rejected = (_parse_answer(record[key], prompt, f"{where}: {key}") for key in PAIR_KEYS)
    if chosen[:-1] != rejected[:-1]:
        raise DataError(f"{where}: chosen and rejected must share every turn but the last")
    if chat and chat[-1].turn.role == "assistant" and chat != chosen:
        raise DataError(
            f"{where}: a conversation is given beside chosen, and is another one; remove conversations or messages"
        )
    return chosen, rejected


def _parse_prompt(prompt: Any, where: str) -> _Messages:
    if prompt is None or prompt in ("", []):
        return ()
    if isinstance(prompt, str):
        content = check_encodable(prompt, where)
        _check_media_markers(content, where)
        return (_Message(Turn("user", content)),)
    return _parse_turns(prompt, where)


def _parse_answer(answer: Any, prompt: _Messages, where: str) -> _Messages:
    """Returns the conversation of an answer: its text, its last turn, or the whole of it, prompt included."""
    if isinstance(answer, str):
        if not prompt:
            raise DataError(f'{where}: is a string, so a "prompt" or a "question" is needed beside it')
        return (*prompt, _Message(Turn("assistant", check_encodable(answer, where))))
    # An object is a single turn.
    messages = _parse_turns([answer] if isinstance(answer, dict) else answer, where)
    if messages[-1].turn.role != "assistant":
        raise DataError(f"{where}: the last turn is {messages[-1].turn.role}'s, expected the assistant's")
    if messages[0].turn.role == "assistant":
        return (*prompt, *messages)
    if not _contains(messages[:-1], prompt):
        raise DataError(
            f"{where}: is a whole conversation, but the prompt beside it is not part of it; remove the prompt, or the "
            "turns before the answer"
        )
    return messages


def _contains(messages: _Messages, prompt: _Messages) -> bool:
    """Returns True if the prompt stands in `messages` without a gap, where these may also hold the images' markers."""
    turns, wanted = (tuple(message.turn for message in part) for part in (messages, prompt))
    unmarked = tuple(Turn(turn.role, turn.content.replace(IMAGE_MARKER, "").strip()) for turn in turns)
    stripped = tuple(Turn(turn.role, turn.content.strip()) for turn in wanted)
    starts = range(len(turns) - len(wanted) + 1)
    return any(
        turns[start : start + len(wanted)] == wanted or unmarked[start : start + len(wanted)] == stripped
        for start in starts
    )


def _insert_markers(turns: tuple[Turn, ...], num_images: int, where: str) -> tuple[Turn, ...]:
    """Puts a marker for each image before the first user turn if there are no markers, as LLaVA does."""
    num_markers = sum(turn.content.count(IMAGE_MARKER) for turn in turns)
    if num_markers == num_images:
        return turns
    if num_markers:
        raise DataError(f"{where}: {num_markers} {IMAGE_MARKER} marker(s) but {num_images} image(s)")
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise DataError(f"{where}: {num_images} image(s) but no user turn to put them into")
    marked = Turn("user", f"{IMAGE_MARKER}\n" * num_images + turns[first].content)
    return (*turns[:first], marked, *turns[first + 1 :])
