import logging
import threading
import time
from collections.abc import Iterator

import pytest

from common.concurrency import BackgroundWriter, Prefetcher, prefetch_map

WAIT_S = 10


def one_then_error() -> Iterator[int]:
    yield 1
    raise KeyError("broken")


def test_map_raises_an_error_of_the_function_at_its_items_turn() -> None:
    def load(item: int) -> int:
        if item == 5:
            raise ValueError("number five")
        return item

    received: list[int] = []
    with pytest.raises(ValueError, match="number five"):
        received.extend(prefetch_map(load, range(100), num_threads=3, ahead=10))
    assert received == [0, 1, 2, 3, 4]


def test_map_raises_an_error_of_the_items_at_its_turn() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("number five")

    received: list[int] = []
    with pytest.raises(ValueError, match="number five"):
        received.extend(prefetch_map(lambda item: item, items(), num_threads=3, ahead=10))
    assert received == [0, 1, 2, 3, 4]


def test_map_keeps_the_order_and_its_limit() -> None:
    started: list[int] = []

    def load(item: int) -> int:
        started.append(item)
        time.sleep(0.001 * (item % 3))
        return item

    for item in prefetch_map(load, range(50), num_threads=4, ahead=8):
        assert max(started) <= item + 8
    assert sorted(started) == list(range(50))


def test_prefetcher_returns_the_items_in_order_and_then_has_ended() -> None:
    prefetcher = Prefetcher(range(5), ahead=2)
    items: list[int] = []
    while not prefetcher.is_exhausted:
        items += prefetcher.take(3, wait=True)
    prefetcher.close()
    assert items == [0, 1, 2, 3, 4]


def test_prefetcher_does_not_wait_for_an_item_unless_told_to() -> None:
    may_continue = threading.Event()

    def items() -> Iterator[int]:
        may_continue.wait(WAIT_S)
        yield 1

    prefetcher = Prefetcher(items(), ahead=2)
    assert prefetcher.take(1, wait=False) == []
    may_continue.set()
    assert prefetcher.take(1, wait=True) == [1]
    prefetcher.close()


def test_prefetcher_iterates_no_further_than_its_limit() -> None:
    iterated = []
    is_full = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            iterated.append(number)
            if number == 3:
                is_full.set()
            yield number

    prefetcher = Prefetcher(items(), ahead=3)
    assert is_full.wait(WAIT_S)
    prefetcher.close()
    # Three items wait in the queue, and the thread holds one more.
    assert iterated == [0, 1, 2, 3]


def test_prefetcher_raises_an_error_of_the_items_after_the_items_before_it() -> None:
    prefetcher = Prefetcher(one_then_error(), ahead=5)
    assert prefetcher.take(1, wait=True) == [1]
    with pytest.raises(KeyError, match="broken"):
        prefetcher.take(1, wait=True)
    prefetcher.close()


def test_writer_has_written_all_items_in_order_when_its_context_ends() -> None:
    written: list[int] = []

    def write(item: int) -> None:
        time.sleep(0.002 * (3 - item))
        written.append(item)

    with BackgroundWriter(write, max_waiting=5) as writer:
        for item in range(3):
            writer.put(item)
    assert written == [0, 1, 2]


def test_writer_blocks_put_while_too_many_items_wait() -> None:
    may_write = threading.Event()
    accepted: list[int] = []
    third_accepted = threading.Event()

    def put_all(writer: BackgroundWriter[int]) -> None:
        for item in range(4):
            writer.put(item)
            accepted.append(item)
            if item == 2:
                third_accepted.set()

    def write(_item: int) -> None:
        may_write.wait(WAIT_S)

    with BackgroundWriter(write, max_waiting=2) as writer:
        caller = threading.Thread(target=put_all, args=(writer,))
        caller.start()
        # One item is under way and two wait.
        assert third_accepted.wait(WAIT_S)
        caller.join(0.05)
        assert caller.is_alive()
        assert accepted == [0, 1, 2]
        may_write.set()
        caller.join(WAIT_S)
    assert accepted == [0, 1, 2, 3]


def fail_on_negative(item: int) -> None:
    if item < 0:
        raise ValueError(f"item {item}")


@pytest.mark.parametrize("later", ["check", "put"])
def test_writer_raises_an_error_at_a_later_call(later: str) -> None:
    def call_repeatedly() -> None:
        with BackgroundWriter(fail_on_negative, max_waiting=5) as writer:
            writer.check()
            writer.put(-1)
            deadline = time.monotonic() + WAIT_S
            while time.monotonic() < deadline:
                writer.check() if later == "check" else writer.put(1)
                time.sleep(0.001)

    began = time.monotonic()
    with pytest.raises(ValueError, match="item -1"):
        call_repeatedly()
    assert time.monotonic() - began < WAIT_S, "raised only when the context ended"


def test_writer_raises_an_error_of_the_last_item_when_its_context_ends() -> None:
    def write(item: int) -> None:
        time.sleep(0.01)
        fail_on_negative(item)

    with pytest.raises(ValueError, match="item -2"), BackgroundWriter(write, max_waiting=5) as writer:
        writer.put(-2)


def test_writer_logs_its_own_error_when_the_caller_failed_first(caplog: pytest.LogCaptureFixture) -> None:
    written: list[int] = []

    def write(item: int) -> None:
        time.sleep(0.01)
        fail_on_negative(item)
        written.append(item)

    def fail_after_two_items() -> None:
        with BackgroundWriter(write, max_waiting=5) as writer:
            writer.put(-3)
            writer.put(4)
            raise KeyError("caller")

    with caplog.at_level(logging.ERROR), pytest.raises(KeyError, match="caller"):
        fail_after_two_items()
    assert "and while finishing: item -3" in caplog.text
    assert written == [4]
