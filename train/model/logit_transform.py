"""What a model does to its logits after the output layer: nothing, a scale, a cap, or both.

    y = c tanh(s x / c)    with scale s and cap c; without a cap y = s x

Granite divides its logits, Cohere multiplies them, Gemma 2 caps them. Models name the settings differently, and one
name means a factor in one and a divisor in another, so the transform is measured on the model itself.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.errors import ModelError

# Logits at which the transform is compared with the formula.
_GRID = (-300.0, -50.0, -20.0, -5.0, -1.0, 0.0, 0.5, 2.0, 10.0, 30.0, 100.0)
# The slope at 0 is the scale, and the value far out is the cap, if there is one.
_NEAR, _FAR = 2.0**-10, 2.0**20


@dataclass(frozen=True)
class LogitTransform:
    """Scale and cap of the logits, in this order."""

    scale: float = 1.0
    cap: float | None = None

    @property
    def is_identity(self) -> bool:
        """True if the logits are those of the output layer."""
        return self.scale == 1.0 and self.cap is None

    def apply_(self, logits: Tensor) -> Tensor:
        """Transforms the output layer's logits in place, and returns them."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, transformed: Tensor) -> Tensor | float:
        """Returns dy/dx where the transformed logits y are given: s (1 - (y / c)^2)."""
        return self.scale if self.cap is None else (transformed / self.cap).square_().neg_().add_(1).mul_(self.scale)


NO_TRANSFORM = LogitTransform()


def find_logit_transform(model: Any) -> LogitTransform:
    """Measures what a model makes of the output of its output layer, by putting known values in its place.

    The model runs once, on two tokens and where its weights are. Its weights and its mode stay as they are.

    Raises:
        ModelError: the model changes its logits in another way than by a scale and a cap.
    """
    num_logits = model.get_output_embeddings().weight.shape[0]
    # Powers of two in float64, so that the measured scale is the model's to the last bits of a float32.
    probe = torch.tensor([*_GRID, _NEAR, _FAR], dtype=torch.float64)
    found = _logits_for(model, probe, num_logits)
    slope, limit = float(found[-2]) / _NEAR, float(found[-1])
    has_cap = abs(limit) < 0.5 * abs(slope) * _FAR
    transform = LogitTransform(1.0 if abs(slope - 1) < 1e-6 else slope, limit if has_cap else None)
    expected = transform.apply_(probe.clone())
    if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
        worst = int((found - expected).abs().argmax())
        raise ModelError(
            f"{type(model).__name__}: makes {float(found[worst]):.6g} of the logit {float(probe[worst]):g} after its "
            f"output layer, expected {float(expected[worst]):.6g}, a scale and a cap of the logits; students of this "
            "class cannot be trained"
        )
    return transform


def _logits_for(model: Any, probe: Tensor, num_logits: int) -> Tensor:
    """Returns the model's logits where its output layer returned `probe`, float64 of the same shape."""
    layer = model.get_output_embeddings()
    original = layer.forward
    # Repeated to the layer's own width, because a model may look at the shape of its logits.
    repeated = probe.repeat(-(-max(num_logits, len(probe)) // len(probe)))[: max(num_logits, len(probe))]

    def forward(hidden_BTH: Tensor) -> Tensor:
        return repeated.to(hidden_BTH.device).expand(*hidden_BTH.shape[:-1], -1).clone()

    layer.forward = forward
    try:
        with torch.no_grad():
            input_ids = torch.zeros(1, 2, dtype=torch.int64, device=layer.weight.device)
            logits: Tensor = model(input_ids=input_ids, use_cache=False).logits
    finally:
        layer.forward = original
    return logits[0, -1, : len(probe)].double().cpu()
