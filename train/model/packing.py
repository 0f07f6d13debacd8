"""Checks that a student can take packed batches, that is, that its attention ends at the borders of sequences.

transformers finds the borders in position_ids that begin again at 0, if it gets no attention mask and no cache:

    sdpa, eager          a mask of T x T that is causal within each sequence, for full and for sliding attention
    flash_attention_2    the lengths of all sequences, for a kernel that needs no mask

A model that ignores the borders raises no error: each sequence then sees those before it, and only the loss is wrong.
So only models are accepted whose packed output tests have compared with that of each sequence alone. State-space layers
keep their state across borders, learned positions or ALiBi may count through them, and other kernels were not tried.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from common.errors import ConfigError
from train.model.student import text_config

ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
TEXT_MODELS = (
    *("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "granite", "phi", "phi3", "smollm3", "stablelm"),
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "glm4v_text"),
)


def check_packing_supported(model: PreTrainedModel) -> None:
    """Checks that the student's attention keeps packed sequences apart.

    Raises:
        ConfigError: the architecture or the attention implementation is not one of those that tests have compared.
    """
    config = text_config(model)
    attention = config._attn_implementation  # noqa: SLF001 - transformers has no public name for it
    for what, found, known in (
        ("text model", config.model_type, TEXT_MODELS),
        ("attention", attention, ATTENTIONS),
    ):
        if found not in known:
            raise ConfigError(
                f'data.batching = "packed": the student\'s {what} is {found}, expected one of {", ".join(known)}: of '
                "others it is not known that packed samples do not see each other, and no error would tell; use "
                '"padded" (with data.group_by_length there is little padding)'
            )


def rope_position_ids(model: PreTrainedModel, inputs: dict[str, Any]) -> Tensor | None:
    """Returns the position ids with which a model of multi-modal rotary positions takes a packed batch.

    Such a model gives an image's tokens positions of time, height and width, which it computes only for padded batches.
    Its own `get_rope_index` computes them here, for each sequence alone.

    Args:
        model: any student.
        inputs: arguments of its forward; `position_ids` int64 [1, T] begin at 0 with each sequence.

    Returns:
        int64 [4, 1, T]: positions in the text, by which transformers finds the borders, then time, height and width;
        None for other models and for padded batches.
    """
    find = getattr(model.base_model, "get_rope_index", None)
    text_positions = inputs["position_ids"]
    if find is None or text_positions is None:
        return None
    starts = torch.nonzero(text_positions[0] == 0).flatten().tolist()
    lengths = np.diff([*starts, text_positions.shape[1]]).tolist()

    def split(values: Tensor) -> Tensor:
        return pad_sequence(list(values[0].split(lengths)), batch_first=True)

    mask = split(torch.ones_like(text_positions))
    rest = {name: value for name, value in inputs.items() if name.endswith("_grid_thw")}
    types = split(inputs["mm_token_type_ids"])
    found, _ = find(split(inputs["input_ids"]), mm_token_type_ids=types, attention_mask=mask, **rest)
    return torch.cat([text_positions[None], found[:, mask.bool()][:, None]])
