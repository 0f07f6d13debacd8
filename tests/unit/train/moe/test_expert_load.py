"""Tests of the files with the load of each expert."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import StorageError
from train.moe.expert_load import ExpertLoad

LOAD = ExpertLoad(
    step=4,
    since_step=2,
    layers=(1, 3),
    top_k=2,
    text_LE=np.array([[3, 1, 2], [2, 2, 2]]),
    image_LE=np.array([[4, 0, 0], [0, 4, 0]]),
)


def test_each_directory_gets_the_counts_and_a_picture(tmp_path: Path) -> None:
    directories = tmp_path / "checkpoint-4", tmp_path / "output"
    for directory in directories:
        directory.mkdir()
    LOAD.write(*directories)
    for directory in directories:
        assert json.loads((directory / "expert-load.json").read_text()) == {
            "first_step": 3,
            "last_step": 4,
            "layers": [1, 3],
            "num_experts": 3,
            "top_k": 2,
            "tokens": {"text": 3, "image": 2},
            "counts": {"text": [[3, 1, 2], [2, 2, 2]], "image": [[4, 0, 0], [0, 4, 0]]},
        }
        with Image.open(directory / "expert-load.png") as picture:
            assert picture.format == "PNG"
            assert picture.width > picture.height > 100


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/expert-load"):
        LOAD.write(tmp_path / "file")
