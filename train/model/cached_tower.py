"""A LLaVA without its vision tower: cached features stand in for what the tower would have given.

    LlavaConfig ── without_tower ──> a configuration from which transformers builds, and loads, everything else
    model ── whole_config, whole_weights ──> what is saved: the tower's part comes from the directory it was loaded from

The model stays transformers' own class. In the tower's place stands a module without a parameter that hands its input
on, so that the tower's weights are neither loaded nor held, and `pixel_values` takes features [I, P, D], not images.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, LlavaConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from common.errors import ModelError
from common.shards.encoder_identity import tower_tensors

# Of a LLaVA's configuration: what says which tower, and what is taken of it.
_TOWER_SETTINGS = ("vision_config", "vision_feature_layer", "vision_feature_select_strategy")


class _CachedTowerConfig(PreTrainedConfig):
    model_type = "cached_tower"

    # Whether LLaVA drops the first token of what it gets.
    first_is_dropped: bool = False


class _CachedTower(PreTrainedModel):
    """Has no parameters, so nothing of it can be missing; that files have a tower's weights is expected."""

    config_class = _CachedTowerConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)vision_tower\."]

    def __init__(self, config: _CachedTowerConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """The features, in the place of the only hidden state.

        With a first token where LLaVA drops one: what is left is then laid out in memory as a live tower's output is.
        The projector's matrix product takes another path for another layout, and rounds otherwise.
        """
        state = nn.functional.pad(pixel_values, (0, 0, 1, 0)) if self.config.first_is_dropped else pixel_values
        return BaseModelOutputWithPooling(hidden_states=(state,))


def cached_tower_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a LLaVA that is given features instead of images.

    Raises:
        ModelError: not a LLaVA's.
    """
    if not isinstance(config, LlavaConfig):
        raise ModelError(f"found model type '{config.model_type}', expected 'llava': only it has a vision tower")
    AutoModel.register(_CachedTowerConfig, _CachedTower, exist_ok=True)
    layers, width = config.vision_feature_layer, config.vision_config.hidden_size
    is_one = isinstance(layers, int)
    # Of several layers LLaVA joins what it left of each, which lays it out anew.
    is_dropped = is_one and config.vision_feature_select_strategy == "default"
    changed = copy.deepcopy(config)
    changed.vision_config = _CachedTowerConfig(
        hidden_size=width if is_one else width * len(layers), first_is_dropped=is_dropped
    )
    changed.vision_feature_layer = 0
    changed.vision_feature_select_strategy = "default" if is_dropped else "full"
    return changed


def has_cached_tower(model: PreTrainedModel) -> bool:
    """Whether the model takes features in the place of images."""
    return isinstance(getattr(model.config, "vision_config", None), _CachedTowerConfig)


def full_config(model: PreTrainedModel, model_dir: Path) -> PreTrainedConfig:
    """The model's configuration; of a towerless model with what `model_dir` says of the tower."""
    if not has_cached_tower(model):
        return model.config
    config, original = copy.deepcopy(model.config), LlavaConfig.from_pretrained(model_dir, local_files_only=True)
    for name in _TOWER_SETTINGS:
        setattr(config, name, getattr(original, name))
    config.vision_config.dtype = model.dtype
    return config


def full_state_dict(
    model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None, model_dir: Path
) -> dict[str, Tensor] | None:
    """What is to be saved: of a towerless model its weights and the tower's of `model_dir`, in the model's dtype.

    The tower is in memory as long as what is returned.

    Args:
        state_dict: the model's weights where it holds only a part of them (ZeRO-3); None stands for its own.

    Raises:
        ModelError: the tower is not there any more.
    """
    weights = None if state_dict is None else dict(state_dict)
    if not has_cached_tower(model):
        return weights
    weights = weights or model.state_dict()
    for name, stored in tower_tensors(model_dir).items():
        with safe_open(stored.file, framework="pt") as file:
            # The conversion to the hub's names, which comes next, knows the prefix of a tower that is there alone.
            weights[f"model.vision_tower.vision_model.{name}"] = file.get_tensor(stored.name).to(model.dtype)
    return weights
