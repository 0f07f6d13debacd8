"""Writes a report as Markdown: the tables of the page, the curves as first, middle and last values, the samples."""

from collections.abc import Iterator, Sequence

from common.console import escape_control
from train.run.history import StageHistory
from use.report.disagreement import ComparedSample
from use.report.stages import charts_of, difference_rows, metric_rows, summary_rows

HEADING = "# Training of "

# Tokens of a sample that are listed, those with the largest divergence.
_NUM_TOKENS = 5


def render_markdown(stages: Sequence[StageHistory], samples: Sequence[ComparedSample], what: str) -> str:
    """Returns the whole report; `what` says which samples were looked at, or why there are none."""
    return "\n".join(_lines(stages, samples, what)) + "\n"


def _lines(stages: Sequence[StageHistory], samples: Sequence[ComparedSample], what: str) -> Iterator[str]:
    yield f"{HEADING}{_cell(stages[-1].output.name)}"
    yield from ("", "## Stages", "", *_table(*summary_rows(stages)))
    header, rows = metric_rows(stages)
    if rows:
        yield from ("", "## Metrics at the end", "", *_table(header, rows), "", "eval_ is of held-out samples.")
    for stage in stages:
        curves = [(name, points) for chart in charts_of(stage) for name, points in chart.curves.items()]
        if curves:
            values = [
                [name, *(f"{points[place][1]:.4g}" for place in (0, len(points) // 2, -1))] for name, points in curves
            ]
            yield from ("", f"## {_cell(stage.name)}", "", *_table(["curve", "first", "middle", "last"], values))
    header, rows = difference_rows(stages)
    if rows and len(stages) > 1:
        yield from ("", "## Settings that differ", "", *_table(header, rows))
    yield from ("", "## Where student and teacher differ most", "", f"{_cell(what[:1].upper() + what[1:])}.")
    for sample in samples:
        worst = sorted(sample.tokens, key=lambda token: -token.divergence)[:_NUM_TOKENS]
        values = [
            [
                token.text,
                f"{token.divergence:.3f}",
                f"{token.teacher} ({token.teacher_probability:.1%})",
                f"{token.student} ({token.student_probability:.1%})",
            ]
            for token in worst
        ]
        yield from ("", f"### {_cell(sample.id)}: {sample.divergence:.3f} nats a token", "")
        yield from _table(["token", "KL, nats", "teacher's best", "student's best"], values)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(map(_cell, header))} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(map(_cell, row))} |"


def _cell(text: str) -> str:
    """Returns text that Markdown shows as it is."""
    plain = escape_control(text).replace("\n", "↵")
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#" else char for char in plain)
