"""The commands that look at shards, check, mend and join them; none loads a model unless it is told to.

Every heavy import stands inside its command, so that `--help` answers at once.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from common.console import JsonOption, check_local_path, hide_loading_bars, report_interrupt, show


def verify_shards(
    path: Annotated[str, typer.Argument(help="Output of precompute-logits or precompute-features.")],
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
    seed: Annotated[int, typer.Option(help="Which random rows --recompute takes.")] = 0,
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

    Exit code 0 if all checks hold, 1 if one does not. Without --recompute no model is loaded. --dataset wants the very
    file that was scored, byte for byte; --against compares with one that may have changed, once all checks hold, and
    gives 1 if a scored sample was changed or removed. --repair deletes nothing, and gives 1 if it moved something.
    """
    import json

    from common.shards.feature_shard import is_feature_cache
    from common.storage.files import parse_location

    if recompute and teacher is None:
        raise typer.BadParameter("--recompute needs --teacher DIR")
    output, root = parse_location(path), None if image_root is None else parse_location(image_root)
    data = None if dataset is None else parse_location(dataset)
    has_features = is_feature_cache(output)
    if has_features:
        from precompute.verify.features import verify_features

        if against:
            raise typer.BadParameter("--against compares scored samples, of which a feature cache has none")
        if recompute and root is None:
            raise typer.BadParameter("--recompute of features needs --image-root: the cache holds no image files")
        report = verify_features(output, data, root, progress=not as_json)
    else:
        from precompute.verify.logits import verify_logits

        report = verify_logits(output, dataset=data, progress=not as_json)
    results: dict[str, Any] = {"verify": report}
    if repair:
        from precompute.verify.repair import repair_output

        results["repair"] = repair_output(report)
    if against and report.ok:
        from precompute.verify.dataset_diff import diff_dataset

        results["against"] = diff_dataset(output, parse_location(against), progress=not as_json)
    elif against:
        typer.echo(f"{against} was not compared with the output, which is not what was written", err=True)
    if recompute and report.ok:
        hide_loading_bars()
        assert teacher is not None
        options: dict[str, Any] = {"image_root": root, "seed": seed, "progress": not as_json}
        if has_features:
            from precompute.verify.recompute_features import recompute_features

            results["recompute"] = recompute_features(output, teacher, recompute, **options)
        else:
            from precompute.verify.recompute_logits import recompute_logits

            results["recompute"] = recompute_logits(output, teacher, recompute, **options)
    if as_json:
        typer.echo(json.dumps({name: json.loads(result.to_json()) for name, result in results.items()}, indent=1))
    else:
        show(*(result.render() for result in results.values()))
    if not all(result.ok for result in results.values()):
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
    """Join outputs that were made apart, or write an output's shards in another size. No score changes.

    Without --samples-per-shard files are copied byte for byte, and what is missing is listed. Outputs that differ in
    teacher, dataset or settings are refused. An interrupted merge continues when it is started again.
    """
    from common.storage.files import parse_location
    from precompute.merge import merge_outputs

    with report_interrupt():
        merged = merge_outputs([parse_location(output) for output in outputs], parse_location(out), samples_per_shard)
    show(merged.render())


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

    from common.storage.files import parse_location, publish
    from precompute.inspection import formatting, html_page, terminal
    from precompute.inspection.collect import inspect_output, open_target
    from precompute.inspection.unpack import check_unpack_destination, unpack_output

    location = parse_location(path)
    if unpack is not None:
        check_unpack_destination(open_target(location), unpack)
    found = inspect_output(
        location,
        sample=sample,
        num_samples=1 if html is None else html_page.NUM_SAMPLES,
        num_alternatives=top,
        max_tokens=tokens if html is None else max(tokens, html_page.MAX_TOKENS),
        max_groups=None if read_all else max_groups,
        tokenizer=tokenizer,
        progress=not as_json,
    )
    if html is not None:
        publish(parse_location(html), html_page.render_page(found).encode())
    exported = None if unpack is None else unpack_output(open_target(location), unpack, progress=not as_json)
    if as_json:
        typer.echo(json.dumps(formatting.to_dict(found), indent=1))
    else:
        show(terminal.render_terminal(found, max_tokens=tokens))
    for line in [
        *([] if html is None else [f"{html}: {len(found.samples):,} samples as a page"]),
        *([] if exported is None else [exported.summary]),
    ]:
        typer.echo(line, err=True)
    if not found.ok or (exported is not None and not exported.ok):
        raise typer.Exit(1)
