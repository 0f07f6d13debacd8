"""Makes the adapter of a composed student, and tells which of a student's parameters belong to it.

    mlp          linear, GELU, linear: LLaVA-1.5's (arXiv 2310.03744)
    linear       one linear layer: LLaVA's first (arXiv 2304.08485)
    attention    two self-attention blocks, then `mlp`

Every student stays a plain LLaVA. LLaVA's projector always has two linear layers, so that the second one of `linear`
is the identity and stays frozen, and its activation is the identity too. The blocks of `attention` are layers of the
vision tower's own kind, behind the layer whose output was taken; `first_adapter_layer` in the tower's configuration is
the number of the first.
"""

import re

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from common.adapter_inputs import FIRST_ADAPTER_LAYER

# The activation of a projector that is linear, as transformers names the identity.
LINEAR = "linear"

_NUM_ATTENTION_BLOCKS = 2
_TOWER_LAYER = re.compile(r"\.vision_tower\.(?:.+\.)?layers\.(\d+)\.")


def add_attention_blocks(tower: PreTrainedModel, feature_layer: int, generator: torch.Generator) -> None:
    """Puts two fresh self-attention blocks behind the layer whose output is taken; the layers after that are dropped.

    The last linear layers of both branches of a block are zero, so that the tower's last hidden state is at first the
    one that was taken. The others are initialised as `nn.Linear` is by default.

    Args:
        tower: a CLIP or SigLIP vision tower; it and its configuration are changed.
        feature_layer: number of the hidden state that is taken, counted from the end if negative.
        generator: draws the weights.
    """
    config, layers = tower.config, tower.encoder.layers
    num_kept = feature_layer % (len(layers) + 1)
    del layers[num_kept:]
    for _ in range(_NUM_ATTENTION_BLOCKS):
        block = type(layers[0])(config).to(tower.dtype)
        for module in block.modules():
            if isinstance(module, nn.Linear):
                initialise_linear(module, generator)
        for branch in (block.self_attn.out_proj, block.mlp.fc2):
            nn.init.zeros_(branch.weight)
            nn.init.zeros_(branch.bias)
        layers.append(block)
    config.num_hidden_layers = len(layers)
    setattr(config, FIRST_ADAPTER_LAYER, num_kept)


def initialise_projector(projector: nn.Module, generator: torch.Generator, *, is_linear: bool) -> None:
    """Initialises LLaVA's projector: linear layers as `nn.Linear` is by default, or the second one as the identity."""
    initialise_linear(projector.linear_1, generator)
    if is_linear:
        nn.init.eye_(projector.linear_2.weight)
        nn.init.zeros_(projector.linear_2.bias)
    else:
        initialise_linear(projector.linear_2, generator)


def initialise_linear(linear: nn.Linear, generator: torch.Generator) -> None:
    """Draws weights and biases uniformly from +-1/sqrt(inputs)."""
    bound = linear.in_features**-0.5
    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    nn.init.uniform_(linear.bias, -bound, bound, generator=generator)


def is_adapter_block(parameter_name: str, config: PreTrainedConfig) -> bool:
    """Returns True if a parameter of this name belongs to a self-attention block of the adapter."""
    first = getattr(getattr(config, "vision_config", None), FIRST_ADAPTER_LAYER, None)
    layer = _TOWER_LAYER.search(f".{parameter_name}")
    return first is not None and layer is not None and int(layer[1]) >= first


def is_frozen_identity(parameter_name: str, config: PreTrainedConfig) -> bool:
    """Returns True if a parameter of this name is the identity that follows a linear projector."""
    is_linear = getattr(config, "projector_hidden_act", None) == LINEAR
    return is_linear and ".multi_modal_projector.linear_2." in f".{parameter_name}"
