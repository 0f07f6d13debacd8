"""Options that the commands share, and functions that show results and interrupts."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigOption = Annotated[Path, typer.Option("--config", help="TOML file of the run.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as engine.dtype=float32. Repeatable."),
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
        typer.echo(message, err=True)
        # A stage that was stopped by another signal names its own exit code.
        raise typer.Exit(getattr(interrupt, "exit_code", 130)) from None


def hide_loading_bars() -> None:
    """Turns off transformers' bars for reading and writing weights, because ours show how the work goes."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def show(*renderables: Any) -> None:
    """Prints tables and texts as wide as the terminal."""
    from rich.console import Console

    console = Console()
    for renderable in renderables:
        console.print(renderable)
