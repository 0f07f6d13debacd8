"""Batches of students of many families against transformers' own processor and model, one sample at a time."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from common.adapter_inputs import CACHED_FEATURES
from common.data.chat_encoding import ChatEncoder
from common.data.model_images import find_model_images
from common.errors import ModelError
from common.shards.encoder_identity import check_encoder
from common.shards.feature_shard import FeatureCache
from demo.families import FAMILIES, build_model
from precompute.features.run import FeatureSettings, run_features
from precompute.verify.features import verify_features
from precompute.verify.recompute_features import recompute_features
from tests.support.models import randomise, tiny_causal_lm, tiny_llava
from tests.support.training import stage
from train.config import MoEConfig, TrainConfig
from train.data.collator import Batch, Collator, StudentInputs
from train.data.feature_source import open_feature_source
from train.data.image_cache import ImageCache, ImageSource
from train.data.sources import DatasetSource
from train.model.compose import compose_student
from train.model.packing import TEXT_MODELS, check_packing_supported, rope_position_ids
from train.model.student import (
    is_multimodal,
    leave_out_tower,
    load_student,
    parameter_groups,
    save_student,
    text_config,
)
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


def collate(
    model_dir: Path, data: Path, *, packed: bool, features: ImageSource | None = None, samples: range = range(3)
) -> tuple[Batch, list[Any], ChatEncoder]:
    images = find_model_images(model_dir)
    assert images is not None
    encoder = ChatEncoder.load(model_dir, placeholder=images.placeholder)
    source = DatasetSource(data / "data.json", "kd", encoder)
    examples = [source[i] for i in samples]
    student = StudentInputs(
        features or ImageCache(images, None), encoder.image_token_id, encoder.tokenizer.pad_token_id
    )
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


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_features_give_the_logits_of_a_live_tower_bit_for_bit(family: str, data: Path, tmp_path: Path) -> None:
    build_model(FAMILIES[family], tmp_path / "model", TEXTS, seed=0)
    compare_cached_with_live(tmp_path, data)


def test_cached_features_of_slices_end_before_the_adapters_blocks(data: Path, tmp_path: Path) -> None:
    clip, text = tiny_llava(tmp_path / "clip"), tiny_causal_lm(tmp_path / "text", image_token=False)
    compose_student(clip, text, tmp_path / "model", seed=0, adapter="attention", num_slices=4)
    compare_cached_with_live(tmp_path, data)


def compare_cached_with_live(tmp_path: Path, data: Path) -> None:
    """Compares batches and saved students with cached features and with a live tower, after the adapter was trained."""
    settings = FeatureSettings(tmp_path / "model", data / "data.json", data, tmp_path / "features", images_per_shard=2)
    assert run_features(settings, progress=False).complete
    assert verify_features(tmp_path / "features", data / "data.json", data, progress=False).ok
    again = recompute_features(tmp_path / "features", tmp_path / "model", 9, image_root=data, progress=False)
    assert (again.num_images, again.num_exact) == (3, 3)
    model = load_student(tmp_path / "model", dtype=torch.float32)
    randomise(((n, p) for n, p in model.named_parameters() if parameter_groups(model)[n] == {"adapter"}), 1)
    save_student(model, tmp_path / "model", tmp_path / "trained")
    live, cached = (load_student(tmp_path / "trained", dtype=torch.bfloat16) for _ in range(2))
    leave_out_tower(cached)
    groups = parameter_groups(cached)
    assert not [name for name, found in groups.items() if "vision_tower" in found and re.search(r"\.\d+\.", name)]
    kept = {name for name, found in parameter_groups(live).items() if "vision_tower" not in found}
    assert kept <= groups.keys()
    loss = {"cross_entropy": 1.0}
    data_settings = {
        "dataset": str(data / "data.json"),
        "image_root": str(data),
        "features": str(tmp_path / "features"),
    }
    config = stage(tmp_path / "out", tmp_path / "trained", loss=loss, data=data_settings, run={"precision": "bf16"})
    features = open_feature_source(TrainConfig.model_validate(config))
    assert features is not None
    for samples in (range(3), range(1, 2)):
        expected, found = (
            collate(tmp_path / "model", data, packed=False, features=source, samples=samples)[0]
            for source in (None, features)
        )
        assert torch.equal(expected.input_ids, found.input_ids)
        assert expected.images.keys() == found.images.keys() - {CACHED_FEATURES}
        assert (CACHED_FEATURES in found.images) == (len(samples) > 1)
        with torch.no_grad():
            of_live, of_cached = (
                model(
                    **{
                        k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v
                        for k, v in inputs.items()
                    }
                )
                for model, inputs in ((live, expected.model_inputs), (cached, found.model_inputs))
            )
        rows = [output.logits.flatten(0, 1)[expected.rows] for output in (of_live, of_cached)]
        assert torch.equal(*rows)
    save_student(live, tmp_path / "trained", tmp_path / "of-live")
    save_student(cached, tmp_path / "trained", tmp_path / "of-cached")
    for path in (tmp_path / "of-live").iterdir():
        assert path.read_bytes() == (tmp_path / "of-cached" / path.name).read_bytes(), path.name
    # The next stage starts from the saved student, which keeps its cache.
    check_encoder(FeatureCache(tmp_path / "features").manifest, tmp_path, tmp_path / "of-cached", "keep")


def test_a_rerun_of_a_complete_cache_loads_no_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_model(FAMILIES["qwen2.5-vl"], tmp_path / "model", TEXTS, seed=0)
    settings = FeatureSettings(tmp_path / "model", data / "data.json", data, tmp_path / "features")
    assert run_features(settings, progress=False).num_new_images == 3
    monkeypatch.setattr("precompute.features.run._load_tower", None)
    assert run_features(settings, progress=False).num_new_images == 0


def test_features_of_other_images_are_refused_by_their_number(data: Path, tmp_path: Path) -> None:
    build_model(FAMILIES["qwen2.5-vl"], tmp_path / "model", TEXTS, seed=0)
    model = load_student(tmp_path / "model", dtype=torch.float32)
    leave_out_tower(model)
    batch, _, _ = collate(tmp_path / "model", data, packed=False)
    with pytest.raises(ModelError, match=r"the cached features have shape \[5, 64\], .* takes \[\d+, 64\]"):
        model(**batch.model_inputs, cached_features=torch.zeros(5, 64))


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
        ("smolvlm", "smolvlm: cannot be upcycled: vLLM's class of it knows dense text models"),
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
