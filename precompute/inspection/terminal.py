"""Shows an inspection in a terminal."""

import itertools
from collections.abc import Iterator, Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from common.console import escape_control, plain_text
from precompute.inspection import formatting
from precompute.inspection.collect import Inspection
from precompute.inspection.sample_view import Conversation, SampleView, Token
from precompute.inspection.statistics import ENTROPY, MAX_BINS, OWN_LOGPROB, Distribution

_BLOCKS = " ▁▂▃▄▅▆▇█"
_HISTOGRAM_ROWS = 4
_HISTOGRAM_WIDTH = MAX_BINS
_BAR_WIDTH = 16
_MAX_TURN_CHARS = 600
_SHA_DIGITS = 64
# The first digits of a SHA-256 suffice to tell two fingerprints apart.
_SHOWN_SHA_DIGITS = 16


def render_terminal(inspection: Inspection, *, max_tokens: int = 48) -> RenderableType:
    """Returns provenance, counts, bytes by column, distributions, one sample, and what could not be read.

    At most `max_tokens` scored tokens of each conversation of the sample are shown.
    """
    return Group(*_sections(inspection, max_tokens))


def histogram(counts: Sequence[int]) -> list[str]:
    """Returns the lines of a bar chart from the top, one column for each bin; a bin that is not empty has a bar."""
    max_count = max(counts)
    eighths = [max(round(count / max_count * _HISTOGRAM_ROWS * 8), 1 if count else 0) for count in counts]
    return ["".join(_BLOCKS[min(8, max(0, n - 8 * row))] for n in eighths) for row in reversed(range(_HISTOGRAM_ROWS))]


def _sections(inspection: Inspection, max_tokens: int) -> Iterator[RenderableType]:
    yield plain_text(inspection.path, "bold")
    yield Text()
    yield _fields_table(
        [(name, _shorten_fingerprints(text)) for name, text in formatting.provenance_fields(inspection)]
    )
    yield _title("Counts")
    yield _fields_table(formatting.count_fields(inspection))
    if inspection.columns:
        yield _title("Bytes by column, compressed")
        yield _columns_table(inspection)
        yield plain_text(formatting.describe_columns(inspection), "dim")
    if inspection.distributions:
        yield _title(f"Distributions, of {formatting.describe_reading(inspection)}")
        yield _quantiles_table(inspection.distributions)
        yield Text()
        yield Columns([_histogram(d) for d in inspection.distributions], padding=(0, 2, 1, 0))
        for d in inspection.distributions:
            yield Text(f"{d.measure.name} ({d.measure.unit}): {d.measure.meaning}", style="dim")
    if inspection.samples:
        yield from _render_sample(inspection.samples[0], max_tokens)
    for problem in inspection.problems:
        yield plain_text(f"{problem.path}: {problem.what}", "red")


def _title(text: str) -> RenderableType:
    return Padding(plain_text(text, "bold"), (1, 0, 0, 0))


def _fields_table(rows: formatting.Fields) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, text in rows:
        table.add_row(plain_text(name, "dim"), plain_text(text))
    return table


def _shorten_fingerprints(text: str) -> str:
    """Returns the text with each SHA-256 cut to its first digits."""
    words = [f"{w[:_SHOWN_SHA_DIGITS]}…{w[_SHA_DIGITS:]}" if _is_sha(w[:_SHA_DIGITS]) else w for w in text.split(" ")]
    return " ".join(words)


def _is_sha(word: str) -> bool:
    return len(word) == _SHA_DIGITS and not set(word) - set("0123456789abcdef")


def _plain_table(*headers: str) -> Table:
    """Returns a table without lines whose first column is left-aligned and whose other columns are right-aligned."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for header in headers:
        table.add_column(header, justify="left" if not table.columns else "right", no_wrap=True)
    return table


def _columns_table(inspection: Inspection) -> Table:
    table = _plain_table("column", "bytes", "a token", "share")
    table.add_column("", justify="left", width=_BAR_WIDTH)
    rows = formatting.column_rows(inspection)
    max_share = max(share for *_, share in rows)
    for name, num_bytes, bytes_per_token, share in rows:
        numbers = f"{num_bytes:,}", f"{bytes_per_token:,.2f}", f"{share:.1%}"
        table.add_row(plain_text(name), *numbers, _bar(share / max_share))
    return table


def _bar(share: float) -> str:
    eighths = round(share * _BAR_WIDTH * 8)
    # Unicode orders the block elements that grow to the right from wide to narrow.
    return "█" * (eighths // 8) + (chr(0x2590 - eighths % 8) if eighths % 8 else "")


def _quantiles_table(distributions: Sequence[Distribution]) -> Table:
    table = _plain_table("", *formatting.QUANTILE_NAMES, "mean")
    for distribution in distributions:
        table.add_row(distribution.measure.name, *formatting.format_distribution(distribution))
    return table


def _histogram(distribution: Distribution) -> RenderableType:
    """Returns title, bars, and both ends of the axis. Few bins are drawn wider, a single one in the middle."""
    metric, counts = distribution.measure, distribution.counts
    repeat = _HISTOGRAM_WIDTH // max(3, len(counts))
    lines = ["".join(c * repeat for c in line) for line in histogram(counts)]
    if len(counts) == 1:
        lines = [line.center(_HISTOGRAM_WIDTH) for line in lines]
    width = max(_HISTOGRAM_WIDTH * 2 // 3, len(lines[0]))
    low, high = (
        formatting.format_number(value, metric) for value in (distribution.quantiles[0], distribution.quantiles[-1])
    )
    title = f"{metric.name}, {metric.unit}"
    top = f"▲ {max(counts) / sum(counts):.1%}"
    return Group(
        Text(title + top.rjust(width - len(title)) if len(title) + len(top) < width else title, style="dim"),
        *(Text(line.ljust(width), style="cyan", no_wrap=True) for line in lines),
        Text(low + high.rjust(width - len(low)) if len(counts) > 1 else low.center(width), style="dim"),
    )


def _render_sample(sample: SampleView, max_tokens: int) -> Iterator[RenderableType]:
    yield _title(formatting.describe_sample(sample))
    for image in sample.images:
        stored = "" if image.data is None else f" ({len(image.data):,} bytes stored)"
        yield plain_text(f"image {image.path or 'without a path'}{stored}", "dim")
    for conversation in sample.conversations:
        if conversation.name:
            yield _title(conversation.name)
        for turn in conversation.turns:
            text = escape_control(turn.content)
            cut = "" if len(text) <= _MAX_TURN_CHARS else f" … ({len(text) - _MAX_TURN_CHARS:,} more characters)"
            yield Text.assemble((f"{escape_control(turn.role)}: ", "bold"), text[:_MAX_TURN_CHARS], (cut, "dim"))
        yield Text()
        yield _tokens_table(conversation, max_tokens)
        if (more := conversation.num_scored - min(max_tokens, conversation.num_shown)) > 0:
            yield Text(f"and {more:,} more scored tokens (--tokens shows more)", style="dim")


def _tokens_table(conversation: Conversation, max_tokens: int) -> Table:
    table = _plain_table("token", "log-prob", "entropy", "rank")
    table.columns[0].overflow = "fold"
    table.add_column(" the teacher's best", justify="left")
    for token in list(itertools.chain(*conversation.spans))[:max_tokens]:
        table.add_row(*_token_cells(token))
    return table


def _token_cells(token: Token) -> Iterator[RenderableType]:
    yield Text(formatting.show_whitespace(token.text), style="bold" if token.rank == 1 else "")
    yield Text(
        formatting.format_number(token.own_logprob, OWN_LOGPROB),
        style="red" if formatting.token_probability(token) < 0.01 else "",
    )
    if not token.alternatives:
        return
    yield formatting.format_number(token.entropy, ENTROPY)
    yield "-" if token.rank is None else f"{token.rank}/{token.num_kept}"
    line = Text()
    for entry in token.alternatives:
        share = formatting.format_percent(entry.probability) if entry.draws is None else f"{entry.draws}×"
        line.append(formatting.show_whitespace(entry.text), "bold" if entry.token_id == token.token_id else "")
        # No space between token and share, so that no line breaks there.
        line.append(f"·{share}  ", "dim")
    line.rstrip()
    yield line
