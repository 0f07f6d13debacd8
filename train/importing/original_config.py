"""Reads config.json of an original LLaVA checkpoint, in which every setting stands at the top level."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    StableLmConfig,
)

from common.errors import ModelError, describe_value, shorten
from train.config import MoEConfig
from train.importing.conversation_templates import TemplateName

TextFamily = Literal["llama", "mistral", "qwen", "qwen2", "phi", "stablelm"]

# What the original code's `model_type` begins with, without `moe_`; "llava" alone is LLaVA-1.5's. LLaVA-NeXT calls
# Qwen2 "llava_qwen", the others mean the first Qwen by it: their settings tell them apart.
_FAMILIES: dict[str, TextFamily] = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen",
    "llava_qwen1_5": "qwen2",
    "llava_qwen2": "qwen2",
    "llava_phi": "phi",
    "llava_stablelm": "stablelm",
}
_CONFIG_CLASSES: dict[TextFamily, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen": Qwen2Config,
    "qwen2": Qwen2Config,
    "phi": PhiConfig,
    "stablelm": StableLmConfig,
}
# Settings of model code that came before transformers' classes, under the names of these.
_RENAMED_SETTINGS: dict[TextFamily, dict[str, str]] = {
    "qwen": {
        "layer_norm_epsilon": "rms_norm_eps",
        "rotary_emb_base": "rope_theta",
        "seq_length": "max_position_embeddings",
    },
    "stablelm": {"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"},
}

# Settings of the vision half and of training. Those that change what the model computes are read by name below.
_VISION_PREFIXES = ("mm_", "image_", "video_", "tune_", "freeze_", "unfreeze_", "use_mm", "s2", "tokenizer_")
_TRAINING_KEYS = frozenset(
    ("_name_or_path", "architectures", "model_type", "moe", "lora", "torch_dtype", "transformers_version", "auto_map")
)

_SELECT_STRATEGIES: dict[str, Literal["default", "full"]] = {"patch": "default", "cls_patch": "full"}


@dataclass(frozen=True)
class OriginalConfig:
    """What an original config.json says.

    family              of the language model
    text                its configuration under transformers' names, dense also for a sparse model
    sparse              experts and sparse layers of a sparse model
    vision_name         name of the vision tower, which is only a hub's name, or the path on the machine that trained
    feature_layer, select_strategy, grid
                        as in `train.model.compose.LlavaParts`
    marks_images        True if `<im_start>` and `<im_end>` stand around each image
    unused              names of the settings that have no meaning here
    """

    family: TextFamily
    text: PreTrainedConfig
    sparse: MoEConfig | None
    vision_name: str
    feature_layer: int
    select_strategy: Literal["default", "full"]
    grid: list[list[int]] | None
    marks_images: bool
    unused: tuple[str, ...]

    @property
    def template(self) -> TemplateName:
        """Conversation style that the original code takes for such a model."""
        if self.family == "llama":
            return "v1"
        if self.family == "mistral":
            # LLaVA 1.6 took Mistral's instruction format, BakLLaVA and MoE-LLaVA that of LLaVA-1.5.
            return "v1" if self.grid is None else "mistral"
        return "qwen" if self.family == "qwen2" else self.family


def read_original_config(source: Path) -> OriginalConfig:
    """Reads config.json of an original checkpoint.

    Raises:
        ModelError: it is none, or what it describes has no counterpart among the standard classes; says what.
    """
    raw = _read_json(source / "config.json")
    where = f"{source}/config.json"
    family = _find_family(raw, where)
    _check_projector(raw, where)
    sparse = _read_sparse_layers(raw, where)
    if sparse is not None and family in ("phi", "stablelm"):
        raise ModelError(
            f"{where}: a sparse {family} model, for which neither transformers nor vLLM has a class; only its dense "
            "form can be imported"
        )
    select = raw.get("mm_vision_select_feature", "patch")
    if select not in _SELECT_STRATEGIES:
        raise ModelError(f"{where}: mm_vision_select_feature is {describe_value(select)}, expected patch or cls_patch")
    text, unused = _text_config(raw, family, where)
    return OriginalConfig(
        family=family,
        text=text,
        sparse=sparse,
        vision_name=str(raw.get("mm_vision_tower") or raw.get("mm_image_tower")),
        feature_layer=int(raw.get("mm_vision_select_layer", -2)),
        select_strategy=_SELECT_STRATEGIES[select],
        grid=_read_grid(raw, where),
        marks_images=bool(raw.get("mm_use_im_start_end")),
        unused=unused,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: does not exist; expected the directory of an original LLaVA checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: holds {describe_value(raw)}, expected an object")
    return raw


def _find_family(raw: Mapping[str, Any], where: str) -> TextFamily:
    kind = str(raw.get("model_type"))
    name = kind.removeprefix("moe_")
    if name == "llama3v" or "llm.model" in raw:
        raise ModelError(
            f"{where}: a Llama3-V model, whose resampler and slices have no standard class; it cannot be imported"
        )
    if raw.get("text_config") is not None:
        raise ModelError(f"{where}: is a model directory of transformers already; use it as it is")
    if name not in _FAMILIES or not (raw.get("mm_vision_tower") or raw.get("mm_image_tower")):
        raise ModelError(
            f"{where}: model type {describe_value(kind)}, expected an original checkpoint of LLaVA, BakLLaVA, "
            f"MoE-LLaVA or LLaVA-MoD: {', '.join(_FAMILIES)} or the same with moe_, and the name of a vision tower"
        )
    family = _FAMILIES[name]
    if family == "qwen" and "num_key_value_heads" in raw:
        return "qwen2"
    return family


def _check_projector(raw: Mapping[str, Any], where: str) -> None:
    kind = raw.get("mm_projector_type") or raw.get("image_projector_type") or "linear"
    if kind != "mlp2x_gelu":
        raise ModelError(
            f"{where}: the projector is {describe_value(kind)}, expected mlp2x_gelu, the only one that the standard "
            "classes have"
        )
    if raw.get("mm_video_tower"):
        raise ModelError(f"{where}: has a tower for video, which the standard classes do not have")


def _read_grid(raw: Mapping[str, Any], where: str) -> list[list[int]] | None:
    """Returns the resolutions of LLaVA 1.6's grid, or None for one picture an image."""
    if raw.get("image_aspect_ratio") != "anyres":
        return None
    merge = raw.get("mm_patch_merge_type")
    if merge != "spatial_unpad":
        raise ModelError(f"{where}: mm_patch_merge_type is {describe_value(merge)}, expected spatial_unpad with anyres")
    found = raw.get("image_grid_pinpoints")
    try:
        # The original code writes (width, height), transformers reads (height, width).
        return [[int(height), int(width)] for width, height in found or ()]
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{where}: image_grid_pinpoints is {describe_value(found)}, expected pairs of numbers"
        ) from error


def _read_sparse_layers(raw: Mapping[str, Any], where: str) -> MoEConfig | None:
    moe = raw.get("moe") or {}
    if not moe or not moe.get("moe_enable", True) or not moe.get("num_experts"):
        return None
    layers, experts = moe.get("moe_layers_idx"), moe.get("num_experts")
    if moe.get("use_residual"):
        raise ModelError(f"{where}: moe.use_residual adds a dense network beside the experts, without a standard class")
    if not isinstance(layers, list) or not isinstance(experts, list) or len(set(experts)) != 1:
        raise ModelError(
            f"{where}: moe has layers {describe_value(layers)} and experts {describe_value(experts)}; expected a list "
            "of layers and one number of experts for all"
        )
    top_k = moe.get("top_k_experts")
    if top_k not in (1, 2):
        raise ModelError(f"{where}: moe.top_k_experts is {describe_value(top_k)}, expected 1 or 2")
    return MoEConfig(num_experts=experts[0], top_k=top_k, layers=tuple(layers))


def _text_config(raw: Mapping[str, Any], family: TextFamily, where: str) -> tuple[PreTrainedConfig, tuple[str, ...]]:
    names = _RENAMED_SETTINGS.get(family, {})
    settings = {
        names.get(key, key): value
        for key, value in raw.items()
        if key not in _TRAINING_KEYS and not key.startswith(_VISION_PREFIXES)
    }
    if family == "qwen":
        settings = _as_qwen2(settings, where)
    config_class = _CONFIG_CLASSES[family]
    known = {*config_class().to_dict(), "rope_theta", "rope_scaling", "partial_rotary_factor", "pretraining_tp"}
    unused = sorted(settings.keys() - known)
    try:
        config = config_class(**{key: settings[key] for key in settings.keys() & known})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"{where}: settings of the language model: {shorten(str(error))}") from error
    return config, tuple(unused)


def _as_qwen2(settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns the settings of the first Qwen as those of a Qwen2 that computes the same."""
    try:
        # Its feed-forward network halves the width that the setting names.
        width, heads = int(settings["intermediate_size"]) // 2, int(settings["num_attention_heads"])
        head_dim = int(settings["hidden_size"]) // heads
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: the sizes of the language model cannot be read ({error})") from error
    expected = {"rotary_pct": 1.0, "no_bias": True, "kv_channels": head_dim}
    wrong = [f"{key} = {settings[key]!r}" for key, value in expected.items() if settings.get(key, value) != value]
    if wrong:
        raise ModelError(f"{where}: {', '.join(wrong)}, expected {expected} as Qwen2 computes")
    rest = {key: value for key, value in settings.items() if key not in expected}
    return {**rest, "intermediate_size": width, "num_key_value_heads": heads}
