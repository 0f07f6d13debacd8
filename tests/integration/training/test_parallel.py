"""The number of ranks, accumulation, ZeRO stages, packing and cached features do not change losses and weights."""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from common.data.chat_encoding import ChatEncoder
from precompute.features.run import FeatureSettings, run_features
from tests.support.models import tiny_llava
from tests.support.training import (
    LiveTeacher,
    largest_difference,
    losses,
    run_stages,
    stage,
    weights,
    write_mixed_dataset,
)
from train.config import MoEConfig
from train.data.collator import Collator, StudentInputs
from train.data.image_cache import ImageCache
from train.data.sampling import GlobalBatchSampler, SampleSet
from train.data.sources import DatasetSource
from train.model.student import load_student, save_student
from train.moe.router_monitor import RouterMonitor
from train.moe.upcycle import upcycle

pytestmark = pytest.mark.slow

NUM_STEPS = 3
IMAGES = ("live", "cached")


class Setup(NamedTuple):
    """Division of a run among ranks, and the data that it reads."""

    num_ranks: int
    zero_stage: int
    batching: str
    images: str


# Batching and images vary together, except in one run each.
SETUPS = [
    *itertools.starmap(Setup, itertools.product((1, 2), (0, 1, 2, 3), ("padded",), ("live",))),
    *itertools.starmap(Setup, itertools.product((1, 2), (0, 1, 2, 3), ("packed",), ("cached",))),
    Setup(1, 0, "padded", "cached"),
    Setup(1, 0, "packed", "live"),
]
ROUTER_LOSSES = {"balance": 0.01, "router_z": 0.001}
# Stage, student, objective.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "init": ("init", "dense", {"cross_entropy": 1.0}),
    "sft-dense": ("sft", "dense", {"cross_entropy": 1.0}),
    "sft-sparse": ("sft", "sparse", {"cross_entropy": 1.0, **ROUTER_LOSSES}),
    "dense-to-dense": ("dense-to-dense", "dense", {"distillation": 1.0}),
    "dense-to-sparse": ("dense-to-sparse", "sparse", {"distillation": 1.0, "cross_entropy": 1.0, **ROUTER_LOSSES}),
    "preference-dense": ("preference", "dense", {"preference": 1.0}),
    "preference-sparse": ("preference", "sparse", {"preference": 1.0, **ROUTER_LOSSES}),
}


def make_sparse(dense: Path, out: Path) -> Path:
    """Makes eight different experts, so that routing matters and some get no token of a small micro-batch."""
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
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes students, data, scores, and a feature cache of the images."""
    root = tmp_path_factory.mktemp("parallel")
    dense = tiny_llava(root / "dense")
    make_sparse(dense, root / "sparse")
    # The teacher is another model, so that no loss is close to 0.
    teacher = tiny_llava(root / "teacher", seed=1)
    for kind in ("kd", "dpo"):
        dataset = write_mixed_dataset(root / "data", 22, kind)
        LiveTeacher(teacher, root / "data").write_output(root / "scores" / kind, dataset, kind, top_k=8)
    run_features(FeatureSettings(dense, dataset, root / "data", root / "features"), progress=False)
    return root


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, root: Path) -> Path:
    """Trains one case in every setup."""
    name: str = request.param
    for num_ranks in (1, 2):
        run_stages(
            [make_stage(root, name, setup) for setup in SETUPS if setup.num_ranks == num_ranks],
            root / "scratch" / name,
            num_ranks,
        )
    return root / name


def make_stage(root: Path, case: str, setup: Setup) -> dict[str, Any]:
    kind, student, loss = CASES[case]
    source: dict[str, Any] = {"shards": str(root / "scores" / ("dpo" if kind == "preference" else "kd"))}
    if "cross_entropy" in loss and "distillation" not in loss:
        source = {"dataset": str(root / "data" / "kd.json")}
    if setup.images == "cached":
        source["features"] = str(root / "features")
    return stage(
        output_path(root / case, setup),
        root / student,
        stage=kind,
        # A dense student has no experts, which this stage trains by default.
        **({"trainable": ["adapter", "language_model"]} if kind == "preference" and student == "dense" else {}),
        data={**source, "image_root": str(root / "data"), "batching": setup.batching},
        loss=loss,
        optim={"max_steps": NUM_STEPS},
        run={"zero_stage": setup.zero_stage},
    )


def output_path(case: Path, setup: Setup) -> Path:
    return case / "-".join(map(str, setup))


def test_every_setup_gives_the_same_losses_and_weights(case: Path) -> None:
    for images in IMAGES:
        reference = output_path(case, Setup(1, 0, "padded", images))
        assert len(losses(reference)) == NUM_STEPS
        for setup in SETUPS:
            if setup.images == images:
                found = output_path(case, setup)
                assert losses(found) == pytest.approx(losses(reference), rel=3e-6), setup
                # The learning rate is 1e-3.
                assert largest_difference(weights(found), weights(reference)) < 5e-6, setup


def test_losses_from_cached_features_differ_by_rounding_only(case: Path) -> None:
    live, cached = (output_path(case, Setup(1, 0, "padded", images)) for images in IMAGES)
    # The student is in float32 here, and the cache has 8 significant bits. With a bfloat16 student both are equal.
    assert losses(cached) == pytest.approx(losses(live), rel=2e-3)
    assert losses(cached) != losses(live)


def test_the_runs_contain_micro_batches_without_an_image_and_experts_without_a_token(root: Path) -> None:
    path = root / "sparse"
    encoder = ChatEncoder.load(path)
    student = StudentInputs(ImageCache.load(path, "pad"), encoder.image_token_id, pad_token_id=0)
    collator = Collator(student, kind="kd", image_root=root / "data", max_tokens=2048)
    source = DatasetSource(root / "data" / "kd.json", "kd", encoder)
    plan = GlobalBatchSampler([SampleSet(range(len(source)))], 8, 2, 0, 8192)
    model = load_student(path, dtype=torch.float32)
    router = RouterMonitor(model)
    without_image, starved, empty = [], 0, 0
    for step in range(NUM_STEPS):
        for number in range(plan.micro_batches_per_step):
            examples = [source[int(i)] for i in plan.micro_batch(step, number)]
            empty += not examples
            without_image.append(not any(example.sample.images for example in examples))
            batch = collator(examples)
            with torch.no_grad():
                model(**batch.model_inputs)
            for logits_TE in router.pop_router_logits():
                starved += len(logits_TE[batch.token_mask.flatten()].topk(2).indices.unique()) < 8
    assert any(without_image)
    assert not all(without_image)
    assert starved
    assert empty, "in the last step of the epoch a rank must have no sample"
