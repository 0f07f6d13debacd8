"""Collects the router logits of a sparse student, counts tokens an expert, and measures the routers' gradient.

    decoder ── RouterMonitor.pop_router_logits ─> logits of each sparse layer ── train.loss.objective
            ── RouterMonitor.count_batch ───────> tokens by layer, expert and modality ─┬─ metrics, at each log
                                                                                  └─ ExpertLoad, with each checkpoint
    routers ── hooks ──────────────────────> gradient of the step ───────────────── metrics

The counts are of the experts that each layer really called, in training passes only. Each reading of the counts checks
that every real token reached all of its experts. Counts stay on the device between two readings.

Axes: L sparse layers, N positions of a micro-batch (B * T), E experts, K experts a token, H hidden size,
M modalities (text, image), S slots: the E experts, then the tokens themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from common.errors import ModelError
from train.data.collator import Batch
from train.model.student import language_model, text_config
from train.moe.expert_load import ExpertLoad
from train.moe.upcycle import is_sparse

# Sums a tensor over all ranks.
Reduce = Callable[[Tensor], Tensor]


class RouterMonitor:
    """Monitors the routers of a model in training by hooks; the model and its config stay unchanged.

    LLaVA's forward drops router logits, and a causal language model that is configured to return them adds its own
    balance loss to the LM loss. So the logits are requested from the decoder only, and nothing is added to any loss.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Registers the hooks.

        Raises:
            ModelError: the model has no router.
        """
        config = text_config(model)
        if not is_sparse(model):
            raise ModelError(f"{type(model).__name__}: has no router ({config.model_type}); upcycle it first")
        self.top_k: int = config.num_experts_per_tok
        self._num_experts: int = config.num_experts
        self._decoder = language_model(model)
        self._router_logits: tuple[Tensor, ...] | None = None
        # The experts that each layer called in the pass under way, [N, K] each.
        self._selected: list[Tensor] = []
        self._selected_LNK: Tensor | None = None
        self._layers: list[int] = []
        self._routers: list[Tensor] = []
        self._gradients: dict[int, Tensor] = {}
        self._counts_since_log: Tensor | int = 0
        self._counts_since_checkpoint: Tensor | int = 0
        self._handles: list[Any] = [
            self._decoder.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self._decoder.register_forward_hook(self._after_forward),
        ]

    # One forward pass

    def pop_router_logits(self) -> list[Tensor]:
        """Returns and forgets the router logits of the latest pass: L tensors [N, E], float, before the softmax.

        Their rows are in the order of the batch. They are part of the graph if the routers are trained.
        """
        assert self._router_logits is not None, "no forward pass since the last call"
        router_logits, self._router_logits = list(self._router_logits), None
        return router_logits

    def count_batch(self, batch: Batch) -> None:
        """Adds the latest forward pass to the counts; `batch` was its input."""
        image_N = batch.image_mask.flatten()
        assert self._selected_LNK is not None, "no forward pass yet"
        counts_LSM = count_assignments(self._selected_LNK, image_N, batch.token_mask.flatten(), self._num_experts)
        self._counts_since_log = self._counts_since_log + counts_LSM
        self._counts_since_checkpoint = self._counts_since_checkpoint + counts_LSM

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    # Readings, by all ranks together

    def clear_gradients(self) -> None:
        """Forgets the gradient of the previous step."""
        self._gradients.clear()

    def metrics(self, reduce: Reduce, num_ranks: int) -> dict[str, float]:
        """Returns the metrics since the last call, over all ranks.

        router/largest_load, router/smallest_load    share of a layer's assignments that an expert got, times E (1 is
                                                     even), maximum and minimum over all experts of all layers
        router/grad_norm                             norm of the gradient of all routers' weights in the latest step,
                                                     before clipping; absent if the routers are frozen

        Raises:
            ModelError: a token did not reach all of its experts.
        """
        found: dict[str, float] = {}
        if isinstance(self._counts_since_log, Tensor):
            counts_LSM, self._counts_since_log = self._reduce_counts(self._counts_since_log, reduce), 0
            assigned_LE = counts_LSM[:, :-1].sum(2).double()
            load_LE = self._num_experts * assigned_LE / assigned_LE.sum(1, keepdim=True).clamp(min=1)
            found = {"router/largest_load": load_LE.max().item(), "router/smallest_load": load_LE.min().item()}
        if self._gradients:
            # Losses are multiplied by the number of ranks, because DeepSpeed averages gradients over them.
            total_LEH = reduce(torch.stack([self._gradients[layer] for layer in self._layers])) / num_ranks
            found["router/grad_norm"] = total_LEH.norm().item()
        return found

    def pop_expert_load(self, reduce: Reduce, step: int, since_step: int) -> ExpertLoad:
        """Returns and forgets the counts since the last call, over all ranks: steps `since_step` + 1 to `step`.

        Raises:
            ModelError: a token did not reach all of its experts.
        """
        assert isinstance(self._counts_since_checkpoint, Tensor), "no training pass since the last call"
        counts_LSM, self._counts_since_checkpoint = self._reduce_counts(self._counts_since_checkpoint, reduce), 0
        return ExpertLoad(
            step=step,
            since_step=since_step,
            layers=tuple(self._layers),
            top_k=self.top_k,
            text_LE=counts_LSM[:, :-1, 0].cpu().numpy(),
            image_LE=counts_LSM[:, :-1, 1].cpu().numpy(),
        )

    def _reduce_counts(self, counts_LSM: Tensor, reduce: Reduce) -> Tensor:
        total_LSM = reduce(counts_LSM)
        check_no_dropped_tokens(total_LSM, self.top_k, self._layers)
        return total_LSM

    # Hooks

    def _before_forward(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not self._layers:
            self._register_router_hooks()
        # Activation checkpointing calls experts again in the backward pass; those calls must not be counted.
        self._selected.clear()
        return args, {**kwargs, "output_router_logits": True}

    def _after_forward(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._selected_LNK = torch.stack(self._selected)
        logits: tuple[Tensor, ...] = output.router_logits
        trained = any(weight.requires_grad for weight in self._routers)
        if torch.is_grad_enabled() and trained and not all(layer.requires_grad for layer in logits):
            raise ModelError(
                f"{type(module).__name__}: the router logits carry no gradient, so the losses of routers would train "
                "nothing; set gradient_checkpointing_kwargs = {'use_reentrant': False}"
            )
        self._router_logits = logits

    def _register_router_hooks(self) -> None:
        """Registers the hooks of sparse blocks at the first pass, because DeepSpeed may replace blocks before it."""
        for number, layer in enumerate(self._decoder.layers):
            block = layer.mlp
            if not hasattr(block, "experts"):
                continue
            self._layers.append(number)
            # gpt-oss calls its gate a router, DeepSpeed a module around the gate.
            router = getattr(block, "router", None) or block.gate
            if hasattr(router, "gate"):
                # DeepSpeed's router returns scores, experts and counts. Its experts get the tokens of all ranks, so
                # that a hook on them would count too much.
                weight = router.gate.weight
                hook = router.register_forward_hook(lambda _module, _args, out: self._selected.append(out[1]))
            else:
                weight = router.weight
                hook = block.experts.register_forward_pre_hook(lambda _module, args: self._selected.append(args[1]))
            self._handles.append(hook)
            self._routers.append(weight)
            if weight.requires_grad:
                self._handles.append(weight.register_hook(lambda g, n=number: self._add_gradient(n, g)))

    def _add_gradient(self, layer: int, gradient_EH: Tensor) -> None:
        # A copy, because autograd's tensor becomes the parameter's gradient, which is reduced in place.
        self._gradients[layer] = self._gradients.get(layer, 0) + gradient_EH.to(torch.float32, copy=True)


def count_assignments(selected_LNK: Tensor, image_N: Tensor, mask_N: Tensor, num_experts: int) -> Tensor:
    """Counts the tokens that each expert got.

    Args:
        selected_LNK: int64 [L, N, K], the experts that were called for each position; numbers outside [0, E) are not
            counted.
        image_N: bool [N], positions of image tokens.
        mask_N: bool [N], positions of real tokens, neither padding nor dummies.
        num_experts: E.

    Returns:
        int64 [L, E + 1, 2]: text and image tokens that each expert got, and in the last slot the number of all
        tokens.
    """
    counted_LNK = mask_N[:, None] & (selected_LNK >= 0) & (selected_LNK < num_experts)
    slots = torch.where(counted_LNK, 2 * selected_LNK + image_N[:, None], 2 * num_experts).flatten(1)
    counts = torch.zeros(len(slots), 2 * num_experts + 1, dtype=torch.int64, device=slots.device)
    counts.scatter_add_(1, slots, torch.ones_like(slots))
    tokens_M = torch.stack([(mask_N & ~image_N).sum(), (mask_N & image_N).sum()])
    return torch.cat([counts[:, :-1].unflatten(1, (num_experts, 2)), tokens_M.expand(len(slots), 1, 2)], 1)


def check_no_dropped_tokens(counts_LSM: Tensor, top_k: int, layers: list[int]) -> None:
    """Checks that every token reached `top_k` experts in every layer.

    Args:
        counts_LSM: [L, E + 1, 2], a result of `count_assignments` or a sum of several.

    Raises:
        ModelError: a token did not; names the first such layer.
    """
    assigned_LM, expected_LM = counts_LSM[:, :-1].sum(1), top_k * counts_LSM[:, -1]
    for layer, assigned, expected in zip(layers, assigned_LM.tolist(), expected_LM.tolist(), strict=True):
        if assigned != expected:
            raise ModelError(
                f"layer {layer}: tokens were dropped: {assigned[0]:,} text and {assigned[1]:,} image assignments to "
                f"experts, expected {expected[0]:,} and {expected[1]:,}, which is every token times top_k {top_k}; "
                "this model's experts have a capacity or skip tokens: train it with a class that routes all of them"
            )
