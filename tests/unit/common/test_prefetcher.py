"""A feed gives what is ready, waits only when told to, and hands on what drawing raises."""

import threading
from collections.abc import Iterator

import pytest

from common.concurrency import Prefetcher


def test_items_come_in_order_and_then_it_has_ended() -> None:
    feed = Prefetcher(range(5), ahead=2)
    items: list[int] = []
    while not feed.ended:
        items += feed.ready(3, wait=True)
    feed.close()
    assert items == [0, 1, 2, 3, 4]


def test_without_waiting_an_item_that_is_not_ready_is_not_waited_for() -> None:
    go = threading.Event()

    def slow() -> Iterator[int]:
        go.wait()
        yield 1

    feed = Prefetcher(slow(), ahead=2)
    assert feed.ready(1, wait=False) == []
    go.set()
    assert feed.ready(1, wait=True) == [1]
    feed.close()


def test_no_more_than_a_given_number_is_drawn_early() -> None:
    drawn = []
    enough = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            drawn.append(number)
            if number == 3:
                enough.set()
            yield number

    feed = Prefetcher(items(), ahead=3)
    assert enough.wait(10)
    feed.close()
    # Three wait in the queue and one in the thread's hand.
    assert drawn == [0, 1, 2, 3]


def test_what_drawing_raises_is_raised_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    feed = Prefetcher(items(), ahead=5)
    assert feed.ready(1, wait=True) == [1]
    with pytest.raises(KeyError, match="broken"):
        feed.ready(1, wait=True)
    feed.close()
