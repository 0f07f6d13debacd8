"""A conversation in the terminal, with one model or with two side by side.

line ─> /image, /reset, /save, /help, /quit │ question ─> each model's answer ─> history of each
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel

from common.console import echo, escape_control, plain_text
from common.data.samples import IMAGE_MARKER, Turn
from common.errors import DataError, DecantError
from common.storage.files import publish
from use.chat_model import Sampling

HELP = """\
/image FILE   show the next question with an image; repeatable
/reset        forget the conversation
/save FILE    write it as a dataset that decant reads
/quit         end, as Ctrl-D does; Ctrl-C ends an answer"""


class Answering(Protocol):
    """What a conversation needs of a model (use.chat_model.ChatModel)."""

    path: Path

    @property
    def takes_images(self) -> bool:
        """True if it has a vision tower."""

    def answer(self, turns: Sequence[Turn], images: Sequence[Path], sampling: Sampling) -> Iterator[str]:
        """Yields the answer piece by piece."""


@dataclass
class Conversation:
    """The turns with one model; a question's images stand before its text, as in LLaVA's data."""

    model: Answering
    sampling: Sampling
    turns: list[Turn] = field(default_factory=list)
    images: list[Path] = field(default_factory=list)

    def ask(self, text: str, images: Sequence[Path] = ()) -> Iterator[str]:
        """Yields the answer piece by piece; question and answer become history once it has ended or was stopped."""
        question = Turn("user", f"{IMAGE_MARKER}\n" * len(images) + text)
        turns, shown = [*self.turns, question], [*self.images, *images]
        answer = ""
        try:
            for piece in self.model.answer(turns, shown, self.sampling):
                answer += piece
                yield piece
        finally:
            if answer:
                self.turns, self.images = [*turns, Turn("assistant", answer)], shown

    def to_record(self) -> dict[str, Any]:
        """Returns the conversation as a sample of LLaVA's JSON."""
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        turns = [{"from": names[turn.role], "value": turn.content} for turn in self.turns]
        images = {"image": [str(path.resolve()) for path in self.images]} if self.images else {}
        return {"id": "conversation", **images, "conversations": turns}


def ask_once(conversations: Sequence[Conversation], text: str, images: Sequence[Path]) -> None:
    """Prints the answer to one question; with two models, side by side.

    Raises:
        DataError: an image cannot be read, or a model takes none.
    """
    if len(conversations) > 1:
        _show_side_by_side(conversations, text, images)
        return
    for piece in conversations[0].ask(text, images):
        sys.stdout.write(escape_control(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")


def run_chat(conversations: Sequence[Conversation], images: Sequence[Path]) -> None:
    """Reads questions and commands from the terminal until its end. An error ends a question, not the conversation."""
    session = _Session(conversations, list(images))
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        echo(f"{HELP}\n", err=True)
    while (line := _read_line("> " if is_terminal else "")) is not None and line.strip() != "/quit":
        try:
            session.enter(line.strip())
        except KeyboardInterrupt:
            sys.stdout.write("\n")
        except DecantError as error:
            echo(f"error: {error}", err=True)


@dataclass
class _Session:
    """Conversations that hear the same questions, and the images that go with the next one."""

    conversations: Sequence[Conversation]
    images: list[Path]

    def enter(self, line: str) -> None:
        """Carries out a command, or asks a question.

        Raises:
            DataError: an unknown command, or a file that cannot be used.
        """
        command, _, rest = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/image": self._add_image,
            "/reset": self._reset,
            "/save": self._save,
            "/help": lambda _: echo(HELP, err=True),
        }
        if command in commands:
            commands[command](rest.strip())
        elif command.startswith("/"):
            raise DataError(f"there is no command {command}\n{HELP}")
        elif line:
            shown, self.images = self.images, []
            ask_once(self.conversations, line, shown)

    def _reset(self, _: str) -> None:
        for conversation in self.conversations:
            conversation.turns, conversation.images = [], []
        self.images = []
        echo("a new conversation", err=True)

    def _add_image(self, name: str) -> None:
        path = Path(name).expanduser()
        if not name:
            raise DataError("/image needs a file: /image FILE")
        if not path.is_file():
            raise DataError(f"{path}: no such image file")
        for conversation in self.conversations:
            if not conversation.model.takes_images:
                raise DataError(f"{conversation.model.path}: takes no images; ask without one")
        self.images.append(path)
        echo(f"{path}: goes with the next question", err=True)

    def _save(self, name: str) -> None:
        path = Path(name).expanduser()
        if not name:
            raise DataError("/save needs a file: /save FILE")
        if path.exists():
            raise DataError(f"{path}: exists already and was not changed; give another name")
        records = [conversation.to_record() for conversation in self.conversations if conversation.turns]
        if not records:
            raise DataError("there is no conversation to save yet")
        for number, record in enumerate(records):
            record["id"] = f"conversation-{number}"
        publish(path, (json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode())
        echo(f"{path}: saved", err=True)


def _read_line(prompt: str) -> str | None:
    """Returns the next line, None at the end of the input. Ctrl-C gives up a line, as in a shell."""
    try:
        return input(prompt)
    except EOFError:
        return None
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        return ""


def _show_side_by_side(conversations: Sequence[Conversation], text: str, images: Sequence[Path]) -> None:
    """Shows the answers of several models in columns, one model answering after the other."""
    console = Console()
    answers = [""] * len(conversations)
    width = max(20, console.width // len(conversations))

    def columns() -> Columns:
        panels = [
            Panel(plain_text(answer), title=plain_text(conversation.model.path), width=width)
            for conversation, answer in zip(conversations, answers, strict=True)
        ]
        return Columns(panels, padding=0)

    with Live(columns(), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for number, conversation in enumerate(conversations):
            for piece in conversation.ask(text, images):
                answers[number] += piece
                live.update(columns(), refresh=True)
    if not console.is_terminal:
        console.line()
