"""Finds where a model that takes images hands the output of its vision tower to its adapter.

The input of the adapter is what a feature cache holds. In most models of transformers the adapter stands beside the
tower; in some it is a part of it, or several parts, each of which gets the output of another layer.
"""

from collections.abc import Callable
from typing import Any

# Argument with which a batch hands cached features to a model whose tower is left out.
CACHED_FEATURES = "cached_features"

# Key in the configuration of a vision tower: the number of the first layer that belongs to the student's adapter, as do
# those after it (train.model.adapter). Absent if there are none.
FIRST_ADAPTER_LAYER = "first_adapter_layer"

# Parts of a tower that map its output to the language model's: Qwen-VL's and GLM-4V's mergers, Llama 4's MLP.
_IN_TOWER = ("merger", "vision_adapter")
_LISTS_IN_TOWER = ("deepstack_merger_list",)


def is_in_adapter(name: str) -> bool:
    """Returns True if a parameter or module of this name, inside of a vision tower, is the adapter's."""
    return not {*_IN_TOWER, *_LISTS_IN_TOWER}.isdisjoint(name.split("."))


def find_adapters(model: Any) -> list[Any]:
    """Returns the modules that take the tower's output: the adapter's parts inside of the tower, else those beside it.

    Of the self-attention blocks of a composed student's adapter it is the first.
    """
    tower, decoder = model.get_encoder(modality="image"), model.get_decoder()
    if (first := getattr(tower.config, FIRST_ADAPTER_LAYER, None)) is not None:
        return [tower.encoder.layers[first]]
    inside = [
        module
        for name, module in tower.named_modules()
        if name.split(".")[-1] in _IN_TOWER or name.split(".")[-2:-1] in [[part] for part in _LISTS_IN_TOWER]
    ]
    others = {id(parameter) for part in (tower, decoder) for parameter in part.parameters()}
    others |= {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    return inside or [
        module
        for module in getattr(model, "model", model).children()
        if (own := {id(parameter) for parameter in module.parameters()}) and own.isdisjoint(others)
    ]


def hook_adapter_inputs(model: Any, replace: Callable[[Any], Any]) -> None:
    """Makes each of the adapter's modules take what `replace` returns for its input, a tensor [..., channels]."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (replace(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: replace(kwargs[name])}

    for module in find_adapters(model):
        module.register_forward_pre_hook(hook, with_kwargs=True)
