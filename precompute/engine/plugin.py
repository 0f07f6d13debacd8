"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in every process that it starts."""

import importlib
import importlib.util
import logging
import sys


def register() -> None:
    """Installs the capture, and lets vLLM import its LLaVA model without torchvision."""
    from precompute.engine.vllm_patch import install_patches

    # Each process would warn that a machine without a GPU has no Triton.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    _stand_in_for_torchvision()
    install_patches()


def _stand_in_for_torchvision() -> None:
    """Lets vLLM import its LLaVA model where torchvision is absent, as in the CPU environment.

    vLLM takes one helper from a module of transformers that needs torchvision; the module's PIL twin has the
    same helper, so it stands in. With torchvision installed nothing is touched.
    """
    name = "transformers.models.pixtral.image_processing_pixtral"
    if importlib.util.find_spec("torchvision") is None and name not in sys.modules:
        sys.modules[name] = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
