"""A trained checkpoint as a plain Hugging Face directory that transformers and vLLM load.

    checkpoint or student directory ── load_student ──> model ── save_student ──> staged directory
    staged directory ── load_student ──> compared tensor by tensor ──> renamed to its final name

DeepSpeed's files, optimizer states and trainer states stay behind.
"""

import functools
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from common.errors import ModelError, StorageError
from train.student import load_student, save_student, staged_directory

__all__ = ["export", "save_student", "staged_directory"]

# As safetensors names them.
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def export(source: Path, out: Path) -> None:
    """Write the model in `source` to `out`: weights, config, generation config, tokenizer, processor.

    Every tensor keeps its value and its dtype; where the source mixes dtypes, the widest holds all of them.

    Args:
        source: a student directory, or a checkpoint with one in it or directly below it.
        out: must not exist, or be empty. It appears complete and verified, or not at all.

    Raises:
        ModelError: `source` holds no model or several, or the written model does not load back equal.
        StorageError: `out` is not empty or cannot be written.
    """
    with staged_directory(out) as staging:
        model_dir = _find_model(source)
        dtype = _widest_dtype(model_dir)
        model = load_student(model_dir, dtype=dtype)
        save_student(model, model_dir, staging)
        _verify(model, load_student(staging, dtype=_widest_dtype(staging)), staging)


def _find_model(source: Path) -> Path:
    if (source / "config.json").is_file():
        return source
    below = sorted(path.parent for path in source.glob("*/config.json"))
    if len(below) != 1:
        raise ModelError(
            f"{source}: found {len(below)} model directories"
            + (f" ({', '.join(path.name for path in below)})" if below else "")
            + ", expected config.json in it or in one directory below it; name the directory of the model"
        )
    return below[0]


def _widest_dtype(model_dir: Path) -> torch.dtype:
    """The dtype that all weights in the directory convert to without loss."""
    found: set[torch.dtype] = set()
    for path in model_dir.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as weights:
                kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 (no dict)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{path}: cannot be read as safetensors ({error}); copy or save it again"
            ) from error
        found |= {_FLOATS[kind] for kind in kinds if kind in _FLOATS}
    if not found:
        raise ModelError(
            f"{model_dir}: found no floating-point weights in *.safetensors; expected a saved model"
        )
    return functools.reduce(torch.promote_types, found)


def _verify(written: PreTrainedModel, read: PreTrainedModel, path: Path) -> None:
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
