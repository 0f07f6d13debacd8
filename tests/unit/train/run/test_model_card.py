"""A student's model card names what it was made of and each stage, as the stages' outputs tell, and no directory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.support.models import tiny_causal_lm, tiny_llava
from tests.support.training import stage
from train.commands import export, init_student
from train.config import TrainConfig
from train.run.history import find_stages

TEXT = "Upcycled to 2 experts, top 1, layers every-second."


def write_stage(output: Path, student: Path, name: str, lines: list[dict[str, Any]], **changes: Any) -> None:
    """Writes what a stage leaves behind, with `student` as its result."""
    config = TrainConfig.model_validate(stage(output, student, stage=name, **changes))
    shutil.copytree(student, output / "final")
    record = {"config": config.model_dump(mode="json"), "config_sha256": "0"}
    (output / "config.json").write_text(json.dumps(record))
    # The last line was being written when the machine went off.
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')


@pytest.fixture
def root(tmp_path: Path) -> Path:
    tiny_llava(tmp_path / "clip-tower")
    tiny_causal_lm(tmp_path / "small-lm", "qwen2", image_token=False)
    init_student(tmp_path / "dense", vision=tmp_path / "clip-tower", language=tmp_path / "small-lm")
    return tmp_path


def test_a_fresh_student_names_its_parts(root: Path) -> None:
    card = ModelCard.load(root / "dense" / "README.md")
    assert card.data.base_model == ["clip-tower", "small-lm"]
    assert (card.data.pipeline_tag, card.data.library_name) == ("image-text-to-text", "transformers")
    assert "1. The vision tower of `clip-tower`, a fresh adapter (mlp), and `small-lm`." in card.text
    init_student(root / "sparse", dense=root / "dense", experts=2, top_k=1)
    card = ModelCard.load(root / "sparse" / "README.md")
    assert card.data.base_model == ["clip-tower", "small-lm"]
    assert "mixture-of-experts" in card.data.tags
    assert f"2. {TEXT}" in card.text


def test_an_exported_student_names_its_stages_with_their_last_metrics(root: Path) -> None:
    first = [{"step": 1, "cross_entropy": 5.0}, {"step": 40, "cross_entropy": 2.51234, "eval_cross_entropy": 2.7}]
    data = {"dataset": str(root / "captions.json")}
    write_stage(root / "a", root / "dense", "init", first, data=data, loss={"cross_entropy": 1.0})
    second = [{"step": 7, "distillation": 0.25, "loss": 0.25, "rewards/accuracies": 0.75}]
    data = {"shards": str(root / "scores")}
    write_stage(root / "b", root / "a" / "final", "dense-to-dense", second, data=data, loss={"distillation": 1.0})
    stages, initial = find_stages(root / "b")
    assert [(each.name, each.num_steps) for each in stages] == [("init", 40), ("dense-to-dense", 7)]
    assert initial == root / "dense"
    export(root / "b", root / "out")
    card = ModelCard.load(root / "out" / "README.md")
    assert card.data.base_model == ["clip-tower", "small-lm"]
    assert card.data.datasets == ["captions.json", "scores"]
    lines = [line for line in card.text.splitlines() if line[:1].isdigit()]
    assert len(lines) == 3
    assert "**init**: cross_entropy 1; 40 steps of" in lines[1]
    assert "At the end: cross_entropy 2.512, eval_cross_entropy 2.7." in lines[1]
    assert "**dense-to-dense**: distillation 1; 7 steps" in lines[2]
    assert "At the end: distillation 0.25, rewards/accuracies 0.75." in lines[2]
    assert str(root) not in (root / "out" / "README.md").read_text()


def test_relative_paths_begin_where_the_run_did(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project that was moved, and is looked at from another directory."""
    project = root / "project"
    project.mkdir()
    shutil.copytree(root / "dense", project / "student")
    monkeypatch.chdir(project)
    changes: dict[str, Any] = {"data": {"dataset": "d.json"}, "loss": {"cross_entropy": 1.0}}
    write_stage(Path("runs/a"), Path("student"), "init", [], **changes)
    write_stage(Path("runs/b"), Path("runs/a/final"), "dense-to-dense", [], **changes)
    monkeypatch.chdir(root)
    moved = project.rename(root / "moved")
    stages, first = find_stages(moved / "runs" / "b" / "final")
    assert [each.name for each in stages] == ["init", "dense-to-dense"]
    assert first == moved / "student"


def test_a_student_whose_stages_are_elsewhere_names_what_is_known(root: Path) -> None:
    write_stage(root / "b", root / "dense", "init", [], data={"dataset": "d.json"}, loss={"cross_entropy": 1.0})
    shutil.rmtree(root / "dense")
    export(root / "b" / "final", root / "out")
    card = ModelCard.load(root / "out" / "README.md")
    assert card.data.base_model == ["dense"]
    assert "1. Began with `dense`.\n2. **init**" in card.text
    assert "At the end: nothing logged." in card.text
