"""Options that the commands share, and functions that show results, errors, log lines and interrupts.

Paths, ids, roles, names and error texts come from files that others wrote. Whatever is shown passes through
`escape_control`: in a table or a text of rich as `plain_text`, on a line by `echo`, in a log by `LogFormatter`.
"""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.text import Text

# The environment variable of the option --debug.
DEBUG_VARIABLE = "DECANT_DEBUG"

ConfigOption = Annotated[Path, typer.Option("--config", help="TOML file of the run.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the file, such as seed=1. Repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]


def check_local_path(path: Path | None) -> Path | None:
    """Returns the path of an option, or refuses an address such as s3://bucket/model.

    Raises:
        typer.BadParameter: an address. A Path has collapsed its two slashes into one.
    """
    if path is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise typer.BadParameter("models and students are local directories; copy it to this machine first")
    return path


@contextmanager
def report_interrupt() -> Iterator[None]:
    """Turns an interrupt into an exit code and a message that says what is left behind."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        message = str(interrupt) or (
            "interrupted; what was published is whole, and the same command continues from there"
        )
        echo(message, err=True)
        # A stage that was stopped by another signal names its own exit code.
        raise typer.Exit(getattr(interrupt, "exit_code", 130)) from None


def is_debugging() -> bool:
    """Returns True if the traceback of an error is to be shown."""
    return os.environ.get(DEBUG_VARIABLE) == "1"


def hide_loading_bars() -> None:
    """Turns off transformers' bars for reading and writing weights, because ours show how the work goes."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def escape_control(text: str) -> str:
    """Returns text with control characters spelled out as \\x.. or \\u....; line breaks stay.

    So are characters that reverse the direction of what follows, and the lone surrogates of a path that is not UTF-8,
    which no stream can write.
    """
    return "".join(c if c.isprintable() or c == "\n" else _spell_out(ord(c)) for c in text)


def plain_text(text: object, style: str = "") -> "Text":
    """Returns text that rich shows as it is, without markup, emoji codes and control characters."""
    from rich.text import Text

    return Text(escape_control(str(text)), style)


def echo(text: str, *, err: bool = False) -> None:
    """Prints a line with control characters spelled out."""
    typer.echo(escape_control(text), err=err)


def show(*renderables: Any) -> None:
    """Prints tables and texts as wide as the terminal; a string, in a cell too, is no markup."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)
    for renderable in renderables:
        console.print(renderable)


class LogFormatter(logging.Formatter):
    """Formatter of log lines that spells out control characters, in messages and tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the message, and below it the traceback if there is one."""
        return escape_control(super().format(record))


def _spell_out(code: int) -> str:
    return f"\\x{code:02x}" if code <= 0xFF else f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"
