"""Tests of students: loading, composing, freezing and saving them, and damaged directories."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    GptOssConfig,
    LlamaModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2Model,
)

from common.data.model_images import find_model_images
from common.data.portable_template import original_template
from common.errors import ModelError, StorageError
from tests.support.models import tiny_causal_lm, tiny_llava, tiny_siglip
from train.choices import ParameterGroup
from train.config import MoEConfig
from train.model.compose import compose_student
from train.model.student import (
    atomic_directory,
    is_multimodal,
    language_model,
    load_student,
    parameter_groups,
    save_student,
    set_trainable,
    stored_dtype,
    text_config,
    trained_groups,
)
from train.moe.upcycle import upcycle

F32 = torch.float32


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava"), "qwen2", tied=True)


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_lm(tmp_path_factory.mktemp("lm"), "llama", tied=True, image_token=False)


@pytest.fixture(scope="module")
def student(llava: Path) -> PreTrainedModel:
    """A student for tests that change nothing but which parameters are trainable."""
    return load_student(llava, dtype=F32)


@pytest.fixture
def broken(llava: Path, tmp_path: Path) -> Path:
    """A LLaVA directory whose model.safetensors the test may rewrite."""
    for path in llava.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_llava_and_text_models_load_as_the_vanilla_classes(llava: Path, lm: Path) -> None:
    student, text_student = load_student(llava, dtype=F32), load_student(lm, dtype=torch.bfloat16)
    assert type(student) is LlavaForConditionalGeneration
    assert is_multimodal(student)
    assert not is_multimodal(text_student)
    assert type(language_model(student)) is Qwen2Model
    assert type(language_model(text_student)) is LlamaModel
    assert text_config(student) is language_model(student).config
    assert {p.dtype for p in text_student.parameters()} == {torch.bfloat16}


def test_loaded_weights_are_those_of_the_file(llava: Path) -> None:
    weights, model = load_file(llava / "model.safetensors"), load_student(llava, dtype=F32)
    tower = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
    assert torch.equal(weights[tower], model.model.vision_tower.encoder.layers[0].mlp.fc1.bias)
    query = "language_model.model.layers.3.self_attn.q_proj.bias"
    assert torch.equal(weights[query], language_model(model).layers[3].self_attn.q_proj.bias)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_student(tmp_path / "absent", dtype=F32)


def test_a_directory_of_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match="found model type 'vit'"):
        load_student(tmp_path, dtype=F32)


def test_a_weight_that_would_stay_random_is_refused(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    del weights["multi_modal_projector.linear_2.bias"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing.*linear_2.bias"):
        load_student(broken, dtype=F32)


def test_a_weight_that_would_be_dropped_is_refused(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    weights["language_model.model.layers.0.mlp.extra"] = torch.zeros(3)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are unknown.*extra"):
        load_student(broken, dtype=F32)


def test_a_weight_of_another_shape_is_refused(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    weights["multi_modal_projector.linear_2.bias"] = torch.zeros(3)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError):
        load_student(broken, dtype=F32)


def test_a_truncated_weight_file_is_refused(broken: Path) -> None:
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_student(broken, dtype=F32)


def test_pickled_weights_are_refused(broken: Path) -> None:
    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load_student(broken, dtype=F32)


@pytest.mark.parametrize(
    ("groups", "prefixes"),
    [
        ({"adapter"}, ("model.multi_modal_projector.",)),
        ({"vision_tower"}, ("model.vision_tower.",)),
        ({"language_model"}, ("model.language_model.", "lm_head.")),
        (
            {"adapter", "language_model"},
            ("model.multi_modal_projector.", "model.language_model.", "lm_head."),
        ),
        (set(), ()),
    ],
)
def test_exactly_the_named_groups_train(student: PreTrainedModel, groups: set[str], prefixes: tuple[str, ...]) -> None:
    num_trainable = set_trainable(student, frozenset(groups))
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    expected = {name: p.numel() for name, p in student.named_parameters() if name.startswith(prefixes)}
    assert trained == set(expected)
    assert num_trainable == sum(expected.values())


def test_the_default_groups_fit_a_text_only_student(student: PreTrainedModel, lm: Path) -> None:
    text, groups = load_student(lm, dtype=F32), frozenset[ParameterGroup]({"adapter", "language_model"})
    assert trained_groups(student, groups, is_default=True) == groups
    assert trained_groups(text, groups, is_default=True) == {"language_model"}
    # A group that the configuration names stays, and is refused later.
    assert trained_groups(text, groups, is_default=False) == groups
    with pytest.raises(ModelError, match="LlamaForCausalLM: takes no images, so it has no adapter"):
        trained_groups(text, frozenset({"adapter"}), is_default=True)


def test_the_default_groups_fit_a_dense_student(student: PreTrainedModel, lm: Path) -> None:
    groups = frozenset[ParameterGroup]({"adapter", "experts", "router"})
    assert trained_groups(student, groups, is_default=True) == {"adapter", "language_model"}
    assert trained_groups(load_student(lm, dtype=F32), groups, is_default=True) == {"language_model"}
    assert trained_groups(student, groups, is_default=False) == groups
    sparse = upcycle(student, MoEConfig(num_experts=2, top_k=1), seed=0)
    assert trained_groups(sparse, groups, is_default=True) == groups


def test_the_experts_and_the_router_of_gpt_oss_are_groups() -> None:
    config = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    assert set_trainable(model, frozenset({"router"})) == 4 * 32 + 4
    assert set_trainable(model, frozenset({"experts"})) == 4 * (32 * 64 + 64 + 32 * 32 + 32)


@pytest.mark.parametrize("group", ["experts", "router", "everything"])
def test_a_group_that_the_model_does_not_have_is_refused(student: PreTrainedModel, group: str) -> None:
    with pytest.raises(ModelError, match=group):
        set_trainable(student, frozenset({group}))


def test_a_composed_student_has_the_parts_of_its_parents(llava: Path, lm: Path, tmp_path: Path) -> None:
    compose_student(llava, lm, tmp_path / "student", seed=3)
    student = load_student(tmp_path / "student", dtype=F32)
    vision, text = load_student(llava, dtype=F32), load_student(lm, dtype=F32)
    for part, parent in (
        (student.model.vision_tower, vision.model.vision_tower),
        (student.model.language_model, text.model),
        (student.lm_head, text.lm_head),
    ):
        expected = parent.state_dict()
        assert part.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in part.state_dict().items())
    assert student.config.vision_feature_layer == -2
    assert student.config.vision_feature_select_strategy == "default"
    assert str(tmp_path) not in (tmp_path / "student" / "config.json").read_text()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_sliced_student_reads_an_image_and_its_slices(llava: Path, lm: Path, tmp_path: Path, tower: str) -> None:
    vision = llava if tower == "clip" else tiny_siglip(tmp_path / "siglip")
    compose_student(vision, lm, tmp_path / "student", seed=3, num_slices=4)
    compose_student(vision, lm, tmp_path / "whole", seed=3)
    student, whole = (load_student(tmp_path / name, dtype=F32) for name in ("student", "whole"))
    assert type(student) is LlavaNextForConditionalGeneration
    rest = student.state_dict()
    newline = rest.pop("model.image_newline")
    assert rest.keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, rest[name]) for name, tensor in whole.state_dict().items())
    # Standard deviation 1 / sqrt(64), over 64 numbers.
    assert 0.09 < float(newline.std()) < 0.16
    assert parameter_groups(student)["model.image_newline"] == {"adapter"}

    # An image of the tower's size is 4 x 4 patches, and each row of a grid ends in a newline. The grid of a square has
    # 2 x 2 slices, that of an image twice as wide as high 1 x 2.
    images = find_model_images(tmp_path / "student")
    assert images is not None
    for size, num_tokens in (((112, 112), 16 + 8 * 9), ((112, 56), 16 + 4 * 9)):
        processed = images.process(Image.new("RGB", size), "here")
        assert len(processed.token_ids) == num_tokens == images.count_tokens(*size, "here")
        assert processed.arrays["pixel_values"].shape[-3:] == (3, 56, 56)


def test_a_composed_student_computes_its_parents_functions(llava: Path, lm: Path, tmp_path: Path) -> None:
    """The test joins tower, adapter and text model itself and compares the logits."""
    made = compose_student(llava, lm, tmp_path / "student", seed=3)
    student = load_student(tmp_path / "student", dtype=F32)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6, *[made.image_token_id] * 16, 7, 8, 9]])
    with torch.no_grad():
        tower = load_student(llava, dtype=F32).model.vision_tower
        patches = tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        adapter = student.model.multi_modal_projector.state_dict()
        hidden = nn.functional.gelu(nn.functional.linear(patches, adapter["linear_1.weight"], adapter["linear_1.bias"]))
        image = nn.functional.linear(hidden, adapter["linear_2.weight"], adapter["linear_2.bias"])
        text = load_student(lm, dtype=F32)
        embeds = text.get_input_embeddings()(ids)
        embeds[:, 2:18] = image
        expected = text(inputs_embeds=embeds).logits
        found = student(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_adapter_depends_on_the_seed_alone(llava: Path, lm: Path, tmp_path: Path) -> None:
    adapters = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.rand(7)
        compose_student(llava, lm, tmp_path / name, seed=seed)
        adapters.append(load_student(tmp_path / name, dtype=F32).model.multi_modal_projector.linear_1.weight)
    assert torch.equal(adapters[0], adapters[1])
    assert not torch.equal(adapters[0], adapters[2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image_token", "padded_rows", "row"), [(True, 0, "had"), (False, 13, "padding"), (False, 0, "resized")]
)
def test_the_image_token_gets_a_row_of_the_embedding(
    llava: Path, tmp_path: Path, image_token: bool, padded_rows: int, row: str
) -> None:
    text = tiny_causal_lm(tmp_path / "lm", image_token=image_token, padded_rows=padded_rows)
    made = compose_student(llava, text, tmp_path / "student", seed=0)
    assert made.image_token_row == row
    student = load_student(tmp_path / "student", dtype=F32)
    before, after = load_student(text, dtype=F32), student.get_input_embeddings().weight
    assert (after.shape[0] > before.vocab_size) == (row == "resized")
    assert torch.equal(after[: before.vocab_size], before.get_input_embeddings().weight)
    processor = AutoProcessor.from_pretrained(tmp_path / "student")
    assert processor.tokenizer.encode("a<image>b")[1] == made.image_token_id == student.config.image_token_index
    assert len(processor.tokenizer.encode("a<image>b")) == 3
    assert "<image>" in processor.tokenizer.all_special_tokens


def test_an_unchanged_tokenizer_is_copied_byte_for_byte(llava: Path, tmp_path: Path) -> None:
    text = tiny_causal_lm(tmp_path / "lm", image_token=True)
    compose_student(llava, text, tmp_path / "student", seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "student" / name).read_bytes() == (text / name).read_bytes()
    template = (tmp_path / "student" / "chat_template.jinja").read_text()
    assert original_template(template) == (text / "chat_template.jinja").read_text()


def test_the_processor_of_a_composed_student_makes_inputs_for_the_student(
    llava: Path, lm: Path, tmp_path: Path
) -> None:
    compose_student(llava, lm, tmp_path / "student", seed=0)
    processor = AutoProcessor.from_pretrained(tmp_path / "student")
    inputs = processor(text="a <image> b", images=Image.new("RGB", (80, 60), "red"), return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 16
    with torch.no_grad():
        assert load_student(tmp_path / "student", dtype=F32)(**inputs).logits.isfinite().all()


def test_a_student_composed_from_two_llavas_keeps_the_second_ones_text(llava: Path, tmp_path: Path) -> None:
    other = tiny_llava(tmp_path / "other", "llama", seed=9)
    compose_student(llava, other, tmp_path / "student", seed=0)
    found, expected = load_student(tmp_path / "student", dtype=F32), load_student(other, dtype=F32)
    assert torch.equal(found.lm_head.weight, expected.lm_head.weight)
    assert not torch.equal(found.lm_head.weight, found.get_input_embeddings().weight)


def test_the_tower_of_a_whole_clip_is_used(llava: Path, lm: Path, tmp_path: Path) -> None:
    config = CLIPConfig(
        vision_config=load_student(llava, dtype=F32).config.vision_config.to_dict(),
        text_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 99},
    )
    clip = CLIPModel(config)
    clip.save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_bytes((llava / "preprocessor_config.json").read_bytes())
    compose_student(tmp_path / "clip", lm, tmp_path / "student", seed=0)
    found = load_student(tmp_path / "student", dtype=F32).model.vision_tower
    assert torch.equal(found.pre_layrnorm.weight, clip.vision_model.pre_layrnorm.weight)
    assert torch.equal(found.encoder.layers[1].mlp.fc2.weight, clip.vision_model.encoder.layers[1].mlp.fc2.weight)


def test_an_image_processor_of_another_size_is_refused(broken: Path, lm: Path, tmp_path: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = broken / name
        path.write_text(path.read_text().replace("56", "70"))
    with pytest.raises(ModelError, match="images of 70 pixels, the vision tower expects 56"):
        compose_student(broken, lm, tmp_path / "student", seed=0)
    assert not (tmp_path / "student").exists()


def test_composing_from_a_text_model_without_a_vision_tower_is_refused(lm: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="type 'llama', expected one with a vision tower of CLIP or SigLIP"):
        compose_student(lm, lm, tmp_path / "student", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_empty_is_left_unchanged(llava: Path, lm: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(StorageError, match="is not empty"):
        compose_student(llava, lm, tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_model_cannot_be_saved_without_its_tokenizer(llava: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="has no tokenizer files"):
        save_student(load_student(llava, dtype=F32), tmp_path / "empty", tmp_path / "out")


def test_a_gathered_state_dict_is_saved_in_place_of_the_models_own(llava: Path, tmp_path: Path) -> None:
    model = load_student(llava, dtype=F32)
    doubled = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    save_student(model, llava, tmp_path, state_dict=doubled)
    found = load_student(tmp_path, dtype=F32).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in doubled.items())


def test_tiny_models_pad_their_vocabulary(student: PreTrainedModel, llava: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llava)
    assert len(tokenizer) == text_config(student).vocab_size - 13
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer.encode("the digit é 数")) == "the digit é 数"


def test_a_student_with_a_cached_tower_is_saved_with_its_tower(llava: Path, tmp_path: Path) -> None:
    save_student(load_student(llava, dtype=torch.bfloat16, tower=False), llava, tmp_path / "cached")
    save_student(load_student(llava, dtype=torch.bfloat16), llava, tmp_path / "live")
    cached, live = (load_file(tmp_path / name / "model.safetensors") for name in ("cached", "live"))
    assert cached.keys() == live.keys()
    assert all(cached[name].dtype == live[name].dtype and torch.equal(cached[name], live[name]) for name in live)
    assert (tmp_path / "cached" / "config.json").read_bytes() == (tmp_path / "live" / "config.json").read_bytes()


def test_the_dtype_of_a_directory_without_readable_weights_is_refused(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(ModelError, match="cannot be read as safetensors"):
        stored_dtype(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="found no floating-point weights"):
        stored_dtype(broken)


def test_a_student_that_cannot_be_written_is_reported(student: PreTrainedModel, llava: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match="file/below: could not be written"),
        atomic_directory(tmp_path / "file/below"),
    ):
        pytest.fail("the block was entered")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").mkdir()
    with pytest.raises(StorageError, match="out: the model could not be written"):
        save_student(student, llava, tmp_path / "out")


def test_a_clip_with_damaged_weights_is_refused(broken: Path, lm: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip"
    config = CLIPConfig(vision_config=load_student(broken, dtype=F32).config.vision_config.to_dict())
    config.save_pretrained(clip)
    (clip / "model.safetensors").write_bytes(b"{}")
    with pytest.raises(ModelError, match=r"clip/model\.safetensors: cannot be read as safetensors"):
        compose_student(clip, lm, tmp_path / "student", seed=0)
    assert not (tmp_path / "student").exists()
