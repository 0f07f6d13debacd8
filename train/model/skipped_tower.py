"""Skips the layers of a student's vision tower and gives its adapter cached features instead.

For students other than LLaVA, whose tower is left out altogether (train.model.cached_tower). The model's own code runs
on an image of the same size, so that shapes, grids and orders are its own, but each layer returns its input, and what
arrives at the adapter is replaced. The weights of the layers are dropped after the student was loaded.

Legend: R rows of features of all images of a batch, D channels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.adapter_inputs import CACHED_FEATURES, FIRST_ADAPTER_LAYER, hook_adapter_inputs, is_in_adapter
from common.errors import ModelError

# Types of towers whose layers return a tuple.
_TUPLES = ("llama4_vision_model",)


def skip_tower(model: PreTrainedModel) -> None:
    """Makes a student take `cached_features` [R, D] beside the arrays of its images.

    Without them, as for a dummy image, the adapter gets what the tower without its layers makes of the pixels.
    """
    tower: PreTrainedModel = model.get_encoder(modality="image")
    for name, module in tower.named_modules():
        if isinstance(module, nn.ModuleList) and not is_in_adapter(name):
            # Layers after the first of the adapter's own are kept.
            for layer in module[: getattr(tower.config, FIRST_ADAPTER_LAYER, None)]:
                # torch has no public way to drop all that a module holds.
                layer._modules.clear()  # noqa: SLF001 - as above
                layer._parameters.clear()  # noqa: SLF001 - as above
                layer.forward = _return_input_as_tuple if tower.config.model_type in _TUPLES else _return_input
    features = _BatchFeatures()
    model.register_forward_pre_hook(features.take, with_kwargs=True)
    hook_adapter_inputs(model, features.next_input)


def has_skipped_tower(model: PreTrainedModel) -> bool:
    """Returns True if the layers of the model's vision tower are skipped."""
    return any(vars(module).get("forward") in (_return_input, _return_input_as_tuple) for module in model.modules())


class _BatchFeatures:
    """The cached features of the batch under way, and how many channels of them were handed out."""

    def __init__(self) -> None:
        self._features: Tensor | None = None
        self._start = 0

    def take(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self._features, self._start = kwargs.pop(CACHED_FEATURES, None), 0
        return args, kwargs

    def next_input(self, skipped: Tensor) -> Tensor:
        """Returns the features in the shape, dtype and memory layout of what they replace.

        The layout decides how the adapter's first matrix product rounds.
        """
        if self._features is None:
            return skipped
        stop = self._start + skipped.shape[-1]
        rows = self._features[:, self._start : stop]
        if rows.numel() != skipped.numel():
            raise ModelError(
                f"the cached features have shape {list(self._features.shape)}, and the student's adapter takes "
                f"{list(skipped.shape)}; verify-shards --recompute N --teacher STUDENT tells whether the cache is this "
                "student's"
            )
        self._start = stop
        replaced = torch.empty_strided(skipped.size(), skipped.stride(), dtype=skipped.dtype, device=skipped.device)
        return replaced.copy_(rows.reshape(skipped.shape))


def _return_input(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _return_input_as_tuple(*args: Any, **kwargs: Any) -> Any:
    return (_return_input(*args, **kwargs),)
