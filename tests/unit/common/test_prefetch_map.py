import time
from collections.abc import Iterator

import pytest

from common.concurrency import prefetch_map


def test_a_failure_while_loading_ahead_is_raised_at_its_turn() -> None:
    def load(item: int) -> int:
        if item == 5:
            raise ValueError("number five")
        return item

    received: list[int] = []
    with pytest.raises(ValueError, match="number five"):
        received.extend(prefetch_map(load, range(100), num_threads=3, ahead=10))
    assert received == [0, 1, 2, 3, 4]


def test_a_failure_of_the_items_themselves_is_raised_at_its_turn_too() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("number five")

    received: list[int] = []
    with pytest.raises(ValueError, match="number five"):
        received.extend(prefetch_map(lambda item: item, items(), num_threads=3, ahead=10))
    assert received == [0, 1, 2, 3, 4]


def test_loading_ahead_keeps_order_and_stays_bounded() -> None:
    started: list[int] = []

    def load(item: int) -> int:
        started.append(item)
        time.sleep(0.001 * (item % 3))
        return item

    for item in prefetch_map(load, range(50), num_threads=4, ahead=8):
        assert max(started) <= item + 8
    assert sorted(started) == list(range(50))
