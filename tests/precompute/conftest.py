from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import tiny_causal_lm, tiny_llava


@pytest.fixture(scope="session")
def llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA whose output layer has 13 rows more than its tokenizer has tokens."""
    return tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model without a vision tower and without an image token."""
    return tiny_causal_lm(tmp_path_factory.mktemp("text"), "llama", image_token=False)


@pytest.fixture(scope="module")
def engine_in_this_process() -> Iterator[None]:
    """vLLM starts three times faster without a process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield
