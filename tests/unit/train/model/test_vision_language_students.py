"""Batches of students of many families against transformers' own processor and model, one sample at a time."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from common.data.chat_encoding import ChatEncoder
from common.data.model_images import find_model_images
from common.errors import ModelError
from demo.families import FAMILIES, build_model
from train.config import MoEConfig
from train.data.collator import Batch, Collator, StudentInputs
from train.data.image_cache import ImageCache
from train.data.sources import DatasetSource
from train.model.packing import TEXT_MODELS, check_packing_supported, rope_position_ids
from train.model.student import is_multimodal, load_student, parameter_groups, save_student, text_config
from train.moe.upcycle import upcycle, upcycle_directory

pytestmark = pytest.mark.slow

TEXTS = ["user\nWhat is in the picture?", "assistant\nA red circle left of a blue square."] * 9
QUESTION, ANSWER = "What is in the picture?", "A red circle."
# vLLM refuses it, see docs/models.md: newlines beside an image become one token with those of its own text.
MERGES_NEWLINES = "gemma3"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes three conversations: with one image, with none, with two images in two turns."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(60, 40), (30, 100), (90, 90)]):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(root / f"{number}.png")
    turns = [
        (["0.png"], [f"<image>{QUESTION}", ANSWER]),
        ([], [QUESTION, ANSWER]),
        (["1.png", "2.png"], [f"Look <image> here. {QUESTION}", ANSWER, f"<image>{QUESTION}", "A blue square."]),
    ]
    records: list[dict[str, Any]] = []
    for number, (images, texts) in enumerate(turns):
        conversation = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        record = {"id": str(number), "conversations": conversation}
        records.append({**record, "image": images} if images else record)
    (root / "data.json").write_text(json.dumps(records))
    return root


def collate(model_dir: Path, data: Path, *, packed: bool) -> tuple[Batch, list[Any], ChatEncoder]:
    images = find_model_images(model_dir)
    assert images is not None
    encoder = ChatEncoder.load(model_dir, placeholder=images.placeholder)
    source = DatasetSource(data / "data.json", "kd", encoder)
    examples = [source[i] for i in range(3)]
    student = StudentInputs(ImageCache(images, None), encoder.image_token_id, encoder.tokenizer.pad_token_id)
    collator = Collator(student, kind="kd", image_root=data, max_tokens=1000, packed=packed)
    return collator(examples), examples, encoder


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != MERGES_NEWLINES])
def test_a_batch_gives_the_logits_of_each_sample_alone(family: str, data: Path, tmp_path: Path) -> None:
    build_model(FAMILIES[family], tmp_path / "model", TEXTS, seed=0)
    model = load_student(tmp_path / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    packed_too = text_config(model).model_type in TEXT_MODELS
    expected: list[torch.Tensor] = []
    for packed in (False, True)[: 1 + packed_too]:
        batch, examples, encoder = collate(tmp_path / "model", data, packed=packed)
        if not expected:
            for example in examples:
                text = encoder.template.render(example.sample.conversations[0], "here")
                images = [Image.open(data / str(ref.path)) for ref in example.sample.images]
                inputs = processor(text=[text], images=images or None, add_special_tokens=False, return_tensors="pt")
                # Llama 4's pixels are bfloat16.
                inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
                with torch.no_grad():
                    logits = model(**inputs).logits[0]
                # The response tokens are the same from the end, where no image stands.
                from_end = len(example.conversations[0].input_ids) - example.conversations[0].response_positions
                if len(images) > 1:
                    from_end = from_end[-1:]
                expected.append(logits[logits.shape[0] - from_end - 1])
        inputs = batch.model_inputs
        positions = rope_position_ids(model, inputs)
        if packed:
            check_packing_supported(model)
            assert (positions is None) == (not hasattr(model.model, "get_rope_index"))
            inputs["position_ids"] = inputs["position_ids"] if positions is None else positions
        else:
            assert positions is None
        with torch.no_grad():
            found = model(**inputs).logits.flatten(0, 1)[batch.rows]
        for number, own in enumerate(expected):
            rows = found[batch.row_sequence == number][-len(own) :]
            assert (rows.log_softmax(-1) - own.log_softmax(-1)).abs().max() < 2e-5, (family, packed, number)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_parameter_groups_are_the_models_own_parts(family: str, tmp_path: Path) -> None:
    build_model(FAMILIES[family], tmp_path, TEXTS, seed=0)
    model = load_student(tmp_path, dtype=torch.float32)
    assert is_multimodal(model)
    groups = parameter_groups(model)
    by_group = {
        group: {name for name, found in groups.items() if group in found}
        for group in ("vision_tower", "adapter", "language_model")
    }
    assert sum(map(len, by_group.values())) == len(groups)
    assert all(by_group.values())
    text = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    assert by_group["language_model"] == {name for name, p in model.named_parameters() if id(p) in text}
    adapters = ADAPTERS.get(family, {"multi_modal_projector"})
    is_adapter = {name for name in groups if adapters & set(name.split("."))}
    assert by_group["adapter"] == is_adapter


@pytest.mark.parametrize("family", ["llava-next", "llava-onevision", "internvl", "mistral3", "qwen3-vl"])
def test_an_upcycled_student_has_the_logits_of_the_dense_one(family: str, data: Path, tmp_path: Path) -> None:
    build_model(FAMILIES[family], tmp_path / "model", TEXTS, seed=0)
    dense = load_student(tmp_path / "model", dtype=torch.float32)
    sparse = upcycle(dense, MoEConfig(), seed=0)
    assert "router" in frozenset[str]().union(*parameter_groups(sparse).values())
    for packed in (False, True):
        batch, _, _ = collate(tmp_path / "model", data, packed=packed)
        inputs = batch.model_inputs
        if packed:
            check_packing_supported(sparse)
            positions = rope_position_ids(sparse, inputs)
            inputs["position_ids"] = inputs["position_ids"] if positions is None else positions
        with torch.no_grad():
            difference = dense(**inputs).logits - sparse(**inputs).logits
        assert difference.flatten(0, 1)[batch.rows].abs().max() < 1e-5


def test_a_sparse_qwen3_vl_is_saved_as_published_ones_are(tmp_path: Path) -> None:
    """Each expert's matrices are transposed in the file. The copies differ, so that no other order would pass."""
    build_model(FAMILIES["qwen3-vl"], tmp_path / "model", TEXTS, seed=0)
    model = upcycle(load_student(tmp_path / "model", dtype=torch.float32), MoEConfig(noise=0.1), seed=0)
    save_student(model, tmp_path / "model", tmp_path / "sparse")
    stored, name = load_file(tmp_path / "sparse/model.safetensors"), "model.language_model.layers.1.mlp.experts"
    expected = model.state_dict()
    for part, shape in (("gate_up_proj", (4, 128, 512)), ("down_proj", (4, 256, 128))):
        assert stored[f"{name}.{part}"].shape == shape
        assert torch.equal(stored[f"{name}.{part}"].transpose(1, 2), expected[f"{name}.{part}"])
    loaded = load_student(tmp_path / "sparse", dtype=torch.float32).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


def test_experts_that_transformers_cannot_tell_from_transposed_ones_are_not_saved(tmp_path: Path) -> None:
    build_model(FAMILIES["qwen3-vl"], tmp_path / "model", TEXTS, seed=0, sizes={"intermediate_size": 64})
    with pytest.raises(ModelError, match="matrices of 128 x 128, of which transformers cannot tell"):
        upcycle_directory(tmp_path / "model", tmp_path / "sparse", MoEConfig(), seed=0)
    assert not (tmp_path / "sparse").exists()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        (
            "qwen2.5-vl",
            "qwen2_5_vl_text: cannot be upcycled; .*no mixture of experts .* has this model's layers and positions",
        ),
        ("smolvlm", "SmolVLMForConditionalGeneration: cannot be upcycled: vLLM's class of it knows dense text models"),
    ],
)
def test_a_student_without_a_standard_sparse_class_is_not_upcycled(family: str, reason: str, tmp_path: Path) -> None:
    build_model(FAMILIES[family], tmp_path, TEXTS, seed=0)
    with pytest.raises(ModelError, match=reason):
        upcycle(load_student(tmp_path, dtype=torch.float32), MoEConfig(), seed=0)


# The modules that map a tower's output to the language model's width, as transformers calls them.
ADAPTERS = {
    "qwen2-vl": {"merger"},
    "qwen2.5-vl": {"merger"},
    "qwen3-vl": {"merger", "deepstack_merger_list"},
    "qwen3-vl-moe": {"merger", "deepstack_merger_list"},
    "glm-4v": {"merger"},
    "llava-next": {"multi_modal_projector", "image_newline"},
    "llava-onevision": {"multi_modal_projector", "image_newline"},
    "smolvlm": {"connector"},
    "idefics3": {"connector"},
    "llama4": {"vision_adapter", "multi_modal_projector"},
    "gemma4": {"embed_vision"},
}
