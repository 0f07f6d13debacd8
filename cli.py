"""Command line of Decant: parse, load the configuration, call one function, turn errors into exit codes.

Exit codes: 0 done, 1 an error that the message explains or a failed verification, 2 wrong usage, 130 interrupted.
Every heavy import stands inside its command, so that `--help` answers at once.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from common.errors import DecantError

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


def _on_this_machine(path: Path | None) -> Path | None:
    """Refuses an address such as s3://bucket/model, of which a Path keeps one slash."""
    if path is not None and re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise typer.BadParameter("models and students are local directories; copy it to this machine first")
    return path


JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]


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
    from precompute.nodes import resolve_nodes
    from precompute.run import run

    settings = load_config(PrecomputeConfig, config, overrides or ())
    # Ray deals out the shards itself: a driver in an srun step is not one of several that share them.
    settings = resolve_nodes(settings, node_rank, num_nodes, {} if engine == "ray" else os.environ)
    with _resumable():
        summary = run(settings, engine=engine)
    _show(summary.render())
    if summary.interrupted:
        raise typer.Exit(130)


@app.command("verify-shards")
def verify_shards(
    path: Annotated[str, typer.Argument(help="Output of precompute-logits: a directory or an address.")],
    dataset: Annotated[
        str | None, typer.Option(help="The dataset file: check that every sample of it is covered.")
    ] = None,
    recompute: Annotated[
        int, typer.Option(min=0, metavar="N", help="Score N random rows again with transformers in float32.")
    ] = 0,
    teacher: Annotated[
        Path | None, typer.Option(help="Teacher directory, for --recompute.", callback=_on_this_machine)
    ] = None,
    image_root: Annotated[str | None, typer.Option(help="Where image paths start, for --recompute.")] = None,
    seed: Annotated[int, typer.Option(help="Which random rows --recompute takes.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Check everything that training relies on: provenance, checksums, schema, values, coverage.

    Exit code 0 if all checks hold, 1 if one does not. Without --recompute no model is loaded.
    """
    import json

    from common.storage import to_location
    from precompute.verify import verify

    if recompute and teacher is None:
        raise typer.BadParameter("--recompute needs --teacher DIR")
    output = to_location(path)
    report = verify(output, dataset=None if dataset is None else to_location(dataset), progress=not as_json)
    results: dict[str, Any] = {"verify": report}
    if recompute and report.ok:
        from precompute.recompute import recompute as score_again

        _hide_loading_bars()
        assert teacher is not None
        results["recompute"] = score_again(
            output,
            teacher,
            num_rows=recompute,
            image_root=None if image_root is None else to_location(image_root),
            seed=seed,
            progress=not as_json,
        )
    if as_json:
        typer.echo(json.dumps({name: json.loads(result.to_json()) for name, result in results.items()}, indent=1))
    else:
        _show(*(result.render() for result in results.values()))
    if not all(result.ok for result in results.values()):
        raise typer.Exit(1)


@app.command("inspect-shards")
def inspect_shards(
    path: Annotated[str, typer.Argument(help="Output of precompute-logits, or one shard file in it.")],
    sample: Annotated[
        str | None, typer.Option(metavar="ID", help="Sample to print: its id, or its position in the dataset.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, metavar="N", help="The teacher's best entries shown of a token.")] = 5,
    tokens: Annotated[int, typer.Option(min=0, metavar="N", help="Scored tokens printed of a conversation.")] = 48,
    tokenizer: Annotated[Path | None, typer.Option(help="Teacher directory: show token texts instead of ids.")] = None,
    max_groups: Annotated[
        int, typer.Option(min=0, metavar="N", help="Row groups read for the distributions, evenly spread.")
    ] = 64,
    read_all: Annotated[bool, typer.Option("--all", help="Read every row group.")] = False,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page with pictures too.")] = None,
    unpack: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write the shards with list columns into a new directory too.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what shards hold: provenance, counts, bytes by column, distributions, and one sample token by token.

    Needs no model and no GPU. Exit code 1 if something cannot be read; the rest is shown.
    """
    import json

    from common.storage import publish, to_location
    from precompute import inspect_facts, inspect_page, inspect_text
    from precompute.inspection import inspect, open_target
    from precompute.unpack import check_destination
    from precompute.unpack import unpack as unpack_shards

    location = to_location(path)
    if unpack is not None:
        check_destination(open_target(location), unpack)
    found = inspect(
        location,
        sample=sample,
        num_samples=1 if html is None else inspect_page.NUM_SAMPLES,
        num_alternatives=top,
        max_tokens=tokens if html is None else max(tokens, inspect_page.MAX_TOKENS),
        max_groups=None if read_all else max_groups,
        tokenizer=tokenizer,
        progress=not as_json,
    )
    if html is not None:
        publish(to_location(html), inspect_page.page(found).encode())
    exported = None if unpack is None else unpack_shards(open_target(location), unpack, progress=not as_json)
    if as_json:
        typer.echo(json.dumps(inspect_facts.to_dict(found), indent=1))
    else:
        _show(inspect_text.render(found, max_tokens=tokens))
    for line in [
        *([] if html is None else [f"{html}: {len(found.samples):,} samples as a page"]),
        *([] if exported is None else [exported.summary]),
    ]:
        typer.echo(line, err=True)
    if not found.ok or (exported is not None and not exported.ok):
        raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigOption,
    student: Annotated[
        Path | None, typer.Option(help="Student directory, for the trainer's memory.", callback=_on_this_machine)
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
    from precompute.estimate import estimate

    num_gpus = _numbers(gpus)
    settings = load_config(PrecomputeConfig, config, overrides or ())
    teacher, sections = estimate(settings, progress=not as_json)
    results: dict[str, Any] = {"capture": [asdict(section) for section in sections]}
    shown = [section.render() for section in sections]
    if student is None and train_config is None:
        shown.append("For the trainer's memory give --student DIR or --train-config FILE.")
    else:
        from train.config import TrainConfig
        from train.estimate import estimate as estimate_trainer

        stage = None if train_config is None else load_config(TrainConfig, train_config)
        if student is None:
            assert stage is not None
            student = stage.model.path
        trainer = estimate_trainer(student, teacher.num_parameters, config=stage, gpus=num_gpus)
        results["trainer"] = trainer.to_dict()
        shown.append(trainer.render())
    if as_json:
        typer.echo(json.dumps(results, indent=1))
    else:
        _show(*shown)


@app.command()
def train(config: ConfigOption, overrides: SetOption = None) -> None:
    """Train one stage of a student: alone, or on many GPUs under the deepspeed launcher or torchrun.

    configs/llava-mod holds the four stages with the paper's settings. A killed run continues from its newest whole
    checkpoint when it is started again. The student ends up in OUTPUT/final, a plain Hugging Face directory.
    """
    from common.config import load_config
    from train.config import TrainConfig

    settings = load_config(TrainConfig, config, overrides or ())

    from train.stage import train as train_stage

    _hide_loading_bars()
    with _resumable():
        result = train_stage(settings)
    _log.info("%s: trained to step %d", result.final, result.steps)


@app.command("init-student")
def init_student(
    out: Annotated[Path, typer.Argument(help="Directory to make.", show_default=False, callback=_on_this_machine)],
    vision: Annotated[
        Path | None,
        typer.Option(
            help="LLaVA or CLIP directory whose vision tower is taken.", show_default=False, callback=_on_this_machine
        ),
    ] = None,
    language: Annotated[
        Path | None,
        typer.Option(
            help="Causal language model directory that becomes the student's.",
            show_default=False,
            callback=_on_this_machine,
        ),
    ] = None,
    dense: Annotated[
        Path | None,
        typer.Option(
            help="Instead of composing: a dense student to upcycle.", show_default=False, callback=_on_this_machine
        ),
    ] = None,
    experts: Annotated[int, typer.Option(min=2, help="Experts a sparse layer, with --dense.")] = 4,
    top_k: Annotated[int, typer.Option(min=1, help="Experts a token is sent to, with --dense.")] = 2,
    layers: Annotated[
        str, typer.Option(help="Sparse layers: every-second, first-half, second-half, all or indices such as 1,3.")
    ] = "every-second",
    seed: Annotated[int, typer.Option(help="Of the fresh adapter or routers.")] = 0,
) -> None:
    """Make a student: from a vision tower, a language model and a fresh adapter, or by sparse upcycling of a dense one.

    The upcycled student gives the same outputs as the dense one it comes from.
    """
    from common.errors import ConfigError

    if (dense is None) == (vision is None and language is None) or (dense is None and not (vision and language)):
        raise typer.BadParameter("give --vision and --language, or --dense alone")
    if dense is None:
        from train.student import compose_student

        _hide_loading_bars()
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
    from train.moe import upcycle_directory

    _hide_loading_bars()
    try:
        pattern = tuple(int(i) for i in layers.split(",")) if layers[:1].isdigit() else layers
        moe = MoEConfig.model_validate({"num_experts": experts, "top_k": top_k, "layers": pattern})
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
            callback=_on_this_machine,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Directory to make.", show_default=False, callback=_on_this_machine)],
) -> None:
    """Write a trained student as a plain Hugging Face directory that transformers and vLLM load, without DeepSpeed."""
    from train.export import export as export_student

    _hide_loading_bars()
    export_student(source, out)
    typer.echo(f"{out}: exported")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for everything the demo makes.")] = Path("demo-run"),
    seed: Annotated[int, typer.Option(help="Seed of data, models and training.")] = 0,
) -> None:
    """Run the whole chain on real handwritten digits: teacher, scores, verification, four stages, export, table."""
    from demo.run import run_demo

    with _resumable():
        run_demo(out, seed=seed)


def _numbers(text: str) -> tuple[int, ...]:
    """Positive whole numbers between commas."""
    if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise typer.BadParameter(f"--gpus {text}: expected numbers such as 1,2,4,8")
    return tuple(map(int, text.split(",")))


@contextmanager
def _resumable() -> Iterator[None]:
    """Tells what an interrupt leaves behind."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted; what was published is whole, and the same command continues from there", err=True)
        raise typer.Exit(130) from None


def _hide_loading_bars() -> None:
    """Transformers' bars for reading and writing weights; ours tell how the work itself goes."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _show(*renderables: Any) -> None:
    from rich.console import Console

    console = Console()
    for renderable in renderables:
        console.print(renderable)


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
