"""Means of terms over micro-batches and ranks."""

import pytest
import torch
from torch import Tensor

from train.loss.objective import Term
from train.run.term_sums import TermSums

CPU = torch.device("cpu")
COUNTS = {"rows": 4, "pairs": 0, "tokens": 10, "positions": 20}


def make_terms(cross_entropy: float, padding: float) -> dict[str, Term]:
    return {
        "cross_entropy": Term(torch.tensor(cross_entropy, requires_grad=True), "rows", 1.0),
        "padding_fraction": Term(torch.tensor(padding), "positions"),
    }


def make_sums() -> TermSums:
    sums = TermSums()
    for cross_entropy, padding in ((6.0, 1.0), (2.0, 4.0)):
        sums.add_counts(COUNTS)
        sums.add_terms(make_terms(cross_entropy, padding))
    return sums


def double(vector: Tensor) -> Tensor:
    """Reduces over two ranks that have the same sums."""
    return 2 * vector


def test_a_term_is_divided_by_the_count_of_its_unit() -> None:
    means = make_sums().means(lambda vector: vector, CPU, counts_are_global=False)
    assert means == {"cross_entropy": 1.0, "padding_fraction": 0.125}


@pytest.mark.parametrize(("counts_are_global", "expected"), [(False, 1.0), (True, 2.0)])
def test_counts_are_added_up_over_ranks_unless_they_are_global(counts_are_global: bool, expected: float) -> None:
    assert make_sums().means(double, CPU, counts_are_global=counts_are_global)["cross_entropy"] == expected


def test_a_term_without_a_count_has_mean_0() -> None:
    sums = TermSums()
    sums.add_terms({"preference": Term(torch.tensor(0.0), "pairs", 1.0)})
    assert sums.means(double, CPU, counts_are_global=False) == {"preference": 0.0}


def test_sums_are_float64_and_keep_no_graph() -> None:
    sums = TermSums()
    assert not sums
    for _ in range(3):
        sums.add_counts({"rows": 1})
        sums.add_terms({"cross_entropy": Term(torch.tensor(2.0**24 + 2, requires_grad=True), "rows", 1.0)})
    sums.add_terms({"cross_entropy": Term(torch.tensor(3.0), "rows", 1.0)})
    assert sums
    assert sums.means(lambda vector: vector, CPU, counts_are_global=True) == {"cross_entropy": 2.0**24 + 3}
