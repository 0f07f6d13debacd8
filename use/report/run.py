"""Collects the stages, compares the last student with its teacher, and writes page and Markdown."""

from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from common.storage.files import Location, publish, read_bytes
from use.report.disagreement import ComparedSample, find_disagreements
from use.report.markdown import HEADING, render_markdown
from use.report.page import render_page
from use.report.stages import collect_stages


def check_markdown_destination(location: Location) -> None:
    """Checks that Markdown replaces nothing but an earlier report.

    Raises:
        ConfigError: there is another file, or a directory.
    """
    try:
        is_report = read_bytes(location).startswith(HEADING.encode())
    except FileNotFoundError:
        return
    except OSError:
        is_report = False
    if not is_report:
        raise ConfigError(f"--markdown {location}: exists and is no report of this program; choose another name")


def write_report(
    runs: Sequence[Path], *, html: Location | None, markdown: Location | None, num_samples: int
) -> list[str]:
    """Writes a report on stages of training; returns their names.

    Of the last stage that was trained on a teacher's scores of conversations and held samples out, the samples are
    shown where its student differs most from the teacher.

    Raises:
        ConfigError: a directory is no output of a stage. StorageError: a file cannot be written.
    """
    stages = collect_stages(runs)
    samples: list[ComparedSample] = []
    what = "no samples were asked for"
    if num_samples:
        for stage in reversed(stages):
            samples, reason = find_disagreements(stage, num_samples)
            what = f"{stage.name}: {reason}" if samples else reason
            if samples:
                break
    if html is not None:
        publish(html, render_page(stages, samples, what).encode())
    if markdown is not None:
        publish(markdown, render_markdown(stages, samples, what).encode())
    return [stage.name for stage in stages]
