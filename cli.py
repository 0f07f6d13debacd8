"""Command line of Decant: parse, load the configuration, call one function, turn errors into exit codes.

Exit codes: 0 done, 1 an error that the message explains or a failed verification, 2 wrong usage, 130 interrupted,
143 stopped by SIGTERM.
Every heavy import stands inside its command, so that `--help` answers at once.
"""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from common.console import JsonOption, check_local_path, hide_loading_bars, report_interrupt, show
from common.errors import DecantError
from precompute import commands, feature_commands

app = typer.Typer(
    name="decant",
    help="Score a large multimodal teacher once, distil it into small students from the stored scores.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ConfigOption = Annotated[Path, typer.Option("--config", help="TOML file of the run.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as engine.dtype=float32. Repeatable."),
]


@app.callback()
def _launcher_arguments(
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Accepts what the deepspeed launcher adds to the arguments; the rank itself comes from the environment."""


@app.command("precompute-logits")
def precompute_logits(
    config: ConfigOption,
    overrides: SetOption = None,
    node_rank: Annotated[
        int | None, typer.Option(metavar="N", help="This node's number, from 0. In an srun step: SLURM's.")
    ] = None,
    num_nodes: Annotated[
        int | None, typer.Option(metavar="M", help="Nodes that share the output. In an srun step: SLURM's.")
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Score in this process, or in the actors of a Ray cluster.")
    ] = "local",
) -> None:
    """Score a dataset with the teacher, once: dataset in, Parquet shards out.

    Kind "kd" keeps the top of the teacher's distribution and the log-prob of every response token; kind "dpo" keeps
    the reference log-probs of chosen and rejected answers. An interrupted run continues when it is started again.
    """
    from common.config import load_config
    from precompute.config import PrecomputeConfig
    from precompute.logits.nodes import resolve_nodes
    from precompute.logits.run import run_capture

    settings = load_config(PrecomputeConfig, config, overrides or ())
    # Ray deals out the shards itself: a driver in an srun step is not one of several that share them.
    settings = resolve_nodes(settings, node_rank, num_nodes, {} if engine == "ray" else os.environ)
    with report_interrupt():
        summary = run_capture(settings, engine=engine)
    show(summary.render())
    if summary.interrupted:
        raise typer.Exit(130)


app.command("precompute-features")(feature_commands.precompute_features)
app.command("verify-shards")(commands.verify_shards)
app.command("inspect-shards")(commands.inspect_shards)
app.command("merge-shards")(commands.merge_shards)


@app.command()
def plan(
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

    Reads the dataset and the models' configurations, tokenizers and image processors: no weights, no engine, no GPU.
    --config is the file of precompute-logits. Memory is in binary units, 1 GiB = 2^30 bytes.
    """
    import json
    from dataclasses import asdict

    from common.config import load_config
    from precompute.config import PrecomputeConfig
    from precompute.planning.capture_cost import estimate_capture

    num_gpus = _numbers(gpus)
    settings = load_config(PrecomputeConfig, config, overrides or ())
    teacher, sections = estimate_capture(settings, progress=not as_json)
    results: dict[str, Any] = {"capture": [asdict(section) for section in sections]}
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


@app.command()
def train(
    config: ConfigOption,
    overrides: SetOption = None,
    resume: Annotated[
        Literal["auto", "never"] | None,
        typer.Option(help="Continue from the output's newest whole checkpoint, or refuse one; sets run.resume."),
    ] = None,
) -> None:
    """Train one stage of a student: alone, or on many GPUs under the deepspeed launcher or torchrun.

    configs/llava-mod holds the four stages with the paper's settings; configs/llava and configs/moe-llava need no
    teacher. SIGTERM and Ctrl-C save a checkpoint (exit code 143 and 130); a run that was stopped or killed continues
    from its newest whole checkpoint when it is started again. The student ends up in OUTPUT/final, a plain Hugging
    Face directory.
    """
    from common.config import load_config
    from train.config import TrainConfig

    settings = load_config(TrainConfig, config, [*(overrides or ()), *([f"run.resume={resume}"] if resume else [])])

    from train.run.stage import train_stage

    hide_loading_bars()
    with report_interrupt():
        result = train_stage(settings)
    _log.info("%s: trained to step %d", result.final, result.steps)


@app.command("init-student")
def init_student(
    out: Annotated[Path, typer.Argument(help="Directory to make.", show_default=False, callback=check_local_path)],
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
            help="Instead of composing: a dense student to upcycle.", show_default=False, callback=check_local_path
        ),
    ] = None,
    experts: Annotated[int, typer.Option(min=2, help="Experts a sparse layer, with --dense.")] = 4,
    top_k: Annotated[int, typer.Option(min=1, help="Experts a token is sent to, with --dense.")] = 2,
    layers: Annotated[
        str, typer.Option(help="Sparse layers: every-second, first-half, second-half, all or indices such as 1,3.")
    ] = "every-second",
    noise: Annotated[
        float, typer.Option(min=0.0, help="Gaussian noise on each expert, in standard deviations of its dense weight.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the fresh adapter, or of routers and noise.")] = 0,
) -> None:
    """Make a student: from a vision tower, a language model and a fresh adapter, or by sparse upcycling of a dense one.

    Without --noise the upcycled student gives the same outputs as the dense one it comes from.
    """
    from common.errors import ConfigError

    if (dense is None) == (vision is None and language is None) or (dense is None and not (vision and language)):
        raise typer.BadParameter("give --vision and --language, or --dense alone")
    if dense is None:
        from train.model.compose import compose_student

        hide_loading_bars()
        assert vision is not None
        assert language is not None
        made = compose_student(vision, language, out, seed=seed)
        typer.echo(
            f"{out}: {made.num_parameters / 1e6:,.1f}M parameters; <image> is token {made.image_token_id} "
            f"({made.image_token_row})"
        )
        return
    from pydantic import ValidationError

    from train.config import MoEConfig
    from train.moe.upcycle import upcycle_directory

    hide_loading_bars()
    try:
        pattern = tuple(int(i) for i in layers.split(",")) if layers[:1].isdigit() else layers
        moe = MoEConfig.model_validate({"num_experts": experts, "top_k": top_k, "layers": pattern, "noise": noise})
    except (ValueError, ValidationError) as error:
        raise ConfigError(f"--layers {layers} --experts {experts} --top-k {top_k}: {error}") from error
    num_parameters = upcycle_directory(dense, out, moe, seed=seed)
    typer.echo(f"{out}: {num_parameters / 1e6:,.1f}M parameters, {experts} experts, top {top_k}, layers {layers}")


@app.command()
def export(
    source: Annotated[
        Path,
        typer.Argument(
            help="A stage's output, one of its checkpoints, or a student.",
            show_default=False,
            callback=check_local_path,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Directory to make.", show_default=False, callback=check_local_path)],
) -> None:
    """Write a trained student as a plain Hugging Face directory that transformers and vLLM load, without DeepSpeed."""
    from train.model.export import export_student

    hide_loading_bars()
    export_student(source, out)
    typer.echo(f"{out}: exported")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything the demo makes.")] = Path("demo-run"),
    seed: Annotated[int, typer.Option(help="Seed of data, models and training.")] = 0,
) -> None:
    """Run the whole chain on real handwritten digits: teacher, scores, verification, four stages, export, table."""
    from demo.run import run_demo

    with report_interrupt():
        run_demo(out, seed=seed)


def _numbers(text: str) -> tuple[int, ...]:
    """Positive whole numbers between commas."""
    if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise typer.BadParameter(f"--gpus {text}: expected numbers such as 1,2,4,8")
    return tuple(map(int, text.split(",")))


_log = logging.getLogger("decant")


def main() -> None:
    """Entry point of the console script."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    # The engines' own warnings are for their developers; ours are log lines. `python -W` shows them all.
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("decant", "precompute", "train", "demo", "common"):
        # Of several ranks one speaks.
        logging.getLogger(name).setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        app()
    except DecantError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
