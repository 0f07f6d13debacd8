"""Tensors and fingerprint of the vision tower in a model directory, read from its files without torch.

Tensors are found by the names that the tower itself gives them, without the files' prefixes. So a LLaVA that was saved
again and the CLIP that it was composed from have the same tower. Parts of a tower that map its output to the language
model's are the adapter's, and are left out.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.adapter_inputs import FIRST_ADAPTER_LAYER, is_in_adapter
from common.data.images import AspectRatio, read_json
from common.data.model_images import LlavaImages, find_model_images
from common.errors import ModelError, ProvenanceError, shorten
from common.shards.feature_shard import to_bfloat16
from common.shards.manifest import EncoderIdentity, FeatureManifest, list_differences
from common.storage.files import Location

# NumPy's names of safetensors' floating-point types. Other types belong to buffers of old checkpoints, such as position
# ids, and are left out.
_FLOAT_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

# Settings of a CLIP or SigLIP tower that change its output; the others are about training or other parts.
_OUTPUT_SETTINGS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
_TOWER_TYPES = ("clip_vision_model", "siglip_vision_model")

# SigLIP's pooling head, which no LLaVA uses.
_POOLING_HEAD = "head."

_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")

_TOWER_NAME = re.compile(r"(?:^|\.)(?:vision_tower|vision_model|visual)\.(?:vision_model\.)?(.+)")

# Settings outside of the vision tower's own that choose what the adapter gets of it.
_CHOOSING_SETTINGS = ("vision_feature_layer", "vision_feature_select_strategy", "downsample_ratio")

_MAX_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """Tensor in a safetensors file, with its name there and its range of bytes [start, stop)."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def bfloat16_chunks(self) -> Iterator[npt.NDArray[np.uint16]]:
        """Yields the bits of the tensor's values in bfloat16, a few million at a time."""
        values = np.memmap(self.file, _FLOAT_TYPES[self.dtype], "r", self.start, (math.prod(self.shape),))
        for start in range(0, len(values), _MAX_CHUNK_VALUES):
            chunk = np.asarray(values[start : start + _MAX_CHUNK_VALUES])
            yield chunk if self.dtype == "BF16" else to_bfloat16(chunk.astype(np.float32))


def load_vision_config(model_dir: Path) -> tuple[Any, tuple[int, ...], str]:
    """Reads the vision configuration of a LLaVA, CLIP or SigLIP directory.

    Where the last layers of the tower belong to the adapter, what they take is what counts: all tokens of the last
    layer before them.

    Returns:
        The configuration of the tower without the adapter's layers, the numbers of the hidden states that are taken,
        and the select strategy.

    Raises:
        ModelError: it is another kind of model, or the tower is neither CLIP's nor SigLIP's.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
        vision = config.vision_config
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{model_dir}: its config.json names no vision tower ({error}); expected a LLaVA, CLIP or SigLIP directory"
        ) from error
    if config.model_type not in ("llava", "clip", "siglip") or vision.model_type not in _TOWER_TYPES:
        raise ModelError(
            f"{model_dir}: found a {config.model_type} with a {vision.model_type}; expected a LLaVA, CLIP or "
            f"SigLIP directory with one of {', '.join(_TOWER_TYPES)}"
        )
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False
    if (first := getattr(vision, FIRST_ADAPTER_LAYER, None)) is not None:
        vision.num_hidden_layers = first
        return vision, (first,), "full"
    # A CLIP or SigLIP directory does not say which layer, so LLaVA-1.5's is taken. SigLIP has no class token to drop.
    found = getattr(config, "vision_feature_layer", -2)
    layers = tuple(found) if isinstance(found, list | tuple) else (found,)
    whole = "full" if config.model_type == "siglip" else "default"
    strategy = getattr(config, "vision_feature_select_strategy", whole)
    num_states = vision.num_hidden_layers + 1
    if strategy not in ("default", "full") or not all(-num_states <= layer < num_states for layer in layers):
        raise ModelError(
            f"{model_dir}/config.json: vision_feature_layer {found} and vision_feature_select_strategy {strategy!r} "
            f"choose nothing of {num_states} hidden states"
        )
    return vision, tuple(layer % num_states for layer in layers), strategy


def compute_encoder_identity(
    model_dir: Path, aspect_ratio: AspectRatio, num_channels: int | None = None
) -> EncoderIdentity:
    """Computes the fingerprint of the features that a model gives its adapter.

    Reads the tower's tensors once, a few million values at a time; about a second for CLIP ViT-L/14.

    Args:
        model_dir: of a LLaVA, CLIP or SigLIP, or of any model whose processor transformers loads.
        aspect_ratio: what becomes of an image before the processor gets it.
        num_channels: of the features, which only the model itself tells unless it is a LLaVA, CLIP or SigLIP.

    Raises:
        ModelError: the directory has no vision tower, or one that is not supported.
    """
    images = find_model_images(model_dir)
    if images is None or isinstance(images, LlavaImages):
        vision, layers, strategy = load_vision_config(model_dir)
        images = LlavaImages.load(model_dir)
        settings = {name: getattr(vision, name) for name in _OUTPUT_SETTINGS}
        tokens_per_image: int | None = images.num_tower_tokens - (strategy == "default")
        num_channels = vision.hidden_size * len(layers)
    else:
        vision, settings = _load_any_vision_config(model_dir)
        layers, strategy, tokens_per_image = (), "model", None
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tower_tensors(model_dir).items()):
        sha256.update(f"{name} {list(tensor.shape)}\n".encode())
        for bits in tensor.bfloat16_chunks():
            sha256.update(bits.astype("<u2").tobytes())
    return EncoderIdentity.model_validate(
        {
            "architecture": vision.model_type,
            "weights_sha256": sha256.hexdigest(),
            "config_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
            "layers": layers,
            "select_strategy": strategy,
            "processor_sha256": images.sha256,
            "aspect_ratio": aspect_ratio,
            "dtype": "bfloat16",
            "tokens_per_image": tokens_per_image,
            "num_channels": num_channels,
        }
    )


def _load_any_vision_config(model_dir: Path) -> tuple[Any, dict[str, Any]]:
    """Returns the configuration of a model's vision tower, and the settings that change what the adapter gets of it."""
    from transformers import AutoConfig, PreTrainedConfig

    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{model_dir}: its config.json cannot be used ({error})") from error
    # The settings that every configuration has are about training, files and versions.
    general = PreTrainedConfig().to_dict().keys() - {"model_type"}
    settings = {name: value for name, value in config.vision_config.to_dict().items() if name not in general}
    settings |= {name: getattr(config, name) for name in _CHOOSING_SETTINGS if hasattr(config, name)}
    return config.vision_config, settings


def check_encoder(manifest: FeatureManifest, cache: Location, model_dir: Path, aspect_ratio: AspectRatio) -> None:
    """Checks that a model would compute the features that a cache holds.

    Raises:
        ProvenanceError: it would not; names every difference. ModelError: as for `compute_encoder_identity`.
    """
    found = compute_encoder_identity(model_dir, aspect_ratio, manifest.encoder.num_channels)
    names = "the cache", "the model"
    if differences := list_differences(manifest.encoder.model_dump(), found.model_dump(), names=names):
        raise ProvenanceError(
            f"{cache}: these features are not what {model_dir} makes of an image\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nrun precompute-features with this model and these settings, or train without data.features"
        )


def tower_tensors(model_dir: Path) -> dict[str, StoredTensor]:
    """Returns the tower's floating-point tensors, by the names that transformers' vision model gives them.

    SigLIP's pooling head and what belongs to the adapter are left out.

    Raises:
        ModelError: there are no safetensors, a file is damaged, a tensor is there twice, or none belongs to a tower.
    """
    found: dict[str, StoredTensor] = {}
    vision = read_json(model_dir / "config.json").get("vision_config")
    first_adapter_layer = (vision or {}).get(FIRST_ADAPTER_LAYER)
    for file in sorted(model_dir.glob("*.safetensors")):
        for tensor in _list_tensors(file):
            # A tower alone may have no prefix.
            name = _tower_name(tensor.name) if vision else tensor.name.removeprefix("vision_model.")
            if name is None or name.startswith(_POOLING_HEAD) or tensor.dtype not in _FLOAT_TYPES:
                continue
            if is_in_adapter(name):
                continue
            layer = _LAYER.match(name)
            if layer is not None and first_adapter_layer is not None and int(layer[1]) >= first_adapter_layer:
                continue
            if name in found:
                raise ModelError(
                    f"{file}: has {tensor.name}, which {found[name].file} has too; remove one of the files"
                )
            found[name] = tensor
    if not found:
        raise ModelError(
            f"{model_dir}: its *.safetensors hold no vision tower, named vision_tower, vision_model or visual; "
            "expected a LLaVA, CLIP, SigLIP or another model that takes images"
        )
    return found


def load_tower_weights(tower: Any, model_dir: Path) -> None:
    """Loads the tensors of a directory's tower into a vision model of transformers, every one of both.

    Raises:
        ModelError: tensors are missing, unknown, damaged or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    # transformers names them with or without the prefix, depending on its version.
    names = {name.removeprefix("vision_model."): name for name in tower.state_dict()}
    weights = {}
    try:
        for name, stored in tower_tensors(model_dir).items():
            with safe_open(stored.file, framework="pt") as file:
                weights[names.get(name, name)] = file.get_tensor(stored.name)
        tower.load_state_dict(weights, strict=True)
    except (RuntimeError, SafetensorError, OSError) as error:
        raise ModelError(f"{model_dir}: its vision tower cannot be loaded ({shorten(str(error))})") from error


def _tower_name(name: str) -> str | None:
    """Returns the name that the tower itself gives a tensor of a model; None if the tensor is not the tower's."""
    match = _TOWER_NAME.search(name)
    return match[1] if match else None


def _list_tensors(file: Path) -> Iterator[StoredTensor]:
    """Yields the tensors that the header of a safetensors file lists.

    The file has 8 bytes of the header's length, the header as JSON, then the bytes of all tensors.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            num_bytes = file.stat().st_size
            if length > num_bytes - 8:
                raise ValueError(f"a header of {length:,} bytes in a file of {num_bytes:,}")
            header: dict[str, Any] = json.loads(opened.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            if stop > num_bytes:
                raise ValueError(f"{name} ends past the end")
            yield StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), start, stop)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: cannot be read as safetensors ({error}); copy or save it again") from error
