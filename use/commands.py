"""Commands for the day after training: `chat`, `report`.

Every heavy import stands inside its command, so that `--help` answers at once.
"""

from pathlib import Path
from typing import Annotated

import typer

from common.config import MAX_SEED
from common.console import check_local_path, echo, hide_loading_bars, report_interrupt


def chat(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Student, teacher, or LoRA weights whose base is on this machine.",
            show_default=False,
            callback=check_local_path,
        ),
    ],
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Image of the first question. Repeatable.")
    ] = None,
    ask: Annotated[str | None, typer.Option(metavar="TEXT", help="Ask one question, print the answer and end.")] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="OTHER", help="Ask another model the same, and show both answers.", callback=check_local_path
        ),
    ] = None,
    load_4bit: Annotated[bool, typer.Option("--load-4bit", help="Load in 4 bit with bitsandbytes (NF4).")] = False,
    load_8bit: Annotated[bool, typer.Option("--load-8bit", help="Load in 8 bit with bitsandbytes.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the draws.")] = 0,
) -> None:
    """Talk to a model in the terminal.

    /image FILE, /reset and /save FILE are commands within the conversation.
    Images are treated as in training.
    """
    if load_4bit and load_8bit:
        raise typer.BadParameter("--load-4bit and --load-8bit: give one of them")
    for path in image or ():
        if not path.is_file():
            raise typer.BadParameter(f"--image {path}: no such file")
    from use.chat import Conversation, ask_once, run_chat
    from use.chat_model import ChatModel, Sampling

    hide_loading_bars()
    sampling = Sampling(max_new_tokens, temperature, seed)
    with report_interrupt():
        models = [
            ChatModel(path, "4bit" if load_4bit else "8bit" if load_8bit else None)
            for path in (model, compare)
            if path is not None
        ]
        for each in models:
            echo(each.description, err=True)
        conversations = [Conversation(each, sampling) for each in models]
        if ask is None:
            run_chat(conversations, image or ())
        else:
            ask_once(conversations, ask, image or ())


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Output of a stage; of a single one, the stages before it are shown too.",
            show_default=False,
        ),
    ],
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page that needs no network.")] = None,
    markdown: Annotated[str | None, typer.Option(metavar="FILE", help="Write the same facts as Markdown.")] = None,
    samples: Annotated[
        int, typer.Option(min=0, metavar="N", help="Held-out samples to show; 0 loads no student.")
    ] = 20,
) -> None:
    """Report on stages of training: curves, metrics side by side, settings, samples where student and teacher differ.

    Give --html or --markdown, or both.
    """
    from common.storage.files import parse_location
    from precompute.inspection.html_document import check_page_destination

    if html is None and markdown is None:
        raise typer.BadParameter("give --html FILE or --markdown FILE")
    page, text = (None if name is None else parse_location(name) for name in (html, markdown))
    from use.report.run import check_markdown_destination, write_report

    if page is not None:
        check_page_destination(page)
    if text is not None:
        check_markdown_destination(text)
    hide_loading_bars()
    with report_interrupt():
        names = write_report(runs, html=page, markdown=text, num_samples=samples)
    for name in filter(None, (html, markdown)):
        echo(f"{name}: {', '.join(names)}")
