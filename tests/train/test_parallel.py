"""Ranks, accumulation and ZeRO stages change where numbers are computed, not which."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoImageProcessor

from common.encoding import Encoder
from common.images import ImageSpec
from tests.models import tiny_llava
from tests.train.runs import LiveTeacher, largest_difference, losses, run_stages, stage, weights, write_mixed_dataset
from train.batch import Collator
from train.config import MoEConfig
from train.moe import router_logits_hook, upcycle
from train.order import SampleSet, StepPlan
from train.stream import DatasetSource
from train.student import load_student, save_student

pytestmark = pytest.mark.slow

NUM_STEPS = 3
CASES = [
    *(("dense", zero) for zero in (0, 1, 2, 3)),
    *(("sparse", zero) for zero in (0, 1, 2, 3)),
    ("distilled", 2),
    ("distilled", 3),
    ("preferred", 2),
    ("preferred", 3),
]


def make_sparse(dense: Path, out: Path) -> Path:
    """Eight experts that differ, so that routing matters and some starve on a small micro-batch."""
    model = upcycle(load_student(dense, dtype=torch.float32), MoEConfig(num_experts=8, top_k=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp.experts." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
            if ".mlp.gate." in name:
                parameter.normal_(0.0, 1.0, generator=generator)
    save_student(model, dense, out)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    dense = tiny_llava(root / "dense")
    sparse = make_sparse(dense, root / "sparse")
    settings: dict[str, dict[str, Any]] = {}
    for kind in ("kd", "dpo"):
        dataset = write_mixed_dataset(root / "data", 22, kind)
        LiveTeacher(dense, root / "data").write_output(root / kind, dataset, kind, top_k=8)
    from_file = {"dataset": str(root / "data" / "kd.json")}
    settings["dense"] = {"model": dense, "data": from_file, "loss": {"cross_entropy": 1.0}}
    settings["sparse"] = {"model": sparse, "data": from_file, "loss": {"cross_entropy": 1.0, "balance": 0.01}}
    distilled = {"distillation": 1.0, "cross_entropy": 1.0, "balance": 0.01}
    settings["distilled"] = {"model": sparse, "data": {"shards": str(root / "kd")}, "loss": distilled}
    preferred = {"preference": 1.0, "balance": 0.01}
    settings["preferred"] = {"model": sparse, "data": {"shards": str(root / "dpo")}, "loss": preferred}
    for num_ranks in (1, 2):
        configs = [
            stage(
                root / f"{name}-{num_ranks}-{zero}",
                settings[name]["model"],
                trainable=["adapter", "language_model"],
                data={**settings[name]["data"], "image_root": str(root / "data")},
                loss=settings[name]["loss"],
                optim={"max_steps": NUM_STEPS},
                run={"zero_stage": zero},
            )
            for name, zero in CASES
        ]
        run_stages(configs, root / "scratch", num_ranks)
    return root


@pytest.mark.parametrize(("name", "zero"), CASES)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_way_to_divide_the_work_gives_the_same_losses_and_weights(
    runs: Path, name: str, zero: int, num_ranks: int
) -> None:
    base = next(z for n, z in CASES if n == name)
    reference, found = runs / f"{name}-1-{base}", runs / f"{name}-{num_ranks}-{zero}"
    assert losses(found) == pytest.approx(losses(reference), rel=2e-6)
    assert len(losses(found)) == NUM_STEPS
    # Adam turns the sign of a gradient of rounding size into a whole step of 1e-3; nothing may come near that.
    assert largest_difference(weights(found), weights(reference)) < 2e-5


def test_the_runs_hold_micro_batches_without_an_image_and_experts_without_a_token(runs: Path) -> None:
    path = runs / "sparse"
    encoder = Encoder.load(path)
    collator = Collator(
        kind="kd",
        image_spec=ImageSpec.load(path),
        image_processor=AutoImageProcessor.from_pretrained(path),
        image_token_id=encoder.image_token_id,
        image_root=runs / "data",
        aspect_ratio="pad",
        max_tokens=2048,
        pad_token_id=0,
    )
    source = DatasetSource(runs / "data" / "kd.json", "kd", encoder)
    plan = StepPlan([SampleSet(range(len(source)))], 8, 2, 0, 8192)
    model = load_student(path, dtype=torch.float32)
    router = router_logits_hook(model)
    without_image, starved, empty = [], 0, 0
    for step in range(NUM_STEPS):
        for number in range(plan.micro_batches_per_step):
            examples = [source[int(i)] for i in plan.micro_batch(step, number)]
            empty += not examples
            without_image.append(not any(example.sample.images for example in examples))
            batch = collator(examples)
            with torch.no_grad():
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixel_values)
            for logits_TE in router.take():
                starved += len(logits_TE[batch.token_mask.flatten()].topk(2).indices.unique()) < 8
    assert any(without_image)
    assert not all(without_image)
    assert starved
    assert empty, "the last step of the epoch is meant to leave a rank without a sample"
