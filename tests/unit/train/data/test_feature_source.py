"""Tests of feature caches in training, and of the student whose vision tower they replace."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from common.data.model_images import LlavaImages
from common.data.samples import ImageRef
from common.errors import ConfigError, DataError, ModelError, ProvenanceError, ShardError
from common.shards.feature_shard import FeatureCache
from common.shards.manifest import shard_path
from precompute.features.run import FeatureSettings, run_features
from tests.support.models import tiny_causal_lm, tiny_llava
from tests.support.outputs import flip_bit
from tests.support.training import ROOT, environment, stage, write_mixed_dataset
from train.config import MoEConfig, TrainConfig
from train.data.feature_source import FeatureSource, open_feature_source
from train.data.image_cache import ImageRequest
from train.memory_estimate import estimate_training_memory
from train.model.student import load_student, save_student
from train.moe.upcycle import upcycle

BF16, F32 = torch.bfloat16, torch.float32


def compute(model: Path, data: Path, output: Path, **changes: Any) -> Path:
    settings = FeatureSettings(model, data / "kd.json", data, output, images_per_shard=3, **changes)
    run_features(settings, progress=False)
    return output


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cached")
    tiny_llava(root / "student", num_layers=2)
    write_mixed_dataset(root / "data", 12)
    compute(root / "student", root / "data", root / "bf16")
    return root


def config(root: Path, student: Path | None = None, **changes: Any) -> TrainConfig:
    data = {"dataset": str(root / "data" / "kd.json"), "features": str(root / "bf16")}
    changes["data"] = data | changes.get("data", {})
    settings = stage(root / "out", student or root / "student", loss={"cross_entropy": 1.0}, **changes)
    return TrainConfig.model_validate(settings)


def requests(*names: str, image_root: Path | None = None) -> list[ImageRequest]:
    return [ImageRequest(ImageRef(name), image_root, f"sample {name!r}") for name in names]


def open_features(root: Path, **changes: Any) -> FeatureSource:
    features = open_feature_source(config(root, **changes))
    assert features is not None
    return features


# Reading features


def pixels(features: FeatureSource, wanted: list[ImageRequest]) -> torch.Tensor:
    return features.read(wanted).tensors["pixel_values"]


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_features_replace_pixels(root: Path, dtype: torch.dtype) -> None:
    live, cached = (load_student(root / "student", dtype=dtype, tower=tower) for tower in (True, False))
    cache = FeatureCache(root / "bf16")
    features = (
        FeatureSource({None: [cache]}, dtype, LlavaImages.load(root / "student"))
        .read(requests("4.png", "0.png", "4.png"))
        .tensors["pixel_values"]
    )
    assert (features.shape, features.dtype) == ((3, 16, 64), dtype)
    seen: list[torch.Tensor] = []
    for model in (live, cached):
        model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    from transformers import AutoImageProcessor

    from common.data.images import load_image

    spec, processor = LlavaImages.load(root / "student"), AutoImageProcessor.from_pretrained(root / "student")
    assert spec is not None
    images = [load_image(ImageRef(f"{n}.png"), root / "data", "pad", spec.mean_rgb, "") for n in (4, 0, 4)]
    with torch.no_grad():
        expected = live.get_image_features(processor(images=images, return_tensors="pt")["pixel_values"])
        found = cached.get_image_features(features)
    # With another memory layout the projector's product would take another path and round differently.
    assert seen[0].stride() == seen[1].stride()
    if dtype == BF16:
        assert torch.equal(seen[0], seen[1])
        assert all(map(torch.equal, expected.pooler_output, found.pooler_output))
    else:
        assert 0 < (seen[0] - seen[1]).norm() < 0.02 * seen[0].norm()


def test_a_dummy_image_is_zeros_of_the_same_shape(root: Path) -> None:
    features = open_features(root)
    dummy = features.dummy().tensors["pixel_values"]
    assert (dummy.shape, dummy.dtype, dummy.any()) == ((1, 16, 64), F32, torch.tensor(False))
    assert [len(ids) for ids in features.dummy().token_ids] == [16]


def test_images_whose_files_a_sample_holds_are_found_by_content(root: Path) -> None:
    features = open_features(root)
    data = (root / "data" / "6.png").read_bytes()
    by_content = pixels(features, [ImageRequest(ImageRef("another/name.png", data), None, "")])
    assert torch.equal(by_content, pixels(features, requests("6.png")))
    changed = (root / "data" / "8.png").read_bytes()
    with pytest.raises(
        DataError, match=f"sample 'a': image 6.png .SHA-256 {hashlib.sha256(b'x').hexdigest()}"
    ) as caught:
        pixels(features, [ImageRequest(ImageRef("6.png", b"x"), None, "sample 'a'")])
    assert "there it is another file" in str(caught.value)
    by_changed_content = pixels(features, [ImageRequest(ImageRef("6.png", changed), None, "")])
    assert torch.equal(by_changed_content, pixels(features, requests("8.png")))


def test_an_image_that_is_in_no_cache_names_its_sample_and_what_to_run(root: Path) -> None:
    with pytest.raises(DataError, match=r"sample 'new\.png': image new\.png is in no feature cache") as caught:
        pixels(open_features(root), requests("0.png", "new.png"))
    assert "decant precompute-features --model STUDENT" in str(caught.value)
    # The same path below another root is another image.
    with pytest.raises(DataError, match="is in no feature cache"):
        pixels(open_features(root), requests("0.png", image_root=root))


def test_the_features_in_memory_are_limited(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pixels(open_features(root), requests("0.png", "2.png", "8.png", "0.png"))
    monkeypatch.setattr("train.data.feature_source._MAX_CACHED_BYTES", 2 * 16 * 64 * 4)
    features = open_features(root)
    for _ in range(2):
        assert torch.equal(pixels(features, requests("0.png", "2.png", "8.png", "0.png")), expected)
        cached = features._cached  # noqa: SLF001 - memory use cannot be seen from outside
        assert len(cached) == 2
        assert features._cached_bytes == sum(each.nbytes for each in cached.values())  # noqa: SLF001 - memory use, as above


def test_a_damaged_shard_is_named(root: Path, tmp_path: Path) -> None:
    output = shutil.copytree(root / "bf16", tmp_path / "bf16")
    damaged = output / shard_path(output, 0).name
    for position in range(4, damaged.stat().st_size // 2, 8):
        flip_bit(damaged, position)
    features = FeatureSource({None: [FeatureCache(output)]}, F32, LlavaImages.load(root / "student"))
    with pytest.raises(ShardError, match=r"shard-00000\.parquet: has SHA-256"):
        pixels(features, requests("0.png"))
    assert pixels(features, requests("8.png")).isfinite().all()


# Checks of a configuration


def test_features_of_another_encoder_are_refused_naming_both_sides(root: Path, tmp_path: Path) -> None:
    other = tiny_llava(tmp_path / "other", num_layers=1, seed=1)
    with pytest.raises(ProvenanceError, match=r"weights_sha256: the cache has '\w+', the model has '\w+'"):
        open_feature_source(config(root, other))
    with pytest.raises(ProvenanceError, match="aspect_ratio: the cache has 'pad', the model has 'keep'"):
        open_feature_source(config(root, data={"image_aspect_ratio": "keep"}))


def test_a_student_that_was_trained_keeps_its_cache(root: Path, tmp_path: Path) -> None:
    """A stage in bf16 saves its student in bfloat16, in which the tower computes the same."""
    save_student(load_student(root / "student", dtype=BF16), root / "student", tmp_path / "next")
    assert open_feature_source(config(root, tmp_path / "next")) is not None


def test_stages_that_features_cannot_train_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="the vision tower cannot be trained"):
        config(root, trainable=["vision_tower", "adapter"])
    text = tiny_causal_lm(tmp_path / "text", num_layers=1)
    with pytest.raises(ConfigError, match="a student without a vision tower"):
        open_feature_source(config(root, text))
    with pytest.raises(ModelError, match="expected one with a vision tower"):
        load_student(text, dtype=F32, tower=False)


def test_each_set_has_the_caches_of_its_own_images(root: Path, tmp_path: Path) -> None:
    dataset, other_data = str(root / "data" / "kd.json"), tmp_path / "data"
    shutil.copytree(root / "data", other_data)
    shutil.copy(other_data / "2.png", other_data / "0.png")
    compute(root / "student", other_data, tmp_path / "other")
    own = {"dataset": dataset, "image_root": str(other_data)}
    with pytest.raises(ValidationError, match="set 2 has no features"):
        config(root, data={"dataset": None, "mix": [{"dataset": dataset}, own]})
    mix = [{"dataset": dataset}, own | {"features": str(tmp_path / "other")}]
    features = open_features(root, data={"dataset": None, "mix": mix})
    first, second = (pixels(features, requests("0.png", image_root=at)) for at in (None, other_data))
    assert not torch.equal(first, second)
    assert torch.equal(second, pixels(features, requests("2.png")))
    both = open_features(root, data={"features": [str(tmp_path / "other"), str(root / "bf16")]})
    assert torch.equal(pixels(both, requests("0.png")), second)


def test_the_memory_estimate_counts_no_tower(root: Path) -> None:
    live = config(root, data={"features": []})
    whole, without = (estimate_training_memory(root / "student", 10, config=each) for each in (live, config(root)))
    tower = sum(w.numel() for name, w in load_file(root / "student" / "model.safetensors").items() if "vision" in name)
    counts = [estimated.parameters.estimates[0].value for estimated in (whole, without)]
    assert counts[0] - counts[1] == tower


# The student without its vision tower


def test_the_model_is_the_vanilla_class_and_has_no_tower(root: Path) -> None:
    model = load_student(root / "student", dtype=F32, tower=False)
    assert type(model) is LlavaForConditionalGeneration
    assert not [name for name, _ in model.named_parameters() if "vision" in name]
    whole = dict(load_student(root / "student", dtype=F32).named_parameters())
    assert all(torch.equal(parameter, whole[name]) for name, parameter in model.named_parameters())
    assert len(whole) - len(list(model.parameters())) == 55


@pytest.mark.parametrize("name", ["multi_modal_projector.linear_1.bias", "language_model.model.norm.weight"])
def test_any_other_weight_that_is_missing_is_still_refused(root: Path, tmp_path: Path, name: str) -> None:
    broken = shutil.copytree(root / "student", tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file({n: w for n, w in weights.items() if n != name}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        load_student(broken, dtype=F32, tower=False)
    save_file({**weights, "stranger": weights[name].clone()}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are unknown"):
        load_student(broken, dtype=F32, tower=False)


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_the_student_is_saved_as_with_a_live_tower(
    root: Path, tmp_path: Path, dtype: torch.dtype, sparse: bool
) -> None:
    for tower in (True, False):
        model = load_student(root / "student", dtype=dtype, tower=tower)
        if sparse:
            model = upcycle(model, MoEConfig(num_experts=2, top_k=1), seed=0)
        save_student(model, root / "student", tmp_path / str(tower))
    live, cached = (load_file(tmp_path / name / "model.safetensors") for name in ("True", "False"))
    assert {name: w.dtype for name, w in live.items()} == {name: w.dtype for name, w in cached.items()}
    assert all(torch.equal(live[name], cached[name]) for name in live)
    names = sorted(path.name for path in (tmp_path / "True").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "False").iterdir())
    for name in names:
        if name.endswith(".json"):
            assert json.loads((tmp_path / "True" / name).read_text()) == json.loads(
                (tmp_path / "False" / name).read_text()
            )


@pytest.mark.slow
def test_the_tower_is_never_in_memory(tmp_path: Path) -> None:
    """Peak memory of loading a student whose tower is 60 MB and everything else 1 MB."""
    from transformers import CLIPVisionConfig, LlavaConfig

    directory = tiny_llava(tmp_path / "student", num_layers=1)
    made = LlavaConfig.from_pretrained(directory)
    made.vision_config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=40_000,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
    )
    LlavaForConditionalGeneration(made).save_pretrained(directory)
    tower_bytes = (directory / "model.safetensors").stat().st_size
    assert tower_bytes > 60e6
    code = f"""
import torch
from pathlib import Path
from train.model.student import load_student

def grown(**options):
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    load_student(Path({str(directory)!r}), dtype=torch.bfloat16, **options)
    return peak() - before

def peak():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

load_student(Path({str(tmp_path / "other")!r}), dtype=torch.bfloat16, tower=False)
print(grown(tower=False), grown())
"""
    tiny_llava(tmp_path / "other", num_layers=1)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment()
    )
    without, whole = map(int, done.stdout.split()[-2:])
    assert whole > 0.45 * tower_bytes
    assert without < 0.05 * tower_bytes
