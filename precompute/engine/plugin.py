"""Entry point of the group `vllm.general_plugins`: vLLM calls `register` in every process that it starts."""

import logging


def register() -> None:
    """Patches vLLM for the capture, and lets it load LLaVAs with a linear projector."""
    from precompute.engine.vllm_patch import install_patches

    # Each process would warn that a machine without a GPU has no Triton.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
    _register_linear_activation()
    install_patches()


def _register_linear_activation() -> None:
    """Gives vLLM the activation that transformers names "linear", the identity: that of a LLaVA's linear projector."""
    from torch import nn
    from vllm.model_executor.layers import activation

    registry = getattr(activation, "_ACTIVATION_REGISTRY", None)
    if registry is not None and "linear" not in registry:
        registry["linear"] = nn.Identity
