"""The fused output layer with a tied weight, whole or partitioned, on one rank and on two."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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

pytestmark = pytest.mark.slow

NUM_STEPS = 3
EMBEDDING = "language_model.model.embed_tokens.weight"
LOSSES = {
    "distilled": {"distillation": 1.0, "cross_entropy": 0.5, "divergence": "jensen_shannon"},
    "preferred": {"preference": 1.0, "length_normalised": True},
}
# Loss and ZeRO stage.
CASES = [("distilled", 0), ("distilled", 3), ("preferred", 0), ("preferred", 3)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fused")
    student = tiny_llava(root / "student", num_layers=2, tied=True)
    teacher = LiveTeacher(tiny_llava(root / "teacher", seed=1, num_layers=2), root / "data")
    for kind, name in (("kd", "distilled"), ("dpo", "preferred")):
        dataset = write_mixed_dataset(root / "data", 16, kind)  # type: ignore[arg-type]
        teacher.write_output(root / name, dataset, kind, top_k=8)  # type: ignore[arg-type]
    for num_ranks in (1, 2):
        configs = [
            stage(
                root / f"{name}-{num_ranks}-{zero}",
                student,
                trainable=["adapter", "language_model"],
                data={"shards": str(root / name), "image_root": str(root / "data")},
                loss=LOSSES[name],
                optim={"max_steps": NUM_STEPS},
                run={"zero_stage": zero, "activation_checkpointing": True},
            )
            for name, zero in CASES
        ]
        run_stages(configs, root / "scratch", num_ranks)
    return root


@pytest.mark.parametrize(("name", "zero"), CASES)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_tied_output_layer_trains_the_same_whole_and_partitioned(
    runs: Path, name: str, zero: int, num_ranks: int
) -> None:
    reference, found = runs / f"{name}-1-0", runs / f"{name}-{num_ranks}-{zero}"
    assert losses(found) == pytest.approx(losses(reference), rel=2e-6)
    assert len(losses(found)) == NUM_STEPS
    assert largest_difference(tied_weights(found), tied_weights(reference)) < 5e-6
    before, after = load_file(runs / "student" / "model.safetensors")[EMBEDDING], tied_weights(found)[EMBEDDING]
    # Most rows belong to tokens that no text has, so they can only be changed by the output layer's gradient.
    assert (before != after).any(1).float().mean() > 0.9


def tied_weights(output: Path) -> dict[str, torch.Tensor]:
    """Returns the weights, where the tied one has one name however they were gathered."""
    found = weights(output)
    assert "language_model.lm_head.weight" not in found
    return found
