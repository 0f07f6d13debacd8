"""Datasets as samples.

path ── find_record_files ──> files of JSON or Parquet ── Dataset.open ──> index of records, unique ids, SHA-256
Dataset[i] ──> Sample   conversations of turns, image references; images are not read
"""

import hashlib
import logging
from collections import Counter
from typing import Any

import numpy as np

from common.data.record_files import RecordFile, find_record_files, open_record_file
from common.data.record_keys import list_counts
from common.data.record_parser import parse_record, parse_record_images
from common.data.sample_ids import IdPolicy, SampleIds
from common.data.samples import ImageRef, Kind, Sample
from common.errors import DataError, describe_value
from common.storage.files import Location

_log = logging.getLogger(__name__)


class Dataset:
    """Random access to the samples of a dataset, in the order of its files and of their records.

    Records are read from the disk when they are asked for.
    """

    def __init__(self, path: Location, kind: Kind, files: list[RecordFile], ids: IdPolicy = "any") -> None:
        self.path = path
        self.kind: Kind = kind
        self._files = files
        self._starts = np.cumsum([0, *map(len, files)])
        digests = [file.sha256 for file in files]
        # One file has its own digest, so that a copy under another name is the same dataset.
        self.sha256 = digests[0] if len(files) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
        self.ids = SampleIds([file.source_ids for file in files])
        if ids == "strict":
            self.ids.check_strict(self._position, str(path))
        for line in self.ids.describe_made():
            _log.info("%s: %s", path, line)
        unused: Counter[str] = Counter()
        for file in files:
            unused.update(file.unused)
        if unused:
            _log.info("%s: not used: keys %s", path, list_counts(unused))

    @classmethod
    def open(cls, path: Location, kind: Kind, ids: IdPolicy = "any") -> "Dataset":
        """Opens a file, a folder or a pattern, and logs which keys are not used and which ids are made.

        With `ids` "strict" every record must have a unique `id`.

        Raises:
            DataError: a file is unreadable or all are empty, JSON is broken (with the line), or an id is not allowed.
            StorageError: the store failed.
        """
        files = [open_record_file(file) for file in find_record_files(path)]
        if not any(map(len, files)):
            raise DataError(f"{path}: the dataset is empty; expected at least one sample")
        return cls(path, kind, files, ids)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        images, conversations = parse_record(self._record(index), self.kind, self.where(index))
        return Sample(self.ids[index], self.kind, images, conversations, self.ids.source(index))

    def images(self, index: int) -> tuple[ImageRef, ...]:
        """Returns the images of a sample of either kind. Raises DataError if the record's images are malformed."""
        return parse_record_images(self._record(index), self.where(index))

    def where(self, index: int) -> str:
        """Returns the name of a sample for messages."""
        return f"{self.path}: sample {describe_value(self.ids[index])} ({self._position(index)})"

    def _record(self, index: int) -> dict[str, Any]:
        file, position = self._locate(index)
        return file[position]

    def _locate(self, index: int) -> tuple[RecordFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._files[number], index - int(self._starts[number])

    def _position(self, index: int) -> str:
        file, position = self._locate(index)
        place = file.position(position)
        return place if len(self._files) == 1 else f"{file.path.name}, {place}"
