"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in every process that it starts."""

import importlib
import importlib.util
import logging
import sys


def register() -> None:
    """Patches vLLM for the capture, and lets it load LLaVAs: without torchvision, and with a linear projector."""
    from precompute.engine.vllm_patch import install_patches

    # Each process would warn that a machine without a GPU has no Triton.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    _alias_pixtral_processor()
    _register_linear_activation()
    install_patches()


def _register_linear_activation() -> None:
    """Gives vLLM the activation that transformers names "linear", the identity: that of a LLaVA's linear projector."""
    from torch import nn
    from vllm.model_executor.layers import activation

    registry = getattr(activation, "_ACTIVATION_REGISTRY", None)
    if registry is not None and "linear" not in registry:
        registry["linear"] = nn.Identity


def _alias_pixtral_processor() -> None:
    """Lets vLLM import its LLaVA model where torchvision is absent, as in the CPU environment.

    vLLM imports one helper from a module of transformers that needs torchvision. The module's PIL version has the same
    helper, so it is entered under the other's name. With torchvision installed nothing changes.
    """
    name = "transformers.models.pixtral.image_processing_pixtral"
    if importlib.util.find_spec("torchvision") is None and name not in sys.modules:
        sys.modules[name] = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
