"""Commands of the training node: make a student, train a stage of it, export it.

Every heavy import stands inside its command, so that `--help` answers at once.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from common.config import MAX_SEED
from common.console import (
    ConfigOption,
    SetOption,
    check_local_path,
    echo,
    hide_loading_bars,
    is_debugging,
    report_interrupt,
)
from common.errors import DecantError
from train.choices import AdapterType

if TYPE_CHECKING:
    from train.config import MoEConfig

_log = logging.getLogger(__name__)


def train(
    config: ConfigOption,
    overrides: SetOption = None,
    resume: Annotated[
        Literal["auto", "never"] | None,
        typer.Option(help="Continue from the output's newest whole checkpoint, or refuse one; sets run.resume."),
    ] = None,
) -> None:
    """Train one stage of a student: alone, or on many GPUs under the deepspeed launcher or torchrun.

    configs/llava-mod holds the four stages with the paper's settings.
    configs/llava and configs/moe-llava need no teacher.

    SIGTERM and Ctrl-C save a checkpoint; the exit code is 143 or 130.
    A run that was stopped or killed continues from its newest whole checkpoint.
    The student ends up in OUTPUT/final, a plain Hugging Face directory.
    """
    from common.config import load_config
    from train.config import TrainConfig

    all_overrides = list(overrides or ())
    if resume is not None:
        all_overrides.append(f"run.resume={resume}")
    settings = load_config(TrainConfig, config, all_overrides)

    # Imported after the configuration is checked, because it imports torch, which takes seconds.
    from train.run.stage import train_stage

    hide_loading_bars()
    with report_interrupt(), _log_traceback():
        result = train_stage(settings)
    _log.info("%s: trained to step %d", result.final, result.steps)


def init_student(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory to make.", show_default=False, callback=check_local_path)
    ],
    vision: Annotated[
        Path | None,
        typer.Option(
            help="Directory with a CLIP or SigLIP vision tower, alone or in a LLaVA.",
            show_default=False,
            callback=check_local_path,
        ),
    ] = None,
    language: Annotated[
        Path | None,
        typer.Option(
            help="Causal language model directory that becomes the student's.",
            show_default=False,
            callback=check_local_path,
        ),
    ] = None,
    dense: Annotated[
        Path | None,
        typer.Option(
            help="Dense student to upcycle, instead of composing one.", show_default=False, callback=check_local_path
        ),
    ] = None,
    experts: Annotated[int | None, typer.Option(min=2, help="Experts in each sparse layer, with --dense (4).")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Experts a token is sent to, with --dense (2).")] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Sparse layers, with --dense: every-second (default), sparse, first-half, second-half, all, or as 1,3."
        ),
    ] = None,
    noise: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Gaussian noise on each expert, in standard deviations of its dense weight, with --dense (0)."
        ),
    ] = None,
    adapter: Annotated[
        AdapterType | None,
        typer.Option(
            help="Adapter to make: mlp (default), linear, or attention, two self-attention blocks before the mlp.",
            show_default=False,
        ),
    ] = None,
    slices: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=36,
            help="Read an image in up to so many slices beside the whole one, as LLaVA-NeXT does (no slices).",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the fresh adapter, or of routers and noise.")
    ] = 0,
) -> None:
    """Make a student: from a vision tower, a language model and a fresh adapter, or by sparse upcycling of a dense one.

    Without --noise the upcycled student gives the outputs of the dense one.
    """
    if (dense is None) == (vision is None and language is None) or (dense is None and not (vision and language)):
        raise typer.BadParameter("give --vision and --language, or --dense alone")
    sparse = {"--experts": experts, "--top-k": top_k, "--layers": layers, "--noise": noise}
    if dense is None and (given := [name for name, value in sparse.items() if value is not None]):
        raise typer.BadParameter(f"{', '.join(given)}: for upcycling a dense student; give --dense, or leave them out")
    if dense is not None and adapter is not None:
        raise typer.BadParameter("--adapter: a dense student has its adapter; leave it out")
    if dense is not None and slices is not None:
        raise typer.BadParameter("--slices: a dense student keeps its treatment of images; leave it out")
    hide_loading_bars()
    if dense is not None:
        pattern = "every-second" if layers is None else layers
        moe = _moe_settings(experts or 4, top_k or 2, pattern, noise or 0.0)
        _upcycle(
            dense,
            out,
            moe,
            seed,
        )
    else:
        assert vision is not None
        assert language is not None
        _compose(vision, language, out, adapter or "mlp", slices, seed)


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="A stage's output, one of its checkpoints, or a student.",
            show_default=False,
            callback=check_local_path,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory to make.", show_default=False, callback=check_local_path)
    ],
) -> None:
    """Write a trained student as a plain Hugging Face directory that transformers and vLLM load, without DeepSpeed.

    Its chat template takes strings and lists of parts.
    Its processor treats images as training did.
    README.md is its model card.
    """
    from train.model.export import export_student
    from train.run.checkpoint import check_undamaged
    from train.run.published_student import finish_export

    check_undamaged(source)
    hide_loading_bars()
    export_student(source, out, finish_export)
    echo(f"{out}: exported")


def import_checkpoint(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="Original checkpoint directory.", show_default=False, callback=check_local_path
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory to make.", show_default=False, callback=check_local_path)
    ],
    vision: Annotated[
        Path | None,
        typer.Option(
            help="CLIP or SigLIP directory of the vision tower, which original checkpoints only name.",
            show_default=False,
            callback=check_local_path,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Conversation style: v1, mistral, phi, stablelm or qwen.", show_default="by the model type"),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="Language model of a checkpoint that holds only a projector or LoRA weights.",
            show_default=False,
            callback=check_local_path,
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Directory of a fast tokenizer, in place of the checkpoint's.",
            show_default=False,
            callback=check_local_path,
        ),
    ] = None,
) -> None:
    """Convert a checkpoint of LLaVA, BakLLaVA, MoE-LLaVA or LLaVA-MoD's own code to one of transformers and vLLM."""
    from train.importing.conversation_templates import TEMPLATE_NAMES
    from train.importing.run import import_checkpoint as convert

    name = next((each for each in TEMPLATE_NAMES if each == template), None)
    if template is not None and name is None:
        raise typer.BadParameter(f"--template: expected one of {', '.join(TEMPLATE_NAMES)}")
    hide_loading_bars()
    imported = convert(source, out, vision=vision, template=name, base=base, tokenizer=tokenizer)
    for note in imported.notes:
        echo(note)
    echo(f"{out}: {imported.num_parameters / 1e6:,.1f}M parameters")


@contextmanager
def _log_traceback() -> Iterator[None]:
    """Logs the traceback of an unexpected error with the rank that it happened on.

    Other commands show it under --debug alone. Training always does, because such an error may come after days on one
    of many ranks, and is not found again by starting the run once more; a launcher keeps what the ranks wrote.
    """
    try:
        yield
    except DecantError:
        raise
    except Exception:
        if not is_debugging():
            _log.exception("rank %s:", os.environ.get("RANK", "0"))
        raise


def _compose(  # noqa: PLR0913, PLR0917 - the options of init-student
    vision: Path, language: Path, out: Path, adapter: AdapterType, slices: int | None, seed: int
) -> None:
    from train.model.compose import compose_student
    from train.run.model_card import write_initial_card

    student = compose_student(vision, language, out, adapter=adapter, num_slices=slices, seed=seed)
    names = [vision.resolve().name, language.resolve().name]
    sliced = "" if slices is None else f", images in up to {slices} slices"
    write_initial_card(
        out, names, f"The vision tower of `{names[0]}`, a fresh adapter ({adapter}){sliced}, and `{names[1]}`."
    )
    echo(
        f"{out}: {student.num_parameters / 1e6:,.1f}M parameters; <image> is token {student.image_token_id} "
        f"({student.image_token_row})"
    )


def _moe_settings(experts: int, top_k: int, layers: str, noise: float) -> "MoEConfig":
    """Returns the options of `init-student` as the table [moe] of a stage's file.

    Raises:
        ConfigError: an option has no such value.
    """
    from pydantic import ValidationError

    from common.config import describe_errors
    from common.errors import ConfigError
    from train.config import MoEConfig

    # What begins with a digit is a list of indices; validation refuses a part of it that is no number.
    pattern = [_parse_index(part) for part in layers.split(",")] if layers[:1].isdecimal() else layers
    raw = {"num_experts": experts, "top_k": top_k, "layers": pattern, "noise": noise}
    try:
        return MoEConfig.model_validate(raw)
    except ValidationError as error:
        wrong = "; ".join(describe_errors(error, MoEConfig, raw))
        raise ConfigError(f"--layers {layers[:200]} --experts {experts} --top-k {top_k}: {wrong}") from error


def _parse_index(text: str) -> int | str:
    """Returns the index of a layer; a text that is none stays as it is. No model has 10^9 layers."""
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) < 10 else text


def _upcycle(dense: Path, out: Path, moe: "MoEConfig", seed: int) -> None:
    from train.moe.upcycle import upcycle_directory
    from train.run.model_card import write_card

    num_parameters = upcycle_directory(dense, out, moe, seed=seed)
    layers = moe.layers if isinstance(moe.layers, str) else ",".join(map(str, moe.layers))
    write_card(dense, out, f"Upcycled to {moe.num_experts} experts, top {moe.top_k}, layers {layers}.")
    echo(f"{out}: {num_parameters / 1e6:,.1f}M parameters, {moe.num_experts} experts, top {moe.top_k}, layers {layers}")
