"""Keys of dataset records: alternatives, ids, flags, keys that are refused, and keys that are not used.

A key that changes what a sample means is used or refused, and never ignored.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from common.errors import DataError, describe_value, shorten

T = TypeVar("T")

IMAGE_KEYS = ("images", "image")
CHAT_KEYS = ("conversations", "messages")
PROMPT_KEYS = ("prompt", "question")
PAIR_KEYS = ("chosen", "rejected")
ROLE_KEYS = ("from", "role")
TEXT_KEYS = ("value", "content")
# The first that is filled is the record's id.
ID_KEYS = ("id", "idx", "uid", "uuid", "question_id", "sample_id")

# Values that say the same as a missing key: `datasets` fills columns that a record does not have.
_EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]", "{}")

_IMAGE_SPELLINGS = frozenset(
    f"{name}{plural}"
    for name in ("image", "img", "picture", "image_path", "image_file", "image_url")
    for plural in ("", "s")
)
_MEDIA_KEYS = frozenset(("video", "videos", "audio", "audios"))
_TOOL_KEYS = frozenset(("tools", "functions", "tool_calls", "function_call"))
_REASONING_KEYS = frozenset(("reasoning_content", "reasoning", "thinking"))
# Of a record, the other two names are columns that describe it.
_RECORD_REASONING_KEYS = frozenset(("reasoning_content",))

# Flags that say whether a turn is scored.
_TURN_FLAGS = ("weight", "train", "loss", "training", "mask")
# Of a record, they would weight the whole sample.
_RECORD_WEIGHTS = ("weight", "sample_weight", "loss_weight")

_USED_KEYS = frozenset((*IMAGE_KEYS, *CHAT_KEYS, *PROMPT_KEYS, *PAIR_KEYS, *ID_KEYS, "system"))
_USED_TURN_KEYS = frozenset((*ROLE_KEYS, *TEXT_KEYS, *_TURN_FLAGS))
# Keys of public datasets that describe a sample, and change nothing of what is learned from it.
_HARMLESS_KEYS = frozenset[str]().union(
    ID_KEYS,
    ("index", "prompt_id", "image_id", "conversation_id", "source_id"),
    ("source", "data_source", "dataset", "dataset_name", "ds_name", "origin_dataset", "origin_split", "split", "url"),
    ("metadata", "meta", "category", "task", "type", "language", "lang", "license", "model", "timestamp", "created"),
    ("width", "height", "size", "image_size", "image_width", "image_height", "num_tokens", "num_turns"),
    ("score", "score_chosen", "score_rejected", "chosen_model", "rejected_model"),
)
_KNOWN_KEYS = _USED_KEYS | _HARMLESS_KEYS
_KNOWN_TURN_KEYS = _USED_TURN_KEYS | _HARMLESS_KEYS


def resolve_alternatives(record: dict[str, Any], keys: Sequence[str], parse: Callable[[Any], T], where: str) -> T:
    """Returns the parsed value of keys that mean the same; null and an empty list are the same as a missing key.

    If no key is filled, the empty value itself is parsed.

    Raises:
        DataError: two keys are filled, and their parsed values differ.
    """
    filled = [key for key in keys if is_filled(record, key)]
    if not filled:
        return parse(next((record[key] for key in keys if record.get(key) is not None), None))
    value = parse(record[filled[0]])
    for other in filled[1:]:
        if parse(record[other]) != value:
            raise DataError(
                f'{where}: "{filled[0]}" and "{other}" mean the same, but are both given and differ; remove one of them'
            )
    return value


def is_filled(record: dict[str, Any], key: str) -> bool:
    """Returns False if the key is missing, null or an empty list."""
    return record.get(key) not in (None, [])


def is_relevant(key: str) -> bool:
    """Returns True if a record's key is used, or refused if it is filled."""
    refused = _MEDIA_KEYS | _TOOL_KEYS | _REASONING_KEYS | frozenset(_RECORD_WEIGHTS)
    return key in _USED_KEYS or key.lower() in refused or _is_image_spelling(key)


def is_unused_key(key: str) -> bool:
    """Returns True if a record's key is neither used nor known to change nothing."""
    return key not in _KNOWN_KEYS


def is_unused_turn_key(key: str) -> bool:
    """Returns True if a turn's key is neither used nor known to change nothing."""
    return key not in _KNOWN_TURN_KEYS


def find_source_id(record: dict[str, Any], where: str) -> tuple[str, str] | None:
    """Returns the key and the text of a record's id: a text or a number, where 1.0 is 1; None if it has none.

    Raises:
        DataError: the id holds half of a surrogate pair.
    """
    for key in ID_KEYS:
        value = record.get(key)
        if isinstance(value, bool) or value == "":
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            return key, check_encodable(str(value), f"{where}: {key}")
    return None


def check_encodable(text: str, where: str) -> str:
    """Returns `text`, and raises DataError if it has half of a surrogate pair.

    JSON can spell one, but neither a tokenizer nor a shard can hold it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {text[error.start]!r} is half a character (a lone surrogate); correct it") from error
    return text


def find_other_image_keys(record: dict[str, Any]) -> list[str]:
    """Returns the filled keys that look like another spelling of `image` or `images`."""
    return _find_image_keys(record, _KNOWN_KEYS)


def _find_image_keys(record: dict[str, Any], known: frozenset[str]) -> list[str]:
    return [key for key in sorted(record.keys() - known) if _is_image_spelling(key) and record[key] not in _EMPTY]


def _is_image_spelling(key: str) -> bool:
    return key.lower().replace("-", "_") in _IMAGE_SPELLINGS


def check_record_keys(record: dict[str, Any], where: str) -> None:
    """Raises DataError if a key of the record changes what it means, and is not supported."""
    _check_keys(record, _KNOWN_KEYS, _RECORD_REASONING_KEYS, where)
    for key in _RECORD_WEIGHTS:
        value = record.get(key)
        if isinstance(value, int | float) and value != 1:
            raise DataError(
                f'{where}: "{key}" is {describe_value(value)}, but every sample counts alike; remove the key, or '
                "give the sets of data.mix weights"
            )


def check_turn_keys(message: dict[str, Any], where: str) -> None:
    """Raises DataError if a key of a turn changes what it means, and is not supported."""
    _check_keys(message, _KNOWN_TURN_KEYS, _REASONING_KEYS, where)
    for key in _find_image_keys(message, _KNOWN_TURN_KEYS):
        raise DataError(
            f'{where}: "{key}" is given in a turn, but images are read from "images" of the sample; move it there, and '
            "write <image> where it stands in the text"
        )


def _check_keys(record: dict[str, Any], known: frozenset[str], reasoning_keys: frozenset[str], where: str) -> None:
    for key in sorted(record.keys() - known):
        lower = key.lower()
        if record[key] in _EMPTY:
            continue
        if lower in _MEDIA_KEYS:
            raise DataError(
                f'{where}: "{key}" is given, but only images and text are read; remove the key and its markers, or '
                'the sample, or rename it to "image" if it holds images'
            )
        if lower in _TOOL_KEYS:
            raise DataError(
                f'{where}: "{key}" is given, but calls of tools are not supported; remove the sample, or write what '
                "the model is to see into the turns' texts, and remove the key"
            )
        if lower in reasoning_keys:
            raise DataError(
                f'{where}: "{key}" is given, but reasoning apart from the text is not supported; write it into the '
                "turn's text as the chat template has it, or remove the key"
            )


def is_scored(message: dict[str, Any], where: str) -> bool:
    """Returns False if a flag of an assistant turn is 0 or false, so that the turn is read but not scored.

    Raises:
        DataError: a flag is neither 0 nor 1, two flags contradict each other, or `mask` is 1: some datasets mean a turn
            that is scored by it, others one that is not.
    """
    values = {key: message[key] for key in _TURN_FLAGS if message.get(key) is not None}
    for key, value in values.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise DataError(
                f'{where}: "{key}" is {describe_value(value)}; a turn is scored (1, true) or not (0, false)'
            )
    if values.get("mask"):
        raise DataError(
            f'{where}: "mask" is {describe_value(values["mask"])}; some datasets mean a turn that is scored by it, '
            'others one that is not; replace it with "weight": 1 or "weight": 0'
        )
    if len(set(map(bool, values.values()))) > 1:
        raise DataError(f"{where}: its flags {describe_value(values)} contradict each other; remove one of them")
    return all(values.values())


def count_unused_keys(record: dict[str, Any], counts: Counter[str]) -> None:
    """Adds the keys of a record and of its turns that are not used and not known to be harmless."""
    counts.update(key for key in record.keys() - _USED_KEYS - _HARMLESS_KEYS if record[key] not in _EMPTY)
    for column in (*CHAT_KEYS, *PAIR_KEYS, "prompt"):
        turns = record.get(column)
        if isinstance(turns, list):
            for turn in turns:
                if isinstance(turn, dict) and (unused := turn.keys() - _USED_TURN_KEYS):
                    counts.update(f"{column}.{key}" for key in unused - _HARMLESS_KEYS if turn[key] not in _EMPTY)


def list_counts(counts: Counter[str]) -> str:
    """Returns the keys with their counts, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return shorten(", ".join(f"{key if key.isprintable() else repr(key)} ({count:,})" for key, count in ordered))
