"""The demo's untrained models: tokenizer, sizes, names of weights, and determinism."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)

from demo.data import DemoData, read_lines, write_dataset
from demo.models import DemoModels, build_models

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return write_dataset(tmp_path_factory.mktemp("data"), seed=0)


@pytest.fixture(scope="module")
def built(data: DemoData, tmp_path_factory: pytest.TempPathFactory) -> DemoModels:
    return build_models(tmp_path_factory.mktemp("models"), data, seed=0)


def all_texts(data: DemoData) -> set[str]:
    lines = [line for path in data.files for line in read_lines(path)]
    keys = ("conversations", "chosen", "rejected")
    return {turn["value"] for line in lines for key in keys for turn in line.get(key, [])}


def test_every_text_survives_the_tokenizer(data: DemoData, built: DemoModels) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built.teacher)
    for text in all_texts(data) | {"a text of other words: naïve, 数字"}:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_one_id_each(built: DemoModels) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built.teacher)
    ids = [tokenizer.encode(text) for text in ("<image>", "<|im_start|>", "<|im_end|>", "<|pad|>")]
    assert [len(found) for found in ids] == [1, 1, 1, 1]
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|pad|>"
    assert tokenizer.encode("<image>\nWhich digit is this?").count(ids[0][0]) == 1


def test_the_stored_template_sets_turns_as_chatml(built: DemoModels) -> None:
    turns = [
        {"role": "user", "content": "<image>\nRead the digit."},
        {"role": "assistant", "content": "It is a two."},
    ]
    tokenizer = AutoTokenizer.from_pretrained(built.student_language)
    prompt = "<|im_start|>user\n<image>\nRead the digit.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == prompt
    assert tokenizer.apply_chat_template(turns, tokenize=False) == f"{prompt}It is a two.<|im_end|>\n"
    assert (built.teacher / "chat_template.jinja").is_file()


def test_teacher_and_student_share_a_tokenizer_and_pad_their_rows_differently(built: DemoModels) -> None:
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in names:
        assert (built.teacher / name).read_bytes() == (built.student_language / name).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(built.teacher)
    teacher_rows = json.loads((built.teacher / "config.json").read_text())["text_config"]["vocab_size"]
    student_rows = json.loads((built.student_language / "config.json").read_text())["vocab_size"]
    assert len(tokenizer) < student_rows < teacher_rows


def test_the_teacher_loads_whole_and_answers_an_image(data: DemoData, built: DemoModels) -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(built.teacher, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = AutoProcessor.from_pretrained(built.teacher)
    with Image.open(data.root / "images/0000.png") as image:
        inputs = processor(images=image, text="<image>\n?", return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 16
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape == (1, inputs["input_ids"].shape[1], model.config.text_config.vocab_size)
    assert torch.isfinite(logits).all()


def test_different_images_give_different_logits(data: DemoData, built: DemoModels) -> None:
    model = AutoModelForImageTextToText.from_pretrained(built.teacher).eval()
    processor = AutoImageProcessor.from_pretrained(built.teacher)
    images = []
    for index in (0, 1):
        with Image.open(data.root / f"images/{index:04d}.png") as image:
            images.append(processor(images=image, return_tensors="pt")["pixel_values"])
    assert images[0].shape == (1, 3, 56, 56)
    ids = torch.tensor([[model.config.image_token_id] * 16 + [40]])
    with torch.no_grad():
        first, second = (model(input_ids=ids, pixel_values=pixels).logits[0, -1] for pixels in images)
    assert not torch.allclose(first, second, atol=1e-6)


def test_the_student_is_at_most_a_third_of_the_teachers_text_model(built: DemoModels) -> None:
    teacher = AutoModelForImageTextToText.from_pretrained(built.teacher)
    student = AutoModelForCausalLM.from_pretrained(built.student_language)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (teacher.model.language_model, student)]
    assert 0.9e6 < teacher.num_parameters() < 1.5e6
    assert sizes[1] < sizes[0] / 3
    with torch.no_grad():
        assert torch.isfinite(student(torch.arange(12)[None]).logits).all()


def test_vision_weights_carry_the_names_that_vllm_reads(built: DemoModels) -> None:
    with safe_open(built.teacher / "model.safetensors", "np") as weights:
        names = list(weights.keys())
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in names
    assert "language_model.model.embed_tokens.weight" in names
    assert "multi_modal_projector.linear_1.weight" in names


@pytest.mark.slow
def test_one_seed_gives_the_same_bytes_and_another_seed_other_weights(
    data: DemoData, built: DemoModels, tmp_path: Path
) -> None:
    state = torch.random.get_rng_state()
    again = build_models(tmp_path / "again", data, seed=0)
    other = build_models(tmp_path / "other", data, seed=1)
    assert np.array_equal(state, torch.random.get_rng_state())
    for before, after in ((built.teacher, again.teacher), (built.student_language, again.student_language)):
        names = sorted(path.name for path in before.iterdir())
        assert names == sorted(path.name for path in after.iterdir())
        for name in names:
            assert (before / name).read_bytes() == (after / name).read_bytes(), name
    weights = [(models.teacher / "model.safetensors").read_bytes() for models in (built, other)]
    assert weights[0] != weights[1]
