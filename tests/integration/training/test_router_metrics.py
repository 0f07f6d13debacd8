"""Router metrics, the z-loss and expert loads in the real trainer, on one rank and two, in every ZeRO stage."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from common.data.chat_encoding import ChatEncoder
from common.data.images import load_image
from common.data.model_images import LlavaImages
from common.errors import ConfigError
from tests.integration.training.test_parallel import make_sparse
from tests.support.forward import expand
from tests.support.models import tiny_llava
from tests.support.training import losses, run_stages, stage, write_mixed_dataset
from train.config import TrainConfig
from train.data.sampling import GlobalBatchSampler, SampleSet, split_validation
from train.data.sources import DatasetSource
from train.model.student import language_model, load_student
from train.moe.expert_load import ExpertLoad
from train.run.stage import train_stage

NUM_STEPS = 3
CASES = [(1, 0), (1, 3), (2, 0), (2, 1), (2, 2), (2, 3)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains routers only, so that the whole gradient is theirs. The last step of the epoch has fewer samples."""
    root = tmp_path_factory.mktemp("routers")
    dataset = write_mixed_dataset(root / "data", 24)
    student = make_sparse(tiny_llava(root / "dense"), root / "sparse")
    for num_ranks in (1, 2):
        configs = [
            stage(
                root / f"{num_ranks}-{zero}",
                student,
                trainable=["router"],
                data={"dataset": str(dataset), "image_root": str(root / "data"), "validation_fraction": 0.2},
                loss={"cross_entropy": 1.0, "balance": 0.01, "router_z": 0.002},
                optim={"max_steps": NUM_STEPS},
                run={"zero_stage": zero, "save_steps": 1, "eval_steps": 1, "keep_checkpoints": 9},
            )
            for ranks, zero in CASES
            if ranks == num_ranks
        ]
        # One run has activation checkpointing, which runs the layers twice.
        configs[-1]["run"]["activation_checkpointing"] = True
        run_stages(configs, root / "scratch", num_ranks)
    return root


def metrics(output: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def read_load(output: Path, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "checkpoints" / f"checkpoint-{step}" / "expert-load.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "zero"), CASES)
def test_every_setup_gives_the_same_router_metrics(runs: Path, num_ranks: int, zero: int) -> None:
    reference, found = metrics(runs / "1-0"), metrics(runs / f"{num_ranks}-{zero}")
    assert len(found) == NUM_STEPS
    for expected, line in zip(reference, found, strict=True):
        for name in ("loss", "router_z", "router/entropy", "router/grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5), name
        for name in ("router/largest_load", "router/smallest_load"):
            assert line[name] == pytest.approx(expected[name], rel=1e-12), name
    assert losses(runs / f"{num_ranks}-{zero}") == pytest.approx(losses(runs / "1-0"), rel=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "zero"), CASES)
def test_the_routers_gradient_is_the_one_that_deepspeed_clips(runs: Path, num_ranks: int, zero: int) -> None:
    for line in metrics(runs / f"{num_ranks}-{zero}"):
        # DeepSpeed reports no norm without ZeRO.
        assert ("grad_norm" in line) == (zero > 0)
        assert line["router/grad_norm"] == pytest.approx(line.get("grad_norm", line["router/grad_norm"]), rel=1e-4)


@pytest.mark.slow
def test_the_loss_is_the_weighted_sum_of_its_terms(runs: Path) -> None:
    for line in metrics(runs / "2-2"):
        z = line["router_z"]
        # The logits over eight experts have a standard deviation of at least 1.
        assert z > 4
        terms = line["cross_entropy"] + 0.002 * z
        # The balance loss of a step is the token-weighted mean over its micro-batches.
        assert terms + 0.01 * line["balance"] == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("num_ranks", "zero"), CASES)
def test_loads_add_up_to_the_tokens_of_each_step(runs: Path, num_ranks: int, zero: int) -> None:
    for step in range(1, NUM_STEPS + 1):
        found, expected = read_load(runs / f"{num_ranks}-{zero}", step), read_load(runs / "1-0", step)
        assert found == expected
        assert (found["first_step"], found["last_step"]) == (step, step)
        for name, counts in found["counts"].items():
            assert [sum(row) for row in counts] == [2 * found["tokens"][name]] * 2


@pytest.mark.slow
def test_the_loads_of_the_first_step_equal_those_of_its_samples_one_by_one(runs: Path) -> None:
    """Counts the two largest router logits of each conversation alone, unpadded, in transformers."""
    path = runs / "sparse"
    encoder, spec = ChatEncoder.load(path), LlavaImages.load(path)
    processor = AutoImageProcessor.from_pretrained(path)
    assert spec is not None
    source = DatasetSource(runs / "data" / "kd.json", "kd", encoder)
    selected, _ = split_validation(24, 0.2)
    sampler = GlobalBatchSampler([SampleSet(selected)], 8, 8, 0, 8192)
    model = load_student(path, dtype=torch.float32)
    expected = {"text": np.zeros((2, 8), int), "image": np.zeros((2, 8), int)}
    for number in sampler.micro_batch(0, 0):
        example = source[int(number)]
        ids, _ = expand(example.conversations[0].input_ids, encoder.image_token_id, spec.tokens_per_image)
        inputs = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None]}
        if example.sample.images:
            images = [load_image(ref, runs / "data", "pad", spec.mean_rgb, "") for ref in example.sample.images]
            inputs["pixel_values"] = processor(images=images, return_tensors="pt")["pixel_values"]
        captured: list[Any] = []
        hook = language_model(model).register_forward_hook(lambda _m, _a, out: captured.append(out.router_logits))  # noqa: B023 - removed before the next iteration
        model.config.text_config.output_router_logits = True
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        for layer, logits_TE in enumerate(captured[0]):
            for token, row in zip(ids, logits_TE, strict=True):
                for expert in row.argsort(descending=True)[:2].tolist():
                    expected["image" if token == encoder.image_token_id else "text"][layer, expert] += 1
    found = read_load(runs / "2-3", 1)
    assert found["layers"] == [1, 3]
    assert expected["image"].sum()
    for name, counts in expected.items():
        assert np.array_equal(found["counts"][name], counts), name


@pytest.mark.slow
def test_each_checkpoint_has_a_picture_and_the_newest_is_copied_to_the_output(runs: Path) -> None:
    output = runs / "2-3"
    for step in range(1, NUM_STEPS + 1):
        with Image.open(output / "checkpoints" / f"checkpoint-{step}" / "expert-load.png") as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
    newest = output / "checkpoints" / f"checkpoint-{NUM_STEPS}"
    for name in ("expert-load.json", "expert-load.png"):
        assert (output / name).read_bytes() == (newest / name).read_bytes()
        # The marker lists it, because it belongs to the files of this checkpoint.
        assert name in json.loads((newest / "complete.json").read_text())["files"]


@pytest.mark.parametrize("name", ["balance", "router_z"])
def test_a_router_loss_needs_a_sparse_student(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_mixed_dataset(tmp_path / "data", 8)
    config = stage(
        tmp_path / "out",
        tiny_llava(tmp_path / "dense"),
        data={"dataset": str(dataset), "image_root": str(dataset.parent)},
        loss={"cross_entropy": 1.0, name: 0.01},
    )
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=rf"loss\.{name} needs a sparse student"):
        train_stage(TrainConfig.model_validate(config))
    with pytest.raises(ValueError, match=rf"loss\.{name} is for sparse students"):
        TrainConfig.model_validate({**config, "stage": "dense-to-dense"})


def make_load(num_layers: int, num_experts: int, *, image: bool) -> ExpertLoad:
    counts_LE = np.zeros((num_layers, num_experts), np.int64)
    counts_LE[:, 0], counts_LE[:, 1] = 6, 2
    return ExpertLoad(
        step=4,
        since_step=2,
        layers=tuple(range(1, 2 * num_layers, 2)),
        top_k=2,
        text_LE=counts_LE,
        image_LE=counts_LE if image else np.zeros_like(counts_LE),
    )


def draw_pixels(load: ExpertLoad) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(load.draw())).convert("RGB")).astype(int)


def test_the_picture_has_a_panel_for_image_tokens_if_there_are_any() -> None:
    assert draw_pixels(make_load(2, 4, image=True)).shape[1] > 1.4 * draw_pixels(make_load(2, 4, image=False)).shape[1]


@pytest.mark.slow
@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 2), (1, 4), (24, 8), (48, 64)])
def test_the_picture_is_red_for_overloaded_and_blue_for_underloaded_experts(num_layers: int, num_experts: int) -> None:
    """Gives the first expert three quarters of the assignments and each other one less than its share."""
    picture = draw_pixels(make_load(num_layers, num_experts, image=False))
    height, width = picture.shape[:2]
    assert width < 2000
    assert height < 2000
    red, blue = picture[..., 0] - picture[..., 2] > 60, picture[..., 2] - picture[..., 0] > 60
    # The colour bar is at the right.
    panel = slice(0, int(0.8 * width))
    columns_red, columns_blue = np.nonzero(red[:, panel])[1], np.nonzero(blue[:, panel])[1]
    assert columns_red.mean() < columns_blue.mean()
    assert len(columns_red)
