"""Ids of samples: those that a dataset has, and unique ones that shards, training and messages use.

A record without an id is called by its position, "@12"; a record that repeats an earlier one's id by both, "a@12". If
a record has that very text as its id, another "@" is added. The first record of an id keeps it.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from common.errors import DataError, describe_value

IdPolicy = Literal["any", "strict"]

_MARK = "@"


class SourceIds:
    """Ids as a dataset has them, None where a record has none; held as one text, because millions of objects are large.

    `key_counts` counts the keys that they were read from.
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])
        self.key_counts: Counter[str] = Counter()

    def append(self, found: tuple[str, str] | None) -> None:
        """Adds a record's (key, id), None if it has no id."""
        if found is not None:
            self.key_counts[found[0]] += 1
            self._text += found[1].encode()
        self._ends.append(len(self._text))

    def append_missing(self, count: int) -> None:
        """Adds records that have no id."""
        self._ends.extend([len(self._text)] * count)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str | None:
        start, end = self._ends[index], self._ends[index + 1]
        return self._text[start:end].decode() if end > start else None


class SampleIds:
    """Unique ids of a dataset's samples, from the ids of its records.

    `num_missing` records have no id, `num_repeated` the id of an earlier one.
    """

    def __init__(self, files: "list[SourceIds]") -> None:
        self._files = files
        self._starts = np.cumsum([0, *map(len, files)])
        hashes_N = np.fromiter((hash(each) for each in self._iterate_sources()), np.int64, len(self))
        self._order_N = np.argsort(hashes_N, kind="stable")
        self._sorted_N = hashes_N[self._order_N]
        self._is_missing_N = np.fromiter((each is None for each in self._iterate_sources()), bool, len(self))
        self._first_N = self._find_first()
        self.num_missing = int(self._is_missing_N.sum())
        self.num_repeated = int((self._first_N >= 0).sum())
        self._others = self._find_taken()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> str:
        if self.is_made(index):
            return self._others.get(index) or self._make(index)
        source = self.source(index)
        assert source is not None
        return source

    def source(self, index: int) -> str | None:
        """Returns the id as the dataset has it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, index, "right")) - 1
        return self._files[number][index - int(self._starts[number])]

    def is_made(self, index: int) -> bool:
        """Returns True if the sample's id is made from its position."""
        return bool(self._is_missing_N[index] or self._first_N[index] >= 0)

    def check_strict(self, position: Callable[[int], str], where: str) -> None:
        """Raises DataError if an id is missing or repeated, or is not read from the key `id`; names the places."""
        for index in np.flatnonzero(self._is_missing_N)[:1].tolist():
            raise DataError(f'{where}: {position(index)}: no "id"; with ids = "strict" every sample needs a unique one')
        for index in np.flatnonzero(self._first_N >= 0)[:1].tolist():
            raise DataError(
                f"{where}: id {describe_value(self.source(index))} stands at {position(int(self._first_N[index]))} and "
                f"again at "
                f'{position(index)}; with ids = "strict" ids must be unique'
            )
        others = sorted({key for each in self._files for key in each.key_counts} - {"id"})
        if others:
            raise DataError(
                f'{where}: ids are read from {", ".join(others)}; with ids = "strict" every sample needs an "id"'
            )

    def describe_made(self) -> list[str]:
        """Returns what was made of ids that are missing, repeated or under another key, one line each."""
        lines = []
        counts = sum((each.key_counts for each in self._files), Counter[str]())
        if others := {key: count for key, count in counts.items() if key != "id"}:
            listed = ", ".join(f"{key} ({count:,})" for key, count in sorted(others.items()))
            lines.append(f"ids are read from {listed}")
        total = f"of {len(self):,} records"
        if self.num_missing:
            first = self[int(np.argmax(self._is_missing_N))]
            lines.append(
                f"{self.num_missing:,} {total} have no id; they are called by their positions, such as {first}"
            )
        if self.num_repeated:
            first = self[int(np.argmax(self._first_N >= 0))]
            lines.append(
                f"{self.num_repeated:,} {total} repeat an earlier id; their positions are added, as in {first}"
            )
        return lines

    def _iterate_sources(self) -> Iterator[str | None]:
        for each in self._files:
            yield from (each[index] for index in range(len(each)))

    def _make(self, index: int) -> str:
        return f"{self.source(index) or ''}{_MARK}{index}"

    def _find_first(self) -> npt.NDArray[np.int64]:
        """Returns for each record that repeats an id the position of the first record of the id; -1 for others."""
        first_N = np.full(len(self), -1, np.int64)
        edges = np.flatnonzero(np.diff(self._sorted_N)) + 1
        starts, stops = np.concatenate([[0], edges]), np.concatenate([edges, [len(self)]])
        for which in np.flatnonzero(stops - starts > 1).tolist():
            # Positions ascend within a group, because the sort is stable. Different ids may have one hash.
            group = self._order_N[starts[which] : stops[which]]
            first: dict[str | None, int] = {}
            for index in group[~self._is_missing_N[group]].tolist():
                source = self.source(index)
                if first.setdefault(source, index) != index:
                    first_N[index] = first[source]
        return first_N

    def _find_taken(self) -> dict[int, str]:
        """Returns the ids of those records whose made id is the id of a record of the dataset."""
        if self.num_missing == len(self):
            return {}
        made = np.flatnonzero(self._is_missing_N | (self._first_N >= 0))
        hashes = np.fromiter((hash(self._make(index)) for index in made.tolist()), np.int64, len(made))
        places = np.minimum(np.searchsorted(self._sorted_N, hashes), len(self) - 1)
        others = {}
        for index in made[self._sorted_N[places] == hashes].tolist():
            name = self._make(index)
            while self._is_source(name):
                name += _MARK
                others[index] = name
        return others

    def _is_source(self, name: str) -> bool:
        start, stop = (int(np.searchsorted(self._sorted_N, hash(name), side)) for side in ("left", "right"))
        return any(self.source(index) == name for index in self._order_N[start:stop].tolist())
