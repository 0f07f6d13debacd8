"""Packs what ranks tell each other once a step, so that all of them take the same decision.

Every rank packs a vector, one reduction adds the vectors up, and each rank unpacks the sum.
"""

import math
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from train.loss.objective import UNITS


@dataclass(frozen=True)
class MicroBatchLoss:
    """Loss of a micro-batch on this rank, a scalar that stays on the device, and the ids of its samples."""

    sample_ids: tuple[str, ...]
    loss: Tensor


class StepOutcome:
    """Losses and gradient of this rank's latest step, kept until they are checked for divergence."""

    def __init__(self) -> None:
        self._losses: list[MicroBatchLoss] = []
        self._is_gradient_finite = True

    @property
    def is_checked(self) -> bool:
        """Returns True if no loss was added since the last `pop_losses`."""
        return not self._losses

    def add_loss(self, sample_ids: tuple[str, ...], loss: Tensor) -> None:
        """Adds a micro-batch without reading its loss from the device."""
        self._losses.append(MicroBatchLoss(sample_ids, loss))

    def set_gradient_norm(self, norm: float | None) -> None:
        """Sets the norm of the step's gradient. DeepSpeed gives -1 for a norm that is not finite."""
        self._is_gradient_finite = norm is None or (math.isfinite(norm) and norm >= 0)

    def pop_losses(self) -> list[MicroBatchLoss]:
        """Returns the losses and forgets them, which marks the step as checked."""
        losses, self._losses = self._losses, []
        return losses

    def pack(self, device: torch.device) -> Tensor:
        """Returns float64 [2]: the sum of the losses, and 1 if the gradient is not finite."""
        num_bad_gradients = torch.tensor(float(not self._is_gradient_finite), dtype=torch.float64, device=device)
        losses = [micro_batch.loss.double() for micro_batch in self._losses]
        return torch.stack([sum(losses, torch.zeros_like(num_bad_gradients)), num_bad_gradients])


def pack_report(
    counts: Iterable[Mapping[str, int]], outcome: Tensor, *, failed: bool, signum: int | None, device: torch.device
) -> Tensor:
    """Returns this rank's report before a step, float64 [len(UNITS) + 5].

    Args:
        counts: of each micro-batch of the step, by unit.
        outcome: the packed `StepOutcome` of the step before.
        failed: this rank could not make a micro-batch.
        signum: the stop signal that came to this rank, or None.
        device: where the reports are added up.
    """
    counts = list(counts)
    values = [
        *(sum(count[unit] for count in counts) for unit in UNITS),
        failed,
        signum == signal.SIGTERM,
        signum == signal.SIGINT,
    ]
    return torch.cat([torch.tensor(values, dtype=torch.float64, device=device), outcome])


@dataclass(frozen=True)
class StepReport:
    """Sum of the reports of all ranks: counts by unit, numbers of ranks, and the loss of the step before."""

    counts: Mapping[str, float]
    num_failed: float
    num_terminated: float
    num_interrupted: float
    loss: float
    num_bad_gradients: float

    @classmethod
    def unpack(cls, total: Tensor) -> Self:
        """Reads the sum of what `pack_report` made on each rank."""
        values = total.tolist()
        return cls(dict(zip(UNITS, values[: len(UNITS)], strict=True)), *values[len(UNITS) :])

    @property
    def stop_signal(self) -> signal.Signals | None:
        """Returns the signal to stop for, or None. SIGTERM wins where ranks got different ones."""
        if self.num_terminated:
            return signal.SIGTERM
        return signal.SIGINT if self.num_interrupted else None
