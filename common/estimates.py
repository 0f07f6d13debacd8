"""Numbers that are estimated before a run, each with the arithmetic that gives it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.console import plain_text

Unit = Literal["", "bytes", "FLOP", "hours"]

_BYTE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


@dataclass(frozen=True)
class Estimate:
    """A number with its arithmetic: `how` is the formula with the values filled in, short enough to check by hand.

    With `high` it is a range from `value` to `high`. `error` is one standard error, 0 if the value is exact.
    """

    name: str
    value: float
    how: str
    unit: Unit = ""
    error: float = 0.0
    high: float | None = None

    def format(self) -> str:
        """Returns the value with its unit, its range and its standard error."""
        text = format_value(self.value, self.unit)
        if self.high is not None and self.high != self.value:
            high = format_value(self.high, self.unit)
            suffix = high[high.rfind(" ") :] if " " in high else ""
            text = f"{text.removesuffix(suffix)} to {high}"
        return f"{text} ± {format_value(self.error, self.unit)}" if self.error else text


@dataclass(frozen=True)
class EstimateTable:
    """Estimates under one title, with notes on what they leave out or assume."""

    title: str
    estimates: tuple[Estimate, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns title, estimates (under "figures") and notes for JSON."""
        return {"title": self.title, "figures": [asdict(each) for each in self.estimates], "notes": list(self.notes)}

    def render(self) -> RenderableType:
        """Returns a table of names, values and arithmetic, with the notes below it."""
        table = Table(title=plain_text(self.title, "bold"), title_justify="left", expand=False)
        table.add_column("what")
        table.add_column("value", justify="right")
        table.add_column("arithmetic")
        for estimate in self.estimates:
            table.add_row(plain_text(estimate.name), estimate.format(), plain_text(estimate.how))
        return Group(table, *(plain_text(f"- {note}") for note in self.notes), Text())


def format_value(value: float, unit: Unit = "") -> str:
    """Formats a number with its unit: "1,234", "13.92 GiB" (1 GiB = 2^30 bytes), "3.142e+18", "12.3 h"."""
    match unit:
        case "bytes":
            power = 0
            while power + 1 < len(_BYTE_UNITS) and abs(value) >= 1024 ** (power + 1):
                power += 1
            return f"{value:,.0f} bytes" if power == 0 else f"{value / 1024**power:,.2f} {_BYTE_UNITS[power]}"
        case "FLOP":
            return f"{value:.3e}"
        case "hours":
            return f"{value:,.1f} h" if value >= 10 else f"{value:.2f} h" if value >= 0.1 else f"{value:.2g} h"
        case "":
            return f"{value:,.0f}"
