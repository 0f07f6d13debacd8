"""Datasets as samples: conversations to distil, or preference pairs.

    file (.json, .jsonl, either with .gz or .zst) ── Dataset.open ──> index of records, ids, SHA-256
    Dataset[i] ──> Sample   conversations of turns, image references; images are not read

Record forms, recognised by their keys:
    LLaVA        {"id", "image": str | [str, ...], "conversations": [{"from": "human" | "gpt" | "system", "value"}]}
    messages     {"id", "messages": [{"role", "content"}], "images": [...]}
    preference   {"id", "image", "chosen", "rejected"}, each a list of from/value or role/content, or the answer's text;
                 a "prompt" or "question" beside them is a text or a list of turns (RLAIF-V, TRL)

Keys that mean the same may stand together if only one is filled, or if they agree (common/data/record_keys.py).
"""

import hashlib
import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from common.data.json_files import Line, decompress, index_records, parse_line
from common.data.record_keys import (
    CHAT_KEYS,
    IMAGE_KEYS,
    PAIR_KEYS,
    PROMPT_KEYS,
    ROLE_KEYS,
    TEXT_KEYS,
    check_record_keys,
    check_turn_flags,
    check_turn_keys,
    count_unused_keys,
    find_other_image_keys,
    is_filled,
    list_counts,
    resolve_alternatives,
)
from common.errors import DataError, describe_value, shorten
from common.storage.files import Location, read_bytes

_log = logging.getLogger(__name__)

IMAGE_MARKER = "<image>"

Kind = Literal["kd", "dpo"]
Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}


@dataclass(frozen=True)
class Turn:
    """Message of a conversation; `content` holds an `<image>` marker at each image's place."""

    role: Role
    content: str


@dataclass(frozen=True)
class ImageRef:
    """Reference to an image: a path relative to the image root, or the bytes of the encoded file, or both."""

    path: str | None
    data: bytes | None = None


@dataclass(frozen=True)
class Sample:
    """Dataset record. `conversations` is (conversation,) for the kind "kd" and (chosen, rejected) for "dpo"."""

    id: str
    kind: Kind
    images: tuple[ImageRef, ...]
    conversations: tuple[tuple[Turn, ...], ...]


class Dataset:
    """Random access to the samples of one file, in the order of the file.

    The file's bytes are held in memory. A line of a JSONL file is parsed each time it is asked for, a JSON array once.
    """

    def __init__(self, path: Location, kind: Kind, data: bytes, records: list[Any]) -> None:
        self.path = path
        self.kind: Kind = kind
        self.sha256 = hashlib.sha256(data).hexdigest()
        self._data = data
        self._records = records
        unused: Counter[str] = Counter()
        self.ids = tuple(self._index_record(index, unused) for index in range(len(records)))
        self._check_unique_ids()
        if unused:
            _log.info("%s: not used: keys %s", path, list_counts(unused))

    @classmethod
    def open(cls, path: Location, kind: Kind) -> "Dataset":
        """Reads and indexes a file, and logs which keys of its records are not used.

        Raises:
            DataError: the file is unreadable or empty, its JSON is broken (with the line), ids are missing or repeated.
            StorageError: the store failed.
        """
        try:
            data = read_bytes(path)
        except OSError as error:
            raise DataError(f"{path}: the dataset cannot be read ({error})") from error
        data = decompress(path, data)
        records = index_records(path, data)
        if not records:
            raise DataError(f"{path}: the dataset is empty; expected at least one sample")
        return cls(path, kind, data, records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = self._record(index)
        where = self._where(index)
        _check_kind(record, self.kind, where)
        check_record_keys(record, where)
        images = _parse_images(record, where)
        conversations: tuple[_Turns, ...]
        if self.kind == "kd":
            conversations = (_parse_chat(record, where),)
        else:
            conversations = _parse_pair(record, where)
        return Sample(
            id=self.ids[index],
            kind=self.kind,
            images=images,
            conversations=tuple(
                _insert_markers(_with_system(turns, record, where), len(images), where) for turns in conversations
            ),
        )

    def images(self, index: int) -> tuple[ImageRef, ...]:
        """Returns the images of a sample of either kind. Raises DataError if the record's image key is malformed."""
        return _parse_images(self._record(index), self._where(index))

    def _record(self, index: int) -> dict[str, Any]:
        entry = self._records[index]
        if isinstance(entry, Line):
            entry = parse_line(self.path, self._data, entry)
        if not isinstance(entry, dict):
            raise DataError(
                f"{self.path}: {self._position(index)}: found {type(entry).__name__}, expected a JSON object"
            )
        return entry

    def _index_record(self, index: int, unused: Counter[str]) -> str:
        # Called for every record on opening, so that broken JSON is found before any work is done.
        record = self._record(index)
        count_unused_keys(record, unused)
        if "id" not in record or not isinstance(record["id"], str | int) or record["id"] == "":
            raise DataError(f'{self.path}: {self._position(index)}: no "id"; every sample needs a unique one')
        return _check_encodable(str(record["id"]), f"{self.path}: {self._position(index)}: id")

    def _check_unique_ids(self) -> None:
        first: dict[str, int] = {}
        for index, sample_id in enumerate(self.ids):
            if (other := first.setdefault(sample_id, index)) != index:
                raise DataError(
                    f"{self.path}: id {describe_value(sample_id)} stands at {self._position(other)} and again at "
                    f"{self._position(index)}; ids must be unique, since shards and training refer to samples by them"
                )

    def _where(self, index: int) -> str:
        return f"{self.path}: sample {describe_value(self.ids[index])} ({self._position(index)})"

    def _position(self, index: int) -> str:
        entry = self._records[index]
        return f"line {entry.number}" if isinstance(entry, Line) else f"element {index}"


def without_last_response(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Returns the turns that a model answers: all but the last response, or all if the last turn is not a response."""
    return turns[:-1] if turns[-1].role == "assistant" else turns


_Turns = tuple[Turn, ...]


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


def _parse_images(record: dict[str, Any], where: str) -> tuple[ImageRef, ...]:
    images = resolve_alternatives(record, IMAGE_KEYS, partial(_parse_image_list, where=where), where)
    for key in find_other_image_keys(record):
        if not images or not _describes_images(record[key], images):
            raise DataError(
                f'{where}: "{key}" is given, but images are read from "image" or "images"; rename the key, or remove it'
            )
    return images


def _parse_image_list(found: Any, where: str) -> tuple[ImageRef, ...]:
    if found is None:
        return ()
    refs = []
    for image in found if isinstance(found, list) else [found]:
        path = image.get("path") if isinstance(image, dict) else image
        if not isinstance(path, str) or not path:
            raise DataError(f"{where}: image {describe_value(image)}; expected a path")
        refs.append(ImageRef(path))
    return tuple(refs)


def _describes_images(value: Any, images: tuple[ImageRef, ...]) -> bool:
    """Returns True if the value of another key repeats the images' paths, or says where on the web they are from."""
    others = value if isinstance(value, list) else [value]
    if all(isinstance(other, str) and other.startswith(("http://", "https://")) for other in others):
        return True
    return len(others) == len(images) and all(
        ref.path in (None, other) for ref, other in zip(images, others, strict=True)
    )


def _parse_chat(record: dict[str, Any], where: str) -> _Turns:
    return resolve_alternatives(record, CHAT_KEYS, partial(_parse_turns, where=where), where)


def _parse_turns(messages: Any, where: str) -> _Turns:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: found {type(messages).__name__}, expected a non-empty list of turns")
    return tuple(_parse_turn(message, f"{where}: turn {position}") for position, message in enumerate(messages))


def _parse_turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{where}: found {type(message).__name__}, expected an object")
    check_turn_keys(message, where)
    role = resolve_alternatives(message, ROLE_KEYS, partial(_parse_role, where=where), where)
    if role == "assistant":
        check_turn_flags(message, where)
    content = resolve_alternatives(message, TEXT_KEYS, partial(_parse_content, where=where), where)
    if role == "user":
        _check_media_markers(content, where)
    return Turn(role, content)


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


def _with_system(turns: _Turns, record: dict[str, Any], where: str) -> _Turns:
    """Returns the turns with the record's `system` text as the first one, if it has one."""
    text = record.get("system")
    if text is None or text == "":
        return turns
    if not isinstance(text, str):
        raise DataError(f'{where}: "system" is {describe_value(text)}; expected text')
    system = Turn("system", _check_encodable(text, f"{where}: system"))
    if turns[0].role != "system":
        return (system, *turns)
    if turns[0] != system:
        raise DataError(f'{where}: "system" and the first turn are both given and differ; remove one of them')
    return turns


def _parse_content(content: Any, where: str) -> str:
    """Returns a message's content as text; in a list of parts each image becomes a marker."""
    if isinstance(content, list):
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
                raise DataError(
                    f'{where}: content part {describe_value(part)}; expected type "text" with its "text", or "image"'
                )
            parts.append(IMAGE_MARKER if kind == "image" else part["text"])
        content = "".join(parts)
    if not isinstance(content, str):
        raise DataError(f"{where}: content is {type(content).__name__}, expected text")
    return _check_encodable(content, where)


def _check_encodable(text: str, where: str) -> str:
    """Returns `text`, and raises DataError if it has half of a surrogate pair.

    JSON can spell one, but neither a tokenizer nor a shard can hold it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {text[error.start]!r} is half a character (a lone surrogate); correct it") from error
    return text


def _parse_pair(record: dict[str, Any], where: str) -> tuple[_Turns, _Turns]:
    """Returns the chosen and the rejected conversation."""
    for key in PAIR_KEYS:
        if not is_filled(record, key):
            raise DataError(f'{where}: "{key}" is missing or empty; expected two answers, chosen and rejected')
    prompt = resolve_alternatives(record, PROMPT_KEYS, partial(_parse_prompt, where=f"{where}: prompt"), where)
    chat = _parse_chat(record, where) if any(is_filled(record, key) for key in CHAT_KEYS) else ()
    if chat and chat[-1].role != "assistant":
        if prompt and prompt != chat:
            raise DataError(f"{where}: the prompt and the conversation are both given and differ; remove one of them")
        prompt = chat
    chosen, rejected = (_parse_answer(record[key], prompt, f"{where}: {key}") for key in PAIR_KEYS)
    if chosen[:-1] != rejected[:-1]:
        raise DataError(f"{where}: chosen and rejected must share every turn but the last")
    if chat and chat[-1].role == "assistant" and chat != chosen:
        raise DataError(
            f"{where}: a conversation is given beside chosen, and is another one; remove conversations or messages"
        )
    return chosen, rejected


def _parse_prompt(prompt: Any, where: str) -> _Turns:
    if prompt is None or prompt == []:
        return ()
    if isinstance(prompt, str):
        content = _check_encodable(prompt, where)
        _check_media_markers(content, where)
        return (Turn("user", content),)
    return _parse_turns(prompt, where)


def _parse_answer(answer: Any, prompt: _Turns, where: str) -> _Turns:
    """Returns the conversation of an answer: its text, its last turn, or the whole of it, prompt included."""
    if isinstance(answer, str):
        if not prompt:
            raise DataError(f'{where}: is a string, so a "prompt" or a "question" is needed beside it')
        return (*prompt, Turn("assistant", _check_encodable(answer, where)))
    # An object is a single turn.
    turns = _parse_turns([answer] if isinstance(answer, dict) else answer, where)
    if turns[-1].role != "assistant":
        raise DataError(f"{where}: the last turn is {turns[-1].role}'s, expected the assistant's")
    if turns[0].role == "assistant":
        return (*prompt, *turns)
    if not _contains(turns[:-1], prompt):
        raise DataError(
            f"{where}: is a whole conversation, but the prompt beside it is not part of it; remove the prompt, or the "
            "turns before the answer"
        )
    return turns


def _contains(turns: _Turns, prompt: _Turns) -> bool:
    """Returns True if the prompt stands in `turns` without a gap, where these may also hold the images' markers."""
    unmarked = tuple(Turn(turn.role, turn.content.replace(IMAGE_MARKER, "").strip()) for turn in turns)
    stripped = tuple(Turn(turn.role, turn.content.strip()) for turn in prompt)
    starts = range(len(turns) - len(prompt) + 1)
    return any(
        turns[start : start + len(prompt)] == prompt or unmarked[start : start + len(prompt)] == stripped
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
