"""The fingerprint of a vision tower depends on its output alone, not on how files hold its weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, LlavaForConditionalGeneration

from common.errors import ModelError, ProvenanceError
from common.shards.encoder_identity import check_encoder, compute_encoder_identity, tower_tensors
from tests.support.models import tiny_causal_lm, tiny_llava
from tests.unit.common.shards.test_feature_shard import make_feature_manifest


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava"), num_layers=1)


@pytest.fixture
def copy(llava: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llava, tmp_path / "copy")


def rewrite(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, directory / "model.safetensors")


def set_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_tensors_are_those_of_transformers_vision_model(llava: Path) -> None:
    tower = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).model.vision_tower
    expected = {name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    assert {name: stored.shape for name, stored in tower_tensors(llava).items()} == expected


@pytest.mark.parametrize("how", ["new names", "several files", "bfloat16", "float64", "without the language model"])
def test_files_may_hold_the_same_tower_otherwise(llava: Path, copy: Path, how: str) -> None:
    weights = load_file(copy / "model.safetensors")
    match how:
        case "new names":
            new = {name: name.replace("vision_tower.vision_model", "model.vision_tower") for name in weights}
            rewrite(copy, {new[name]: w for name, w in weights.items()})
        case "several files":
            names = sorted(weights)
            (copy / "model.safetensors").unlink()
            for part in range(3):
                save_file({name: weights[name] for name in names[part::3]}, copy / f"model-{part}.safetensors")
        case "bfloat16":
            rewrite(copy, {name: w.bfloat16() for name, w in weights.items()})
        case "float64":
            rewrite(copy, {name: w.double() for name, w in weights.items()})
        case _:
            rewrite(copy, {name: w for name, w in weights.items() if "vision_tower" in name})
    assert compute_encoder_identity(copy, "pad") == compute_encoder_identity(llava, "pad")


def test_a_clip_directory_has_the_tower_that_a_llava_took_from_it(llava: Path, tmp_path: Path) -> None:
    tower = LlavaForConditionalGeneration.from_pretrained(llava, dtype=torch.float32).model.vision_tower
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=tower.config.to_dict(), projection_dim=8))
    clip.vision_model.load_state_dict(tower.state_dict())
    clip.save_pretrained(tmp_path)
    shutil.copy(llava / "preprocessor_config.json", tmp_path)
    assert compute_encoder_identity(tmp_path, "pad") == compute_encoder_identity(llava, "pad")


@pytest.mark.parametrize("name", ["embeddings.class_embedding", "encoder.layers.2.mlp.fc1.bias"])
def test_one_changed_weight_is_another_tower(llava: Path, copy: Path, name: str) -> None:
    weights = load_file(copy / "model.safetensors")
    weights[f"vision_tower.vision_model.{name}"][0] += 0.01
    rewrite(copy, weights)
    before, after = (compute_encoder_identity(path, "pad").model_dump() for path in (llava, copy))
    assert {key for key in before if before[key] != after[key]} == {"weights_sha256"}


def test_layers_are_counted_from_the_first_however_they_are_given(llava: Path, copy: Path) -> None:
    assert compute_encoder_identity(llava, "pad").layers == (2,)
    set_config(copy, vision_feature_layer=2)
    assert compute_encoder_identity(copy, "pad") == compute_encoder_identity(llava, "pad")
    set_config(copy, vision_feature_layer=[-2, -1])
    found = compute_encoder_identity(copy, "pad")
    assert (found.layers, found.num_channels) == ((2, 3), 128)
    set_config(copy, vision_feature_layer=7)
    with pytest.raises(ModelError, match="choose nothing of 4 hidden states"):
        compute_encoder_identity(copy, "pad")


def test_every_difference_is_named_with_both_values(llava: Path, copy: Path) -> None:
    manifest = make_feature_manifest([], encoder=compute_encoder_identity(llava, "pad"))
    check_encoder(manifest, Path("cache"), llava, "pad")
    set_config(copy, vision_feature_layer=-1, vision_feature_select_strategy="full")
    processor = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.1, 0.2, 0.3]}))
    with pytest.raises(ProvenanceError) as caught:
        check_encoder(manifest, Path("cache"), copy, "keep")
    for line in (
        "layers: the cache has (2,), the model has (3,)",
        "select_strategy: the cache has 'default', the model has 'full'",
        "aspect_ratio: the cache has 'pad', the model has 'keep'",
        "tokens_per_image: the cache has 16, the model has 17",
        "processor_sha256",
    ):
        assert line in str(caught.value)


def test_a_directory_without_an_intact_tower_is_refused(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="names no vision tower"):
        compute_encoder_identity(tiny_causal_lm(tmp_path / "text", num_layers=1), "pad")
    weights = load_file(copy / "model.safetensors")
    save_file({name: w for name, w in weights.items() if "class_embedding" in name}, copy / "more.safetensors")
    with pytest.raises(ModelError, match="remove one of the files"):
        tower_tensors(copy)
    (copy / "more.safetensors").unlink()
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read as safetensors .* ends past the end"):
        tower_tensors(copy)
    rewrite(copy, {name: w for name, w in weights.items() if "vision_tower" not in name})
    with pytest.raises(ModelError, match="hold no vision tower"):
        tower_tensors(copy)
