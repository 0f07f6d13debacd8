"""The demo's chain with a teacher and a student of another family, a few steps of each stage."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from demo.run import DemoError, run_demo
from train.model.student import load_student

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def test_the_chain_of_a_family_without_a_sparse_stage(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    run_demo(out, seed=0, family="qwen2.5-vl", max_steps=4)

    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["same_answers_in_vllm"] == report["answers_compared"] == 64
    rows = report["rows"]
    assert [*rows] == ["teacher", "student, init", "CE alone, dense", "distilled, dense", "preference, exported"]
    # The stored scores are the teacher's own, so recomputed from the model they give no divergence.
    assert abs(rows["teacher"]["kl_to_teacher"]) < 1e-5
    assert rows["distilled, dense"]["kl_to_teacher"] < rows["student, init"]["kl_to_teacher"]
    teacher, given, fresh = (
        dict(load_student(out / path, dtype=torch.float32).named_parameters())
        for path in ("teacher", "models/student_with_tower", "models/student")
    )
    tower = {name for name in given if ".visual." in name and ".merger." not in name}
    assert len(tower) > 20
    assert all(torch.equal(given[name], (teacher if name in tower else fresh)[name]) for name in given)
    with Image.open(out / "losses.png") as image:
        assert len(image.getcolors(1 << 24) or ()) > 10
    assert (out / "report.html").read_text("utf-8").count("<figure>") > 10
    with pytest.raises(DemoError, match=r"begun with .*qwen2\.5-vl.*choose another directory"):
        run_demo(out, seed=0, family="smolvlm", max_steps=4)
