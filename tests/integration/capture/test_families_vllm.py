"""Captures of teachers that take images otherwise than LLaVA, with the real vLLM, and what is refused at the start."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import ModelError
from common.shards.manifest import read_manifest
from demo.families import FAMILIES, build_model
from precompute.config import PrecomputeConfig
from precompute.engine.teacher import Teacher
from precompute.logits.job import open_inputs, prepare_job
from precompute.logits.run import run_capture
from precompute.logits.self_check import check_scores
from precompute.planning.workload import measure_workload
from precompute.verify.recompute_logits import recompute_logits

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("engine_in_this_process")]

TEXTS = ["user\nWhat is in the picture?", "assistant\nA red circle left of a blue square."] * 9


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes four conversations with images of different sizes: none, one, two in two turns, two side by side."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(60, 40), (30, 100), (200, 133)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(root / f"{number}.png")
    turns = [
        ([], ["Hello", "A red square."]),
        (["0.png"], ["<image>\nWhat is it?", "A red circle.", "And left?", "A blue square."]),
        (["1.png", "2.png"], ["Look <image> here.", "A circle.", "<image>\nThe same?", "A square."]),
        (["0.png", "2.png"], ["<image><image>\nCompare.", "A square, a circle."]),
    ]
    records = [
        {
            "image": images,
            "messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)],
        }
        for images, texts in turns
    ]
    (root / "data.json").write_text(json.dumps([r if r["image"] else {"messages": r["messages"]} for r in records]))
    return root


def make_config(family: str, data: Path, out: Path) -> PrecomputeConfig:
    build_model(FAMILIES[family], out / "model", TEXTS, seed=0)
    settings = {
        "teacher": str(out / "model"),
        "dataset": str(data / "data.json"),
        "image_root": str(data),
        "output": str(out / "scores"),
        "top_k": 16,
        "max_tokens": 700,
        "engine": {"dtype": "float32", "enforce_eager": True, "kv_cache_gib": 0.25, "max_num_seqs": 4},
    }
    return PrecomputeConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("family", "capture"), [("qwen2.5-vl", "in-engine"), ("smolvlm", "stock"), ("llava-next", "in-engine")]
)
def test_scores_of_images_of_any_size_are_the_models(family: str, capture: str, data: Path, tmp_path: Path) -> None:
    config = make_config(family, data, tmp_path)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"capture": capture})})
    planned = measure_workload(open_inputs(config), progress=False)
    summary = run_capture(config, progress=False)
    assert summary.complete
    assert int((planned.prompt_n + planned.scored_n).sum()) == summary.num_new_tokens
    manifest = read_manifest(config.output)
    assert manifest.image is not None
    assert (manifest.image.aspect_ratio, manifest.image.tokens_per_image) == ("keep", None)
    found = recompute_logits(config.output, config.teacher, 4, image_root=data, progress=False)
    assert found.num_rows == 4
    assert found.max_own_difference < 1e-5


def test_a_teacher_whose_images_vllm_reads_as_other_tokens_is_refused_with_both_sequences(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Gemma 3's newlines around an image become one token with those of the text, in vLLM but not here."""
    caplog.set_level("INFO")
    config = make_config("gemma3", data, tmp_path)
    with pytest.raises(ModelError, match="makes other tokens of an image than the model's processor") as caught:
        run_capture(config, progress=False)
    processor, engine = str(caught.value).splitlines()[1:3]
    assert processor.startswith("  processor, ")
    assert engine.startswith("  vLLM, ")
    # No weights were loaded to find it.
    assert "starting vLLM" not in caplog.text
    assert not list(tmp_path.glob("scores/*.parquet"))


class _WrongTeacher(Teacher):
    """Scores of another image, as a kernel gives them that ignores images."""

    def __init__(self, teacher: Teacher) -> None:
        vars(self).update(vars(teacher))

    def score(self, requests):  # type: ignore[no-untyped-def]
        white = [
            dataclasses.replace(each, images=tuple(Image.new("RGB", image.size, "white") for image in each.images))
            for each in requests
        ]
        return super().score(white)


def test_without_a_gpu_a_teacher_whose_scores_are_not_the_models_is_refused(data: Path, tmp_path: Path) -> None:
    settings = prepare_job(make_config("qwen2.5-vl", data, tmp_path)).scorer_settings
    assert [len(probe.images) for probe in settings.probes] == [1, 2]
    teacher = Teacher(settings)
    try:
        check_scores(teacher, settings)
        with pytest.raises(ModelError, match=r"differ from transformers' by up to .* nats, expected at most 0.001"):
            check_scores(_WrongTeacher(teacher), settings)
    finally:
        teacher.close()
