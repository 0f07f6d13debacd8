"""Commands of the training node: make a student, train a stage of it, export it.

Every heavy import stands inside its command, so that `--help` answers at once.
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from common.console import ConfigOption, SetOption, check_local_path, hide_loading_bars, report_interrupt

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

    # Only now, because it imports torch: a wrong configuration is reported at once.
    from train.run.stage import train_stage

    hide_loading_bars()
    with report_interrupt():
        result = train_stage(settings)
    _log.info("%s: trained to step %d", result.final, result.steps)


def init_student(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory to make.", show_default=False, callback=check_local_path)
    ],
    vision: Annotated[
        Path | None,
        typer.Option(
            help="LLaVA or CLIP directory whose vision tower is taken.", show_default=False, callback=check_local_path
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
    experts: Annotated[int, typer.Option(min=2, help="Experts in each sparse layer, with --dense.")] = 4,
    top_k: Annotated[int, typer.Option(min=1, help="Experts a token is sent to, with --dense.")] = 2,
    layers: Annotated[
        str, typer.Option(help="Sparse layers: every-second, first-half, second-half, all or indices such as 1,3.")
    ] = "every-second",
    noise: Annotated[
        float, typer.Option(min=0.0, help="Gaussian noise on each expert, in standard deviations of its dense weight.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the fresh adapter, or of routers and noise.")] = 0,
) -> None:
    """Make a student: from a vision tower, a language model and a fresh adapter, or by sparse upcycling of a dense one.

    Without --noise the upcycled student gives the outputs of the dense one.
    """
    if (dense is None) == (vision is None and language is None) or (dense is None and not (vision and language)):
        raise typer.BadParameter("give --vision and --language, or --dense alone")
    hide_loading_bars()
    if dense is not None:
        _upcycle(dense, out, _moe_settings(experts, top_k, layers, noise), seed)
    else:
        assert vision is not None
        assert language is not None
        _compose(vision, language, out, seed)


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
    """Write a trained student as a plain Hugging Face directory that transformers and vLLM load, without DeepSpeed."""
    from train.model.export import export_student
    from train.run.checkpoint import check_undamaged

    check_undamaged(source)
    hide_loading_bars()
    export_student(source, out)
    typer.echo(f"{out}: exported")


def _compose(vision: Path, language: Path, out: Path, seed: int) -> None:
    from train.model.compose import compose_student

    made = compose_student(vision, language, out, seed=seed)
    typer.echo(
        f"{out}: {made.num_parameters / 1e6:,.1f}M parameters; <image> is token {made.image_token_id} "
        f"({made.image_token_row})"
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

    pattern = layers.split(",") if layers[:1].isdigit() else layers
    raw = {"num_experts": experts, "top_k": top_k, "layers": pattern, "noise": noise}
    try:
        return MoEConfig.model_validate(raw)
    except ValidationError as error:
        wrong = "; ".join(describe_errors(error, MoEConfig, raw))
        raise ConfigError(f"--layers {layers} --experts {experts} --top-k {top_k}: {wrong}") from error


def _upcycle(dense: Path, out: Path, moe: "MoEConfig", seed: int) -> None:
    from train.moe.upcycle import upcycle_directory

    num_parameters = upcycle_directory(dense, out, moe, seed=seed)
    layers = moe.layers if isinstance(moe.layers, str) else ",".join(map(str, moe.layers))
    typer.echo(
        f"{out}: {num_parameters / 1e6:,.1f}M parameters, {moe.num_experts} experts, top {moe.top_k}, layers {layers}"
    )
