"""Conversations as token ids, with the spans of the tokens that are scored, and the shift by one.

Legend: T tokens with one placeholder an image, T' tokens after expansion, S spans, R scored tokens.

A model predicts token t at position t - 1. This shift is written in `predicting_positions` alone, which teacher,
student and reference log-probs all use. An image is one placeholder token here, because teacher and student may
expand it to different numbers of tokens.
"""

import copy
import datetime
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.data.chat_template import ChatTemplate, Span, TemplateRefusalError
from common.data.portable_template import original_template
from common.data.samples import IMAGE_MARKER, Sample, Turn
from common.errors import ConfigError, DataError, ModelError
from common.storage.files import is_file, read_bytes

# "response" scores every assistant turn, "last" the last one, "all" every token but images and the first.
ScoredTokens = Literal["response", "last", "all"]
IntArray = npt.NDArray[np.integer]

_log = logging.getLogger(__name__)

_IRRELEVANT_STATE = ("version", "truncation", "padding", "post_processor", "decoder")


@dataclass(frozen=True)
class EncodedChat:
    """Tokens of one conversation: `input_ids` int32 [T].

    `spans` int32 [S, 2] are ranges of scored tokens: half-open, ascending, not overlapping.
    """

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
        """Number of image placeholders in `input_ids`."""
        return 0 if self.image_token_id is None else int((self.input_ids == self.image_token_id).sum())


def predicting_positions(token_positions: IntArray) -> IntArray:
    """Returns the position whose output distribution predicts each token: the one before the token's own."""
    return token_positions - 1


@dataclass(frozen=True)
class ExpandedIds:
    """A sequence with the tokens of its images in place of their placeholders.

    ids        int32 [T']
    is_image   bool [T']: True for tokens of an image
    positions  int64 [T]: where each original token is now; an image's is that of its last token, because that one
               predicts the token after the image
    """

    ids: npt.NDArray[np.int32]
    is_image: npt.NDArray[np.bool_]
    positions: npt.NDArray[np.int64]

    def place_types(self, image_types: Sequence[IntArray | None]) -> npt.NDArray[np.int64]:
        """Returns the type of each token, int64 [T']: those of the images' tokens, if known; 0 for text."""
        types = np.zeros(len(self.ids), np.int64)
        if known := [each for each in image_types if each is not None]:
            types[self.is_image] = np.concatenate(known)
        return types


def expand_placeholders(input_ids: IntArray, image_token_id: int | None, images: Sequence[IntArray]) -> ExpandedIds:
    """Replaces the image placeholders in `input_ids` by the tokens of the images, one after the other."""
    is_placeholder_T = input_ids == (-1 if image_token_id is None else image_token_id)
    widths_T = np.ones(len(input_ids), np.int64)
    widths_T[is_placeholder_T] = [len(image) for image in images]
    ids = np.repeat(input_ids, widths_T).astype(np.int32)
    is_image = np.repeat(is_placeholder_T, widths_T)
    if images:
        ids[is_image] = np.concatenate(images)
    return ExpandedIds(ids, is_image, np.cumsum(widths_T) - 1)


def load_tokenizer(model_dir: Path) -> Any:
    """Loads the fast tokenizer of a local model directory; only fast ones give the tokens' offsets in the text.

    Raises:
        ModelError: there is no tokenizer or only a slow one, or transformers is not installed.
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
    """Returns the SHA-256 (hex) of what a fast tokenizer makes ids with, whatever files it was loaded from.

    Truncation and padding are left out, because a call sets them, and so is what adds special tokens around a text,
    because the chat template writes all tokens. The decoder makes texts of ids. Which tokens are called special matters
    only if these are split into pieces.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    relevant = {key: value for key, value in state.items() if key not in _IRRELEVANT_STATE}
    if getattr(tokenizer, "split_special_tokens", False):
        relevant["split_special_tokens"] = True
    else:
        for token in relevant["added_tokens"]:
            del token["special"]
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


class ChatEncoder:
    """Turns samples into token ids, with a tokenizer and its chat template.

    Raises:
        ConfigError: the template cannot be compiled.
    """

    def __init__(
        self,
        tokenizer: Any,
        score: ScoredTokens,
        template: str,
        date: datetime.date | None = None,
        placeholder: str = IMAGE_MARKER,
    ) -> None:
        self.tokenizer = tokenizer
        self.placeholder = placeholder
        self.score: ScoredTokens = score
        self.vocab_size = len(tokenizer)
        template = original_template(template)
        self.template_sha256 = hashlib.sha256(template.encode()).hexdigest()
        self.tokenizer_sha256 = tokenizer_sha256(tokenizer)
        image_id = tokenizer.convert_tokens_to_ids(placeholder)
        self.image_token_id = None if image_id in (None, tokenizer.unk_token_id) else int(image_id)
        self.template = ChatTemplate(tokenizer, template, date, placeholder)
        self._left_out_was_said = False
        # All added special tokens, because a model may name only eos and bos while its end of turn is another one.
        added = tokenizer.added_tokens_decoder.items()
        special = {token_id for token_id, token in added if token.special} | set(tokenizer.all_special_ids)
        self.special_ids = special - {self.image_token_id}

    @classmethod
    def load(
        cls,
        model_dir: Path,
        chat_template: Path | None = None,
        score: ScoredTokens = "response",
        date: datetime.date | None = None,
        placeholder: str = IMAGE_MARKER,
    ) -> "ChatEncoder":
        """Loads the tokenizer and the chat template of a local model directory, or the template of another file.

        A template that shows a date shows `date`, otherwise today's. `placeholder` is what stands for an image in the
        model's text (common.data.model_images).

        Raises:
            ModelError: the tokenizer cannot be loaded (`load_tokenizer`).
            ConfigError: there is no chat template, neither with the model nor in `chat_template`, or it is broken.
        """
        tokenizer = load_tokenizer(model_dir)
        template = _read_template_file(chat_template) if chat_template else _read_model_template(model_dir, tokenizer)
        try:
            return cls(tokenizer, score, template, date, placeholder)
        except ConfigError as error:
            raise ConfigError(f"{chat_template or model_dir}: {error}") from error

    def with_date(self, date: datetime.date | None) -> "ChatEncoder":
        """Returns an encoder whose template shows another date; this one if that changes nothing."""
        if date is None or self.template.date in (None, date):
            return self
        other = copy.copy(self)
        other.template = ChatTemplate(self.tokenizer, self.tokenizer.chat_template, date, self.placeholder)
        return other

    def encode_sample(self, sample: Sample) -> tuple[EncodedChat, ...]:
        """Encodes each conversation. Of a preference pair only the last turns are scored, as the others are the same.

        Raises:
            DataError: the tokenizer has no image token for the sample's images, or there is nothing to score.
        """
        return tuple(
            self.encode(turns, len(sample.images), f"sample {sample.id!r}", last_only=sample.kind == "dpo")
            for turns in sample.conversations
        )

    def encode(self, turns: Sequence[Turn], num_images: int, where: str, *, last_only: bool = False) -> EncodedChat:
        """Encodes one conversation of `num_images` images; with `last_only` only its last turn is scored.

        A response is the text that the template writes after its generation prompt, the end-of-turn token included. One
        that the template rewrites when later turns are added is not scored, which is logged once.

        Raises:
            DataError: this conversation cannot be encoded or scored.
        """
        self._check_image_token(num_images, where)
        scores_all = self.score == "all" and not last_only
        positions = [position for position, turn in enumerate(turns) if turn.role == "assistant"]
        if positions and not positions[0] and turns[0].scored:
            raise DataError(f"{where}: begins with an assistant turn, which answers nothing; remove that turn")
        if positions and not any(turns[position].scored for position in positions):
            raise DataError(f"{where}: there is nothing to score: every assistant turn is flagged as not scored")
        if last_only or self.score == "last":
            positions = positions[-1:]
        # The tokens of "all" are known without a look at the turns, but for those of turns that are left out.
        wanted = [position for position in positions if turns[position].scored != scores_all]
        text, responses = self.template.find_responses(turns, where, wanted)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded["input_ids"], np.int32)
        self._check_placeholders(ids, num_images, where)
        offsets = np.asarray(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        if scores_all and None in responses:
            raise DataError(
                f"{where}: the chat template rewrites an assistant turn that is flagged as not scored, so its tokens "
                'cannot be left out; use score = "response"'
            )
        if self.score == "response" and not last_only:
            self._say_what_is_left_out(responses)
        spans = self._token_spans(text, ids, offsets, [span for span in responses if span is not None])
        if scores_all:
            spans = self._spans_without_images(ids, spans)
        # The first token is never scored, because no position predicts it.
        spans = [(max(start, 1), stop) for start, stop in spans if stop > max(start, 1)]
        if not spans:
            # If it is so with every sample, the template is wrong and not the data.
            raise (TemplateRefusalError if responses and not any(responses) else DataError)(
                f"{where}: there is nothing to score: no assistant turn, or only ones that are empty, flagged as not "
                "scored, or rewritten by the chat template; remove the sample"
            )
        if self.image_token_id is not None and any((ids[a:b] == self.image_token_id).any() for a, b in spans):
            raise DataError(f"{where}: an assistant turn holds an {self.placeholder}; images belong to user turns")
        return EncodedChat(ids, np.asarray(spans, np.int32).reshape(-1, 2), self.image_token_id)

    def encode_prompt(
        self, turns: Sequence[Turn], num_images: int | None = None, where: str = "prompt"
    ) -> npt.NDArray[np.int32]:
        """Returns the token ids of `turns` and of the generation prompt after them, int32 [T].

        Raises:
            DataError: the template cannot render them, or writes another number of images than `num_images`.
        """
        text = self.template.render(turns, where, generation_prompt=True)
        ids = np.asarray(self.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
        if num_images is not None:
            self._check_image_token(num_images, where)
            self._check_placeholders(ids, num_images, where)
        return ids

    def _check_image_token(self, num_images: int, where: str) -> None:
        if num_images and self.image_token_id is None:
            raise DataError(f"{where}: has {num_images} image(s), but the tokenizer has no {self.placeholder} token")

    def _check_placeholders(self, ids: npt.NDArray[np.int32], num_images: int, where: str) -> None:
        num_placeholders = 0 if self.image_token_id is None else int((ids == self.image_token_id).sum())
        if num_placeholders != num_images:
            raise TemplateRefusalError(
                f"{where}: {num_images} image(s), but its text holds {num_placeholders} image token(s) after "
                "tokenization; the chat template drops or repeats some, or the text spells the token"
            )

    def _say_what_is_left_out(self, responses: Sequence[Span | None]) -> None:
        if None in responses and not self._left_out_was_said:
            self._left_out_was_said = True
            _log.info(
                "the chat template rewrites earlier turns when later ones are added; of such conversations only the "
                'responses that stay as a model would write them are scored, such as the last (score = "last" scores '
                "the last one alone)"
            )

    def _token_spans(
        self, text: str, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], spans: Sequence[Span]
    ) -> list[Span]:
        """Returns the range of the tokens that overlap the characters of each span; the spans ascend.

        A range leaves out white space after an end-of-turn token, and a token of the next turn that shares only white
        space with this one (" USER" after "answer ").
        """
        # Tokens of parts of one character have the same offsets; none begins or ends before an earlier one.
        starts = np.searchsorted(offsets[:, 1], [span[0] for span in spans], "right").tolist()
        stops = np.searchsorted(offsets[:, 0], [span[1] for span in spans], "left").tolist()
        return [
            self._trim_span(text, ids, offsets, (start, stop), span)
            for start, stop, span in zip(starts, stops, spans, strict=True)
        ]

    def _trim_span(
        self, text: str, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], tokens: Span, span: Span
    ) -> Span:
        start, stop = tokens
        if start >= stop:
            return 0, 0
        if offsets[stop - 1, 1] > span[1] and text[offsets[stop - 1, 0] : span[1]].isspace():
            stop -= 1
        special = [t for t in range(start, stop) if int(ids[t]) in self.special_ids]
        if special and not self.tokenizer.decode(ids[special[-1] + 1 : stop]).strip():
            stop = special[-1] + 1
        return start, stop

    def _spans_without_images(
        self, ids: npt.NDArray[np.int32], unscored: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """Returns the spans between the images and the `unscored` spans, which together hold every other token."""
        scored = ids != (-1 if self.image_token_id is None else self.image_token_id)
        for start, stop in unscored:
            scored[start:stop] = False
        edges = np.flatnonzero(np.diff(np.concatenate([[0], scored.astype(np.int8), [0]])))
        return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


def _read_template_file(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except OSError as error:
        raise ConfigError(f"{path}: the chat template cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the chat template is not UTF-8 ({error}); save it as UTF-8") from error


def _read_model_template(model_dir: Path, tokenizer: Any) -> str:
    """Returns the tokenizer's template, or the processor's, which older checkpoints keep in chat_template.json."""
    if isinstance(tokenizer.chat_template, str):
        return tokenizer.chat_template
    processor_file = model_dir / "chat_template.json"
    if is_file(processor_file):
        try:
            return str(json.loads(read_bytes(processor_file))["chat_template"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{processor_file}: has no readable chat_template ({error})") from error
    raise ConfigError(f"{model_dir}: has no chat template; give one with chat_template = FILE")
