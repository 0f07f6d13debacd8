"""The limit on skipped samples, and the list of problems that stops a run."""

import re
from collections.abc import Sequence

from common.errors import DataError, shorten

_MAX_LISTED_PROBLEMS = 20
_MAX_LISTED_REASONS = 5

# Characters of a reason. It begins with the paths of the dataset and of an image, which are long in deep folders.
_MAX_REASON = 1000

# What differs between samples with one and the same problem: which sample it is, paths and other quoted texts, numbers.
_SAMPLE = re.compile(r"^.*?\bsample (?:'[^']*'|\"[^\"]*\")(?: \([^)]*\))?: ", re.DOTALL)
_PARTICULARS = re.compile(r"'[^']*'|\"[^\"]*\"|\S*/\S*|\S+\.\w{3,4}\b|\d+")


def list_problems(problems: Sequence[str]) -> str:
    """Returns one message for all problems; long lists are cut."""
    if len(problems) == 1:
        return problems[0]
    lines = [f"  {problem}" for problem in problems[:_MAX_LISTED_PROBLEMS]]
    if (more := len(problems) - _MAX_LISTED_PROBLEMS) > 0:
        lines.append(f"  and {more} more")
    return f"{len(problems)} samples cannot be used\n" + "\n".join(lines)


def check_skipped_share(reasons: Sequence[str], num_samples: int, max_skipped: float) -> None:
    """Checks that not too many of `num_samples` samples are skipped; `reasons` has one entry a skipped sample.

    Raises:
        DataError: their share is above `max_skipped`; lists the most frequent kinds of reasons, each with an example.
    """
    if len(reasons) <= max_skipped * num_samples:
        return
    groups: dict[str, list[str]] = {}
    for reason in reasons:
        groups.setdefault(_PARTICULARS.sub("*", _SAMPLE.sub("", reason)), []).append(reason)
    largest = sorted(groups.values(), key=len, reverse=True)
    lines = [f"  {len(group):,} such as: {shorten(group[0], _MAX_REASON)}" for group in largest[:_MAX_LISTED_REASONS]]
    if (more := len(largest) - _MAX_LISTED_REASONS) > 0:
        lines.append(f"  and {more} other reasons")
    share = f"{len(reasons):,} of {num_samples:,} samples ({len(reasons) / num_samples:.0%})"
    raise DataError(
        f"{share} cannot be used, but max_skipped = {max_skipped:g} allows {max_skipped:.0%}; most frequent:\n"
        + "\n".join(lines)
        + "\ncorrect them, or, if they are to be left out, raise max_skipped and run the same command again"
    )
