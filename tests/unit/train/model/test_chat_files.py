"""Other programs can talk to a student: parts render as strings do, transformers' own tools take both."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig, pipeline

from common.data.chat_encoding import ChatEncoder
from common.data.images import pad_to_square
from common.data.model_images import find_model_images
from common.data.portable_template import find_problem, make_portable, original_template
from common.data.samples import Turn
from tests.support.models import CHAT_TEMPLATE, tiny_causal_lm, tiny_llava
from train.commands import export
from train.config import MoEConfig
from train.model.chat_files import write_chat_files
from train.model.compose import compose_student
from train.model.export import export_student
from train.moe.upcycle import upcycle_directory

QUESTION, ANSWER = "What is in the picture?", "A dog."
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
]
STRINGS = [{"role": "user", "content": f"<image>\n{QUESTION}"}, {"role": "assistant", "content": ANSWER}]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composed student, its upcycled one, and that one exported."""
    root = tmp_path_factory.mktemp("students")
    tiny_llava(root / "clip")
    tiny_causal_lm(root / "lm", "qwen2", image_token=False)
    compose_student(root / "clip", root / "lm", root / "dense", seed=0)
    upcycle_directory(root / "dense", root / "sparse", MoEConfig(num_experts=2, top_k=1), seed=0)
    export_student(root / "sparse", root / "exported")
    return root


@pytest.mark.parametrize("name", ["dense", "sparse", "exported"])
def test_the_template_takes_strings_and_parts(root: Path, name: str) -> None:
    processor, tokenizer = (auto.from_pretrained(root / name) for auto in (AutoProcessor, AutoTokenizer))
    expected = AutoTokenizer.from_pretrained(root / "lm").apply_chat_template(STRINGS, tokenize=False)
    for messages in (PARTS, STRINGS):
        for each in (processor, tokenizer):
            assert each.apply_chat_template(messages, tokenize=False) == expected
    inputs = processor.apply_chat_template(
        [{**PARTS[0], "content": [{"type": "image", "image": Image.new("RGB", (9, 9))}, *PARTS[0]["content"][1:]]}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    image_token_id = json.loads((root / name / "config.json").read_text())["image_token_index"]
    assert (inputs["input_ids"] == image_token_id).sum() == 16
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)


def test_the_fingerprint_and_the_tokens_are_those_of_the_original_template(root: Path) -> None:
    language, student = (ChatEncoder.load(root / name) for name in ("lm", "exported"))
    assert student.template_sha256 == language.template_sha256
    assert not student.template.takes_parts
    turns = [Turn("user", QUESTION), Turn("assistant", ANSWER)]
    assert list(student.encode(turns, 0, "").input_ids) == list(language.encode(turns, 0, "").input_ids)


def test_generation_stops_at_the_end_of_a_turn(root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "exported")
    text = tokenizer.apply_chat_template(STRINGS, tokenize=False)
    end = text[text.index(ANSWER) + len(ANSWER) :].strip()
    stops = GenerationConfig.from_pretrained(root / "exported").eos_token_id
    assert tokenizer.convert_tokens_to_ids(end) in (stops if isinstance(stops, list) else [stops])


def test_generation_settings_that_transformers_does_not_write_are_kept(root: Path, tmp_path: Path) -> None:
    """Vicuna has a temperature and draws nothing."""
    model = shutil.copytree(root / "lm", tmp_path / "lm")
    (model / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    compose_student(root / "clip", model, tmp_path / "student", seed=0)
    export_student(tmp_path / "student", tmp_path / "exported")
    found = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert (found["temperature"], found["top_p"]) == (0.9, 0.6)
    assert found["eos_token_id"] is not None


def test_a_pipeline_of_transformers_talks_to_an_exported_sparse_student(root: Path) -> None:
    talk: Any = pipeline("image-text-to-text", model=str(root / "exported"), dtype=torch.float32, device="cpu")
    content = [{"type": "image", "image": Image.new("RGB", (40, 30))}, {"type": "text", "text": QUESTION}]
    (found,) = talk(text=[{"role": "user", "content": content}], max_new_tokens=3, return_full_text=False)
    assert isinstance(found["generated_text"], str)


def test_the_processor_pads_images_as_training_does(root: Path, tmp_path: Path) -> None:
    export(root / "sparse", tmp_path / "out")
    pixels = torch.randint(0, 255, (30, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.numpy())
    images = find_model_images(root / "sparse")
    assert images is not None
    expected = images.process(pad_to_square(image, images.mean_rgb), "here").arrays["pixel_values"]
    exported, before = (AutoProcessor.from_pretrained(path) for path in (tmp_path / "out", root / "sparse"))
    found = exported(images=[image], text=["<image>"], return_tensors="pt")["pixel_values"]
    assert torch.allclose(found, torch.from_numpy(expected), atol=1e-5)
    cropped = before(images=[image], text=["<image>"], return_tensors="pt")["pixel_values"]
    assert not torch.allclose(cropped, torch.from_numpy(expected), atol=0.5)
    again = find_model_images(tmp_path / "out")
    assert again is not None
    assert (again.process(pad_to_square(image, again.mean_rgb), "here").arrays["pixel_values"] == expected).all()


def test_a_portable_template_is_made_once_and_can_be_taken_back() -> None:
    portable = make_portable(CHAT_TEMPLATE, "<image>")
    assert make_portable(portable, "<image>") == portable
    assert original_template(portable) == CHAT_TEMPLATE
    assert original_template(CHAT_TEMPLATE) == CHAT_TEMPLATE


def test_images_stand_where_they_are_and_other_parts_are_refused(root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "dense")
    content: list[dict[str, str]] = [
        {"type": "text", "text": "Compare "},
        {"type": "image"},
        {"type": "image_url"},
        {"type": "text", "text": "with"},
        {"type": "image"},
    ]
    (found,) = [tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)]
    assert "Compare <image>\n<image>\nwith<image>" in found
    with pytest.raises(Exception, match="this model takes text and images, not video"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)


def test_a_template_that_cannot_be_made_portable_stays(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = shutil.copytree(root / "dense", tmp_path / "student")
    # Jinja drops spaces before a block at the beginning of a line, which this one is no more.
    template = "  {% for message in messages %}[{{ message['content'] + '' }}]{% endfor %}"
    (student / "chat_template.jinja").write_text(template)
    assert find_problem(AutoTokenizer.from_pretrained(student), make_portable(template, "<image>"), "<image>")
    write_chat_files(student)
    assert (student / "chat_template.jinja").read_text() == template
    assert "its chat template takes strings alone; made to take parts, it renders" in caplog.text
