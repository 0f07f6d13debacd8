"""Random checkpoints in the layouts of the original LLaVA code, and a plain forward pass over their tensors.

The forward pass knows the original names only, and is written from the papers: it shares nothing with the importer.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests.support.models import IMAGE_SIZE, PATCH_SIZE, randomise, tiny_tokenizer

HIDDEN, WIDTH, HEADS, LAYERS, TOWER_WIDTH = 32, 48, 4, 3, 64
HEAD = HIDDEN // HEADS
IMAGE = -200
EPS, THETA = 1e-5, 10000.0
GRID = [[2 * IMAGE_SIZE, IMAGE_SIZE], [IMAGE_SIZE, 2 * IMAGE_SIZE], [2 * IMAGE_SIZE, 2 * IMAGE_SIZE]]

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "mm_hidden_size": TOWER_WIDTH,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
    "tune_mm_mlp_adapter": False,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "torch_dtype": "float32",
    "some_new_setting": 7,
}
LLAMA_LIKE = {**COMMON, "intermediate_size": WIDTH, "num_key_value_heads": 2, "rms_norm_eps": EPS, "rope_theta": THETA}
LLAVA_15 = {
    **LLAMA_LIKE,
    "model_type": "llava",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
}
IMAGE_TOWER = {"mm_image_tower": "openai/clip-vit-large-patch14-336", "image_projector_type": "mlp2x_gelu"}
MOE = {
    "moe": {
        "moe_enable": True,
        "moe_mode": "sparse",
        "moe_layers_idx": [0, 2],
        "num_experts": [3, 3],
        "top_k_experts": 2,
        "use_residual": False,
    }
}

CONFIGS: dict[str, dict[str, Any]] = {
    "llava-1.5": LLAVA_15,
    "llava-1.6": {
        **LLAVA_15,
        "model_type": "llava_llama",
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[width, height] for height, width in GRID],
    },
    "bakllava": {**LLAVA_15, "model_type": "llava_mistral", "sliding_window": 4096},
    "llava-mod-dense": {**LLAMA_LIKE, **IMAGE_TOWER, "model_type": "llava_qwen2", "use_sliding_window": False},
    "llava-mod": {**LLAMA_LIKE, **IMAGE_TOWER, **MOE, "model_type": "moe_llava_qwen2", "use_sliding_window": False},
    "moe-llava-qwen": {
        **COMMON,
        **IMAGE_TOWER,
        "moe": {**MOE["moe"], "top_k_experts": 1},
        "model_type": "moe_llava_qwen",
        "intermediate_size": 2 * WIDTH,
        "layer_norm_epsilon": EPS,
        "rotary_emb_base": THETA,
        "rotary_pct": 1.0,
        "no_bias": True,
        "seq_length": 512,
        "kv_channels": HEAD,
    },
    "llava-phi": {
        **COMMON,
        **IMAGE_TOWER,
        "model_type": "llava_phi",
        "intermediate_size": WIDTH,
        "hidden_act": "gelu_new",
        "layer_norm_eps": EPS,
        "partial_rotary_factor": 0.5,
        "rope_theta": THETA,
        "num_key_value_heads": HEADS,
    },
    "llava-stablelm": {
        **COMMON,
        **IMAGE_TOWER,
        "model_type": "llava_stablelm",
        "intermediate_size": WIDTH,
        "norm_eps": EPS,
        "rope_pct": 0.5,
        "rope_theta": THETA,
        "num_key_value_heads": HEADS,
        "use_qkv_bias": True,
    },
}


@dataclass(frozen=True)
class Original:
    """A checkpoint: its configuration, tensors under the original names, and the directory of its vision tower."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    directory: Path
    vision: Path


def make_vision_tower(directory: Path) -> Path:
    """Saves a random CLIP tower with its image processor, and returns the directory."""
    config = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
    )
    tower = CLIPVisionModel(config)
    randomise(tower.named_parameters(), seed=5)
    tower.save_pretrained(directory)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(directory)
    return directory


def make_original(root: Path, name: str, *, bos: bool = False) -> Original:
    """Saves a random checkpoint of one of `CONFIGS`, without its vision tower, in two pickled files."""
    directory = root / name
    directory.mkdir(parents=True)
    tokenizer = tiny_tokenizer(directory, image_token=False)
    tokenizer.add_tokens(["</s>", "<im_start>", "<im_end>", *(["<s>"] if bos else [])], special_tokens=True)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    config = {**CONFIGS[name], "vocab_size": len(tokenizer)}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = make_tensors(config, len(tokenizer))
    save_pickled(directory, tensors)
    return Original(config, tensors, directory, make_vision_tower(root / "vision"))


def save_pickled(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Writes tensors as the original code does: pickled, in two files."""
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        torch.save({key: tensors[key] for key in part}, directory / f"pytorch_model-0000{number}-of-00002.bin")


class _TensorMaker:
    """Draws random tensors under the original names."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.kind: str = config["model_type"]
        self.tensors: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(3)

    def draw(self, *shape: int, scale: float = 0.2) -> Tensor:
        return torch.randn(*shape, generator=self._generator) * scale

    def add_linear(self, name: str, rows: int, columns: int, *, bias: bool) -> None:
        self.tensors[f"{name}.weight"] = self.draw(rows, columns)
        if bias:
            self.tensors[f"{name}.bias"] = self.draw(rows)

    def add_norm(self, name: str) -> None:
        self.tensors[f"{name}.weight"] = 1 + self.draw(HIDDEN)
        if self.kind in ("llava_phi", "llava_stablelm"):
            self.tensors[f"{name}.bias"] = self.draw(HIDDEN)

    def add_network(self, mlp: str, parts: dict[str, tuple[int, int]], layer: int) -> None:
        moe = self.config.get("moe", {})
        num_experts = moe["num_experts"][0] if layer in moe.get("moe_layers_idx", ()) else 0
        if num_experts:
            self.tensors[f"{mlp}.deepspeed_moe.gate.wg.weight"] = self.draw(num_experts, HIDDEN, scale=1.0)
        homes = [f"{mlp}.deepspeed_moe.experts.deepspeed_experts.{e}" for e in range(num_experts)] or [mlp]
        for home in homes:
            for part, shape in parts.items():
                self.add_linear(f"{home}.{part}", *shape, bias=False)

    def add_qwen1_layer(self, layer: int) -> None:
        base = f"transformer.h.{layer}"
        self.add_norm(f"{base}.ln_1")
        self.add_norm(f"{base}.ln_2")
        self.add_linear(f"{base}.attn.c_attn", 3 * HIDDEN, HIDDEN, bias=True)
        self.add_linear(f"{base}.attn.c_proj", HIDDEN, HIDDEN, bias=False)
        parts = {"w1": (WIDTH, HIDDEN), "w2": (WIDTH, HIDDEN), "c_proj": (HIDDEN, WIDTH)}
        self.add_network(f"{base}.mlp", parts, layer)

    def add_phi_layer(self, layer: int) -> None:
        base = f"model.layers.{layer}"
        self.add_norm(f"{base}.input_layernorm")
        for name in ("q_proj", "k_proj", "v_proj", "dense"):
            self.add_linear(f"{base}.self_attn.{name}", HIDDEN, HIDDEN, bias=True)
        self.add_linear(f"{base}.mlp.fc1", WIDTH, HIDDEN, bias=True)
        self.add_linear(f"{base}.mlp.fc2", HIDDEN, WIDTH, bias=True)

    def add_llama_like_layer(self, layer: int) -> None:
        base = f"model.layers.{layer}"
        self.add_norm(f"{base}.input_layernorm")
        self.add_norm(f"{base}.post_attention_layernorm")
        keys = HEAD * self.config["num_key_value_heads"]
        for name, rows in (("q", HIDDEN), ("k", keys), ("v", keys)):
            has_bias = "qwen" in self.kind or self.kind == "llava_stablelm"
            self.add_linear(f"{base}.self_attn.{name}_proj", rows, HIDDEN, bias=has_bias)
        self.add_linear(f"{base}.self_attn.o_proj", HIDDEN, HIDDEN, bias=False)
        self.tensors[f"{base}.self_attn.rotary_emb.inv_freq"] = self.draw(HEAD // 2)
        parts = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
        self.add_network(f"{base}.mlp", parts, layer)


def make_tensors(config: dict[str, Any], vocab_size: int) -> dict[str, Tensor]:
    """Returns random tensors under the original names."""
    maker = _TensorMaker(config)
    kind = maker.kind
    for index, inputs in ((0, TOWER_WIDTH), (2, HIDDEN)):
        maker.add_linear(f"{projector_name(config)}.{index}", HIDDEN, inputs, bias=True)
    if config["image_aspect_ratio"] == "anyres":
        maker.tensors["model.image_newline"] = maker.draw(HIDDEN)
    maker.tensors[embedding_name(kind)] = maker.draw(vocab_size, HIDDEN)
    maker.add_linear("lm_head", vocab_size, HIDDEN, bias=kind == "llava_phi")
    add_layer = {"moe_llava_qwen": maker.add_qwen1_layer, "llava_phi": maker.add_phi_layer}
    for layer in range(LAYERS):
        add_layer.get(kind, maker.add_llama_like_layer)(layer)
    maker.add_norm(final_norm_name(kind))
    return maker.tensors


def projector_name(config: dict[str, Any]) -> str:
    return "model.mm_projector.image_spatial_proj" if "mm_image_tower" in config else "model.mm_projector"


def embedding_name(kind: str) -> str:
    return "transformer.wte.weight" if kind == "moe_llava_qwen" else "model.embed_tokens.weight"


def final_norm_name(kind: str) -> str:
    return {"moe_llava_qwen": "transformer.ln_f", "llava_phi": "model.final_layernorm"}.get(kind, "model.norm")


class PlainModel:
    """Forward pass over original tensors, in float32, without a class of transformers but the frozen CLIP tower."""

    def __init__(self, original: Original) -> None:
        self.config, self.tensors = original.config, original.tensors
        self.kind = self.config["model_type"]
        self.tower = CLIPVisionModel.from_pretrained(original.vision, dtype=torch.float32).eval()

    def logits(self, ids: list[int], images: list[Tensor]) -> Tensor:
        """Returns the logits [T', V] of token ids, in which -200 stands for the next image's features [P, H]."""
        tensors = self.tensors
        words = tensors[embedding_name(self.kind)]
        remaining = iter(images)
        hidden = torch.cat([next(remaining) if token == IMAGE else words[[token]] for token in ids])
        for layer in range(LAYERS):
            hidden = self._layer(hidden, layer)
        return functional.linear(
            self._norm(hidden, final_norm_name(self.kind)), tensors["lm_head.weight"], tensors.get("lm_head.bias")
        )

    def image_features(self, pixels: Tensor) -> Tensor:
        """Returns the projected patches [N, P, H] of pictures [N, 3, H, W]."""
        with torch.no_grad():
            states = self.tower(pixels, output_hidden_states=True).hidden_states
        features = states[self.config["mm_vision_select_layer"]][:, 1:]
        base = projector_name(self.config)
        first, second = (
            (self.tensors[f"{base}.{index}.weight"], self.tensors[f"{base}.{index}.bias"]) for index in (0, 2)
        )
        return functional.linear(functional.gelu(functional.linear(features, *first)), *second)

    def grid_features(self, pixels: Tensor, rows: int, columns: int, size: tuple[int, int]) -> Tensor:
        """Returns the features [P, H] of an image of `size` (height, width) cut into rows x columns pictures.

        `pixels` holds the whole image first, then the pictures in reading order. The padding that made the image fit
        the grid is cut off, and each row of patches ends with the newline.
        """
        features = self.image_features(pixels)
        side = IMAGE_SIZE // PATCH_SIZE
        patches = features[1:].view(rows, columns, side, side, HIDDEN)
        patches = torch.cat([torch.cat(list(row), dim=1) for row in patches], dim=0)
        height, width = patches.shape[:2]
        if size[1] / size[0] > width / height:
            cut = (height - int(round(size[0] * width / size[1], 7))) // 2
            patches = patches[cut : height - cut]
        else:
            cut = (width - int(round(size[1] * height / size[0], 7))) // 2
            patches = patches[:, cut : width - cut]
        newline = self.tensors["model.image_newline"].expand(len(patches), 1, HIDDEN)
        return torch.cat([features[0], torch.cat([patches, newline], 1).flatten(0, 1)])

    def _norm(self, hidden: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        if self.kind in ("llava_phi", "llava_stablelm"):
            return functional.layer_norm(hidden, (HIDDEN,), weight, bias, EPS)
        return weight * hidden / (hidden.square().mean(-1, keepdim=True) + EPS).sqrt()

    def _layer(self, hidden: Tensor, layer: int) -> Tensor:
        if self.kind == "llava_phi":
            base = f"model.layers.{layer}"
            normed = self._norm(hidden, f"{base}.input_layernorm")
            inner = functional.gelu(self._linear(normed, f"{base}.mlp.fc1"), approximate="tanh")
            return hidden + self._attention(normed, base) + self._linear(inner, f"{base}.mlp.fc2")
        is_qwen1 = self.kind == "moe_llava_qwen"
        base = f"transformer.h.{layer}" if is_qwen1 else f"model.layers.{layer}"
        norms = ("ln_1", "ln_2") if is_qwen1 else ("input_layernorm", "post_attention_layernorm")
        hidden = hidden + self._attention(self._norm(hidden, f"{base}.{norms[0]}"), base)
        return hidden + self._network(self._norm(hidden, f"{base}.{norms[1]}"), f"{base}.mlp")

    def _linear(self, inputs: Tensor, name: str) -> Tensor:
        return functional.linear(inputs, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _attention(self, inputs: Tensor, base: str) -> Tensor:
        if self.kind == "moe_llava_qwen":
            query, key, value = self._linear(inputs, f"{base}.attn.c_attn").split(HIDDEN, dim=1)
            out = f"{base}.attn.c_proj"
        else:
            query, key, value = (self._linear(inputs, f"{base}.self_attn.{name}_proj") for name in "qkv")
            out = f"{base}.self_attn.{'dense' if self.kind == 'llava_phi' else 'o_proj'}"
        rotated = int(HEAD * self.config.get("partial_rotary_factor", self.config.get("rope_pct", 1.0)))
        query, key, value = (each.view(len(inputs), -1, HEAD).transpose(0, 1) for each in (query, key, value))
        query, key = _rotate(query, rotated), _rotate(key, rotated)
        key, value = (each.repeat_interleave(HEADS // len(each), 0) for each in (key, value))
        scores = query @ key.transpose(1, 2) / HEAD**0.5
        mask = torch.ones(len(inputs), len(inputs)).tril().bool()
        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
        return self._linear(mixed.transpose(0, 1).flatten(1), out)

    def _network(self, inputs: Tensor, mlp: str) -> Tensor:
        router = self.tensors.get(f"{mlp}.deepspeed_moe.gate.wg.weight")
        if router is None:
            return self._gated(inputs, mlp)
        top_k = self.config["moe"]["top_k_experts"]
        chances = functional.linear(inputs, router).softmax(-1)
        output = torch.zeros_like(inputs)
        for token, row in enumerate(chances):
            best = row.topk(top_k)
            # DeepSpeed divides by the sum of two weights, and takes the weight of a single expert as it is.
            shares = best.values / best.values.sum() if top_k == 2 else best.values
            for share, expert in zip(shares, best.indices.tolist(), strict=True):
                home = f"{mlp}.deepspeed_moe.experts.deepspeed_experts.{expert}"
                output[token] += share * self._gated(inputs[[token]], home)[0]
        return output

    def _gated(self, inputs: Tensor, home: str) -> Tensor:
        gate, up, down = (
            ("w2", "w1", "c_proj") if self.kind == "moe_llava_qwen" else ("gate_proj", "up_proj", "down_proj")
        )
        return self._linear(
            functional.silu(self._linear(inputs, f"{home}.{gate}")) * self._linear(inputs, f"{home}.{up}"),
            f"{home}.{down}",
        )


def _rotate(heads: Tensor, width: int) -> Tensor:
    """Applies rotary embeddings (arXiv 2104.09864) to the first `width` entries of [heads, T, HEAD], in halves."""
    angles = torch.arange(heads.shape[1])[:, None] / THETA ** (torch.arange(0, width, 2) / width)
    cos, sin = angles.cos(), angles.sin()
    first, second, rest = heads[..., : width // 2], heads[..., width // 2 : width], heads[..., width:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)
