"""A checkpoint for another number of ranks, in the form that DeepSpeed calls universal.

    checkpoints/checkpoint-200              whole, as its ranks wrote it; stays
    checkpoints/.universal/checkpoint-200   made from it aside, then renamed; goes with the next checkpoint

It holds each parameter and its optimiser state whole, so that any number of ranks takes its part.
"""

import argparse
import contextlib
import os
import shutil
from pathlib import Path

from common.errors import StorageError

DIRECTORY = ".universal"

# What the Trainer itself reads, beside DeepSpeed's states. Random states belong to ranks.
_TRAINER_FILES = ("trainer_state.json", "scheduler.pt")


def to_universal(checkpoint: Path) -> Path:
    """Converts a whole checkpoint of ZeRO 1, 2 or 3, if that was not done before; one rank does it.

    Raises:
        StorageError: it cannot be converted or written.
    """
    from deepspeed.checkpoint import ds_to_universal

    made = checkpoint.parent / DIRECTORY / checkpoint.name
    if made.is_dir():
        return made
    partial = made.with_name(f".{made.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        (state,) = checkpoint.glob("global_step*")
        partial.mkdir(parents=True)
        arguments = argparse.Namespace(
            input_folder=str(state),
            output_folder=str(partial / state.name),
            # Processes of its own would be forked from one with running threads.
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            # ZeRO 1 and 2 leave out a version number that is asked for.
            inject_missing_state=True,
        )
        # It prints its progress.
        with (
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            ds_to_universal.main(arguments)
        for name in _TRAINER_FILES:
            if (checkpoint / name).is_file():
                shutil.copyfile(checkpoint / name, partial / name)
        partial.rename(made)
    except Exception as error:
        # DeepSpeed raises what it likes.
        raise StorageError(
            f"{checkpoint}: cannot be converted for another number of ranks ({type(error).__name__}: {error}); "
            "continue on as many ranks as wrote it, or free space and run the same command again"
        ) from error
    return made


def remove_universal(checkpoints: Path) -> None:
    """Deletes converted checkpoints: a newer one has been written."""
    shutil.rmtree(checkpoints / DIRECTORY, ignore_errors=True)
