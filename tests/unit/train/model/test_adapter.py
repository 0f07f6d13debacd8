"""Adapters of composed students, over CLIP and SigLIP: what they compute, what trains, and what is saved."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from common.errors import ModelError
from tests.support.models import randomise, tiny_causal_lm, tiny_llava, tiny_siglip
from train.choices import AdapterType
from train.model.compose import compose_student
from train.model.student import load_student, save_student, set_trainable

F32 = torch.float32
PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    tiny_llava(root / "clip", "qwen2")
    tiny_siglip(root / "siglip")
    tiny_causal_lm(root / "lm", "llama", image_token=False)
    return root


def compose(root: Path, out: Path, tower: str, adapter: AdapterType) -> nn.Module:
    compose_student(root / tower, root / "lm", out, seed=3, adapter=adapter)
    return load_student(out, dtype=F32)


def image_embeddings(student: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = student.model.get_image_features(PIXELS).pooler_output[0]
    return found


def patches(root: Path, tower: str) -> Tensor:
    """Returns the second-to-last hidden state of the tower itself, without the class token."""
    from transformers import SiglipVisionModel

    if tower == "siglip":
        model: nn.Module = SiglipVisionModel.from_pretrained(root / tower, local_files_only=True)
    else:
        model = load_student(root / tower, dtype=F32).model.vision_tower
    with torch.no_grad():
        state: Tensor = model(PIXELS, output_hidden_states=True).hidden_states[-2][0]
    return state if tower == "siglip" else state[1:]


@pytest.mark.parametrize("adapter", ["mlp", "linear", "attention"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_fresh_adapter_is_its_projector_on_the_towers_patches(
    root: Path, tmp_path: Path, tower: str, adapter: AdapterType
) -> None:
    """Fresh self-attention blocks change nothing."""
    student = compose(root, tmp_path / "student", tower, adapter)
    weights = student.model.multi_modal_projector.state_dict()
    expected = nn.functional.linear(patches(root, tower), weights["linear_1.weight"], weights["linear_1.bias"])
    if adapter == "linear":
        assert weights["linear_2.weight"].equal(torch.eye(64))
    else:
        hidden = nn.functional.gelu(expected)
        expected = nn.functional.linear(hidden, weights["linear_2.weight"], weights["linear_2.bias"])
    torch.testing.assert_close(image_embeddings(student), expected, rtol=0, atol=1e-6)
    assert not any("head" in name for name, _ in student.named_parameters() if "vision_tower" in name)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_the_adapter_trains_with_its_blocks_and_without_the_towers_layers(
    root: Path, tmp_path: Path, tower: str
) -> None:
    student = compose(root, tmp_path / "student", tower, "attention")
    set_trainable(student, frozenset({"adapter"}))
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    blocks = {name for name in trained if "vision_tower" in name}
    assert {name.split("layers.")[1][0] for name in blocks} == {"2", "3"}
    assert len(blocks) == 32
    assert trained - blocks == {
        f"model.multi_modal_projector.linear_{number}.{part}" for number in (1, 2) for part in ("weight", "bias")
    }
    set_trainable(student, frozenset({"vision_tower"}))
    assert not any(p.requires_grad for name, p in student.named_parameters() if name in trained)


def test_of_a_linear_adapter_one_layer_trains(root: Path, tmp_path: Path) -> None:
    student = compose(root, tmp_path / "student", "clip", "linear")
    assert set_trainable(student, frozenset({"adapter"})) == 64 * 64 + 64
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert all("linear_1" in name for name in trained)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_trained_blocks_are_saved_and_loaded_with_and_without_the_tower(root: Path, tmp_path: Path, tower: str) -> None:
    student = compose(root, tmp_path / "student", tower, "attention")
    set_trainable(student, frozenset({"adapter"}))
    randomise([(name, p) for name, p in student.named_parameters() if p.requires_grad], seed=5)
    save_student(student, tmp_path / "student", tmp_path / "trained")
    whole = load_student(tmp_path / "trained", dtype=F32)
    assert image_embeddings(whole).equal(image_embeddings(student))

    cached = load_student(tmp_path / "trained", dtype=F32, tower=False)
    assert not any("embeddings" in name for name, _ in cached.named_parameters() if "vision_tower" in name)
    with torch.no_grad():
        features = whole.model.vision_tower(PIXELS, output_hidden_states=True).hidden_states[2]
        found = cached.model.get_image_features(features).pooler_output[0]
    assert found.equal(image_embeddings(whole))
    save_student(cached, tmp_path / "trained", tmp_path / "again")
    again = load_student(tmp_path / "again", dtype=F32)
    expected = whole.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in again.state_dict().items())


def test_a_tower_that_ends_in_an_adapter_is_not_taken(root: Path, tmp_path: Path) -> None:
    compose(root, tmp_path / "student", "clip", "attention")
    with pytest.raises(ModelError, match="the last layers of its vision tower are an adapter"):
        compose_student(tmp_path / "student", root / "lm", tmp_path / "other", seed=0)


def test_a_tower_that_cannot_be_made_is_refused(root: Path, tmp_path: Path) -> None:
    for path in (root / "siglip").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": 3}))
    with pytest.raises(ModelError, match=r"config\.json: describes no vision tower that can be made"):
        compose_student(tmp_path, root / "lm", tmp_path / "student", seed=0)
