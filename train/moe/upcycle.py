"""Upcycles a dense student to a sparse one (sparse upcycling, arXiv 2212.05055).

Every chosen feed-forward network is copied into E experts under a fresh router. The router's top-k weights are
normalised to sum to one, so that equal experts compute exactly what the dense network computes, and the sparse student
starts with the dense one's logits.

| dense         | sparse       | beside the experts                                                           |
| ------------- | ------------ | ---------------------------------------------------------------------------- |
| Qwen1.5/Qwen2 | Qwen2-MoE    | the shared expert, which this class always has: a narrow one of frozen zeros |
| Llama/Mistral | Qwen2-MoE    | the same, and zero biases in q, k and v, which vLLM's class always reads     |
| Qwen3         | Qwen3-MoE    | nothing                                                                      |
| Qwen3-VL      | Qwen3-VL-MoE | nothing                                                                      |

Noise between the copies is optional, and off by default: Qwen2's mixture of experts was made with half of each expert
drawn anew (arXiv 2407.10671), while OLMoE found no gain from such noise (arXiv 2409.02060). Every copy gets it, because
an exact one among noisy ones would start as the best expert, and routers would learn that first.

Axes: E experts, H hidden size, I width of a feed-forward network.
"""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import assert_never

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeTextConfig,
)
from transformers.initialization import no_init_weights

from common.errors import ConfigError, ModelError
from train.choices import SparsePattern
from train.config import MoEConfig
from train.model.student import (
    ZERO_SHARED_EXPERT,
    atomic_directory,
    is_multimodal,
    load_student,
    save_student,
    stored_dtype,
    text_config,
)

ROUTER_STD = 0.02

# Noise has a random stream of its own, so that a seed's routers are the same with and without it.
_NOISE_STREAM = 0x6E6F697365

# vLLM rejects a shared expert of width 0; 32 suits the kernels of both engines and costs almost nothing.
_SHARED_EXPERT_WIDTH = 32

_QWEN2_MOE_SOURCES = ("qwen2", "llama", "mistral")
_QWEN3_MOE_SOURCES = ("qwen3",)
_QWEN3_VL_MOE_SOURCES = ("qwen3_vl_text",)
_SOURCES = _QWEN2_MOE_SOURCES + _QWEN3_MOE_SOURCES + _QWEN3_VL_MOE_SOURCES

# Models of text and images for which transformers and vLLM both take any text model.
_COMPOSITIONS = ("llava", "llava_next", "llava_onevision", "internvl", "mistral3")

# Rotary embeddings that transformers and vLLM both compute from `rope_parameters` alone, whatever the length.
_STATIC_ROPE_TYPES = ("default", "linear", "llama3")

# Settings that are copied unchanged. `_check_exact_upcycling` checks every other one that has an effect on logits.
_COPIED_SETTINGS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "dtype",
)

_DENSE_FFN = re.compile(r"(?P<layer>.*\.layers\.(?P<index>\d+)\.mlp)\.(?P<part>gate|up|down)_proj\.weight")
_QKV_WEIGHT = re.compile(r"(?P<linear>.*\.self_attn\.[qkv]_proj)\.weight")


def sparse_layers(pattern: SparsePattern | tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Returns the indices of the sparse layers among `num_layers`, ascending.

    "every-second" is 1, 3, 5, ..., as `decoder_sparse_step=2` means in Qwen2-MoE. "sparse" is 0, 2, 4, ..., the mode of
    that name in the code of MoE-LLaVA and LLaVA-MoD. The halves split at num_layers // 2.

    Raises:
        ConfigError: an index is out of range or given twice, or no layer is chosen.
    """
    match pattern:
        case "every-second":
            layers = tuple(range(1, num_layers, 2))
        case "sparse":
            layers = tuple(range(0, num_layers, 2))
        case "first-half":
            layers = tuple(range(num_layers // 2))
        case "second-half":
            layers = tuple(range(num_layers // 2, num_layers))
        case "all":
            layers = tuple(range(num_layers))
        case tuple():
            layers = tuple(sorted(set(pattern)))
            if len(layers) != len(pattern) or any(not 0 <= index < num_layers for index in layers):
                raise ConfigError(
                    f"moe.layers: found {list(pattern)}, expected distinct indices from 0 to {num_layers - 1}"
                )
        case _:
            assert_never(pattern)
    if not layers:
        raise ConfigError(f"moe.layers: {pattern!r} chooses none of {num_layers} layers; choose at least one")
    return layers


def upcycle(model: PreTrainedModel, moe: MoEConfig, *, seed: int) -> PreTrainedModel:
    """Returns a new sparse model with the logits of the dense one (in float32 to 1e-5), which stays unchanged.

    Routers are drawn from normal(0, 0.02) in the order of the layers. Adapter and vision tower are copied. With
    `moe.noise` each expert's three matrices get independent Gaussian noise whose standard deviation is `moe.noise`
    times that of the dense matrix they are copies of, and the logits differ accordingly.

    Args:
        model: a dense LLaVA or causal language model, not partitioned by ZeRO-3.
        moe: number of experts, experts a token is sent to, sparse layers (see `sparse_layers`), noise.
        seed: seed of the routers and the noise.

    Raises:
        ModelError: the text model's architecture is not in this module's table, or a setting of it has no exact
            counterpart there.
        ConfigError: `moe.layers` does not fit the number of layers, or `moe.top_k` the number of experts.
    """
    dense = text_config(model)
    sparse = sparse_config(dense, moe)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ModelError(
            f"{type(model).__name__}: is partitioned by ZeRO-3; upcycle and save it before the distributed start"
        )
    if model.config.model_type == "qwen3_vl":
        with no_init_weights():
            upcycled: PreTrainedModel = Qwen3VLMoeForConditionalGeneration(_qwen3_vl_moe_config(model.config, sparse))
    elif is_multimodal(model):
        check_composition(model.config)
        config = copy.deepcopy(model.config)
        config.text_config = sparse
        with no_init_weights():
            upcycled = type(model)(config)
    else:
        upcycled = sparse_model(sparse)
    upcycled.to(model.dtype)
    upcycled.tie_weights()
    layers = frozenset(sparse_layers(moe.layers, dense.num_hidden_layers))
    load_sparse_weights(upcycled, _sparse_weights(model.state_dict(), layers, moe, seed))
    upcycled.generation_config = copy.deepcopy(model.generation_config)
    return upcycled.train(model.training)


def check_composition(config: PreTrainedConfig) -> None:
    """Raises ModelError if a model of images, by its configuration, cannot hold a sparse text model."""
    takes_images = getattr(config, "vision_config", None) is not None
    if takes_images and config.model_type not in (*_COMPOSITIONS, "qwen3_vl"):
        raise ModelError(
            f"{config.model_type}: cannot be upcycled: vLLM's class of it knows dense text models alone; expected one "
            f"of {', '.join(_COMPOSITIONS)}"
        )


def upcycle_directory(dense: Path, out: Path, moe: MoEConfig, *, seed: int) -> int:
    """Upcycles a student directory into a new one of the same dtype, and returns the number of parameters.

    Raises:
        ModelError, ConfigError: see `load_student` and `upcycle`; `out` is not created.
        StorageError: `out` is not empty or cannot be written.
    """
    with atomic_directory(out) as staging:
        model = upcycle(load_student(dense, dtype=stored_dtype(dense)), moe, seed=seed)
        save_student(model, dense, staging)
    return sum(parameter.numel() for parameter in model.parameters())


def is_sparse(model: PreTrainedModel) -> bool:
    """Returns True if the text model has routers."""
    return getattr(text_config(model), "num_experts", None) is not None


def sparse_config(dense: PreTrainedConfig, moe: MoEConfig, *, normalise: bool = True) -> PreTrainedConfig:
    """Returns the configuration of a dense text model's sparse counterpart.

    Args:
        normalise: True if the weights of a token's experts are divided by their sum.

    Raises:
        ModelError: the text model's architecture is not in this module's table, or a setting of it has no exact
            counterpart there.
        ConfigError: `moe.layers` does not fit the number of layers.
    """
    _check_exact_upcycling(dense)
    layers = sparse_layers(moe.layers, dense.num_hidden_layers)
    settings = {name: copy.deepcopy(getattr(dense, name)) for name in _COPIED_SETTINGS if hasattr(dense, name)}
    settings |= {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": dense.intermediate_size,
        "norm_topk_prob": normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(dense.num_hidden_layers) if i not in layers],
        "use_sliding_window": False,
    }
    if dense.model_type in _QWEN3_VL_MOE_SOURCES:
        return Qwen3VLMoeTextConfig(**settings, head_dim=dense.head_dim, attention_bias=False)
    if dense.model_type in _QWEN3_MOE_SOURCES:
        return Qwen3MoeConfig(**settings, head_dim=dense.head_dim, attention_bias=False)
    return Qwen2MoeConfig(
        **settings,
        qkv_bias=True,
        shared_expert_intermediate_size=_SHARED_EXPERT_WIDTH,
        **{ZERO_SHARED_EXPERT: True},
    )


def _qwen3_vl_moe_config(dense: PreTrainedConfig, text: PreTrainedConfig) -> Qwen3VLMoeConfig:
    """Returns the configuration of a Qwen3-VL with a sparse text model; its tower is the same under another name."""
    own = {name: value for name, value in dense.to_dict().items() if name not in ("model_type", "architectures")}
    own["vision_config"].pop("model_type")
    return Qwen3VLMoeConfig(**{**own, "text_config": text.to_dict()})


def sparse_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Returns the causal language model of a configuration that `sparse_config` made, without weights."""
    model_class = {"qwen2_moe": Qwen2MoeForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}[config.model_type]
    with no_init_weights():
        model: PreTrainedModel = model_class(config)
    return model


def load_sparse_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Loads the weights of a sparse model; shared experts, and q, k and v biases that the dense model lacks, are zeros.

    Raises:
        RuntimeError: other weights are missing, unknown, or of another shape.
    """
    # Of a LLaVA, the text model is Qwen2-MoE or Qwen3-MoE, and only the first has a shared expert and biases.
    zeros = _zero_weights(model.state_dict(), weights) if text_config(model).model_type == "qwen2_moe" else {}
    model.load_state_dict({**weights, **zeros}, strict=True)


def _sparse_weights(
    dense: Mapping[str, Tensor], layers: frozenset[int], moe: MoEConfig, seed: int
) -> dict[str, Tensor]:
    """Returns the dense weights with the chosen FFNs replaced by experts [E, 2I, H] and [E, H, I] and routers [E, H].

    Without noise the experts are views of the dense weights; they are copied when they are loaded.
    """
    routers = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed ^ _NOISE_STREAM)
    weights: dict[str, Tensor] = {}
    for name, tensor in dense.items():
        ffn = _DENSE_FFN.fullmatch(name)
        if ffn is None or int(ffn["index"]) not in layers:
            weights[name] = tensor
        elif ffn["part"] == "gate":
            gate_up = (tensor, dense[f"{ffn['layer']}.up_proj.weight"])
            weights[f"{ffn['layer']}.experts.gate_up_proj"] = _copy_into_experts(gate_up, moe, noise)
            router = torch.empty(moe.num_experts, tensor.shape[1])
            weights[f"{ffn['layer']}.gate.weight"] = nn.init.normal_(router, std=ROUTER_STD, generator=routers)
        elif ffn["part"] == "down":
            weights[f"{ffn['layer']}.experts.down_proj"] = _copy_into_experts((tensor,), moe, noise)
    return weights


def _copy_into_experts(matrices: tuple[Tensor, ...], moe: MoEConfig, generator: torch.Generator) -> Tensor:
    """Returns E copies of the matrices, stacked along their rows, each with noise of its own."""
    if not moe.noise:
        return torch.cat(matrices).expand(moe.num_experts, -1, -1)
    copies = []
    for _ in range(moe.num_experts):
        for matrix in matrices:
            exact = matrix.float()
            drawn = torch.empty(exact.shape).normal_(generator=generator)
            copies.append((exact + moe.noise * exact.std() * drawn).to(matrix.dtype))
    return torch.cat(copies).unflatten(0, (moe.num_experts, -1))


def _zero_weights(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns zeros for shared experts and for missing q, k and v biases; anything else that is missing stays so."""
    names = {f"{qkv['linear']}.bias" for name in weights if (qkv := _QKV_WEIGHT.fullmatch(name))}
    names |= {name for name in expected if ".mlp.shared_expert" in name}
    return {name: torch.zeros_like(expected[name]) for name in names if name in expected and name not in weights}


def _check_exact_upcycling(dense: PreTrainedConfig) -> None:
    """Checks that a text model's sparse counterpart computes the same in transformers and in vLLM.

    Raises:
        ModelError: it would not; names every setting without an exact counterpart.
    """
    kind = dense.model_type
    if kind not in _SOURCES:
        known = ", ".join(_SOURCES)
        raise ModelError(
            f"{kind}: cannot be upcycled; expected a dense text model of type {known}: no mixture of experts that both "
            "transformers and vLLM know has this model's layers and positions"
        )
    rope = dense.rope_parameters
    partial = rope.get("partial_rotary_factor", getattr(dense, "partial_rotary_factor", None))
    window = getattr(dense, "sliding_window", None)
    layer_types = getattr(dense, "layer_types", None) or ()
    # Llama's and Qwen3's bias is also one of the output projection, where the sparse classes have none.
    attention_bias = getattr(dense, "attention_bias", False)
    mlp_bias = getattr(dense, "mlp_bias", False)
    # vLLM's Qwen2-MoE divides the hidden size by the heads, whatever the config says.
    plain_head_dim = dense.hidden_size // dense.num_attention_heads
    head_dim = getattr(dense, "head_dim", None) or plain_head_dim
    quantisation = getattr(dense, "quantization_config", None)
    checks: list[tuple[bool, str, object, str]] = [
        (dense.hidden_act == "silu", "hidden_act", dense.hidden_act, "silu"),
        (
            rope["rope_type"] in _STATIC_ROPE_TYPES,
            "rope_type",
            rope["rope_type"],
            "/".join(_STATIC_ROPE_TYPES),
        ),
        (partial in (None, 1.0), "partial_rotary_factor", partial, "1"),
        (window is None, "sliding_window", window, "full attention"),
        ("sliding_attention" not in layer_types, "layer_types", layer_types, "full attention"),
        (not attention_bias, "attention_bias", attention_bias, "false"),
        (not mlp_bias, "mlp_bias", mlp_bias, "false"),
        (kind not in _QWEN2_MOE_SOURCES or head_dim == plain_head_dim, "head_dim", head_dim, str(plain_head_dim)),
        (quantisation is None, "quantization_config", quantisation, "plain weights"),
    ]
    wrong = [f"{name} is {found!r}, expected {wanted}" for exact, name, found, wanted in checks if not exact]
    if wrong:
        raise ModelError(f"{kind}: cannot be upcycled exactly: {'; '.join(wrong)}. Use another dense student")
