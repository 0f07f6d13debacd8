"""`precompute-features`. Every heavy import stands inside the command, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from common.console import check_local_path, hide_loading_bars, report_interrupt, show


def precompute_features(
    model: Annotated[
        Path,
        typer.Option(
            help="LLaVA or CLIP directory whose vision tower computes: the student's.",
            show_default=False,
            callback=check_local_path,
        ),
    ],
    dataset: Annotated[
        str, typer.Option(metavar="FILE", help="Dataset of either kind, a file or an address.", show_default=False)
    ],
    output: Annotated[str, typer.Option(metavar="OUT", help="Directory or address to make, or to go on with.")],
    image_root: Annotated[str | None, typer.Option(help="Where the dataset's image paths start.")] = None,
    form: Annotated[
        Literal["bf16", "q8"],
        typer.Option(help="bf16 is exact for training in bf16; q8 takes three quarters of its bytes."),
    ] = "bf16",
    image_aspect_ratio: Annotated[
        Literal["pad", "keep"], typer.Option(help="As data.image_aspect_ratio of the training.")
    ] = "pad",
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Images that the tower takes at once.")] = 16,
    images_per_shard: Annotated[int, typer.Option(min=1, metavar="N", help="Images a file holds.")] = 128,
) -> None:
    """Compute the frozen vision tower's output once for each distinct image, for training with data.features.

    Image files are read twice: first all of them to find those that are the same. An interrupted run continues when
    it is started again. Training then needs neither the tower nor the images.
    """
    from common.storage.files import parse_location
    from precompute.features.run import FeatureSettings, run_features

    hide_loading_bars()
    with report_interrupt():
        summary = run_features(
            FeatureSettings(
                model=model,
                dataset=parse_location(dataset),
                image_root=None if image_root is None else parse_location(image_root),
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
