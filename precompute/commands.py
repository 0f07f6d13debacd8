"""Commands of the inference node: score a dataset, cache image features, check, show and join the shards.

Every heavy import stands inside its command, so that `--help` answers at once.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

import typer

from common.console import (
    ConfigOption,
    JsonOption,
    SetOption,
    check_local_path,
    echo,
    hide_loading_bars,
    report_interrupt,
    show,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

    from common.data.images import ImageRoot
    from common.storage.files import Location
    from precompute.report import Report


_FOLLOW_SYMLINKS = typer.Option("--follow-symlinks", help="Open images behind symbolic links, also outside the root.")


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

    Kind "kd" keeps the top of the teacher's distribution for each response token.
    Kind "dpo" keeps the reference log-probs of chosen and rejected answers.
    An interrupted run continues when it is started again.
    """
    from common.config import load_config
    from precompute.config import PrecomputeConfig
    from precompute.logits.nodes import resolve_nodes
    from precompute.logits.run import run_capture

    settings = load_config(PrecomputeConfig, config, overrides or ())
    # Ray deals out the shards itself, so a driver in an srun step is not one of several that share them.
    settings = resolve_nodes(settings, node_rank, num_nodes, {} if engine == "ray" else os.environ)
    with report_interrupt():
        summary = run_capture(settings, engine=engine)
    show(summary.render())
    if summary.interrupted:
        raise typer.Exit(130)
    summary.check_skipped(settings.max_skipped)


def precompute_features(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    model: Annotated[
        Path,
        typer.Option(
            help="Student, or another directory with its vision tower (CLIP, SigLIP).",
            show_default=False,
            callback=check_local_path,
        ),
    ],
    dataset: Annotated[
        str, typer.Option(metavar="FILE", help="Dataset of either kind, a file or an address.", show_default=False)
    ],
    output: Annotated[str, typer.Option(metavar="OUT", help="Directory or address to make, or to go on with.")],
    image_root: Annotated[str | None, typer.Option(help="Where the dataset's image paths start.")] = None,
    follow_symlinks: Annotated[bool, _FOLLOW_SYMLINKS] = False,
    form: Annotated[
        Literal["bf16", "q8"],
        typer.Option(help="bf16 is exact for training in bf16; q8 takes three quarters of its bytes."),
    ] = "bf16",
    image_aspect_ratio: Annotated[
        Literal["pad", "keep"] | None,
        typer.Option(help="The same as data.image_aspect_ratio of the training. Default: pad for LLaVA, else keep."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images that the tower takes at once.")] = 16,
    images_per_shard: Annotated[int, typer.Option(min=1, metavar="N", help="Images in each file.")] = 128,
) -> None:
    """Compute the frozen vision tower's output once for each distinct image, for training with data.features.

    Image files are read twice, because the first reading finds duplicates.
    An interrupted run continues when it is started again.
    Training then needs neither the tower nor the images.
    """
    from common.storage.files import parse_location
    from precompute.features.run import FeatureSettings, run_features

    hide_loading_bars()
    with report_interrupt():
        summary = run_features(
            FeatureSettings(
                model=model,
                dataset=parse_location(dataset),
                image_root=_open_image_root(image_root, follow_symlinks),
                output=parse_location(output),
                form=form,
                aspect_ratio=image_aspect_ratio,
                batch_size=batch_size,
                images_per_shard=images_per_shard,
            )
        )
    show(summary.render())
    if summary.interrupted:
        raise typer.Exit(130)


def verify_shards(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    path: Annotated[str, typer.Argument(metavar="PATH", help="Output of precompute-logits or precompute-features.")],
    dataset: Annotated[str | None, typer.Option(help="The dataset file: check that all of it is covered.")] = None,
    recompute: Annotated[
        int, typer.Option(min=0, metavar="N", help="Compute N random rows (images) again with transformers.")
    ] = 0,
    teacher: Annotated[
        Path | None,
        typer.Option(help="Teacher, or model with the vision tower, for --recompute.", callback=check_local_path),
    ] = None,
    image_root: Annotated[
        str | None,
        typer.Option(help="Where image paths start, for --recompute; of a feature cache, checks the files too."),
    ] = None,
    follow_symlinks: Annotated[bool, _FOLLOW_SYMLINKS] = False,
    seed: Annotated[int, typer.Option(min=0, help="Which random rows --recompute takes.")] = 0,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move what is broken to PATH/broken, so that a rerun fills the gap.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(metavar="DATASET", help="A newer version of the dataset: list samples that it changed, by id."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check everything that training relies on: provenance, checksums, schema, values, coverage.

    The exit code is 0 if all checks hold, 1 if one does not.
    Without --recompute no model is loaded.

    --dataset wants the very file that was scored, byte for byte.
    --against compares with a file that may have changed, once all checks hold.
    It gives exit code 1 if a scored sample was changed or removed.
    --repair deletes nothing, and gives exit code 1 if it moved something.
    """
    from common.shards.feature_shard import is_feature_cache
    from common.storage.files import parse_location

    if recompute and teacher is None:
        raise typer.BadParameter("--recompute needs --teacher DIR")
    output, root = parse_location(path), _open_image_root(image_root, follow_symlinks)
    data = None if dataset is None else parse_location(dataset)
    has_features = is_feature_cache(output)
    if has_features:
        _check_feature_options(against, recompute, root)
    report = _verify(output, data, root, has_features=has_features, progress=not as_json)
    results: dict[str, _Result] = {"verify": report}
    if repair:
        from precompute.verify.repair import repair_output

        results["repair"] = repair_output(report)
    if against and report.ok:
        from precompute.verify.dataset_diff import diff_dataset

        results["against"] = diff_dataset(output, parse_location(against), progress=not as_json)
    elif against:
        echo(f"{against} was not compared with the output, which is not what was written", err=True)
    if recompute and not report.ok:
        echo("nothing was computed again, because the output is not what was written", err=True)
    elif recompute:
        assert teacher is not None
        recompute_rows = _load_recompute(has_features)
        results["recompute"] = recompute_rows(
            output, teacher, recompute, image_root=root, seed=seed, progress=not as_json
        )
    _print_results(results, as_json=as_json)
    if not all(result.ok for result in results.values()):
        raise typer.Exit(1)


def inspect_shards(  # noqa: PLR0913, PLR0917 - each argument is an option of the command
    path: Annotated[str, typer.Argument(metavar="PATH", help="Output of precompute-logits, or one shard file in it.")],
    sample: Annotated[
        str | None, typer.Option(metavar="ID", help="Sample to print: its id, or its position in the dataset.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, metavar="N", help="Best entries of the teacher shown for each token.")] = 5,
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
    check: Annotated[
        Literal["sha256", "size"], typer.Option(help="Compare all bytes of each shard with its receipt, or its size.")
    ] = "sha256",
    as_json: JsonOption = False,
) -> None:
    """Show what shards hold: provenance, counts, bytes by column, distributions, and one sample token by token.

    Needs no model and no GPU.
    The exit code is 1 if something cannot be read; the rest is shown.
    """
    from common.storage.files import parse_location, publish
    from precompute.inspection import formatting, html_document, html_page, terminal
    from precompute.inspection.collect import inspect_output, open_target
    from precompute.inspection.unpack import check_unpack_destination, unpack_output

    location = parse_location(path)
    if html is not None:
        html_document.check_page_destination(parse_location(html))
    if unpack is not None:
        check_unpack_destination(open_target(location, check), unpack)
    found = inspect_output(
        location,
        sample=sample,
        num_samples=1 if html is None else html_page.NUM_SAMPLES,
        num_alternatives=top,
        max_tokens=tokens if html is None else max(tokens, html_page.MAX_TOKENS),
        max_groups=None if read_all else max_groups,
        tokenizer=tokenizer,
        progress=not as_json,
        check=check,
    )
    if html is not None:
        publish(parse_location(html), html_page.render_page(found).encode())
    exported = None if unpack is None else unpack_output(open_target(location, check), unpack, progress=not as_json)
    if as_json:
        typer.echo(json.dumps(formatting.to_dict(found), indent=1))
    else:
        show(terminal.render_terminal(found, max_tokens=tokens))
    if html is not None:
        echo(f"{html}: {len(found.samples):,} samples as a page", err=True)
    if exported is not None:
        echo(exported.summary, err=True)
    if not found.ok or (exported is not None and not exported.ok):
        raise typer.Exit(1)


def merge_shards(
    outputs: Annotated[
        list[str], typer.Argument(metavar="OUTPUT", help="Outputs of precompute-logits with one manifest.")
    ],
    out: Annotated[
        str, typer.Option(metavar="OUT", help="Directory or address to make, or to go on with.", show_default=False)
    ],
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Write shards of N samples; all shards must be there.")
    ] = None,
) -> None:
    """Join outputs that were made apart, or write an output's shards in another size.

    No score changes.
    Without --samples-per-shard files are copied byte for byte.
    Shards that are missing are listed.
    Outputs that differ in teacher, dataset or settings are refused.
    An interrupted merge continues when it is started again.
    """
    from common.storage.files import parse_location
    from precompute.merge import merge_outputs

    with report_interrupt():
        merged = merge_outputs([parse_location(output) for output in outputs], parse_location(out), samples_per_shard)
    show(merged.render())


class _Result(Protocol):
    """Outcome of a step of `verify-shards`, for a terminal and as JSON."""

    @property
    def ok(self) -> bool: ...

    def to_json(self) -> str: ...

    def render(self) -> "RenderableType": ...


def _open_image_root(text: str | None, follow_symlinks: bool) -> "ImageRoot | None":
    from common.data.images import image_root_of
    from common.storage.files import parse_location

    return image_root_of(None if text is None else parse_location(text), follow_symlinks)


def _check_feature_options(against: str | None, recompute: int, image_root: "ImageRoot | None") -> None:
    """Raises typer.BadParameter if an option has no meaning for a feature cache."""
    if against:
        raise typer.BadParameter("--against compares scored samples, of which a feature cache has none")
    if recompute and image_root is None:
        raise typer.BadParameter("--recompute of features needs --image-root: the cache holds no image files")


def _verify(
    output: "Location",
    dataset: "Location | None",
    image_root: "ImageRoot | None",
    *,
    has_features: bool,
    progress: bool,
) -> "Report":
    if has_features:
        from precompute.verify.features import verify_features

        return verify_features(output, dataset, image_root, progress=progress)
    from precompute.verify.logits import verify_logits

    return verify_logits(output, dataset=dataset, progress=progress)


def _load_recompute(has_features: bool) -> Callable[..., _Result]:
    """Returns the function that computes random rows (images) again, after the import of transformers that it needs."""
    hide_loading_bars()
    if has_features:
        from precompute.verify.recompute_features import recompute_features

        return recompute_features
    from precompute.verify.recompute_logits import recompute_logits

    return recompute_logits


def _print_results(results: Mapping[str, _Result], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({name: json.loads(result.to_json()) for name, result in results.items()}, indent=1))
    else:
        show(*(result.render() for result in results.values()))
