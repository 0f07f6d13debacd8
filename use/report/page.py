"""Writes a report as one self-contained page: no script, no network, images inside."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

from precompute.inspection.formatting import show_whitespace
from precompute.inspection.html_charts import NUM_LEVELS, level
from precompute.inspection.html_document import escape, render_document, thumbnail
from train.run.history import StageHistory
from use.report.disagreement import ComparedSample, ComparedToken
from use.report.line_charts import CHART_RULES, chart_figure
from use.report.stages import charts_of, difference_rows, metric_rows, summary_rows

# Tokens of a sample that are shown; what follows is counted.
_MAX_TOKENS = 400
_MAX_PROMPT_CHARS = 2000
_MAX_PICTURE_BYTES = 4_000_000


def render_page(stages: Sequence[StageHistory], samples: Sequence[ComparedSample], what: str) -> str:
    """Returns the whole page; `what` says which samples were looked at, or why there are none."""
    name = stages[-1].output.name
    colours = "".join(
        f".t.d{step},.legend .d{step}{{background:var(--o{step});color:var(--o{step}t)}}" for step in range(NUM_LEVELS)
    )
    body = "".join([*_tables(stages), *_curves(stages), *_samples(samples, what)])
    return render_document(f"decant report: {name}", f"Training of {name}", body, CHART_RULES + colours)


def _tables(stages: Sequence[StageHistory]) -> Iterator[str]:
    yield f"<section><h2>Stages</h2>{_table(*summary_rows(stages), css='facts')}</section>"
    header, rows = metric_rows(stages)
    if rows:
        note = "<p>eval_ is of held-out samples.</p>"
        yield f"<section><h2>Metrics at the end</h2>{_table(header, rows)}{note}</section>"
    header, rows = difference_rows(stages)
    if rows and len(stages) > 1:
        yield f"<section><details><summary>Settings that differ ({len(rows)})</summary>{_table(header, rows)}"
        yield "</details></section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], css: str = "numbers") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{css}"><tr>{head}</tr>{body}</table></div>'


def _curves(stages: Sequence[StageHistory]) -> Iterator[str]:
    for stage in stages:
        charts = charts_of(stage)
        yield f"<section><h2>{escape(stage.name)}</h2>"
        yield f'<div class="charts">{"".join(map(chart_figure, charts))}</div>' if charts else "<p>nothing logged</p>"
        yield _expert_load(stage.output / "expert-load.png")
        yield "</section>"


def _expert_load(path: Path) -> str:
    """Returns the stage's last picture of what each expert got, an empty text if there is none."""
    try:
        picture = path.read_bytes()
    except OSError:
        return ""
    if len(picture) > _MAX_PICTURE_BYTES:
        return ""
    data = base64.b64encode(picture).decode()
    return (
        "<details><summary>load of each expert at the end</summary>"
        f'<img style="max-width:100%" src="data:image/png;base64,{data}" alt="load of experts"></details>'
    )


def _samples(samples: Sequence[ComparedSample], what: str) -> Iterator[str]:
    yield '<section class="samples"><h2>Where student and teacher differ most</h2>'
    yield f"<p>{escape(what[:1].upper() + what[1:])}.</p>"
    if not samples:
        yield "</section>"
        return
    scale = max(0.25, max(token.divergence for sample in samples for token in sample.tokens) / 2)
    steps = "".join(
        f'<i class="d{step}">{"≥ " if step == NUM_LEVELS - 1 else ""}{step * scale / NUM_LEVELS:.2g}</i>'
        for step in range(NUM_LEVELS)
    )
    yield f'<div class="legend"><span>KL of a token, nats</span>{steps}</div>'
    yield "<p>Point at a token, or go to it with the tab key, to see what each side would have written.</p>"
    for number, sample in enumerate(samples):
        yield from _sample(sample, number, scale)
    yield "</section>"


def _sample(sample: ComparedSample, number: int, scale: float) -> Iterator[str]:
    yield f"<article><h3>{escape(sample.id)}: {sample.divergence:.3f} nats a token</h3>"
    if sample.image is not None:
        yield f'<div class="images">{thumbnail(sample.image, "image of this sample")}</div>'
    cut = " …" if len(sample.prompt) > _MAX_PROMPT_CHARS else ""
    yield f'<p class="turn">{escape(sample.prompt[:_MAX_PROMPT_CHARS])}{cut}</p><div class="map">'
    for position, token in enumerate(sample.tokens[:_MAX_TOKENS]):
        shown = escape(token.text.replace("\t", "⇥")).replace("\n", "↵\n")
        yield (
            f'<span class="t d{level(token.divergence, scale)}" tabindex="0" id="s{number}-{position}">{shown}'
            f'<span class="pop">{_details(token)}</span></span>'
        )
    yield "</div>"
    if (num_more := len(sample.tokens) - _MAX_TOKENS) > 0:
        yield f"<p>{num_more:,} more tokens</p>"
    yield "</article>"


def _details(token: ComparedToken) -> str:
    rows = "".join(
        f'<span><i style="width:{100 * min(1.0, probability):.1f}%"></i><u>{name}: {escape(show_whitespace(text))}</u>'
        f"<s>{probability:.1%}</s></span>"
        for name, text, probability in (
            ("teacher", token.teacher, token.teacher_probability),
            ("student", token.student, token.student_probability),
        )
    )
    return f"<span><b>{escape(show_whitespace(token.text))}</b> KL {token.divergence:.3f} nats</span>{rows}"
