"""Fixtures of all tests."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from common.storage import object_store
from tests.support.object_store import Store, running_store

pytest_plugins = ["tests.support.capture_fixtures"]


@pytest.fixture(scope="module")
def engine_in_this_process() -> Iterator[None]:
    """Runs vLLM's engine in the test's process, where it starts three times faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(scope="session")
def _running_store() -> Iterator[Store]:
    with running_store() as store:
        yield store


@pytest.fixture
def store(_running_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Yields an S3 server that counts requests and fails them on demand; waits between retries are short."""
    monkeypatch.setattr(object_store, "MIN_WAIT_S", 0.001)
    _running_store.clear()
    yield _running_store
    _running_store.clear()


@pytest.fixture
def record_counts(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Returns a function that takes a line of counts, which the summary of the test run shows."""
    return lambda line: record_property("counts", line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the lines of `record_counts`, also those of tests that ran in workers or with captured output."""
    reports = [report for found in terminalreporter.stats.values() for report in found]
    called = [report for report in reports if getattr(report, "when", None) == "call"]
    if lines := [str(value) for report in called for name, value in report.user_properties if name == "counts"]:
        terminalreporter.section("counts")
        for line in lines:
            terminalreporter.write_line(line)
