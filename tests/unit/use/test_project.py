"""The files of a project are valid, fit the models and the data, and keep the comments of the shipped ones."""

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli import app
from common.config import load_config
from common.errors import ConfigError
from demo.families import FAMILIES, build_model
from precompute.config import PrecomputeConfig
from tests.support.models import tiny_causal_lm, tiny_llava
from tests.support.training import write_mixed_dataset
from train.config import TrainConfig
from train.model.compose import compose_student
from use.project import Answers, Project, inspect_project, write_project

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    tiny_llava(root / "clip")
    tiny_causal_lm(root / "lm", "qwen2", image_token=False)
    compose_student(root / "clip", root / "lm", root / "teacher", seed=1)
    build_model(FAMILIES["qwen2.5-vl"], root / "qwen2.5-vl", ["a text"] * 9, seed=0)
    write_mixed_dataset(root / "data", 400)
    write_mixed_dataset(root / "data", 90, "dpo")
    return root


def answers(root: Path, **changes: Any) -> Answers:
    settings: dict[str, Any] = {
        "teacher": root / "teacher",
        "dataset": root / "data" / "kd.json",
        "image_root": root / "data",
        "gpus": 4,
        "gpu_gib": 80,
        "language": root / "lm",
    }
    return Answers(**{**settings, **changes})


def write(directory: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Writes a project; returns what its stages and captures say, as the commands read them."""
    found: dict[str, Any] = {}
    files = write_project(directory, project)
    monkeypatch.chdir(directory)
    for path in files:
        if path.suffix == ".toml":
            kind: Any = PrecomputeConfig if path.name.startswith("capture") else TrainConfig
            found[path.stem] = load_config(kind, path, ())
    assert subprocess.run(["bash", "-n", str(directory / "run.sh")], check=False).returncode == 0
    return found


def test_a_chain_of_a_composed_student(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = inspect_project(answers(root, preferences=root / "data" / "dpo.json"))
    found = write(tmp_path / "p", project, monkeypatch)
    stages = ["1-init", "2-dense-to-dense", "3-dense-to-sparse", "4-preference"]
    assert list(found) == ["capture", "capture-preferences", *stages]
    paths = ["student", *(f"runs/{name}/final" for name in stages)]
    assert [str(found[name].model.path) for name in stages] == paths[:4]
    assert found["capture"].teacher == root / "teacher"
    assert str(found["2-dense-to-dense"].data.shards) == str(found["capture"].output) == "scores"
    assert str(found["4-preference"].data.shards) == str(found["capture-preferences"].output) == "preferences"
    assert found["3-dense-to-sparse"].moe.num_experts == 4
    # 400 samples make 50 steps of 8 samples, 2 on each GPU.
    optim = found["2-dense-to-dense"].optim
    assert (optim.global_batch_size, optim.micro_batch_size) == (8, 2)
    assert (found["1-init"].run.precision, found["capture"].engine.dtype) == ("bf16", "bfloat16")
    script = (tmp_path / "p" / "run.sh").read_text()
    assert "torchrun --standalone --nproc-per-node 4 -m cli train --config 1-init.toml" in script
    assert f"decant init-student student --vision {root / 'teacher'} --language {root / 'lm'}" in script
    assert "# The teacher generates" in (tmp_path / "p" / "capture.toml").read_text()


def test_a_machine_without_a_gpu(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = write(tmp_path / "p", inspect_project(answers(root, gpus=0)), monkeypatch)
    assert (found["capture"].engine.dtype, found["capture"].engine.kv_cache_gib) == ("float32", 4)
    assert (found["1-init"].run.precision, found["1-init"].run.zero_stage) == ("fp32", 1)
    assert "4-preference" not in found
    assert "|| decant train --config 1-init.toml" in (tmp_path / "p" / "run.sh").read_text()


def test_a_whole_student_that_cannot_be_upcycled(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = root / "qwen2.5-vl"
    changes = {"teacher": model, "language": None, "student": model, "preferences": root / "data" / "dpo.json"}
    project = inspect_project(answers(root, **changes))
    found = write(tmp_path / "p", project, monkeypatch)
    assert list(found) == ["capture", "capture-preferences", "1-dense-to-dense", "2-preference"]
    assert found["1-dense-to-dense"].model.path == model
    assert found["2-preference"].loss.balance == 0
    script = (tmp_path / "p" / "run.sh").read_text()
    assert "# There is no sparse stage: " in script
    assert "init-student" not in script


def test_a_student_of_another_layout_than_the_teachers(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LLaVA that learns from a Qwen2.5-VL sees images in their own shape, as the teacher does."""
    teacher = root / "qwen2.5-vl"
    monkeypatch.setattr("use.project.tokenizer_sha256", lambda _: "the same")
    project = inspect_project(answers(root, teacher=teacher, vision=root / "clip"))
    found = write(tmp_path / "p", project, monkeypatch)
    assert {found[name].data.image_aspect_ratio for name in ("1-init", "3-dense-to-sparse")} == {"keep"}
    build_model(FAMILIES["smolvlm"], root / "smolvlm", ["a text"] * 9, seed=0)
    smol = inspect_project(answers(root, teacher=root / "smolvlm", language=None, student=root / "smolvlm"))
    assert "smolvlm: cannot be upcycled" in str(smol.why_dense)


def test_a_teacher_of_many_gpus(root: Path) -> None:
    project = inspect_project(answers(root))
    sizes = [
        Project(answers(root, gpus=8), True, billions * 10**9, 9, None, None).tensor_parallel_size
        for billions in (7, 32, 72, 235)
    ]
    # 2 bytes a parameter, half of 80 GiB: 14, 64, 144 and 470 GB need 1, 2, 4 and 16 GPUs; 8 are there.
    assert sizes == [1, 2, 4, 8]
    assert project.tensor_parallel_size == 1


def test_what_does_not_fit_is_refused_before_anything_is_written(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="have other tokenizers"):
        inspect_project(answers(root, language=None, student=root / "qwen2.5-vl"))
    with pytest.raises(ConfigError, match="has no CLIP or SigLIP tower to give a student"):
        inspect_project(answers(root, teacher=root / "qwen2.5-vl", language=root / "qwen2.5-vl"))
    with pytest.raises(ConfigError, match="give --language"):
        inspect_project(answers(root, language=None))
    (tmp_path / "mine").touch()
    with pytest.raises(ConfigError, match="is not empty, and nothing in it was changed"):
        write_project(tmp_path, inspect_project(answers(root)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_command_names_the_next_one_and_asks_for_nothing_without_a_terminal(root: Path, tmp_path: Path) -> None:
    data = ["--dataset", str(root / "data" / "kd.json"), "--image-root", str(root / "data")]
    models = ["--teacher", str(root / "teacher"), "--language", str(root / "lm")]
    done = CliRunner().invoke(app, ["init", str(tmp_path / "p"), *data, *models])
    assert done.exit_code == 0, done.output
    assert f"bash {tmp_path / 'p' / 'run.sh'}" in done.output
    assert tomllib.loads((tmp_path / "p" / "1-init.toml").read_text())["optim"]["global_batch_size"] == 8
    done = CliRunner().invoke(app, ["init", str(tmp_path / "q"), *data])
    assert done.exit_code == 2
    assert "--teacher is missing" in done.output
    assert not (tmp_path / "q").exists()
