"""Converts a checkpoint for another number of ranks, into the form that DeepSpeed calls universal.

    checkpoints/checkpoint-200              as its ranks wrote it; not changed
    checkpoints/.universal/checkpoint-200   the converted one: made anew at each start; removed at the next save

The universal form holds each parameter and its optimiser state undivided, so that any number of ranks can load it.
"""

import argparse
import contextlib
import os
import shutil
from pathlib import Path

from common.errors import StorageError

DIRECTORY = ".universal"

# Files that the Trainer reads beside DeepSpeed's states. Random states are left out, because each belongs to one rank.
_TRAINER_FILES = ("trainer_state.json", "scheduler.pt")


def to_universal(checkpoint: Path) -> Path:
    """Converts a complete checkpoint of ZeRO 1, 2 or 3 and returns the new directory; one rank calls this.

    An earlier conversion is replaced, because nothing says whether its bytes are still those that were written.

    Raises:
        StorageError: the checkpoint cannot be converted, or the result cannot be written.
    """
    from deepspeed.checkpoint import ds_to_universal

    converted = checkpoint.parent / DIRECTORY / checkpoint.name
    partial = converted.with_name(f".{converted.name}.partial")
    try:
        for earlier in (converted, partial):
            if earlier.exists():
                shutil.rmtree(earlier)
        (state,) = checkpoint.glob("global_step*")
        partial.mkdir(parents=True)
        arguments = argparse.Namespace(
            input_folder=str(state),
            output_folder=str(partial / state.name),
            # No worker processes, because they would be forked from a process with running threads.
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            # ZeRO 1 and 2 leave out a version number that the conversion reads.
            inject_missing_state=True,
        )
        # The conversion prints its progress, which nobody needs.
        with (
            Path(os.devnull).open("w", encoding="utf-8") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
        ):
            ds_to_universal.main(arguments)
        for name in _TRAINER_FILES:
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, partial / name)
        partial.rename(converted)
    except Exception as error:
        # DeepSpeed raises exceptions of many types here.
        raise StorageError(
            f"{checkpoint}: cannot be converted for another number of ranks ({type(error).__name__}: {error}); "
            "continue on as many ranks as wrote it, or free space and run the same command again"
        ) from error
    return converted


def remove_universal(checkpoints: Path) -> None:
    """Removes converted checkpoints, which are of no use once a newer checkpoint is written."""
    shutil.rmtree(checkpoints / DIRECTORY, ignore_errors=True)
