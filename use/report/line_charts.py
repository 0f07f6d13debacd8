"""Draws curves over steps as SVG."""

import html
import math
from collections.abc import Sequence

from precompute.inspection.html_charts import format_tick, ticks
from use.report.stages import Chart

# Colours of the curves are those of this style sheet, in order.
CHART_RULES = """
:root{--c0:#3f6fb5;--c1:#c2571a;--c2:#4d8b31;--c3:#8a4fa3;--c4:#7a6a00;--c5:#b3261e}
@media (prefers-color-scheme:dark){:root{--c0:#7ea8e6;--c1:#f0a36b;--c2:#9ccf7f;--c3:#d3a6e6;--c4:#d8c659;--c5:#ff8a80}}
.curve{fill:none;stroke-width:1.6;stroke-linejoin:round}
.key{display:flex;flex-wrap:wrap;gap:0 1rem;font-size:.8rem;color:var(--dim)}
.key i{display:inline-block;width:1.2rem;height:.2rem;margin:0 .35rem .2rem 0}
"""
_NUM_COLOURS = 6

_WIDTH, _HEIGHT = 440.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 10.0, 10.0, 36.0

# More points than pixels add bytes and nothing that can be seen; neighbours are averaged.
_MAX_POINTS = 300


def chart_figure(chart: Chart) -> str:
    """Returns a chart with its key as an HTML figure."""
    keys = "".join(
        f'<span><i style="background:var(--c{number % _NUM_COLOURS})"></i>{html.escape(name)}</span>'
        for number, name in enumerate(chart.curves)
    )
    scale = ", logarithmic" if chart.is_log else ""
    return (
        f"<figure>{line_svg(chart)}<figcaption>{html.escape(chart.title)}{scale}"
        f'<div class="key">{keys}</div></figcaption></figure>'
    )


def line_svg(chart: Chart) -> str:
    """Returns the curves with axes; a single point is a dot."""
    points = [point for curve in chart.curves.values() for point in curve]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    values = [_scaled(y, chart.is_log) for _, y in points]
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_scaled(value, chart.is_log) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{html.escape(chart.title)}">']
    for tick in _value_ticks(low, high, is_log=chart.is_log):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{format_tick(tick)}</text>')
    for tick in ticks(first, last, whole=True):
        parts.append(
            f'<text x="{x(tick):.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{format_tick(tick)}</text>'
        )
    parts.append(f'<path class="axis" d="M{_LEFT} {_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}"/>')
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>')
    for number, curve in enumerate(chart.curves.values()):
        colour = f"var(--c{number % _NUM_COLOURS})"
        thinned = thin(curve)
        if len(thinned) == 1:
            parts.append(f'<circle cx="{x(thinned[0][0]):.1f}" cy="{y(thinned[0][1]):.1f}" r="3" fill="{colour}"/>')
            continue
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in thinned)
        parts.append(f'<path class="curve" style="stroke:{colour}" d="M{path}"/>')
    return "".join(parts) + "</svg>"


def thin(curve: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Returns at most `_MAX_POINTS` points: means of runs of neighbours."""
    size = -(-len(curve) // _MAX_POINTS)
    runs = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def _scaled(value: float, is_log: bool) -> float:
    return math.log10(value) if is_log else value


def _value_ticks(low: float, high: float, *, is_log: bool) -> list[float]:
    if not is_log:
        return ticks(low, high)
    powers = [10.0**power for power in range(math.floor(low), math.ceil(high) + 1)]
    found = [power * step for power in powers for step in (1, 3) if low <= math.log10(power * step) <= high]
    return found if len(found) > 1 else [10**low, 10**high]
