"""Datasets as samples: conversations to distil, or preference pairs.

    file (.json, .jsonl, either with .zst) ── Dataset.open ──> index of records, ids, SHA-256
    Dataset[i] ──> Sample   conversations of turns, image references; images are not read

Record forms, recognised by their keys:
    LLaVA        {"id", "image": str | [str, ...], "conversations": [{"from": "human" | "gpt" | "system", "value"}]}
    messages     {"id", "messages": [{"role", "content"}], "images": [...]}
    preference   {"id", "image", "chosen": [...], "rejected": [...]}, each a list of from/value or role/content,
                 or two strings beside a "question" (RLAIF-V)
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import zstandard

from common.errors import DataError
from common.storage.files import Location, read_bytes

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


class _Line(NamedTuple):
    start: int
    end: int
    number: int


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
        self.ids = tuple(self._record_id(index) for index in range(len(records)))
        self._check_unique_ids()

    @classmethod
    def open(cls, path: Location, kind: Kind) -> "Dataset":
        """Reads and indexes a file.

        Raises:
            DataError: the file is unreadable or empty, its JSON is broken (with the line), ids are missing or repeated.
            StorageError: the store failed.
        """
        try:
            data = read_bytes(path)
            if path.suffix == ".zst":
                data = _decompress(data)
        except (OSError, zstandard.ZstdError) as error:
            raise DataError(f"{path}: the dataset cannot be read ({error})") from error
        name = path.name.removesuffix(".zst")
        records: list[Any] = list(_index_lines(data)) if name.endswith(".jsonl") else _parse_array(path, data)
        if not records:
            raise DataError(f"{path}: the dataset is empty; expected at least one sample")
        return cls(path, kind, data, records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        record = self._record(index)
        where = f"{self.path}: sample {self.ids[index]!r} ({self._position(index)})"
        if not any(key in record for key in ("conversations", "messages", "chosen")):
            raise DataError(
                f"{where}: found keys {sorted(record)}; expected conversations, messages or chosen/rejected"
            )
        if ("chosen" in record) != (self.kind == "dpo"):
            expected = "chosen and rejected answers" if self.kind == "dpo" else "conversations or messages"
            raise DataError(f'{where}: found keys {sorted(record)}; kind = "{self.kind}" expects {expected}')
        images = _parse_images(record, where)
        conversations: tuple[tuple[Turn, ...], ...]
        if self.kind == "kd":
            conversations = (_parse_turns(record.get("conversations", record.get("messages")), where),)
        else:
            conversations = tuple(_parse_answer(record, name, where) for name in ("chosen", "rejected"))
            if conversations[0][:-1] != conversations[1][:-1]:
                raise DataError(f"{where}: chosen and rejected must share every turn but the last")
        return Sample(
            id=self.ids[index],
            kind=self.kind,
            images=images,
            conversations=tuple(_insert_markers(turns, len(images), where) for turns in conversations),
        )

    def images(self, index: int) -> tuple[ImageRef, ...]:
        """Returns the images of a sample of either kind. Raises DataError if the record's image key is malformed."""
        return _parse_images(self._record(index), f"{self.path}: sample {self.ids[index]!r} ({self._position(index)})")

    def _record(self, index: int) -> dict[str, Any]:
        entry = self._records[index]
        if isinstance(entry, _Line):
            entry = _parse(self._data[entry.start : entry.end], self.path, entry.number)
        if not isinstance(entry, dict):
            raise DataError(
                f"{self.path}: {self._position(index)}: found {type(entry).__name__}, expected a JSON object"
            )
        return entry

    def _record_id(self, index: int) -> str:
        # Called for every record on opening, so that broken JSON is found before any work is done.
        record = self._record(index)
        if "id" not in record or not isinstance(record["id"], str | int) or record["id"] == "":
            raise DataError(f'{self.path}: {self._position(index)}: no "id"; every sample needs a unique one')
        return _check_encodable(str(record["id"]), f"{self.path}: {self._position(index)}: id")

    def _check_unique_ids(self) -> None:
        first: dict[str, int] = {}
        for index, sample_id in enumerate(self.ids):
            if (other := first.setdefault(sample_id, index)) != index:
                raise DataError(
                    f"{self.path}: id {sample_id!r} stands at {self._position(other)} and again at "
                    f"{self._position(index)}; ids must be unique, since shards and training refer to samples by them"
                )

    def _position(self, index: int) -> str:
        entry = self._records[index]
        return f"line {entry.number}" if isinstance(entry, _Line) else f"element {index}"


def _decompress(data: bytes) -> bytes:
    """Decompresses all frames of a zstd file.

    A stream reader would stop without an error after the first frame, or where the file is cut off.
    """
    contents = []
    while data:
        frame = zstandard.ZstdDecompressor().decompressobj()
        contents.append(frame.decompress(data))
        if not frame.eof:
            raise zstandard.ZstdError("the compressed data ends too early")
        data = frame.unused_data
    return b"".join(contents)


def _index_lines(data: bytes) -> Iterator[_Line]:
    start, number = 0, 1
    while start < len(data):
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if data[start:end].strip():
            yield _Line(start, end, number)
        start, number = end + 1, number + 1


def _parse_array(path: Location, data: bytes) -> list[Any]:
    records = _parse(data, path, 1)
    if not isinstance(records, list):
        raise DataError(f"{path}: found a JSON {type(records).__name__}, expected an array (or name the file .jsonl)")
    return records


def _parse(data: bytes, path: Location, first_line: int) -> Any:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(f"{path}: line {line}, column {error.colno}: broken JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataError(f"{path}: line {line}: not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {first_line}: cannot be read as JSON: {error}") from error


def _parse_images(record: dict[str, Any], where: str) -> tuple[ImageRef, ...]:
    found = record.get("images", record.get("image"))
    if found is None:
        return ()
    refs = []
    for image in found if isinstance(found, list) else [found]:
        path = image.get("path") if isinstance(image, dict) else image
        if not isinstance(path, str) or not path:
            raise DataError(f"{where}: image {image!r}; expected a path")
        refs.append(ImageRef(path))
    return tuple(refs)


def _parse_turns(messages: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: found {type(messages).__name__}, expected a non-empty list of turns")
    turns = []
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise DataError(f"{where}: turn {position}: found {type(message).__name__}, expected an object")
        speaker = message.get("from", message.get("role"))
        content = message.get("value", message.get("content"))
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise DataError(f"{where}: turn {position}: role {speaker!r}; expected one of {', '.join(_ROLES)}")
        turns.append(Turn(_ROLES[speaker], _parse_content(content, f"{where}: turn {position}")))
    return tuple(turns)


def without_last_response(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Returns the turns that a model answers: all but the last response, or all if the last turn is not a response."""
    return turns[:-1] if turns[-1].role == "assistant" else turns


def _parse_content(content: Any, where: str) -> str:
    """Returns a message's content as text; in a list of parts each image becomes a marker."""
    if isinstance(content, list):
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "image" and not (kind == "text" and isinstance(part.get("text"), str)):
                raise DataError(f'{where}: content part {part!r}; expected type "text" with its "text", or "image"')
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


def _parse_answer(record: dict[str, Any], name: str, where: str) -> tuple[Turn, ...]:
    answer = record.get(name)
    if isinstance(answer, str):
        if not isinstance(record.get("question"), str):
            raise DataError(f'{where}: "{name}" is a string, so a "question" string is needed beside it')
        return (
            Turn("user", _parse_content(record["question"], where)),
            Turn("assistant", _parse_content(answer, f"{where}: {name}")),
        )
    turns = _parse_turns(answer, f"{where}: {name}")
    if turns[-1].role != "assistant":
        raise DataError(f"{where}: {name}: the last turn is {turns[-1].role}'s, expected the assistant's")
    if len(turns) == 1 and isinstance(record.get("question"), str):
        turns = (Turn("user", _parse_content(record["question"], where)), *turns)
    return turns


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
