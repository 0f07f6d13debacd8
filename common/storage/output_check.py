"""The check before a command writes into an output: it is new, empty, or of this program for the same purpose."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ConfigError, shorten
from common.storage.files import Location, list_files, read_bytes


@dataclass(frozen=True)
class OutputKind:
    """An output of one purpose.

    `command` is the command that writes it. `markers` are JSON files by which it is known, each with a function that
    says of the parsed content if it is this program's; `is_own` says of a name if the command may have written such an
    entry before the first marker.
    """

    command: str
    markers: Mapping[str, Callable[[Any], bool]]
    is_own: Callable[[str], bool] = field(default=lambda _: False)


def check_output(output: Location, kind: OutputKind, inputs: Mapping[str, Location | None]) -> None:
    """Checks that nothing of others is in the way of an output. Writes nothing.

    Entries whose names begin with a dot are passed over, because locks and unfinished files have such names. `inputs`
    are what the command reads, by the names of their settings; none of them may be the output or lie in it.

    Raises:
        ConfigError: an input lies in the output, or the output holds what this command did not write.
        StorageError: the disk or the store failed.
    """
    for name, location in inputs.items():
        if location is not None and _lies_in(location, output):
            raise ConfigError(
                f"{output}: is where {name} lies ({location}), and {kind.command} would write there; choose an output "
                "of its own, such as runs/first"
            )
    names = sorted(name for name in _list_names(output) if not name.startswith("."))
    if not names:
        return
    marked = [name for name in kind.markers if name in names]
    foreign = [name for name in marked if not kind.markers[name](_read_json(output / name))]
    if not marked:
        foreign = [name for name in names if not kind.is_own(name)]
    if foreign:
        raise ConfigError(
            f"{output}: holds {shorten(', '.join(foreign))}, which {kind.command} did not write; nothing was changed. "
            "Choose a new or empty directory, or move these away"
        )


def _lies_in(location: Location, output: Location) -> bool:
    if isinstance(location, Path) and isinstance(output, Path):
        return location.resolve().is_relative_to(output.resolve())
    return f"{location}/".startswith(f"{str(output).rstrip('/')}/") and isinstance(location, type(output))


def _list_names(output: Location) -> list[str]:
    if not isinstance(output, Path):
        return list(list_files(output))
    try:
        return [path.name for path in output.iterdir()]
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise ConfigError(f"{output}: is a file, expected a directory; choose another output") from error
    except OSError as error:
        raise ConfigError(f"{output}: cannot be listed ({error.strerror}); choose another output") from error


def _read_json(location: Location) -> Any:
    """Returns the parsed content; None for a file that is damaged or no JSON."""
    try:
        return json.loads(read_bytes(location))
    except (OSError, ValueError, RecursionError):
        return None
