"""Conversations as token ids, with the spans of the tokens that are scored, and the shift.

Legend: T own sequence (one placeholder an image), T' expanded sequence, S spans, R scored tokens.

A model predicts token t from position t - 1. `predicting_positions` is the only place that says so; teacher,
student and reference log-probs all go through it. Images count as one placeholder token here, because teacher
and student may expand an image to different numbers of tokens.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.data.samples import IMAGE_MARKER, Sample, Turn
from common.errors import ConfigError, DataError, ModelError

ScoredTokens = Literal["response", "all"]
IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class EncodedChat:
    """One conversation. `input_ids` int32 [T]; `spans` int32 [S, 2], half-open, ascending, not overlapping."""

    input_ids: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
    image_token_id: int | None

    @cached_property
    def response_positions(self) -> npt.NDArray[np.int64]:
        """Positions of the scored tokens in `input_ids`, int64 [R]."""
        ranges = [np.arange(start, stop, dtype=np.int64) for start, stop in self.spans]
        return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)

    @cached_property
    def response_ids(self) -> npt.NDArray[np.int32]:
        """The scored tokens, int32 [R]."""
        return self.input_ids[self.response_positions]

    @property
    def num_images(self) -> int:
        """How many image placeholders the sequence holds."""
        return 0 if self.image_token_id is None else int((self.input_ids == self.image_token_id).sum())


def predicting_positions(token_positions: IntArray) -> IntArray:
    """Positions whose output distribution each token is drawn from: the one before it."""
    return token_positions - 1


def expand_placeholders(
    input_ids: IntArray, image_token_id: int | None, tokens_per_image: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Repeats each image placeholder as often as a model wants.

    Returns:
        The expanded ids, int32 [T'], and where each own token stands in them, int64 [T]; for an image that is
        its last placeholder, the one that predicts the token after it.
    """
    widths = np.where(input_ids == (-1 if image_token_id is None else image_token_id), tokens_per_image, 1)
    return np.repeat(input_ids, widths).astype(np.int32), np.cumsum(widths, dtype=np.int64) - 1


def load_tokenizer(model_dir: Path) -> Any:
    """The fast tokenizer of a local model directory; offsets of tokens need a fast one.

    Raises:
        ModelError: none there, a slow one, or transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError(
            f"{model_dir}: its tokenizer needs transformers, which is not installed; install precompute or train"
        ) from error
    if not model_dir.is_dir():
        raise ModelError(f"{model_dir}: no such model directory; models are local Hugging Face directories")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model_dir}: its tokenizer cannot be loaded ({error})") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{model_dir}: has no fast tokenizer (tokenizer.json); token offsets need one")
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """Fingerprint of what a fast tokenizer does, whatever files it came from."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


class ChatEncoder:
    """A tokenizer with its chat template: turns samples into token ids.

    Each template is told apart by rendering it: one whose output for a list of content parts holds the part's
    text wants lists, any other wants strings.
    """

    def __init__(self, tokenizer: Any, score: ScoredTokens, template: str) -> None:
        self.tokenizer = tokenizer
        self.score: ScoredTokens = score
        self.vocab_size = len(tokenizer)
        self.template_sha256 = hashlib.sha256(template.encode()).hexdigest()
        self.tokenizer_sha256 = tokenizer_sha256(tokenizer)
        image_id = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)
        self.image_token_id = None if image_id in (None, tokenizer.unk_token_id) else int(image_id)
        tokenizer.chat_template = template
        self._wants_parts = self._template_wants_parts()
        # Models often name only some of their special tokens (eos, bos); an end of turn may be another.
        added = tokenizer.added_tokens_decoder.items()
        special = {token_id for token_id, token in added if token.special} | set(tokenizer.all_special_ids)
        self._special_ids = special - {self.image_token_id}

    @classmethod
    def load(
        cls, model_dir: Path, chat_template: Path | None = None, score: ScoredTokens = "response"
    ) -> "ChatEncoder":
        """Loads the tokenizer of a local model directory; the template may come from a file instead.

        Raises:
            ModelError: see `load_tokenizer`.
            ConfigError: no chat template, neither with the model nor given.
        """
        tokenizer = load_tokenizer(model_dir)
        template = _read_template(chat_template) if chat_template else _own_template(model_dir, tokenizer)
        return cls(tokenizer, score, template)

    def encode_sample(self, sample: Sample) -> tuple[EncodedChat, ...]:
        """Encodes each conversation. Of a preference pair only the last turn is scored: the others are shared.

        Raises:
            DataError: an image in a sample for a tokenizer without an image token, nothing to score.
        """
        return tuple(
            self.encode(turns, len(sample.images), f"sample {sample.id!r}", last_only=sample.kind == "dpo")
            for turns in sample.conversations
        )

    def encode(self, turns: Sequence[Turn], num_images: int, where: str, *, last_only: bool = False) -> EncodedChat:
        """Encodes one conversation of `num_images` images; `last_only` scores its last turn alone.

        A response is what the template writes after its generation prompt, its end-of-turn token included.
        """
        if num_images and self.image_token_id is None:
            raise DataError(f"{where}: has {num_images} image(s), but the tokenizer has no {IMAGE_MARKER} token")
        text, char_spans = self._render(turns, where)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"], np.int32)
        placeholders = 0 if self.image_token_id is None else int((ids == self.image_token_id).sum())
        if placeholders != num_images:
            raise DataError(
                f"{where}: {num_images} image(s), but its text holds {placeholders} image token(s) after "
                "tokenization; the chat template drops or repeats some, or the text spells the token"
            )
        offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        if self.score == "all" and not last_only:
            spans = self._unmasked_spans(ids)
        else:
            wanted = char_spans[-1:] if last_only else char_spans
            spans = [self._token_span(text, ids, offsets, span) for span in wanted]
        # Nothing predicts the first token of a sequence.
        spans = [(max(start, 1), stop) for start, stop in spans if stop > max(start, 1)]
        if not spans:
            raise DataError(
                f"{where}: no assistant turn, or only empty ones, so that there is nothing to score; remove the sample"
            )
        if self.image_token_id is not None and any((ids[a:b] == self.image_token_id).any() for a, b in spans):
            raise DataError(f"{where}: an assistant turn holds an {IMAGE_MARKER}; images belong to user turns")
        return EncodedChat(ids, np.asarray(spans, np.int32).reshape(-1, 2), self.image_token_id)

    def encode_prompt(self, turns: Sequence[Turn]) -> npt.NDArray[np.int32]:
        """Token ids int32 [T] of `turns` and the generation prompt after them: what a model continues."""
        messages = [{"role": turn.role, "content": self._content(turn.content)} for turn in turns]
        text = self._apply(messages, True, "prompt")
        return np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)

    def _render(self, turns: Sequence[Turn], where: str) -> tuple[str, list[tuple[int, int]]]:
        """The whole conversation as text, and the character range of each assistant turn."""
        messages = [{"role": turn.role, "content": self._content(turn.content)} for turn in turns]
        full = self._apply(messages, False, where)
        spans = []
        for position, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            if not position:
                raise DataError(f"{where}: begins with an assistant turn, which answers nothing; remove that turn")
            before = self._apply(messages[:position], True, where)
            through = self._apply(messages[: position + 1], False, where)
            if not (full.startswith(through) and through.startswith(before)):
                raise ConfigError(
                    f"{where}: the chat template rewrites earlier turns when later ones are added, so the start of "
                    f"turn {position} cannot be found; give a template that only appends (chat_template = FILE)"
                )
            spans.append((len(before), len(through)))
        return full, spans

    def _apply(self, messages: list[dict[str, Any]], generation_prompt: bool, where: str) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
            )
        except TemplateError as error:
            raise DataError(f"{where}: the chat template refuses this conversation ({error})") from error

    def _content(self, text: str) -> Any:
        if not self._wants_parts:
            return text
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(text.split(IMAGE_MARKER)):
            if number:
                parts.append({"type": "image"})
                # The line break of `<image>\n` belongs to the marker: where parts are wanted, the template writes it.
                piece = piece.removeprefix("\n")
            parts += [{"type": "text", "text": piece}] * bool(piece)
        return parts

    def _template_wants_parts(self) -> bool:
        from jinja2 import TemplateError

        probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        try:
            rendered = self.tokenizer.apply_chat_template(probe, tokenize=False)
        except (TypeError, AttributeError, ValueError, TemplateError):
            # A list where the template concatenates or strips text: strings are what it wants.
            return False
        return "probe" in rendered and "'text'" not in rendered

    def _token_span(
        self, text: str, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], span: tuple[int, int]
    ) -> tuple[int, int]:
        """Tokens that overlap the characters of `span`.

        Left out are white space after an end-of-turn token, and a token of the next turn that shares no more than
        white space with this one (" USER" after "answer ").
        """
        inside = np.flatnonzero((offsets[:, 1] > span[0]) & (offsets[:, 0] < span[1]))
        if not inside.size:
            return 0, 0
        start, stop = int(inside[0]), int(inside[-1]) + 1
        if offsets[stop - 1, 1] > span[1] and text[offsets[stop - 1, 0] : span[1]].isspace():
            stop -= 1
        ends = [t for t in range(start, stop) if int(ids[t]) in self._special_ids]
        if ends and not self.tokenizer.decode(ids[ends[-1] + 1 : stop]).strip():
            stop = ends[-1] + 1
        return start, stop

    def _unmasked_spans(self, ids: npt.NDArray[np.int32]) -> list[tuple[int, int]]:
        """Everything but images."""
        scored = ids != (-1 if self.image_token_id is None else self.image_token_id)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], scored.astype(np.int8), [0]])))
        return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _read_template(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the chat template cannot be read ({error.strerror})") from error


def _own_template(model_dir: Path, tokenizer: Any) -> str:
    """The tokenizer's template, or the processor's (older checkpoints keep it in chat_template.json)."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    beside = model_dir / "chat_template.json"
    if beside.is_file():
        try:
            return str(json.loads(beside.read_text("utf-8"))["chat_template"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{beside}: has no readable chat_template ({error})") from error
    raise ConfigError(f"{model_dir}: has no chat template; give one with chat_template = FILE")
