import io

import pytest
from rich.console import Console

from common.estimates import Estimate, EstimateTable, Unit, format_value


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1234, "", "1,234"),
        (1023, "bytes", "1,023 bytes"),
        (1024, "bytes", "1.00 KiB"),
        (3 * 2**29, "bytes", "1.50 GiB"),
        (2**60, "bytes", "1,024.00 PiB"),
        (3.1416e18, "FLOP", "3.142e+18"),
        (1234.56, "hours", "1,234.6 h"),
        (9.876, "hours", "9.88 h"),
        (0.0123, "hours", "0.012 h"),
    ],
)
def test_values_are_formatted_with_their_unit(value: float, unit: Unit, text: str) -> None:
    assert format_value(value, unit) == text


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate("x", 2**30, "", "bytes"), "1.00 GiB"),
        (Estimate("x", 2**30, "", "bytes", high=2**31), "1.00 to 2.00 GiB"),
        (Estimate("x", 2**20, "", "bytes", high=2**31), "1.00 MiB to 2.00 GiB"),
        (Estimate("x", 5, "", high=5), "5"),
        (Estimate("x", 1000, "", error=12.4), "1,000 ± 12"),
    ],
)
def test_ranges_and_errors_are_shown(estimate: Estimate, text: str) -> None:
    assert estimate.format() == text


def test_a_table_shows_each_estimate_with_its_arithmetic_and_the_notes() -> None:
    table = EstimateTable("Memory", (Estimate("weights", 2**30, "2 x [536,870,912]", "bytes"),), ("no activations",))
    console = Console(file=io.StringIO(), width=80)
    console.print(table.render())
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    for text in ("Memory", "weights", "1.00 GiB", "2 x [536,870,912]", "- no activations"):
        assert text in shown
