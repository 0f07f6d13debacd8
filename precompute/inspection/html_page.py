"""An inspection as one page that needs nothing else: no script, no network, pictures inside."""

import base64
import html
import io
import math
from collections.abc import Iterator

from common.data.images import load_image
from common.data.samples import ImageRef
from common.errors import DataError
from precompute.inspection import formatting, html_charts
from precompute.inspection.collect import Inspection
from precompute.inspection.html_style import STYLE
from precompute.inspection.sample_view import Conversation, SampleView, Token

MAX_TOKENS = 400
NUM_SAMPLES = 8

_MAX_CHARS = 4000
_MAX_IMAGES = 4
_MAX_IMAGE_BYTES = 20_000_000
_THUMBNAIL = 320
# A quarter of a bit: an output without a surprise still has a scale.
_LEAST_SCALE = 0.25
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render_page(inspection: Inspection) -> str:
    """The whole page, UTF-8 text. Everything that comes from the output is escaped."""
    title = f"inspect-shards: {_text(str(inspection.path))}"
    light, dark = html_charts.scale_css("light"), html_charts.scale_css("dark")
    style = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}{_level_rules()}{STYLE}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{style}</style></head><body>"
        f"<header><h1>{_text(str(inspection.path))}</h1></header><main>{''.join(_sections(inspection))}</main>"
        "</body></html>\n"
    )


def _sections(inspection: Inspection) -> Iterator[str]:
    if inspection.problems:
        items = "".join(f"<li>{_text(problem.path)}: {_text(problem.what)}</li>" for problem in inspection.problems)
        yield f'<section class="problems"><h2>Cannot be read</h2><ul>{items}</ul></section>'
    yield f'<div class="two"><section><h2>Provenance</h2>{_facts(formatting.provenance_facts(inspection))}</section>'
    yield f"<section><h2>Counts</h2>{_facts(formatting.count_facts(inspection))}"
    if inspection.columns:
        note = _text(formatting.column_note(inspection))
        yield f"<h2>Bytes by column, compressed</h2>{_columns(inspection)}<p>{note}</p>"
    yield "</section></div>"
    if inspection.distributions:
        reading = _text(formatting.describe_reading(inspection))
        yield f"<section><h2>Distributions, of {reading}</h2>{_quantiles(inspection)}"
        yield '<div class="charts">'
        for distribution in inspection.distributions:
            meaning = _text(distribution.measure.meaning)
            yield f"<figure>{html_charts.histogram_svg(distribution)}<figcaption>{meaning}</figcaption></figure>"
        yield "</div></section>"
    if inspection.samples:
        yield from _samples(inspection)


def _facts(rows: formatting.Facts) -> str:
    cells = (f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts">{"".join(cells)}</table>'


def _columns(inspection: Inspection) -> str:
    rows = formatting.column_rows(inspection)
    greatest = max(share for *_, share in rows)
    cells = (
        f"<tr><td>{_text(name)}</td><td>{num_bytes:,}</td><td>{a_token:,.2f}</td><td>{share:.1%}</td>"
        f'<td class="bar"><i style="width:{100 * share / greatest:.1f}%"></i></td></tr>'
        for name, num_bytes, a_token, share in rows
    )
    head = "<tr><th>column</th><th>bytes</th><th>a scored token</th><th>share</th><th></th></tr>"
    return f'<table class="numbers">{head}{"".join(cells)}</table>'


def _quantiles(inspection: Inspection) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("", *formatting.QUANTILE_NAMES, "mean", "values"))
    rows = []
    for d in inspection.distributions:
        values = "".join(f"<td>{value}</td>" for value in (*formatting.format_distribution(d), f"{d.num_values:,}"))
        rows.append(f"<tr><td>{_text(d.measure.name)}, {_text(d.measure.unit)}</td>{values}</tr>")
    return f'<div class="wide"><table class="numbers"><tr>{head}</tr>{"".join(rows)}</table></div>'


def _samples(inspection: Inspection) -> Iterator[str]:
    """The heat maps, and two radio buttons that choose what colours them."""
    tokens = [t for s in inspection.samples for c in s.conversations for span in c.spans for t in span]
    scales = {
        "e": _round_up(max((token.entropy for token in tokens), default=0.0)),
        "o": _round_up(_high([-token.own_logprob for token in tokens])),
    }
    has_kept = inspection.manifest.capture.max_kept > 0
    yield '<section class="samples"><h2>Samples</h2>'
    yield (
        "<p>Each scored token is coloured. Point at one, or go to it with the tab key, "
        "to see what the teacher thought.</p>"
    )
    checked = {"e": " checked" if has_kept else "", "o": "" if has_kept else " checked"}
    names = {"e": "entropy", "o": "own log-prob"}
    for key in "eo" if has_kept else "o":
        yield f'<input type="radio" name="colour" id="by-{key}"{checked[key]}>'
        yield f'<label for="by-{key}">by {names[key]}</label>'
    for key in "eo" if has_kept else "o":
        yield _legend(key, scales[key])
    for number, sample in enumerate(inspection.samples):
        yield from _sample(sample, number, scales)
    yield "</section>"


def _legend(key: str, greatest: float) -> str:
    """The scale's steps, each with the value that it begins at; own log-probs run down from 0."""
    sign = -1 if key == "o" else 1
    names = {"e": "entropy, nats", "o": "log-prob of the token itself, nats"}
    steps = []
    for step in range(html_charts.NUM_LEVELS):
        value = sign * step * greatest / html_charts.NUM_LEVELS + 0.0
        ends = ("", "≤ " if sign < 0 else "≥ ")[step == html_charts.NUM_LEVELS - 1]
        steps.append(f'<i class="{key}{step}">{ends}{value:.3g}</i>')
    return f'<div class="legend legend-{key}"><span>{names[key]}</span>{"".join(steps)}</div>'


def _sample(sample: SampleView, number: int, scales: dict[str, float]) -> Iterator[str]:
    yield f"<article><h3>{_text(formatting.sample_facts(sample))}</h3>"
    if sample.images:
        yield '<div class="images">'
        yield from (_image(image) for image in sample.images[:_MAX_IMAGES])
        if more := len(sample.images) - _MAX_IMAGES:
            yield f"<span>and {more} more images</span>" if more > 0 else ""
        yield "</div>"
    for which, conversation in enumerate(sample.conversations):
        if conversation.name:
            yield f"<h4>{_text(conversation.name)}</h4>"
        yield "<details><summary>messages</summary>"
        for turn in conversation.turns:
            more = len(turn.content) - _MAX_CHARS
            cut = f" <em>… {more:,} more characters</em>" if more > 0 else ""
            yield f'<p class="turn"><b>{turn.role}</b> {_text(turn.content[:_MAX_CHARS])}{cut}</p>'
        yield "</details>"
        yield from _heat_map(conversation, f"s{number}-{which}", scales)
    yield "</article>"


def _heat_map(conversation: Conversation, name: str, scales: dict[str, float]) -> Iterator[str]:
    for span in conversation.spans:
        yield '<div class="map">'
        for token in span:
            entropy = html_charts.level(token.entropy, scales["e"])
            own = html_charts.level(-token.own_logprob, scales["o"])
            shown = _text(token.text.replace("\t", "⇥")).replace("\n", "↵\n")
            ids = " id" if token.text == str(token.token_id) else ""
            yield (
                f'<span class="t e{entropy} o{own}{ids}" tabindex="0" id="{name}-{token.position}">{shown}'
                f'<span class="pop">{_details(token)}</span></span>'
            )
        yield "</div>"
    if more := conversation.num_scored - conversation.num_shown:
        yield f"<p><em>Cut here: {more:,} of {conversation.num_scored:,} scored tokens follow.</em></p>"


def _details(token: Token) -> str:
    """What stands in the panel of a token."""
    probability = formatting.format_percent(formatting.token_probability(token))
    head = f"<b>{_visible(token.text)}</b> {probability}, log-prob {token.own_logprob:.3f}"
    if token.alternatives:
        rank = "not kept" if token.rank is None else f"rank {token.rank}"
        head += f", {rank} of {token.num_kept} kept, which hold {1 - token.rest_mass:.2%}; entropy {token.entropy:.3f}"
    rows = []
    for entry in token.alternatives:
        drawn = "" if entry.draws is None else f" {entry.draws}×"
        own = ' class="own"' if entry.token_id == token.token_id else ""
        rows.append(
            f'<span{own}><i style="width:{100 * min(1.0, entry.probability):.1f}%"></i>'
            f"<u>{_visible(entry.text)}</u><s>{formatting.format_percent(entry.probability)}{drawn}</s></span>"
        )
    return f"<span>{head}</span>{''.join(rows)}"


def _image(image: ImageRef) -> str:
    """A small copy of an image that the shard holds; of others the path."""
    name = _text(image.path or "image")
    if image.data is None:
        return f"<span>image {name}, not in the shard</span>"
    if len(image.data) > _MAX_IMAGE_BYTES:
        return f"<span>image {name}, {len(image.data):,} bytes, too large for this page</span>"
    try:
        picture = load_image(image, None, "keep", (0, 0, 0), "this sample")
    except DataError:
        return f"<span>image {name}, {len(image.data):,} bytes that are no image or too large a one</span>"
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    # Encoded again: nothing but pixels gets into the page.
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{name}" title="{name}">'


def _level_rules() -> str:
    """Which class gets which colour while its radio button is chosen; the legends always have theirs."""
    return "".join(
        f"#by-{key}:checked~article .t.{key}{step},.legend .{key}{step}"
        f"{{background:var(--{key}{step});color:var(--{key}{step}t)}}"
        for key in "eo"
        for step in range(html_charts.NUM_LEVELS)
    )


def _text(text: str) -> str:
    """Escaped for any place in the page; control characters are spelled out."""
    return html.escape(formatting.escape_control(text))


def _visible(text: str) -> str:
    return html.escape(formatting.show_whitespace(text))


def _high(values: list[float]) -> float:
    """The value that 98% do not exceed: the few that do share the scale's last step."""
    return sorted(values)[math.ceil(0.98 * (len(values) - 1))] if values else 0.0


def _round_up(value: float) -> float:
    """To the next multiple of a quarter, at least one."""
    return max(_LEAST_SCALE, math.ceil(value / _LEAST_SCALE) * _LEAST_SCALE)
