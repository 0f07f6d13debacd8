"""Tests of the recognition of the original LLaVA layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import ModelError
from common.model_layout import check_not_original_layout


def write_config(directory: Path, content: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("key", ["mm_vision_tower", "mm_image_tower"])
def test_an_original_checkpoint_is_named_with_the_command_that_converts_it(tmp_path: Path, key: str) -> None:
    write_config(tmp_path, {"model_type": "llava", key: "openai/clip-vit-large-patch14-336", "hidden_size": 4096})
    with pytest.raises(ModelError, match=r"original LLaVA code \(model type 'llava'\).*decant import-checkpoint"):
        check_not_original_layout(tmp_path)


@pytest.mark.parametrize("content", [{"model_type": "llava", "text_config": {}}, {"model_type": "qwen2"}, [], "x"])
def test_other_configurations_pass(tmp_path: Path, content: Any) -> None:
    check_not_original_layout(write_config(tmp_path, content))


def test_what_cannot_be_read_is_left_to_the_reader(tmp_path: Path) -> None:
    check_not_original_layout(tmp_path)
    (tmp_path / "config.json").write_text("{")
    check_not_original_layout(tmp_path)
