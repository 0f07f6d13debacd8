"""Tests of imported checkpoints against a plain forward pass over the original tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from common.errors import ConfigError, DecantError, ModelError
from precompute.fingerprints import ModelFacts
from tests.support.models import IMAGE_SIZE, TOKENS_PER_IMAGE
from tests.support.original_checkpoints import CONFIGS, GRID, IMAGE, Original, PlainModel, make_original, save_pickled
from train.importing.run import import_checkpoint
from train.model.student import load_student

PROMPT = [7, 3, IMAGE, 11, 80, 200, IMAGE, 5, 9, 44]


def largest_difference(original: Original, out: Path) -> float:
    """Returns the largest difference of the logits at the places that are no image, for a prompt with two images."""
    model: Any = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    token = model.config.image_token_id
    ids = [t for token_ in PROMPT for t in ([token] * TOKENS_PER_IMAGE if token_ == IMAGE else [token_])]
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
        plain = PlainModel(original)
        expected = plain.logits(PROMPT, list(plain.image_features(pixels)))
    vocab_size = expected.shape[1]
    assert expected.std() > 0.3
    return float((found[:, :vocab_size] - expected).abs().max())


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("llava-1.6", "llava-phi")])
def test_logits_are_those_of_a_plain_forward_pass_over_the_original_tensors(name: str, tmp_path: Path) -> None:
    original = make_original(tmp_path, name)
    imported = import_checkpoint(original.directory, tmp_path / "out", vision=original.vision)
    assert largest_difference(original, tmp_path / "out") < 2e-5
    notes = "\n".join(imported.notes)
    assert "settings not used: some_new_setting" in notes
    assert "openai/clip-vit-large-patch14-336" in notes
    assert ("drops tokens beyond an expert's capacity" in notes) == ("moe" in CONFIGS[name])


@pytest.mark.slow
def test_logits_of_a_grid_of_pictures_are_those_of_the_original(tmp_path: Path) -> None:
    original = make_original(tmp_path, "llava-1.6")
    import_checkpoint(original.directory, tmp_path / "out", vision=original.vision)
    model: Any = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert model.config.image_grid_pinpoints == GRID
    rng = np.random.default_rng(0)
    for height, width in ((60, 200), (300, 90), (90, 95)):
        image = Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))
        inputs = processor(text="USER: <image>\nthe digit ASSISTANT:", images=image, return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs).logits[0]
        ids, token = inputs["input_ids"][0].tolist(), model.config.image_token_id
        first = ids.index(token)
        prompt = [*ids[:first], IMAGE, *ids[first + ids.count(token) :]]
        plain = PlainModel(original)
        pixels = inputs["pixel_values"][0]
        best = {(60, 200): (1, 2), (300, 90): (2, 1), (90, 95): (2, 2)}[height, width]
        assert len(pixels) == 1 + best[0] * best[1]
        features = plain.grid_features(pixels, *best, size=(height, width))
        expected = plain.logits(prompt, [features])
        assert len(found) == len(expected)
        assert float((found[:, : expected.shape[1]] - expected).abs().max()) < 2e-5


def test_a_trained_vision_tower_comes_from_the_checkpoint(tmp_path: Path) -> None:
    original = make_original(tmp_path, "bakllava")
    plain = PlainModel(original)
    trained = {name: tensor + 0.05 for name, tensor in plain.tower.state_dict().items()}
    prefix = "model.vision_tower.vision_tower.vision_model."
    named = {prefix + name.removeprefix("vision_model."): tensor for name, tensor in trained.items()}
    save_pickled(original.directory, {**original.tensors, **named})
    import_checkpoint(original.directory, tmp_path / "out", vision=original.vision)
    with_trained_tower = Original(original.config, original.tensors, original.directory, tmp_path / "trained")
    plain.tower.load_state_dict(trained)
    plain.tower.save_pretrained(tmp_path / "trained")
    assert largest_difference(with_trained_tower, tmp_path / "out") < 2e-5
    assert largest_difference(original, tmp_path / "out") > 1e-3


def split_off_what_was_trained(original: Original, *, lora: bool) -> Path:
    """Moves all but the language model into files of its own, and returns the directory of the language model."""
    base = original.directory.with_name("base")
    base.mkdir()
    is_trained = {name: "mm_projector" in name for name in original.tensors}
    text = {name: tensor for name, tensor in original.tensors.items() if not is_trained[name]}
    projector = {name: tensor for name, tensor in original.tensors.items() if is_trained[name]}
    save_file(text, base / "model.safetensors")
    for file in original.directory.glob("*.bin"):
        file.unlink()
    for file in original.directory.glob("tokenizer*"):
        file.rename(base / file.name)
    if not lora:
        torch.save(projector, original.directory / "mm_projector.bin")
        return base
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in projector.items()},
        original.directory / "non_lora_trainables.bin",
    )
    generator = torch.Generator().manual_seed(9)
    adapter: dict[str, Tensor] = {}
    for layer in range(3):
        for part in ("self_attn.q_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{part}"
            weight = original.tensors[f"{name}.weight"]
            a, b = (
                torch.randn(4, weight.shape[1], generator=generator),
                torch.randn(weight.shape[0], 4, generator=generator),
            )
            adapter |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": 0.1 * b}
            original.tensors[f"{name}.weight"] = weight + 16 / 4 * (0.1 * b) @ a
    torch.save(adapter, original.directory / "adapter_model.bin")
    (original.directory / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16, "peft_type": "LORA"}))
    return base


@pytest.mark.parametrize("lora", [False, True])
def test_what_was_trained_is_put_onto_its_base_model(tmp_path: Path, lora: bool) -> None:
    original = make_original(tmp_path, "llava-1.5")
    base = split_off_what_was_trained(original, lora=lora)
    with pytest.raises(ModelError, match=r"holds only what was trained .*--base DIR"):
        import_checkpoint(original.directory, tmp_path / "out", vision=original.vision)
    import_checkpoint(original.directory, tmp_path / "out", vision=original.vision, base=base)
    # LoRA's products are large here, and so are the logits.
    assert largest_difference(original, tmp_path / "out") < (2e-3 if lora else 2e-5)


def make_whole(tmp_path: Path, name: str = "llava-1.5", **changes: Any) -> Original:
    original = make_original(tmp_path, name)
    path = original.directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return original


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava-1.5", {"mm_projector_type": "linear"}, "projector is 'linear', expected mlp2x_gelu"),
        ("llava-mod", {"image_projector_type": "qformer4_36"}, "projector is 'qformer4_36'"),
        ("llava-1.5", {"model_type": "llava_mpt"}, "model type 'llava_mpt', expected an original"),
        ("llava-1.5", {"model_type": "llama3v"}, "Llama3-V model, whose resampler"),
        ("llava-1.5", {"text_config": {}}, "is a model directory of transformers already"),
        ("llava-1.5", {"mm_vision_select_feature": "cls"}, "mm_vision_select_feature is 'cls'"),
        ("llava-1.5", {"hidden_size": "many"}, "settings of the language model"),
        ("llava-1.5", {"num_hidden_layers": 5}, "weights do not fit its config.json"),
        ("llava-phi", {}, "output layer of PhiForCausalLM has a bias"),
        ("llava-phi", {"moe": CONFIGS["llava-mod"]["moe"]}, "sparse phi model, for which neither"),
        ("llava-mod", {"moe": {**CONFIGS["llava-mod"]["moe"], "use_residual": True}}, "use_residual"),
        ("llava-mod", {"moe": {**CONFIGS["llava-mod"]["moe"], "num_experts": [3, 4]}}, "one number of experts"),
        ("llava-1.6", {"mm_patch_merge_type": "flat"}, "mm_patch_merge_type is 'flat'"),
        ("llava-1.6", {"image_aspect_ratio": "pad"}, "do not agree, of which LLaVA 1.6 has both"),
        ("moe-llava-qwen", {"rotary_pct": 0.5}, "rotary_pct = 0.5"),
    ],
)
def test_what_has_no_standard_class_is_refused_by_name(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    original = make_whole(tmp_path, name, **changes)
    with pytest.raises(ModelError, match=message):
        import_checkpoint(original.directory, tmp_path / "out", vision=original.vision)
    assert not (tmp_path / "out").exists()


def test_student_and_teacher_in_the_original_layout_are_refused_with_the_command(tmp_path: Path) -> None:
    original = make_original(tmp_path, "llava-1.5")
    with pytest.raises(ModelError, match="decant import-checkpoint"):
        load_student(original.directory, dtype=torch.float32)
    with pytest.raises(ModelError, match="decant import-checkpoint"):
        ModelFacts.load(original.directory)


def test_other_wrong_inputs_are_refused(tmp_path: Path) -> None:
    original = make_original(tmp_path, "llava-1.5")
    out = tmp_path / "out"

    def check_refused(error: type[DecantError], message: str, **options: Any) -> None:
        with pytest.raises(error, match=message):
            import_checkpoint(original.directory, out, **{"vision": original.vision, **options})
        assert not out.exists()

    check_refused(ConfigError, "names its vision tower openai/clip.*give its directory with --vision", vision=None)
    check_refused(ModelError, "holds a whole model, so --base", base=original.vision)
    check_refused(ModelError, "has no config.json", vision=tmp_path)
    file = next(original.directory.glob("*.bin"))
    file.write_bytes(file.read_bytes()[:-50])
    check_refused(ModelError, "weights cannot be read")
    torch.save({"model.norm.weight": print}, file)
    check_refused(ModelError, "holds more than tensors, and is not opened")
    for path in original.directory.glob("*.bin"):
        path.unlink()
    check_refused(ModelError, "holds no weights")
    (original.directory / "config.json").write_text("[]")
    check_refused(ModelError, "expected an object")


def render(directory: Path, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.mark.parametrize(
    ("name", "template", "conversation", "prompt"),
    [
        (
            "llava-1.5",
            None,
            f"{SYSTEM} USER: <image>\nthe ASSISTANT: digit</s>USER: a ASSISTANT: is</s>",
            " ASSISTANT:",
        ),
        ("bakllava", None, f"{SYSTEM} USER: <image>\nthe ASSISTANT: digit</s>USER: a ASSISTANT: is</s>", " ASSISTANT:"),
        ("llava-1.5", "mistral", "[INST] <image>\nthe [/INST] digit </s>[INST] a [/INST] is </s>", ""),
        (
            "llava-mod",
            None,
            f"{SYSTEM} USER: <image>\nthe ASSISTANT: digit<|endoftext|>USER: a ASSISTANT: is<|endoftext|>",
            " ASSISTANT:",
        ),
    ],
)
def test_prompts_are_those_of_the_original_conversation_styles(
    tmp_path: Path, name: str, template: Any, conversation: str, prompt: str
) -> None:
    """The expected texts are what `get_prompt` of the original `Conversation` returns for these turns."""
    original = make_original(tmp_path, name)
    imported = import_checkpoint(original.directory, tmp_path / "out", vision=original.vision, template=template)
    turns = [("user", "<image>\nthe"), ("assistant", "digit"), ("user", "a"), ("assistant", "is")]
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in turns]
    assert render(tmp_path / "out", messages) == conversation
    parts = [{"type": "image"}, {"type": "text", "text": "the"}]
    assert render(tmp_path / "out", [{"role": "user", "content": parts}, *messages[1:]]) == conversation
    question = "<image>\nthe"
    before = render(tmp_path / "out", messages[:1], add_generation_prompt=True)
    assert before == conversation[: conversation.index(question) + len(question)] + (prompt or " [/INST]")
    assert (f"chat template: {template or 'v1'}" in imported.notes[0]) == (name != "llava-mod")
    system = [{"role": "system", "content": "the digit"}, *messages]
    assert "the digit" in render(tmp_path / "out", system)
    assert SYSTEM not in render(tmp_path / "out", system)


def test_a_template_whose_end_the_tokenizer_does_not_have_is_refused(tmp_path: Path) -> None:
    original = make_original(tmp_path, "llava-1.5")
    tokenizer = AutoTokenizer.from_pretrained(original.directory)
    assert "<unused>" not in tokenizer.get_vocab()
    text = (original.directory / "tokenizer.json").read_text().replace('"</s>"', '"<unused>"')
    (original.directory / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match=r"tokenizer has no </s>, which the conversation style v1 writes"):
        import_checkpoint(original.directory, tmp_path / "out", vision=original.vision)


def test_markers_around_images_are_written_by_the_template(tmp_path: Path) -> None:
    original = make_whole(tmp_path, mm_use_im_start_end=True)
    import_checkpoint(original.directory, tmp_path / "out", vision=original.vision)
    text = render(tmp_path / "out", [{"role": "user", "content": "<image>\nthe"}])
    assert "USER: <im_start><image><im_end>\nthe" in text
