"""Imports one heavy package and prints what it is as a JSON object: `python -m doctor.probes NAME`.

`run_probe` of `doctor.facts` starts it. An exception becomes {"error": TEXT}; a package that is not there, {"absent":
true}. What packages print goes to stderr.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any


def _probe_torch() -> dict[str, Any]:
    import torch

    cuda_error = ""
    num_gpus = 0
    if torch.version.cuda or torch.version.hip:
        try:
            torch.cuda.init()
            num_gpus = torch.cuda.device_count()
        except (RuntimeError, AssertionError) as error:
            cuda_error = _first_line(str(error))
    gpus = [torch.cuda.get_device_properties(index) for index in range(num_gpus)]
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip,
        "cuda_error": cuda_error,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
    }


def _probe_transformers() -> dict[str, Any]:
    import transformers

    # transformers imports a model's module when its class is wanted; a package that does not fit shows up there.
    assert transformers.LlavaForConditionalGeneration
    assert transformers.AutoProcessor
    return {"version": transformers.__version__}


def _probe_vllm() -> dict[str, Any]:
    import vllm
    from vllm.platforms import current_platform

    from precompute.engine.vllm_patch import find_patch_problems

    return {
        "version": vllm.__version__,
        "device": current_platform.device_type,
        "has_plugin": any(entry.name == "decant" for entry in entry_points(group="vllm.general_plugins")),
        "patch_problems": find_patch_problems(),
    }


def _probe_accelerate() -> dict[str, Any]:
    import accelerate

    return {"version": accelerate.__version__}


def _probe_deepspeed() -> dict[str, Any]:
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed

    return {"version": deepspeed.__version__}


def _probe_flash_attn() -> dict[str, Any]:
    import flash_attn

    # A kernel that was built for another torch fails here.
    assert flash_attn.flash_attn_func
    return {"version": flash_attn.__version__}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": _probe_torch,
    "transformers": _probe_transformers,
    "vllm": _probe_vllm,
    "accelerate": _probe_accelerate,
    "deepspeed": _probe_deepspeed,
    "flash_attn": _probe_flash_attn,
}


def _probe(name: str) -> dict[str, Any]:
    if importlib.util.find_spec(name) is None:
        return {"absent": True}
    try:
        return PROBES[name]()
    except Exception as error:  # noqa: BLE001 - a broken installation can raise anything, which is what is looked for
        return {"error": f"{type(error).__name__}: {_first_line(str(error))}"}


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def main() -> None:
    """Prints the result of the probe that the first argument names."""
    # Packages and what they start print to stdout too, so the result has a copy of it for itself.
    results = os.dup(1)
    os.dup2(2, 1)
    found = json.dumps(_probe(sys.argv[1])).encode()
    os.write(results, found)


if __name__ == "__main__":
    main()
