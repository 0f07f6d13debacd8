"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest

from common import object_store
from tests.object_store import Store, running_store


@pytest.fixture(scope="module")
def engine_in_this_process() -> Iterator[None]:
    """vLLM starts three times faster without a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.fixture(scope="session")
def _running_store() -> Iterator[Store]:
    with running_store() as store:
        yield store


@pytest.fixture
def store(_running_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """An S3 server that counts requests and fails them on demand; pauses between tries are short."""
    monkeypatch.setattr(object_store, "FIRST_WAIT_S", 0.001)
    _running_store.clear()
    yield _running_store
    _running_store.clear()
