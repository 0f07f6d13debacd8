"""What the commands of cli.py share: options, and how results and interrupts are shown."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]


def check_local_path(path: Path | None) -> Path | None:
    """Refuses an address such as s3://bucket/model, of which a Path keeps one slash."""
    if path is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise typer.BadParameter("models and students are local directories; copy it to this machine first")
    return path


@contextmanager
def report_interrupt() -> Iterator[None]:
    """Tells what an interrupt leaves behind."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        told = str(interrupt) or "interrupted; what was published is whole, and the same command continues from there"
        typer.echo(told, err=True)
        # A stage that was stopped by another signal says so.
        raise typer.Exit(getattr(interrupt, "exit_code", 130)) from None


def hide_loading_bars() -> None:
    """Transformers' bars for reading and writing weights; ours tell how the work itself goes."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def show(*renderables: Any) -> None:
    """Prints tables and texts as wide as the terminal."""
    from rich.console import Console

    console = Console()
    for renderable in renderables:
        console.print(renderable)
