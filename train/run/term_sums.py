"""Sums of the objective's terms, and their means over all ranks."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from train.loss.objective import UNITS, Term

# Adds up a tensor over all ranks.
Reduce = Callable[[Tensor], Tensor]


class TermSums:
    """Adds up terms, and counts of the units that their means are divided by.

    The terms' sums stay on the device until `means` is called, because reading them would make every micro-batch wait.
    """

    def __init__(self) -> None:
        self.counts: dict[str, float] = dict.fromkeys(UNITS, 0.0)
        self._totals: dict[str, Tensor] = {}
        self._units: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._totals)

    def add_counts(self, counts: Mapping[str, float]) -> None:
        """Adds a number of scored rows, pairs, tokens and positions."""
        for unit, count in counts.items():
            self.counts[unit] += count

    def add_terms(self, terms: Mapping[str, Term]) -> None:
        """Adds the sums of one micro-batch."""
        for name, term in terms.items():
            self._totals[name] = self._totals.get(name, 0.0) + term.total.detach().double()
            self._units[name] = term.unit

    def means(self, reduce: Reduce, device: torch.device, *, counts_are_global: bool) -> dict[str, float]:
        """Returns each term's mean over all ranks, which call this together.

        Args:
            reduce: adds up a float64 vector over all ranks.
            device: where that is done.
            counts_are_global: the counts are those of all ranks already, and only the terms are added up.
        """
        names = sorted(self._units)
        sums = [*(self._totals[name] for name in names), *(self.counts[unit] for unit in UNITS)]
        local = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in sums])
        if counts_are_global:
            reduced = torch.cat([reduce(local[: len(names)]), local[len(names) :]])
        else:
            reduced = reduce(local)
        totals = reduced.tolist()
        counts = dict(zip(UNITS, totals[len(names) :], strict=True))
        return {name: totals[number] / max(counts[self._units[name]], 1) for number, name in enumerate(names)}
