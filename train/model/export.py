"""Exports a trained checkpoint as a plain Hugging Face directory that transformers and vLLM load.

    checkpoint or student directory ── load_student ──> model ── save_student ──> staged directory
    staged directory ── load_student ──> compared tensor by tensor ──> renamed to its final name

Files of DeepSpeed, the optimiser and the trainer are not exported.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.errors import ModelError, StorageError
from train.model.chat_files import write_chat_files
from train.model.student import atomic_directory, load_student, save_student, stored_dtype


def export_student(source: Path, out: Path, finish: Callable[[Path, Path], None] | None = None) -> None:
    """Writes the model in `source` to `out`: weights, config, generation config, tokenizer, processor.

    Every tensor keeps its value and its dtype; if the source mixes dtypes, all tensors get the widest of them.

    Args:
        source: a student directory, a stage's output with its `final`, or a checkpoint with one model directory in it.
        out: a new or empty directory. It appears complete and verified, or not at all.
        finish: adds files to the directory before it appears (train.run.published_student); it is given `source` too.

    Raises:
        ModelError: `source` holds no model, or several; see the message.
        StorageError: `out` is not empty, cannot be written, or does not read back equal.
    """
    with atomic_directory(out) as staging:
        model_dir = _resolve_model_dir(source)
        dtype = stored_dtype(model_dir)
        model = load_student(model_dir, dtype=dtype)
        save_student(model, model_dir, staging)
        write_chat_files(staging)
        _check_equal_weights(model, load_student(staging, dtype=stored_dtype(staging)), staging)
        if finish is not None:
            finish(source, staging)


def _resolve_model_dir(source: Path) -> Path:
    """Returns `source` itself, its `final`, or the only model directory directly in it."""
    # A stage's output also has a config.json, but no weights beside it.
    for path in (source, source / "final"):
        if _is_model_dir(path):
            return path
    model_dirs = [path for path in sorted(source.glob("*")) if _is_model_dir(path)]
    if len(model_dirs) != 1:
        raise ModelError(
            f"{source}: found {len(model_dirs)} model directories"
            + (f" ({', '.join(path.name for path in model_dirs)})" if model_dirs else "")
            + ", expected config.json and safetensors in it, in its final/ or in one directory below it; "
            "name the directory of the model"
        )
    return model_dirs[0]


def _is_model_dir(path: Path) -> bool:
    return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def _check_equal_weights(written: PreTrainedModel, read: PreTrainedModel, path: Path) -> None:
    expected, found = written.state_dict(), read.state_dict()
    different = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected or name not in found or not torch.equal(expected[name], found[name])
    )
    if different:
        raise StorageError(
            f"{path}: {len(different)} tensors read back otherwise than they were written, the first is "
            f"{different[0]}; nothing was exported. Check the disk"
        )
