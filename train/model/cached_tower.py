"""Replaces the vision tower of a LLaVA by cached features of its output (of others: train.model.skipped_tower).

    LlavaConfig ── cached_tower_config ──> configuration from which transformers builds and loads everything else
    model ── full_config, full_state_dict ──> what is saved; the tower's part comes from the original model directory

The model stays transformers' own class. The tower is replaced by a module that returns its input, so that the tower's
weights are neither loaded nor held, and `pixel_values` are features, not images. It has no parameters, but for those of
the adapter's self-attention blocks, which are the tower's last layers (train.model.adapter).

Legend: I images, P tokens that the tower gives an image, D channels.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, LlavaConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from common.adapter_inputs import FIRST_ADAPTER_LAYER
from common.errors import ModelError
from common.shards.encoder_identity import tower_tensors

# The settings of a LLaVA that choose the tower and which of its outputs are used.
_TOWER_SETTINGS = ("vision_config", "vision_feature_layer", "vision_feature_select_strategy")

# The self-attention blocks of an adapter, by the type of its tower.
_LAYERS: dict[str, type[nn.Module]] = {"clip_vision_model": CLIPEncoderLayer, "siglip_vision_model": SiglipEncoderLayer}


class _CachedTowerConfig(PreTrainedConfig):
    model_type = "cached_tower"

    # True if LLaVA drops the first token of the tower's output.
    drops_first_token: bool = False
    # The tower's own configuration, and the number of its first layer that belongs to the adapter, if there is one.
    tower: PreTrainedConfig | None = None
    first_adapter_layer: int | None = None


class _CachedTower(PreTrainedModel):
    """A vision tower that returns its input, or what the adapter's self-attention blocks make of it.

    It has no parameters but those of the blocks.
    """

    config_class = _CachedTowerConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    # The student's files still hold the weights of its tower, which are not loaded.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)vision_tower\."]

    def __init__(self, config: _CachedTowerConfig) -> None:
        super().__init__(config)
        if config.tower is not None and config.first_adapter_layer is not None:
            tower = config.tower
            tower._attn_implementation = config._attn_implementation  # noqa: SLF001 - transformers has no public name
            numbers = range(config.first_adapter_layer, tower.num_hidden_layers)
            # The modules have the names of the tower's own, as they are in the student's files.
            self.vision_model = nn.Module()
            self.vision_model.encoder = nn.Module()
            self.vision_model.encoder.layers = nn.ModuleDict(
                {str(n): _LAYERS[tower.model_type](tower) for n in numbers}
            )
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Returns the features [I, P, D] as the only hidden state, or what the blocks of the adapter make of them.

        If LLaVA drops the first token and there are no blocks, a first token of zeros is put before the features. The
        view that LLaVA takes of it then has the memory layout of a live tower's output. With another layout the
        projector's matrix product would take another path and round differently.
        """
        state = nn.functional.pad(pixel_values, (0, 0, 1, 0)) if self.config.drops_first_token else pixel_values
        if self.config.tower is not None:
            for block in self.vision_model.encoder.layers.values():
                state = block(state, None)
        return BaseModelOutputWithPooling(hidden_states=(state,))


def cached_tower_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the configuration of the same LLaVA with features as input instead of images; any other one unchanged.

    Raises:
        ModelError: the configuration is that of a model without a vision tower.
    """
    if getattr(config, "vision_config", None) is None:
        raise ModelError(f"found model type '{config.model_type}', expected one with a vision tower")
    if not isinstance(config, LlavaConfig) or config.vision_config.model_type not in _LAYERS:
        return config
    AutoModel.register(_CachedTowerConfig, _CachedTower, exist_ok=True)
    layers, width = config.vision_feature_layer, config.vision_config.hidden_size
    is_single_layer = isinstance(layers, int)
    first = getattr(config.vision_config, FIRST_ADAPTER_LAYER, None)
    # With several layers LLaVA drops the first token of each and then copies them into one tensor, so that there is no
    # view whose layout has to be kept.
    drops_first_token = is_single_layer and first is None and config.vision_feature_select_strategy == "default"
    changed = copy.deepcopy(config)
    changed.vision_config = _CachedTowerConfig(
        hidden_size=width if is_single_layer else width * len(layers),
        drops_first_token=drops_first_token,
        **({} if first is None else {"tower": copy.deepcopy(config.vision_config), FIRST_ADAPTER_LAYER: first}),
    )
    changed.vision_feature_layer = 0
    if first is None:
        changed.vision_feature_select_strategy = "default" if drops_first_token else "full"
    return changed


def has_cached_tower(model: PreTrainedModel) -> bool:
    """Returns True if the model takes features instead of images."""
    return isinstance(getattr(model.config, "vision_config", None), _CachedTowerConfig)


def full_config(model: PreTrainedModel, model_dir: Path) -> PreTrainedConfig:
    """Returns the model's configuration; if its tower is cached, with the tower's settings of `model_dir`."""
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
    """Returns the weights to save; if the tower is cached, with those of `model_dir`'s tower in the model's dtype.

    The tower stays in memory as long as the returned dictionary.

    Args:
        state_dict: the whole weights if the model itself holds only a part of them (ZeRO-3); None for its own.

    Returns:
        None if `state_dict` is None and the model has a live tower, so that transformers saves the model's own weights.

    Raises:
        ModelError: `model_dir` has no tower any more.
    """
    weights = None if state_dict is None else dict(state_dict)
    if not has_cached_tower(model):
        return weights
    weights = weights or model.state_dict()
    for name, stored in tower_tensors(model_dir).items():
        with safe_open(stored.file, framework="pt") as file:
            # The prefix that a live tower's weights have before transformers converts names to the hub's.
            weights[f"model.vision_tower.vision_model.{name}"] = file.get_tensor(stored.name).to(model.dtype)
    return weights
