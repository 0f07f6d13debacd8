from collections import Counter
from typing import Any

import pytest

from common.data.record_keys import list_counts, resolve_alternatives
from common.errors import DataError


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, None),
        ({"a": None}, None),
        ({"a": None, "b": []}, []),
        ({"a": [], "b": 1}, 1),
        ({"a": 0, "b": None}, 0),
        ({"a": "", "b": []}, ""),
        ({"a": 1, "b": 1.0}, 1),
    ],
)
def test_the_filled_alternative_is_taken(record: dict[str, Any], expected: Any) -> None:
    assert resolve_alternatives(record, ("a", "b"), lambda value: value, "here") == expected


def test_alternatives_are_compared_as_they_are_parsed() -> None:
    assert resolve_alternatives({"a": "X", "b": "x"}, ("a", "b"), str.lower, "here") == "x"
    with pytest.raises(DataError, match=r'^here: "a" and "b" mean the same, but are both given and differ; remove one'):
        resolve_alternatives({"a": "x", "b": ""}, ("a", "b"), str.lower, "here")


def test_counts_are_listed_by_frequency_then_name_in_one_short_line() -> None:
    assert list_counts(Counter({"b": 2, "a": 2, "line\nbreak": 1234})) == r"'line\nbreak' (1,234), a (2), b (2)"
    assert len(list_counts(Counter(f"key {i}" for i in range(1000)))) == 200
