"""A forward pass of a tiny model with inputs that are the same for all models of a kind."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel


def expand(
    input_ids: npt.NDArray[np.int32], image_token_id: int | None, width: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Returns the ids with each placeholder `width` times, and the (last) position of each original token in them."""
    expanded: list[int] = []
    positions = []
    for token in input_ids.tolist():
        expanded += [token] * (width if token == image_token_id else 1)
        positions.append(len(expanded) - 1)
    return np.array(expanded, np.int32), np.array(positions, np.int64)


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
