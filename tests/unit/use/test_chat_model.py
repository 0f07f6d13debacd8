"""Answers are those of transformers' own generation on its processor's inputs; models in 4 and 8 bit, LoRA weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoProcessor
from typer.testing import CliRunner

from cli import app
from common.data.samples import Turn
from common.errors import ConfigError, DataError, ModelError
from demo.families import FAMILIES, build_model
from tests.support.hf_reference import padded
from tests.support.models import randomise, tiny_causal_lm, tiny_llava
from train.model.student import load_student, save_student
from use.chat_model import ChatModel, Sampling

pytestmark = pytest.mark.slow

QUESTION = "What is in the picture?"
SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (40, 60, 3), dtype=torch.uint8, generator=generator).numpy()
    Image.fromarray(pixels).save(root / "a.png")
    tiny_llava(root / "llava")
    tiny_causal_lm(root / "text")
    build_model(FAMILIES["qwen2.5-vl"], root / "qwen2.5-vl", [QUESTION] * 9, seed=0)
    return root


def answer(model: ChatModel, images: list[Path], sampling: Sampling = SAMPLING) -> str:
    turns = [Turn("user", "<image>\n" * len(images) + QUESTION)]
    return "".join(model.answer(turns, images, sampling))


def expected_answer(model_dir: Path, image: Image.Image | None, model: Any = None) -> str:
    """Returns what transformers generates from the inputs that its own processor makes."""
    model = model or load_student(model_dir, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(model_dir)
    tokenizer = getattr(processor, "tokenizer", processor)
    content: Any = QUESTION
    if image is not None:
        parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        # The LLaVA's template takes strings.
        content = f"<image>\n{QUESTION}" if model.config.model_type == "llava" else parts
    message = {"role": "user", "content": content}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    images = {} if image is None else {"images": [image]}
    inputs = processor(text=[text], add_special_tokens=False, return_tensors="pt", **images)
    inputs.pop("token_type_ids", None)
    found = model.generate(**inputs, max_new_tokens=SAMPLING.max_new_tokens, do_sample=False)
    return str(tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("name", ["llava", "qwen2.5-vl", "text"])
def test_answers_are_those_of_transformers(root: Path, name: str) -> None:
    model = ChatModel(root / name)
    assert model.takes_images == (name != "text")
    whole = padded(root / "a.png", (122, 116, 104)) if name == "llava" else Image.open(root / "a.png")
    image = None if name == "text" else whole
    expected = expected_answer(root / name, image)
    assert answer(model, [] if image is None else [root / "a.png"]) == expected
    assert expected
    with pytest.raises(DataError, match="no such|does not exist" if image else "image"):
        answer(model, [root / "gone.png"])


def test_draws_follow_their_seed(root: Path) -> None:
    model = ChatModel(root / "text")
    drawn = [answer(model, [], Sampling(16, 5.0, seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_conversation_that_is_too_long_is_refused(root: Path, tmp_path: Path) -> None:
    short = shutil.copytree(root / "text", tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    with pytest.raises(DataError, match=r"the conversation has \d+ tokens, .* this model reads 8"):
        answer(ChatModel(short), [])


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_model_is_smaller_and_answers(root: Path, bits: Any) -> None:
    model = ChatModel(root / "llava", bits)
    assert f"{bits} (bitsandbytes)" in model.description
    kinds = {type(module).__name__ for module in model._model.modules()}  # noqa: SLF001 - what was loaded
    assert {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[bits] in kinds
    assert isinstance(answer(model, [root / "a.png"]), str)


def test_lora_weights_answer_with_their_base(root: Path, tmp_path: Path) -> None:
    base = load_student(root / "text", dtype=torch.float32)
    lora = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], base_model_name_or_path=""))
    randomise(((n, p) for n, p in lora.named_parameters() if "lora" in n), 1, std=0.5)
    lora.peft_config["default"].base_model_name_or_path = str(root / "text")
    lora.save_pretrained(str(tmp_path / "lora"))
    merged = lora.merge_and_unload()
    save_student(merged, root / "text", tmp_path / "merged")
    model = ChatModel(tmp_path / "lora")
    assert f"with LoRA weights of {tmp_path / 'lora'}" in model.description
    assert answer(model, []) == expected_answer(tmp_path / "merged", None) != expected_answer(root / "text", None)

    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    for wrong, message in ((str(root / "llava"), "do not fit"), (str(root / "gone"), "is no directory here")):
        changed = json.dumps(config | {"base_model_name_or_path": wrong})
        (tmp_path / "lora" / "adapter_config.json").write_text(changed)
        with pytest.raises(ModelError, match=message):
            ChatModel(tmp_path / "lora")


def test_a_missing_package_is_named_with_its_extra(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes, which is not installed: pip install '\.\[quantized\]'"):
        ChatModel(root / "text", "4bit")


def test_the_command_prints_the_answer_alone(root: Path) -> None:
    options = ["--image", str(root / "a.png"), "--ask", QUESTION, "--max-new-tokens", "6"]
    done = CliRunner().invoke(app, ["chat", str(root / "qwen2.5-vl"), *options])
    assert done.exit_code == 0
    assert done.stdout == expected_answer(root / "qwen2.5-vl", Image.open(root / "a.png")) + "\n"
    assert "Qwen2_5_VLForConditionalGeneration" in done.stderr
    assert CliRunner().invoke(app, ["chat", str(root / "text"), "--load-4bit", "--load-8bit"]).exit_code == 2
    assert CliRunner().invoke(app, ["chat", str(root / "text"), "--image", "/nowhere.png"]).exit_code == 2
