"""Lists the files of an output, and tells a path that holds none from an output that is damaged."""

from pathlib import Path

from common.errors import ShardError
from common.shards.feature_shard import INDEX_NAME
from common.shards.manifest import MANIFEST_NAME, shard_number
from common.storage.files import Location, list_files


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


def _describe(output: Location, files: dict[str, int]) -> str:
    if files:
        return f"holds {len(files):,} files ({min(files)} ...), but no {MANIFEST_NAME} and no shard"
    if not isinstance(output, Path):
        return "nothing is stored below this address"
    if not output.exists():
        return "no such directory"
    return "is a directory without files" if output.is_dir() else "is a file, not a directory"
