"""Lists the files of an output, and tells a path that holds none from an output that is damaged."""

from pathlib import Path

from common.errors import ShardError
from common.shards.feature_shard import INDEX_NAME
from common.shards.manifest import MANIFEST_NAME, shard_number
from common.storage.files import Location, list_files
from common.storage.output_check import OutputKind

# The dataset card of a complete output.
CARD_NAME = "README.md"


def list_output_files(output: Location, commands: str) -> dict[str, int]:
    """Returns names and bytes of the files in an output that `commands` write.

    An output may have lost any of its files: one manifest, shard, receipt or list of images is enough to be one.

    Raises:
        ShardError: there is no such directory, or it holds no file of an output.
        StorageError: the disk or the store refused.
    """
    files = list_files(output)
    if any(name in (MANIFEST_NAME, INDEX_NAME) or shard_number(name) is not None for name in files):
        return files
    raise ShardError(f"{output}: {_describe(output, files)}; expected an output of {commands}: check the path")


def is_output_name(name: str) -> bool:
    """Returns True for a name that a file of an output or of a feature cache may have."""
    return name in (MANIFEST_NAME, INDEX_NAME, CARD_NAME, "config.json", "broken") or shard_number(name) is not None


def output_kind(command: str) -> OutputKind:
    """Returns how outputs of shards are known; a manifest of another capture is compared where it is opened."""
    return OutputKind(
        command,
        markers={
            MANIFEST_NAME: lambda content: (
                content is None or (isinstance(content, dict) and "content_sha256" in content)
            ),
            "config.json": lambda content: isinstance(content, dict) and content.keys() == {"sha256", "config"},
        },
        is_own=is_output_name,
    )


def _describe(output: Location, files: dict[str, int]) -> str:
    if files:
        return f"holds {len(files):,} files ({min(files)} ...), but no {MANIFEST_NAME} and no shard"
    if not isinstance(output, Path):
        return "nothing is stored below this address"
    if not output.exists():
        return "no such directory"
    return "is a directory without files" if output.is_dir() else "is a file, not a directory"
