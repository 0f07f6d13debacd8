"""Parameter groups of the optimiser, and the repair of its state after a universal checkpoint."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn


def weight_decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Returns two groups of the trainable parameters: matrices with weight decay, and vectors without.

    The shape that counts is the one before ZeRO-3 partitioned a parameter. A group may be empty.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter.requires_grad:
            is_vector = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            (vectors if is_vector else matrices).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def repair_universal_state(optimizer: Any, weight_decays: Sequence[float]) -> None:
    """Repairs what DeepSpeed's universal form leaves wrong in the optimiser under ZeRO-3.

    There all groups get the weight decay of the first one, and all partitions share one tensor as their step counter,
    which each of them then increments.

    Args:
        optimizer: an AdamW that a universal checkpoint was loaded into; changed in place.
        weight_decays: the right weight decay of each group.
    """
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    for group, weight_decay in zip(optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = weight_decay
