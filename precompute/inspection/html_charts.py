"""Colours of an inspection's heat maps, and its histograms as SVG."""

import html
import math
from itertools import pairwise

from precompute.inspection import formatting
from precompute.inspection.statistics import Distribution

# Number of colours of a heat map's scale.
NUM_LEVELS = 12

Colour = tuple[float, float, float]

# Lightness, chroma and hue in degrees at both ends of each scale: "e" for entropy, "o" for own log-probs. Lightness
# changes evenly away from the page's background, so that the order can be seen without the hues.
SCALES: dict[str, dict[str, tuple[Colour, Colour]]] = {
    "light": {
        "e": ((0.97, 0.035, 110.0), (0.38, 0.14, 285.0)),
        "o": ((0.97, 0.03, 95.0), (0.40, 0.15, 20.0)),
    },
    "dark": {
        "e": ((0.27, 0.04, 285.0), (0.90, 0.13, 110.0)),
        "o": ((0.27, 0.04, 10.0), (0.88, 0.13, 85.0)),
    },
}

_WIDTH, _HEIGHT = 440.0, 210.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 12.0, 18.0, 40.0


def level(value: float, scale: float) -> int:
    """Returns the step of a value on a scale from 0 to `scale`; larger values get the last step."""
    return min(NUM_LEVELS - 1, max(0, int(value / scale * NUM_LEVELS))) if scale > 0 else 0


def scale_css(theme: str) -> str:
    """Returns a theme's CSS properties: `--e3` is the colour of the fourth step, `--e3t` that of text on it."""
    parts = []
    for name, (low, high) in SCALES[theme].items():
        for step in range(NUM_LEVELS):
            share = step / (NUM_LEVELS - 1)
            lightness, chroma, hue = (a + share * (b - a) for a, b in zip(low, high, strict=True))
            rgb = oklch(lightness, chroma, hue)
            parts.append(f"--{name}{step}:{to_hex(rgb)};--{name}{step}t:{text_colour(rgb)};")
    return "".join(parts)


def oklch(lightness: float, chroma: float, hue: float) -> Colour:
    """Converts OKLCH, hue in degrees, to sRGB in 0..1 (Ottosson, "A perceptual color space for image processing")."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    red, green, blue = (
        12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in (min(1.0, max(0.0, c)) for c in linear)
    )
    return red, green, blue


def to_hex(rgb: Colour) -> str:
    """Returns a colour as CSS writes it, such as #1a2b3c."""
    return "#" + "".join(f"{round(255 * c):02x}" for c in rgb)


def contrast(one: Colour, other: Colour) -> float:
    """Returns the contrast ratio of two sRGB colours, 1 to 21 (WCAG 2.2)."""
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def text_colour(background: Colour) -> str:
    """Returns black or white, whichever has more contrast to the background."""
    return "#000" if contrast(background, (0, 0, 0)) >= contrast(background, (1, 1, 1)) else "#fff"


def histogram_svg(distribution: Distribution) -> str:
    """Returns a histogram of the shares of all values, with axes, units and a line at the median."""
    metric, edges = distribution.measure, distribution.edges
    total = sum(distribution.counts)
    shares = [count / total for count in distribution.counts]
    top = max(shares)
    title = html.escape(f"{metric.name}, {metric.unit}")

    # A single bin is drawn in the middle.
    margin = edges[1] - edges[0] if len(edges) == 2 else 0.0
    low, high = edges[0] - margin, edges[-1] + margin

    def x(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(share: float) -> float:
        return _HEIGHT - _BOTTOM - share / top * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="histogram of {title}">']
    for tick in ticks(0, top):
        parts.append(f'<path class="grid" d="M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{100 * tick:g}%</text>')
    for (start, stop), share, count in zip(pairwise(edges), shares, distribution.counts, strict=True):
        if count:
            # At least half a unit, so that a rare value can be seen.
            height = max(0.5, y(0) - y(share))
            label = html.escape(
                f"{_format_bin(start, stop, distribution)}: {count:,}, {formatting.format_percent(share)}"
            )
            parts.append(
                f'<rect x="{x(start):.1f}" y="{y(0) - height:.1f}" width="{max(1, x(stop) - x(start) - 0.8):.1f}" '
                f'height="{height:.1f}"><title>{label}</title></rect>'
            )
    parts.append(f'<path class="axis" d="M{_LEFT} {y(0)}H{_WIDTH - _RIGHT}"/>')
    for tick in ticks(low, high, whole=metric.is_whole):
        parts.append(f'<path class="axis" d="M{x(tick):.1f} {y(0)}v4"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{y(0) + 16}" text-anchor="middle">{format_tick(tick)}</text>')
    median = x(distribution.quantiles[3])
    anchor = "end" if median > _WIDTH / 2 else "start"
    parts.append(f'<path class="median" d="M{median:.1f} {_TOP - 4}V{y(0)}"/>')
    parts.append(
        f'<text class="median-label" x="{median + (-5 if anchor == "end" else 5):.1f}" y="{_TOP - 6}" '
        f'text-anchor="{anchor}">median {formatting.format_number(distribution.quantiles[3], metric)}</text>'
    )
    parts.append(f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{title}</text>')
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Returns three to seven round numbers from `low` to `high`; only whole ones if `whole`."""
    if high <= low:
        return [low]
    rough_step = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough_step))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough_step * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    # A tick may lie 2% of a step outside, so that an axis from 0.0003 begins with 0.
    first = math.ceil(low / step - 0.02)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 0.02) + 1)]


def _luminance(rgb: Colour) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _format_bin(start: float, stop: float, distribution: Distribution) -> str:
    if not distribution.measure.is_whole:
        ends = (formatting.format_number(end, distribution.measure) for end in (start, stop))
        return " to ".join(ends)
    first, last = math.ceil(start), math.floor(stop)
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def format_tick(value: float) -> str:
    """Returns a number beside an axis."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:g}"
