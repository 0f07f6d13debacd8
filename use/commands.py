"""Commands before and after training: `init`, `chat`, `report`.

Every heavy import stands inside its command, so that `--help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from common.config import MAX_SEED
from common.console import check_local_path, echo, hide_loading_bars, report_interrupt


def init(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory to make.", show_default=False, callback=check_local_path)
    ],
    teacher: Annotated[
        Path | None,
        typer.Option(help="Directory of the teacher.", show_default=False, callback=check_local_path),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="FILE", help="Conversations to distil.", show_default=False)
    ] = None,
    language: Annotated[
        Path | None,
        typer.Option(help="Language model that becomes the student's.", show_default=False, callback=check_local_path),
    ] = None,
    vision: Annotated[
        Path | None,
        typer.Option(
            help="Directory with the student's vision tower.",
            show_default="the teacher's tower",
            callback=check_local_path,
        ),
    ] = None,
    student: Annotated[
        Path | None,
        typer.Option(
            help="Whole student, in place of --language and --vision.", show_default=False, callback=check_local_path
        ),
    ] = None,
    image_root: Annotated[
        str | None, typer.Option(help="Where the dataset's image paths start.", show_default=False)
    ] = None,
    captions: Annotated[
        str | None, typer.Option(metavar="FILE", help="Data of the first stage.", show_default="the dataset")
    ] = None,
    preferences: Annotated[
        str | None, typer.Option(metavar="FILE", help="Preference pairs, for the last stage.", show_default=False)
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=0, metavar="N", help="GPUs of a node; 0 runs on the CPU.")] = None,
    gpu_gib: Annotated[int, typer.Option(min=1, metavar="N", help="Memory of each GPU in GiB.")] = 80,
) -> None:
    """Write the configuration files of a whole chain, and the script that runs it.

    What is not given is asked for in a terminal.
    """
    from common.storage.files import parse_location
    from use.project import Answers, inspect_project, write_project

    teacher = teacher or Path(_ask("--teacher", "directory of the teacher"))
    if language is None and student is None:
        language = Path(_ask("--language", "directory of the student's language model"))
    is_asked = dataset is None
    dataset = dataset or _ask("--dataset", "file of conversations")
    if sys.stdin.isatty():
        if is_asked and image_root is None:
            image_root = typer.prompt("directory of its images, empty for none", default="", show_default=False) or None
        gpus = typer.prompt("number of GPUs, 0 for none", default=1, type=int) if gpus is None else gpus
    locations = [
        None if name is None else parse_location(name) for name in (dataset, image_root, captions, preferences)
    ]
    assert locations[0] is not None
    hide_loading_bars()
    with report_interrupt():
        answers = Answers(
            teacher=teacher,
            dataset=locations[0],
            image_root=locations[1],
            gpus=1 if gpus is None else gpus,
            gpu_gib=gpu_gib,
            language=language,
            vision=vision,
            student=student,
            captions=locations[2],
            preferences=locations[3],
        )
        project = inspect_project(answers)
        written = write_project(directory, project)
    for path in written:
        echo(str(path))
    if project.why_dense is not None:
        echo(f"no sparse stage: {project.why_dense}")
    echo(f"\nread the files, then run: bash {directory / 'run.sh'}")


def _ask(option: str, what: str) -> str:
    """Asks in a terminal for what an option would have said.

    Raises:
        typer.BadParameter: nobody can be asked.
    """
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"{option} is missing: {what}")
    return str(typer.prompt(what)).strip()


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
            metavar="RUN",
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
