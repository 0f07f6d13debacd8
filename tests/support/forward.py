"""A forward pass of a tiny model with inputs that are the same for all models of a kind."""

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns two sequences of 40 tokens; for a LLaVA the first has an image."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 280, (2, 40), generator=generator)
    if not isinstance(model, LlavaForConditionalGeneration):
        return {"input_ids": ids}
    ids[0, 3:19] = model.config.image_token_index
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 56, generator=generator)}


def logits(model: PreTrainedModel) -> Tensor:
    """Returns the logits [2, 40, V] of `inputs`."""
    with torch.no_grad():
        found: Tensor = model(**inputs(model)).logits
    return found
