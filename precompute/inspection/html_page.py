"""Writes an inspection as one self-contained page: no script, no network, images inside."""

import html
import math
from collections.abc import Iterator

from common.data.images import load_image
from common.data.samples import ImageRef
from common.errors import DataError
from precompute.inspection import formatting, html_charts
from precompute.inspection.collect import Inspection
from precompute.inspection.html_document import escape, render_document, thumbnail
from precompute.inspection.sample_view import Conversation, SampleView, Token

MAX_TOKENS = 400
NUM_SAMPLES = 8

_MAX_TURN_CHARS = 4000
_MAX_IMAGES = 4
_MAX_IMAGE_BYTES = 20_000_000
# Nats. A scale has at least one step of this size, so that it has a length where all values are 0.
_SCALE_STEP = 0.25


def render_page(inspection: Inspection) -> str:
    """Returns the whole page. All text that comes from the output is escaped."""
    name = str(inspection.path)
    return render_document(f"inspect-shards: {name}", name, "".join(_sections(inspection)), _level_rules())


def _sections(inspection: Inspection) -> Iterator[str]:
    if inspection.problems:
        items = "".join(f"<li>{escape(problem.path)}: {escape(problem.what)}</li>" for problem in inspection.problems)
        yield f'<section class="problems"><h2>Cannot be read</h2><ul>{items}</ul></section>'
    provenance, counts = formatting.provenance_fields(inspection), formatting.count_fields(inspection)
    yield f'<div class="two"><section><h2>Provenance</h2>{_fields_table(provenance)}</section>'
    yield f"<section><h2>Counts</h2>{_fields_table(counts)}"
    if inspection.columns:
        explanation = escape(formatting.describe_columns(inspection))
        yield f"<h2>Bytes by column, compressed</h2>{_columns_table(inspection)}<p>{explanation}</p>"
    yield "</section></div>"
    if inspection.distributions:
        reading = escape(formatting.describe_reading(inspection))
        yield f"<section><h2>Distributions, of {reading}</h2>{_quantiles_table(inspection)}"
        yield '<div class="charts">'
        for distribution in inspection.distributions:
            meaning = escape(distribution.measure.meaning)
            yield f"<figure>{html_charts.histogram_svg(distribution)}<figcaption>{meaning}</figcaption></figure>"
        yield "</div></section>"
    if inspection.samples:
        yield from _samples_section(inspection)


def _fields_table(rows: formatting.Fields) -> str:
    cells = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts">{"".join(cells)}</table>'


def _columns_table(inspection: Inspection) -> str:
    rows = formatting.column_rows(inspection)
    max_share = max(share for *_, share in rows)
    cells = (
        f"<tr><td>{escape(name)}</td><td>{num_bytes:,}</td><td>{bytes_per_token:,.2f}</td><td>{share:.1%}</td>"
        f'<td class="bar"><i style="width:{100 * share / max_share:.1f}%"></i></td></tr>'
        for name, num_bytes, bytes_per_token, share in rows
    )
    head = "<tr><th>column</th><th>bytes</th><th>a scored token</th><th>share</th><th></th></tr>"
    return f'<table class="numbers">{head}{"".join(cells)}</table>'


def _quantiles_table(inspection: Inspection) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("", *formatting.QUANTILE_NAMES, "mean", "values"))
    rows = []
    for d in inspection.distributions:
        values = "".join(f"<td>{value}</td>" for value in (*formatting.format_distribution(d), f"{d.num_values:,}"))
        rows.append(f"<tr><td>{escape(d.measure.name)}, {escape(d.measure.unit)}</td>{values}</tr>")
    return f'<div class="wide"><table class="numbers"><tr>{head}</tr>{"".join(rows)}</table></div>'


def _samples_section(inspection: Inspection) -> Iterator[str]:
    """Yields the heat maps of all samples, and two radio buttons that choose what colours them."""
    conversations = [conversation for sample in inspection.samples for conversation in sample.conversations]
    tokens = [token for conversation in conversations for span in conversation.spans for token in span]
    scales = {
        "e": _round_up(max((token.entropy for token in tokens), default=0.0)),
        "o": _round_up(_scale_end([-token.own_logprob for token in tokens])),
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
        yield from _sample_section(sample, number, scales)
    yield "</section>"


def _legend(key: str, scale: float) -> str:
    """Returns the steps of a scale, each with the value that it begins at; own log-probs fall from 0."""
    sign = -1 if key == "o" else 1
    names = {"e": "entropy, nats", "o": "log-prob of the token itself, nats"}
    steps = []
    for step in range(html_charts.NUM_LEVELS):
        value = sign * step * scale / html_charts.NUM_LEVELS + 0.0
        prefix = ""
        if step == html_charts.NUM_LEVELS - 1:
            prefix = "≤ " if sign < 0 else "≥ "
        steps.append(f'<i class="{key}{step}">{prefix}{value:.3g}</i>')
    return f'<div class="legend legend-{key}"><span>{names[key]}</span>{"".join(steps)}</div>'


def _sample_section(sample: SampleView, number: int, scales: dict[str, float]) -> Iterator[str]:
    yield f"<article><h3>{escape(formatting.describe_sample(sample))}</h3>"
    if sample.images:
        yield '<div class="images">'
        yield from (_image(image) for image in sample.images[:_MAX_IMAGES])
        if (num_more := len(sample.images) - _MAX_IMAGES) > 0:
            yield f"<span>and {num_more} more images</span>"
        yield "</div>"
    for which, conversation in enumerate(sample.conversations):
        if conversation.name:
            yield f"<h4>{escape(conversation.name)}</h4>"
        yield "<details><summary>messages</summary>"
        for turn in conversation.turns:
            num_more = len(turn.content) - _MAX_TURN_CHARS
            cut = f" <em>… {num_more:,} more characters</em>" if num_more > 0 else ""
            yield f'<p class="turn"><b>{escape(turn.role)}</b> {escape(turn.content[:_MAX_TURN_CHARS])}{cut}</p>'
        yield "</details>"
        yield from _heat_map(conversation, f"s{number}-{which}", scales)
    yield "</article>"


def _heat_map(conversation: Conversation, name: str, scales: dict[str, float]) -> Iterator[str]:
    for span in conversation.spans:
        yield '<div class="map">'
        for token in span:
            entropy = html_charts.level(token.entropy, scales["e"])
            own = html_charts.level(-token.own_logprob, scales["o"])
            shown = escape(token.text.replace("\t", "⇥")).replace("\n", "↵\n")
            ids = " id" if token.text == str(token.token_id) else ""
            yield (
                f'<span class="t e{entropy} o{own}{ids}" tabindex="0" id="{name}-{token.position}">{shown}'
                f'<span class="pop">{_details(token)}</span></span>'
            )
        yield "</div>"
    if num_more := conversation.num_scored - conversation.num_shown:
        yield f"<p><em>Cut here: {num_more:,} of {conversation.num_scored:,} scored tokens follow.</em></p>"


def _details(token: Token) -> str:
    """Returns the panel that is shown for a token."""
    probability = formatting.format_percent(formatting.token_probability(token))
    head = f"<b>{_escape_token(token.text)}</b> {probability}, log-prob {token.own_logprob:.3f}"
    if token.alternatives:
        rank = "not kept" if token.rank is None else f"rank {token.rank}"
        head += f", {rank} of {token.num_kept} kept, which hold {1 - token.rest_mass:.2%}; entropy {token.entropy:.3f}"
    rows = []
    for entry in token.alternatives:
        drawn = "" if entry.draws is None else f" {entry.draws}×"
        own = ' class="own"' if entry.token_id == token.token_id else ""
        rows.append(
            f'<span{own}><i style="width:{100 * min(1.0, entry.probability):.1f}%"></i>'
            f"<u>{_escape_token(entry.text)}</u><s>{formatting.format_percent(entry.probability)}{drawn}</s></span>"
        )
    return f"<span>{head}</span>{''.join(rows)}"


def _image(image: ImageRef) -> str:
    """Returns a thumbnail of an image that the shard holds, or a text that names the image."""
    name = escape(image.path or "image")
    if image.data is None:
        return f"<span>image {name}, not in the shard</span>"
    if len(image.data) > _MAX_IMAGE_BYTES:
        return f"<span>image {name}, {len(image.data):,} bytes, too large for this page</span>"
    try:
        picture = load_image(image, None, "keep", (0, 0, 0), "this sample")
    except DataError:
        return f"<span>image {name}, {len(image.data):,} bytes that are no image or too large a one</span>"
    return thumbnail(picture, name)


def _level_rules() -> str:
    """Returns CSS that colours the tokens by the chosen radio button, and both legends."""
    return "".join(
        f"#by-{key}:checked~article .t.{key}{step},.legend .{key}{step}"
        f"{{background:var(--{key}{step});color:var(--{key}{step}t)}}"
        for key in "eo"
        for step in range(html_charts.NUM_LEVELS)
    )


def _escape_token(text: str) -> str:
    return html.escape(formatting.show_whitespace(text))


def _scale_end(values: list[float]) -> float:
    """Returns the 98% quantile, so that a few extreme values do not stretch the scale; they share its last step."""
    return sorted(values)[math.ceil(0.98 * (len(values) - 1))] if values else 0.0


def _round_up(value: float) -> float:
    """Rounds up to a multiple of `_SCALE_STEP`, and to one step at least."""
    return max(_SCALE_STEP, math.ceil(value / _SCALE_STEP) * _SCALE_STEP)
