"""Chat templates: conversations as text, and where each response stands in it.

A response is what the template writes after its generation prompt, up to the end of the turn. It can be scored where
the text up to its end is what the template writes for the conversation that ends there, because that is what a model
sees when it answers. Templates of reasoning models rewrite earlier turns once later ones are added (Qwen3 removes their
reasoning); such a turn has no place in the whole conversation, and is left out. A template that marks the responses
itself, with transformers' `{% generation %}`, is taken at its word.
"""

import datetime
import re
import threading
from collections.abc import Sequence
from typing import Any

from common.data.samples import IMAGE_MARKER, Turn
from common.errors import ConfigError, DataError

Span = tuple[int, int]
Message = dict[str, Any]

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Up to this many responses, each is looked for in renderings of all turns before it.
_MAX_WHOLE_RENDERINGS = 8

_ANSWER = "probe answer"

_marks_lock = threading.Lock()


class TemplateRefusalError(DataError):
    """The chat template cannot render a conversation."""


class ChatTemplate:
    """Chat template of a tokenizer, rendered as transformers does, but with a fixed date instead of today's.

    Some templates take a message's content as a list of parts, others as a string. One trial rendering tells which: if
    the output for a list of parts holds the part's text, the template takes lists.

    `date` is the date that is rendered; None if the template shows none. `takes_parts` tells whether it takes lists.
    """

    def __init__(
        self, tokenizer: Any, text: str, date: datetime.date | None = None, placeholder: str = IMAGE_MARKER
    ) -> None:
        """Compiles the template. Where it takes strings, they have `placeholder` for an image.

        Raises:
            ConfigError: it cannot be compiled.
        """
        self._tokenizer = tokenizer
        self._text = text
        self._placeholder = placeholder
        # transformers gives templates the function of this name.
        self.date = (date or datetime.datetime.now().astimezone().date()) if "strftime_now" in text else None
        tokenizer.chat_template = text
        self._marks_responses = _GENERATION_MARK.search(text) is not None
        self.takes_parts = self._check_takes_parts()
        self.ends_turns, self.has_generation_prompt = self._probe()

    def render(self, turns: Sequence[Turn], where: str, *, generation_prompt: bool = False) -> str:
        """Returns the text of a conversation. Raises TemplateRefusalError."""
        return self._apply(self._to_messages(turns), where, generation_prompt)

    def find_responses(
        self, turns: Sequence[Turn], where: str, positions: Sequence[int] | None = None
    ) -> tuple[str, list[Span | None]]:
        """Returns the text of a conversation, and the character range of the response at each of `positions`.

        These are positions of assistant turns, ascending; None stands for all. A turn that the template rewrites when
        later ones are added has None.

        Raises:
            TemplateRefusalError: the template cannot render the conversation.
        """
        messages = self._to_messages(turns)
        responses = [position for position, turn in enumerate(turns) if turn.role == "assistant"]
        wanted = responses if positions is None else list(positions)
        if self._marks_responses:
            text, marked = self._read_marks(messages, len(responses), where)
            spans = dict(zip(responses, marked, strict=True))
            return text, [spans[position] for position in wanted]
        text = self._apply(messages, where)
        if len(wanted) > _MAX_WHOLE_RENDERINGS and responses[0] > 0:
            found = self._find_in_rounds(messages, responses, text, where)
            if found is not None:
                spans = dict(zip(responses, found, strict=True))
                return text, [spans[position] for position in wanted]
        return text, [self._find_response(messages, position, text, where) for position in wanted]

    def _find_response(self, messages: list[Message], position: int, text: str, where: str) -> Span | None:
        # Templates cannot render a conversation without a turn.
        before = self._apply(messages[:position], where, generation_prompt=True) if position else ""
        through = text if position + 1 == len(messages) else self._apply(messages[: position + 1], where)
        survives = text.startswith(through) and through.startswith(before)
        return (len(before), len(through)) if survives else None

    def _find_in_rounds(
        self, messages: list[Message], positions: list[int], text: str, where: str
    ) -> list[Span] | None:
        """Returns the responses of a long conversation in time that is linear in its length.

        Each round of turns is rendered alone, after the first round. The result holds if the rounds' texts make up the
        whole text; None is returned if they do not, as with templates that number turns or rewrite earlier ones.
        """
        first_stop = positions[0] + 1
        head = messages[:first_stop]
        head_text = self._apply(head, where)
        first = self._find_response(messages, positions[0], text, where)
        if first is None:
            return None
        spans, place = [first], len(head_text)
        for start, position in zip((p + 1 for p in positions), positions[1:], strict=False):
            before = self._apply([*head, *messages[start:position]], where, generation_prompt=True)
            through = self._apply([*head, *messages[start : position + 1]], where)
            round_text = through.removeprefix(head_text)
            if not (through.startswith(before) and before.startswith(head_text) and text.startswith(round_text, place)):
                return None
            spans.append((place + len(before) - len(head_text), place + len(round_text)))
            place += len(round_text)
        rest = self._apply([*head, *messages[positions[-1] + 1 :]], where).removeprefix(head_text)
        is_whole = text[place:] == rest
        return spans if is_whole and spans[-1] == self._find_response(messages, positions[-1], text, where) else None

    def _read_marks(self, messages: list[Message], num_responses: int, where: str) -> tuple[str, list[Span | None]]:
        """Returns the text of the conversation, and the ranges that the template marks as responses.

        transformers' own function counts what was written before a mark anew at each of them, which takes long where
        there are thousands, and is wrong in a macro, whose text is written when the macro ends.
        """
        from transformers.utils.chat_template_utils import _compile_jinja_template

        variables = {"tools": None, "documents": None, **self._tokenizer.special_tokens_map, **self._variables()}
        pieces: list[str] = []
        marks: list[Span] = []
        spans: list[Span | None] = []
        place = 0
        try:
            template = _compile_jinja_template(self._text)
            # The compiled template is one for the process, and holds the marks of one rendering.
            with _marks_lock, template.environment.activate_tracker([], marks):
                for piece in template.generate(messages=messages, add_generation_prompt=False, **variables):
                    for start, stop in marks[len(spans) :]:
                        if stop - start != len(piece) or len(marks) > len(spans) + 1:
                            raise TemplateRefusalError(
                                f"{where}: the chat template marks responses inside a macro, a block or another mark, "
                                "where their place is not known; write {% generation %} outside of these"
                            )
                        spans.append((place, place + len(piece)))
                    pieces.append(piece)
                    place += len(piece)
        except TemplateRefusalError:
            raise
        except Exception as error:
            raise _refusal(error, where) from error
        if len(spans) != num_responses:
            raise TemplateRefusalError(
                f"{where}: the chat template marks {len(spans)} responses of {num_responses} assistant turns; expected "
                "one mark ({% generation %}) for each"
            )
        return "".join(pieces), spans

    def _apply(self, messages: list[Message], where: str, generation_prompt: bool = False) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation_prompt, **self._variables()
                )
            )
        except Exception as error:
            raise _refusal(error, where) from error

    def _variables(self) -> dict[str, Any]:
        if self.date is None:
            return {}
        return {"strftime_now": datetime.datetime.combine(self.date, datetime.time()).strftime}

    def _to_messages(self, turns: Sequence[Turn]) -> list[Message]:
        """Returns the turns as transformers' chat templates take them."""
        return [{"role": turn.role, "content": self._to_content(turn.content)} for turn in turns]

    def _to_content(self, text: str) -> Any:
        if not self.takes_parts:
            return text.replace(IMAGE_MARKER, self._placeholder)
        parts: list[dict[str, str]] = []
        for number, piece in enumerate(text.split(IMAGE_MARKER)):
            if number:
                parts.append({"type": "image"})
                # The line break of `<image>\n` belongs to the marker, because a template of parts writes its own.
                piece = piece.removeprefix("\n")
            if piece:
                parts.append({"type": "text", "text": piece})
        return parts

    def _check_takes_parts(self) -> bool:
        """Returns True if the template takes lists of parts. Raises ConfigError if it cannot be compiled."""
        from jinja2 import TemplateSyntaxError

        probe = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        try:
            rendered = self._apply(probe, "a trial")
        except TemplateRefusalError as error:
            if isinstance(error.__cause__, TemplateSyntaxError):
                raise ConfigError(
                    f"the chat template cannot be compiled (line {error.__cause__.lineno}: {error.__cause__.message}); "
                    "correct it, or give another (chat_template = FILE)"
                ) from error
            # The template concatenates or strips the content, so it takes strings.
            return False
        return "probe" in rendered and "'text'" not in rendered

    def _probe(self) -> tuple[bool, bool]:
        """Returns if the response ends with something, and if all before it is written as a prompt for it.

        Both are True where a trial fails. What stands after a response's mark does not count: it is not scored.
        """
        question, answer = Turn("user", "probe question"), Turn("assistant", _ANSWER)
        try:
            plain, prompt = (self.render([question], "a trial", generation_prompt=on) for on in (False, True))
            whole, (span,) = self.find_responses([question, answer], "a trial")
        except TemplateRefusalError:
            return True, True
        response = whole if span is None else whole[span[0] : span[1]]
        begins_with_role = whole.startswith(plain) and bool(whole[len(plain) :].partition(_ANSWER)[0].strip())
        return bool(response.rpartition(_ANSWER)[2].strip()), plain != prompt or not begins_with_role


def describe_template(ends_turns: bool, has_generation_prompt: bool) -> list[str]:
    """Returns what a student learns from a template without an end of turn or without a generation prompt."""
    lines = []
    if not ends_turns:
        lines.append(
            "the chat template writes nothing after a response, or does not mark it, so a student does not learn to "
            "stop; give one that writes the end-of-turn token (chat_template = FILE)"
        )
    if not has_generation_prompt:
        lines.append(
            "the chat template writes no generation prompt, so what it writes before a response, such as the role, is "
            "scored as part of it, and a student learns to write that too; give one that has a generation prompt "
            "(chat_template = FILE)"
        )
    return lines


def _refusal(error: Exception, where: str) -> TemplateRefusalError:
    from jinja2 import TemplateError

    reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
    return TemplateRefusalError(f"{where}: the chat template refuses this conversation ({reason})")
