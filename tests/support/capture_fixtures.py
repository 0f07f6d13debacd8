"""Fixtures: tiny teachers, and outputs that a fake teacher scored."""

import shutil
from pathlib import Path

import pytest

from precompute.config import PrecomputeConfig
from precompute.logits.run import run_capture
from tests.support.captures import NUM_SAMPLES
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config
from tests.support.models import tiny_causal_lm, tiny_llava


@pytest.fixture(scope="session")
def llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA whose output layer has 13 rows more than its tokenizer has tokens."""
    return tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model without a vision tower and without an image token."""
    return tiny_causal_lm(tmp_path_factory.mktemp("text"), "llama", image_token=False)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, llava_dir: Path) -> Path:
    """A directory with a dataset and, in `out`, a complete output that no test may change."""
    root = tmp_path_factory.mktemp("whole")
    config = make_config(root, llava_dir, conversation_records(root, 10), precision="fp32")
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    return root


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    """A copy of the complete output."""
    return shutil.copytree(whole / "out", tmp_path / "out")


@pytest.fixture
def config(tmp_path: Path, llava_dir: Path) -> PrecomputeConfig:
    """A configuration whose output does not exist yet."""
    return make_config(tmp_path, llava_dir, conversation_records(tmp_path, NUM_SAMPLES))
