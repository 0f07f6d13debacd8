"""Files of a dataset: one file, the Parquet files of a folder, or the files that a pattern names."""

import fnmatch
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from common.data import parquet_files
from common.data.json_files import JsonFile
from common.data.parquet_files import ParquetFile
from common.data.sample_ids import SourceIds
from common.errors import DataError, shorten
from common.storage.files import Location, find_special_kind, list_files, open_ranged

_SPLIT = re.compile(r"(train|test|valid|validation|val|dev)(?=[-_.\d])")


class RecordFile(Protocol):
    """Random access to the records of a file; all counts and ids are known once it is open."""

    path: Location
    sha256: str
    source_ids: SourceIds
    unused: Counter[str]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def position(self, index: int) -> str:
        """Returns where a record stands in the file."""


def open_record_file(path: Location) -> RecordFile:
    """Opens a file of JSON or Parquet, told by its first bytes.

    Raises:
        DataError: it cannot be read, or is broken. StorageError: the store failed.
    """
    try:
        with open_ranged(path) as file:
            is_parquet = file.read(len(parquet_files.MAGIC)) == parquet_files.MAGIC
    except OSError as error:
        raise DataError(f"{path}: the dataset cannot be read ({error})") from error
    return ParquetFile(path) if is_parquet else JsonFile(path)


def find_record_files(path: Location) -> list[Location]:
    """Returns the files that a path names, by name: itself, a folder's Parquet files, or those of a pattern.

    A pattern has `*`, `?` or `[` in its last part. A file of that very name comes first.

    Raises:
        DataError: no file, or files of several splits, such as train and test. StorageError: the store failed.
    """
    if _is_folder(path):
        names = [name for name in list_files(path) if name.endswith(".parquet")]
        if not names:
            raise DataError(
                f"{path}: is a folder without .parquet files; name a file, a folder of .parquet files, or a pattern "
                f"such as {path / 'train-*.parquet'}{_hint(path)}"
            )
        return _check_splits(path, path, names)
    if any(character in path.name for character in "*?[") and not _is_there(path):
        names = [name for name in list_files(path.parent) if fnmatch.fnmatchcase(name, path.name)]
        if not names:
            raise DataError(f"{path}: no file in {path.parent} has such a name")
        return _check_splits(path, path.parent, names)
    return [path]


def _check_splits(path: Location, folder: Location, names: list[str]) -> list[Location]:
    splits = sorted({match[1] for name in names if (match := _SPLIT.match(name))})
    if len(splits) > 1:
        raise DataError(
            f"{path}: names files of several splits, {', '.join(splits)}; name one, such as "
            f"{folder / (splits[-1] + '-*.parquet')}"
        )
    return [folder / name for name in sorted(names)]


def _is_folder(path: Location) -> bool:
    if not isinstance(path, Path):
        return not path.suffix and bool(list_files(path))
    try:
        return find_special_kind(path) == "a directory"
    except FileNotFoundError:
        return False


def _is_there(path: Location) -> bool:
    return path.name in list_files(path.parent)


def _hint(folder: Location) -> str:
    """Returns which folders below one without Parquet files have some."""
    if not isinstance(folder, Path):
        return ""
    found = []
    for root, _, names in os.walk(folder):
        if any(name.endswith(".parquet") for name in names):
            found.append(root)
        if len(found) == 3:
            break
    return shorten(f"; there are some in {', '.join(sorted(found))}") if found else ""
