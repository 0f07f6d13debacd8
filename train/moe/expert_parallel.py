"""Expert parallelism: each rank of a group of `run.expert_parallel_size` holds its share of every layer's experts.

DeepSpeed's AutoEP does it: it replaces each sparse block by one of its own, which sends tokens to the ranks that hold
their experts. Here is what it has to be told for a student, what it cannot do, and how the whole weights are put
together again under the names that transformers gives them.

    model ── refuse_unsupported, expert_parallel_settings ──> DeepSpeed ── whole_weights ──> save_student

Axes: E experts, I width of an expert, H hidden size.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.errors import ConfigError
from train.model.student import groups_of, is_multimodal, text_config

# DeepSpeed's names of a sparse block's parts, and transformers'. Experts are sliced and so not among them.
_PARTS = {"router.gate.": "gate.", "shared_experts.": "shared_expert.", "shared_experts_gate.": "shared_expert_gate."}

# The text models whose sparse blocks AutoEP computes as transformers does.
_SUPPORTED = ("qwen2_moe", "qwen3_moe")


def check_expert_parallel_supported(model: PreTrainedModel, size: int, *, num_ranks: int, zero_stage: int) -> None:
    """Checks that AutoEP can divide the experts of a model, frozen as the stage wants it, among `size` ranks.

    Raises:
        ConfigError: says what does not fit.
    """
    key = f"run.expert_parallel_size {size}"
    config = text_config(model)
    if config.model_type not in _SUPPORTED:
        raise ConfigError(
            f"{key}: the student's text model is {config.model_type}, expected {' or '.join(_SUPPORTED)}: DeepSpeed "
            "divides the experts of these; leave the key out, or upcycle the student with a [moe] table"
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
    if not any(p.requires_grad for name, p in model.named_parameters() if "experts" in groups_of(name)):
        raise ConfigError(f"{key}: this stage trains no expert, which DeepSpeed then cannot divide; leave the key out")


def check_same_num_ranks(checkpoint: Path, written: int, now: int) -> None:
    """A checkpoint of divided experts is continued on as many ranks as wrote it.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"{checkpoint}: was written by {written} rank(s) with divided experts, this run has {now}; continue it on "
        f"{written}, or train on from its weights, which are whole, as a new run with model.path = {checkpoint}"
    )


def expert_parallel_settings(model: PreTrainedModel, size: int) -> dict[str, Any]:
    """The section `expert_parallel` of DeepSpeed's configuration."""
    config = text_config(model)
    decoder = r"model\.language_model" if is_multimodal(model) else "model"
    return {
        "enabled": True,
        "autoep_size": size,
        # Its name for both of Qwen's architectures; a LLaVA's own config tells it neither this nor what follows.
        "preset_model": "qwen3_moe",
        "moe_layer_pattern": decoder + r"\.layers\.\d+\.mlp",
        "top_k": config.num_experts_per_tok,
        "route_norm": bool(config.norm_topk_prob),
        "score_func": "softmax",
    }


def split_experts(model: PreTrainedModel, groups: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """The optimiser's groups with the experts of each in one of its own, named as DeepSpeed wants it."""
    experts = {id(parameter) for name, parameter in model.named_parameters() if "experts" in groups_of(name)}
    divided = []
    for group in groups:
        divided.append({**group, "params": [p for p in group["params"] if id(p) not in experts]})
        of_experts = [p for p in group["params"] if id(p) in experts]
        divided.append({**group, "params": of_experts, "moe": True, "name": f"ep_size_{size}"})
    return divided


def gather_full_state_dict(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The state dict as if nothing were divided, on the CPU of the first rank; None on the others, which all call it.

    The experts of one layer at a time are whole on every rank.
    """
    import deepspeed.comm as dist
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
    from deepspeed.runtime.zero import GatheredParameters

    main = dist.get_rank() == 0
    blocks = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, AutoEPMoELayer)}
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        block = next((prefix for prefix in blocks if name.startswith(prefix)), "")
        if block and name.startswith(f"{block}experts."):
            continue
        with GatheredParameters([parameter]):
            if main:
                found[block + _renamed(name.removeprefix(block))] = parameter.detach().cpu().clone()
    for prefix, block in blocks.items():
        for name, stacked in _gather_experts(block).items():
            if main:
                found[f"{prefix}experts.{name}"] = stacked.cpu()
    return found if main else None


def _gather_experts(block: Any) -> dict[str, Tensor]:
    """A layer's experts under transformers' names: [E, 2I, H] and [E, H, I]."""
    import deepspeed.comm as dist
    from deepspeed.runtime.zero import GatheredParameters

    whole = []
    for part in (block.experts.w1, block.experts.w3, block.experts.w2):
        with GatheredParameters([part]):
            shares = [torch.empty_like(part.data) for _ in range(block.ep_size)]
            dist.all_gather(shares, part.detach().contiguous(), group=block.ep_group)
        whole.append(torch.cat(shares))
    gate_EIH, up_EIH, down_EHI = whole
    return {"gate_up_proj": torch.cat([gate_EIH, up_EIH], 1), "down_proj": down_EHI}


def _renamed(name: str) -> str:
    for theirs, ours in _PARTS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
