"""Expert parallelism: each rank of a group of `run.expert_parallel_size` holds its share of every layer's experts.

DeepSpeed's AutoEP replaces each sparse block by one of its own, which sends tokens to the ranks that hold their
experts. This module has AutoEP's settings for a student, checks its limits, and gathers the full weights under
transformers' names.

    model ── check_expert_parallel_supported, expert_parallel_settings ──> DeepSpeed
    DeepSpeed's model ── gather_full_state_dict ──> save_student

Axes: E experts, I width of an expert, H hidden size.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.errors import ConfigError
from train.model.student import is_multimodal, parameter_groups, text_config

# DeepSpeed's names of a sparse block's parts, and transformers'. Experts are not here, because ranks divide them.
_PREFIXES = {
    "router.gate.": "gate.",
    "shared_experts.": "shared_expert.",
    "shared_experts_gate.": "shared_expert_gate.",
}

# The text models whose sparse blocks AutoEP computes as transformers does.
_SUPPORTED_TEXT_MODELS = ("qwen2_moe", "qwen3_moe")


def check_expert_parallel_supported(model: PreTrainedModel, size: int, *, num_ranks: int, zero_stage: int) -> None:
    """Checks that AutoEP can divide a model's experts among `size` ranks; the stage's groups must be frozen already.

    Raises:
        ConfigError: the model, the number of ranks or the ZeRO stage does not fit; the message names it.
    """
    key = f"run.expert_parallel_size {size}"
    config = text_config(model)
    if config.model_type not in _SUPPORTED_TEXT_MODELS:
        raise ConfigError(
            f"{key}: the student's text model is {config.model_type}, expected {' or '.join(_SUPPORTED_TEXT_MODELS)}: "
            "DeepSpeed divides the experts of these; leave the key out, or upcycle the student with a [moe] table"
        )
    if zero_stage == 0:
        raise ConfigError(
            f"{key}: needs run.zero_stage 1, 2 or 3; at 0 DeepSpeed clips each rank's gradients by the norm of its own "
            "experts, so that the ranks' other weights drift apart. Stage 1 costs nothing"
        )
    if num_ranks % size:
        raise ConfigError(f"{key}: does not divide the {num_ranks} rank(s) of this run; start a multiple of {size}")
    if config.num_experts % size:
        raise ConfigError(f"{key}: does not divide the student's {config.num_experts} experts")
    groups = parameter_groups(model)
    if not any(p.requires_grad for name, p in model.named_parameters() if "experts" in groups[name]):
        raise ConfigError(f"{key}: this stage trains no expert, which DeepSpeed then cannot divide; leave the key out")


def check_same_num_ranks(checkpoint: Path, num_saved_ranks: int, num_ranks: int) -> None:
    """Checks that a checkpoint of divided experts is continued on as many ranks as wrote it.

    Raises:
        ConfigError: the numbers differ.
    """
    if num_saved_ranks != num_ranks:
        raise ConfigError(
            f"{checkpoint}: was written by {num_saved_ranks} rank(s) with divided experts, this run has {num_ranks}; "
            f"continue it on {num_saved_ranks}, or train on from its weights, which are whole, as a new run with "
            f"model.path = {checkpoint}"
        )


def expert_parallel_settings(model: PreTrainedModel, size: int) -> dict[str, Any]:
    """Returns the section `expert_parallel` of DeepSpeed's configuration."""
    config = text_config(model)
    decoder = r"model\.language_model" if is_multimodal(model) else "model"
    return {
        "enabled": True,
        "autoep_size": size,
        # AutoEP has one preset for both of Qwen's architectures. All that follows is given too, because AutoEP cannot
        # read it from a LLaVA's config.
        "preset_model": "qwen3_moe",
        "moe_layer_pattern": decoder + r"\.layers\.\d+\.mlp",
        "top_k": config.num_experts_per_tok,
        "route_norm": bool(config.norm_topk_prob),
        "score_func": "softmax",
    }


def split_experts(model: PreTrainedModel, groups: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Splits each of the optimiser's groups into one without experts and one of experts, with DeepSpeed's names."""
    found = parameter_groups(model)
    experts = {id(parameter) for name, parameter in model.named_parameters() if "experts" in found[name]}
    split = []
    for group in groups:
        split.append({**group, "params": [p for p in group["params"] if id(p) not in experts]})
        expert_params = [p for p in group["params"] if id(p) in experts]
        split.append({**group, "params": expert_params, "moe": True, "name": f"ep_size_{size}"})
    return split


def gather_full_state_dict(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """Gathers the undivided state dict on the CPU of the first rank; returns None on the others. All ranks call it.

    Every rank holds the full experts of one layer at a time.
    """
    import deepspeed.comm as dist
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.runtime.zero import GatheredParameters

    is_main = dist.get_rank() == 0
    blocks = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, AutoEPMoELayer)}
    gathered: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        block = next((prefix for prefix in blocks if name.startswith(prefix)), "")
        if block and name.startswith(f"{block}experts."):
            continue
        with GatheredParameters([parameter]):
            if is_main:
                gathered[block + _to_transformers_name(name.removeprefix(block))] = parameter.detach().cpu().clone()
    for prefix, block in blocks.items():
        for name, stacked in _gather_experts(block).items():
            if is_main:
                gathered[f"{prefix}experts.{name}"] = stacked.cpu()
    return gathered if is_main else None


def _gather_experts(block: Any) -> dict[str, Tensor]:
    """Gathers a layer's experts under transformers' names: [E, 2I, H] and [E, H, I]."""
    import deepspeed.comm as dist
    from deepspeed.runtime.zero import GatheredParameters

    stacks = []
    for part in (block.experts.w1, block.experts.w3, block.experts.w2):
        with GatheredParameters([part]):
            shares = [torch.empty_like(part.data) for _ in range(block.ep_size)]
            dist.all_gather(shares, part.detach().contiguous(), group=block.ep_group)
        stacks.append(torch.cat(shares))
    gate_EIH, up_EIH, down_EHI = stacks
    return {"gate_up_proj": torch.cat([gate_EIH, up_EIH], 1), "down_proj": down_EHI}


def _to_transformers_name(name: str) -> str:
    for deepspeed_prefix, prefix in _PREFIXES.items():
        if name.startswith(deepspeed_prefix):
            return prefix + name.removeprefix(deepspeed_prefix)
    return name
