"""Command line of Decant: assembles the commands of both halves, sets up logging, turns errors into exit codes.

Exit codes: 0 done, 1 an error or a failed verification, 2 wrong usage, 130 interrupted, 143 stopped by SIGTERM.
Every heavy import stands inside its command, so that `--help` answers at once.
"""

import io
import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import precompute.commands
import train.commands
import use.commands
from common.config import MAX_SEED
from common.console import (
    DEBUG_VARIABLE,
    ConfigOption,
    JsonOption,
    LogFormatter,
    SetOption,
    check_local_path,
    echo,
    is_debugging,
    report_interrupt,
    show,
)
from common.errors import DecantError

# An error of a library may hold a whole tensor or document.
_MAX_MESSAGE_CHARS = 500

app = typer.Typer(
    name="decant",
    help="Score a large multimodal teacher once, distil it into small students from the stored scores.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Runs the command line; the entry point of the console script `decant`."""
    _set_up_output()
    _silence_libraries()
    try:
        app()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - a panic of a library in Rust is no Exception, and has to be named too
        if is_debugging():
            echo("".join(traceback.format_exception(error)), err=True)
        echo(_describe_error(error), err=True)
        sys.exit(1)


def _describe_error(error: BaseException) -> str:
    """Returns the message for whatever ended a command; one that is not a DecantError gets a single line."""
    if isinstance(error, DecantError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {where}{error.strerror}; check the path, its permissions and the disk (--debug shows where)"
    message = " ".join(str(error).split())
    if len(message) > _MAX_MESSAGE_CHARS:
        message = f"{message[:_MAX_MESSAGE_CHARS]} …"
    where = "are above" if is_debugging() else "--debug shows"
    kind = type(error).__name__
    # Of torch, which is slow to import.
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return f"error: out of memory: {message or kind}"
    return f"unexpected error: {kind}: {message}; this is a bug: please report it with the details that {where}"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"decant {_find_version()}")
        raise typer.Exit


def _set_debugging(wanted: bool) -> None:
    if wanted:
        # A variable, so that the commands that this one starts, such as the demo's, show their tracebacks too.
        os.environ[DEBUG_VARIABLE] = "1"


def _find_version() -> str:
    """Returns the version of the installed package, or that of a source tree that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("decant")
    except PackageNotFoundError:
        import tomllib

        project = tomllib.loads(Path(__file__).with_name("pyproject.toml").read_text("utf-8"))["project"]
        return str(project["version"])


@app.callback()
def _common_options(
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            callback=_set_debugging,
            envvar=DEBUG_VARIABLE,
            help="Show the traceback of an error, for a report.",
        ),
    ] = False,
) -> None:
    """Declares the options before a command. The deepspeed launcher adds its rank, which the environment has too."""


app.command("init")(use.commands.init)
app.command("precompute-logits")(precompute.commands.precompute_logits)
app.command("precompute-features")(precompute.commands.precompute_features)
app.command("verify-shards")(precompute.commands.verify_shards)
app.command("inspect-shards")(precompute.commands.inspect_shards)
app.command("merge-shards")(precompute.commands.merge_shards)


@app.command()
def plan(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    config: ConfigOption,
    student: Annotated[
        Path | None, typer.Option(help="Student directory, for the trainer's memory.", callback=check_local_path)
    ] = None,
    train_config: Annotated[
        Path | None, typer.Option(help="TOML file of a stage: what is trained, and of which student.")
    ] = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs to plan the trainer for.")] = "1,2,4,8",
    overrides: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a precompute-logits run and a stage of training will take, before anything is spent.

    Reads the dataset and the models' small files: no weights, no engine, no GPU.
    --config is the file of precompute-logits.
    Memory is in binary units: 1 GiB is 2^30 bytes.
    """
    from common.config import load_config
    from precompute.config import PrecomputeConfig
    from precompute.planning.capture_cost import estimate_capture

    num_gpus = _parse_counts(gpus)
    settings = load_config(PrecomputeConfig, config, overrides or ())
    teacher, sections = estimate_capture(settings, progress=not as_json)
    results: dict[str, Any] = {"capture": [section.to_dict() for section in sections]}
    shown = [section.render() for section in sections]
    if student is None and train_config is None:
        shown.append("For the trainer's memory give --student DIR or --train-config FILE.")
    else:
        from train.config import TrainConfig
        from train.memory_estimate import estimate_training_memory

        stage = None if train_config is None else load_config(TrainConfig, train_config)
        if student is None:
            assert stage is not None
            student = stage.model.path
        trainer = estimate_training_memory(student, teacher.num_parameters, config=stage, gpus=num_gpus)
        results["trainer"] = trainer.to_dict()
        shown.append(trainer.render())
    if as_json:
        typer.echo(json.dumps(results, indent=1))
    else:
        show(*shown)


app.command("train")(train.commands.train)
app.command("init-student")(train.commands.init_student)
app.command("export")(train.commands.export)
app.command("import-checkpoint")(train.commands.import_checkpoint)
app.command("chat")(use.commands.chat)
app.command("report")(use.commands.report)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything the demo makes.")] = Path("demo-run"),
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of data, models and training.")] = 0,
    family: Annotated[
        Literal["llava", "qwen2.5-vl", "smolvlm"], typer.Option(help="Architecture of teacher and student.")
    ] = "llava",
) -> None:
    """Run the whole chain on real handwritten digits: teacher, scores, verification, four stages, export, table."""
    from demo.run import run_demo

    with report_interrupt():
        run_demo(out, seed=seed, family=family)


@app.command()
def doctor(
    half: Annotated[
        Literal["precompute", "train"] | None,
        typer.Option("--for", help="Look at one half alone, and fail if it cannot run.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine has for each half, what it lacks, and the command that brings it.

    Starts no engine and changes nothing.
    The exit code is 1 if the half after --for cannot run.
    Without --for it is 1 if neither half can.
    """
    from doctor.diagnosis import HALVES, PACKAGES, diagnose
    from doctor.facts import collect_facts

    halves = HALVES if half is None else (half,)
    typer.echo("importing what is installed, which takes up to a minute ...", err=True)
    with report_interrupt():
        found = diagnose(collect_facts(dict.fromkeys(name for each in halves for name in PACKAGES[each])), halves)
    if as_json:
        typer.echo(found.to_json())
    else:
        show(found.render())
    if not found.ok:
        raise typer.Exit(1)


def _parse_counts(text: str) -> tuple[int, ...]:
    """Returns the positive whole numbers between commas."""
    parts = [part.strip() for part in text.split(",")]
    # Nobody has 10^9 GPUs; Python refuses to read thousands of digits.
    if not all(part.isdecimal() and len(part) < 10 and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--gpus {text[:200]!r}: expected numbers such as 1,2,4,8")
    return tuple(map(int, parts))


def _set_up_output() -> None:
    """Sets the form and the levels of log lines; a character that stdout cannot encode is spelled out."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As Python does for stderr.
        sys.stdout.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Only rank 0 logs, because all ranks would write the same lines.
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    for package in ("precompute", "train", "demo", "common", "use"):
        logging.getLogger(package).setLevel(level)


def _silence_libraries() -> None:
    """Hides what libraries tell their own developers, here and in the processes that are started from here.

    Our own warnings are log lines. `python -W` and PYTHONWARNINGS show those of the libraries again.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        # This one is for users: it says why a GPU is not used.
        warnings.filterwarnings("default", message="CUDA initialization")
        os.environ["PYTHONWARNINGS"] = "ignore,default:CUDA initialization"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("DeepSpeed").addFilter(_is_not_about_missing_gpu)
    logging.getLogger("transformers.utils.import_utils").addFilter(_is_not_about_torchvision)


def _is_not_about_missing_gpu(record: logging.LogRecord) -> bool:
    """Returns False for DeepSpeed's warning that it found no GPU: transformers imports it to save any model."""
    return record.funcName != "get_accelerator" or record.levelno > logging.WARNING


def _is_not_about_torchvision(record: logging.LogRecord) -> bool:
    """Returns False for the warning that images are processed by PIL, because torchvision is no requirement of ours."""
    return "requires torchvision" not in record.getMessage() or record.levelno > logging.WARNING


if __name__ == "__main__":
    main()
