"""Reads the tensors of an original checkpoint, and gives them the names of transformers' classes.

    directory ── read_tensors ──> {name: tensor} ── split_weights ──> language model, adapter, tower, image_newline
    directory ── merge_adapters ──> the same, with LoRA and separately trained tensors over a base model

Axes: E experts, H hidden size, I width of a feed-forward network.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.errors import ModelError, shorten

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PROJECTOR_FILE = "mm_projector.bin"
_NON_LORA_FILE = "non_lora_trainables.bin"
# Of peft and of the original code, which wraps a model that already has this prefix.
_PEFT_PREFIXES = ("base_model.model.", "base_model.")

_PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.(?:image_spatial_proj\.)?(?P<index>[02])\.(?P<part>weight|bias)")
_TOWER = re.compile(r"model\.(?:vision_tower\.vision_tower|image_tower\.image_tower)\.(?P<name>.+)")
_EXPERT = re.compile(
    r"(?P<mlp>.*\.mlp)\.deepspeed_moe\.experts\.deepspeed_experts\.(?P<number>\d+)\.(?P<part>\w+)\.weight"
)
_ROUTER = re.compile(r"(?P<mlp>.*\.mlp)\.deepspeed_moe\.gate\.wg\.weight")
_LORA = re.compile(r"(?P<layer>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight")

# Names of the first Qwen under Qwen2's, without the layer's number.
_QWEN_LAYER = re.compile(r"transformer\.h\.(?P<number>\d+)\.(?P<rest>.+)")
_QWEN_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
}
# Its network computes c_proj(w1(x) * silu(w2(x))).
_QWEN_FFN = {"w1": "up_proj", "w2": "gate_proj", "c_proj": "down_proj"}


@dataclass
class OriginalWeights:
    """Tensors by the part that they belong to, under the names of the part's class in transformers."""

    language: dict[str, Tensor] = field(default_factory=dict)
    adapter: dict[str, Tensor] = field(default_factory=dict)
    tower: dict[str, Tensor] = field(default_factory=dict)
    image_newline: Tensor | None = None


def read_weights(source: Path, base: Path | None) -> dict[str, Tensor]:
    """Reads all tensors of a checkpoint; one that holds only what was trained is completed from `base`.

    Raises:
        ModelError: a file is missing or damaged, or holds more than tensors; or `base` is needed, or has no use.
    """
    tensors = _read_directory(source)
    partial = [name for name in (_PROJECTOR_FILE, _NON_LORA_FILE, *_ADAPTER_FILES) if (source / name).is_file()]
    if tensors:
        if base is not None:
            raise ModelError(f"{source}: holds a whole model, so --base {base} has no use; leave it out")
        return tensors
    if not partial:
        raise ModelError(f"{source}: holds no weights; expected *.safetensors, pytorch_model*.bin or {_PROJECTOR_FILE}")
    if base is None:
        raise ModelError(
            f"{source}: holds only what was trained ({', '.join(partial)}); name the language model that it was "
            "trained from with --base DIR"
        )
    tensors = _read_directory(base)
    if not tensors:
        raise ModelError(f"{base}: holds no weights; expected *.safetensors or pytorch_model*.bin")
    for name in (_PROJECTOR_FILE, _NON_LORA_FILE):
        if (source / name).is_file():
            tensors.update(_without_peft_prefix(_read_file(source / name)))
    for name in _ADAPTER_FILES:
        if (source / name).is_file():
            _merge_lora(tensors, _read_file(source / name), source)
            break
    return tensors


def split_weights(tensors: Mapping[str, Tensor], *, is_first_qwen: bool) -> OriginalWeights:
    """Sorts tensors by parts, under transformers' names; experts are stacked as [E, 2I, H] and [E, H, I]."""
    found = OriginalWeights()
    experts: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _PROJECTOR.fullmatch(name):
            found.adapter[f"linear_{1 + int(match['index']) // 2}.{match['part']}"] = tensor
        elif match := _TOWER.fullmatch(name):
            found.tower[match["name"]] = tensor
        elif name == "model.image_newline":
            found.image_newline = tensor
        elif not name.endswith(".inv_freq"):
            for renamed, part in (_rename_qwen(name, tensor) if is_first_qwen else {name: tensor}).items():
                if match := _EXPERT.fullmatch(renamed):
                    experts.setdefault((match["mlp"], match["part"]), {})[int(match["number"])] = part
                elif match := _ROUTER.fullmatch(renamed):
                    found.language[f"{match['mlp']}.gate.weight"] = part
                else:
                    found.language[renamed] = part
    for layer in {mlp for mlp, _ in experts}:
        gate, up, down = (_stack(experts[layer, part]) for part in ("gate_proj", "up_proj", "down_proj"))
        found.language[f"{layer}.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        found.language[f"{layer}.experts.down_proj"] = down
    return found


def _stack(by_number: Mapping[int, Tensor]) -> Tensor:
    return torch.stack([by_number[number] for number in sorted(by_number)])


def _rename_qwen(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Returns a tensor of the first Qwen under Qwen2's names; the joined projection of q, k and v is divided."""
    match = _QWEN_LAYER.fullmatch(name)
    if match is None:
        return {_QWEN_NAMES.get(name, name): tensor}
    layer, rest = f"model.layers.{match['number']}", match["rest"]
    if rest.startswith("attn.c_attn."):
        part = rest.rpartition(".")[2]
        return {
            f"{layer}.self_attn.{kind}_proj.{part}": piece for kind, piece in zip("qkv", tensor.chunk(3), strict=True)
        }
    if rest.startswith("mlp."):
        for old, new in _QWEN_FFN.items():
            rest = re.sub(rf"\b{old}\.weight$", f"{new}.weight", rest)
        return {f"{layer}.{rest}": tensor}
    return {f"{layer}.{_QWEN_NAMES.get(rest, rest)}": tensor}


def _read_directory(directory: Path) -> dict[str, Tensor]:
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.name not in _ADAPTER_FILES:
            tensors.update(_read_file(file))
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    """Reads a file of tensors. A pickle is read as tensors only, so that it cannot run code."""
    read: Callable[[Path], Any] = load_file if path.suffix == ".safetensors" else _load_pickled_tensors
    try:
        tensors = read(path)
    except UnpicklingError as error:
        raise ModelError(f"{path}: holds more than tensors, and is not opened ({shorten(str(error))})") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path}: the weights cannot be read ({shorten(str(error))}); copy the file again") from error
    if not isinstance(tensors, dict) or not all(isinstance(each, Tensor) for each in tensors.values()):
        raise ModelError(f"{path}: holds something else than named tensors")
    return tensors


def _load_pickled_tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _without_peft_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for prefix in _PEFT_PREFIXES:
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                break
        renamed[name.removeprefix("model.") if name.startswith("model.model.") else name] = tensor
    return renamed


def _merge_lora(tensors: dict[str, Tensor], lora: Mapping[str, Tensor], source: Path) -> None:
    """Adds scale x B A to each adapted weight, in float32 (arXiv 2106.09685)."""
    path = source / "adapter_config.json"
    try:
        settings = json.loads(path.read_text("utf-8"))
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: r and lora_alpha cannot be read ({error})") from error
    if unsupported := [
        key for key in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out") if settings.get(key)
    ]:
        raise ModelError(f"{path}: {', '.join(unsupported)} cannot be merged; merge it with peft first")
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _without_peft_prefix(lora).items():
        match = _LORA.fullmatch(name)
        if match is None:
            raise ModelError(f"{source}: the adapter holds {name}, expected only lora_A and lora_B weights")
        parts.setdefault(f"{match['layer']}.weight", {})[match["part"]] = tensor
    for name, part in parts.items():
        if name not in tensors or part.keys() != {"A", "B"}:
            raise ModelError(f"{source}: the adapter of {name} fits no weight of the base model, or lacks a half")
        weight = tensors[name]
        change = scale * (part["B"].float() @ part["A"].float())
        if change.shape != weight.shape:
            raise ModelError(
                f"{source}: the adapter of {name} has shape {tuple(change.shape)}, the base {tuple(weight.shape)}"
            )
        tensors[name] = (weight.float() + change).to(weight.dtype)
