"""One forward pass of a tiny model, the same for every model that has the same inputs."""

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Two sequences of 40 tokens; for a LLaVA the first holds an image."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 280, (2, 40), generator=generator)
    if not isinstance(model, LlavaForConditionalGeneration):
        return {"input_ids": ids}
    ids[0, 3:19] = model.config.image_token_index
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 56, generator=generator)}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits
