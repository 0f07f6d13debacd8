"""A run that continues on another number of ranks ends as an uninterrupted one."""

import signal
from pathlib import Path

import pytest

from tests.support.forked import Ranks, steps_logged
from tests.support.models import tiny_llava
from tests.support.training import largest_difference, losses, stage, weights, write_mixed_dataset
from train.run.checkpoint import find_latest_complete

pytestmark = pytest.mark.slow

NUM_STEPS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("other-ranks")
    write_mixed_dataset(root / "data", 36)
    tiny_llava(root / "student", num_layers=2)
    run = Ranks(config(root, "whole", zero=2), root / "whole.log")
    assert run.wait() == [0], run.output[-3000:]
    return root


def config(root: Path, name: str, zero: int, precision: str = "fp32") -> dict[str, object]:
    return stage(
        root / name,
        root / "student",
        trainable=["adapter", "language_model"],
        data={"dataset": str(root / "data" / "kd.json"), "image_root": str(root / "data")},
        loss={"cross_entropy": 1.0},
        # Vectors have no decay, so a parameter group that did not get its own settings back would show.
        optim={"max_steps": NUM_STEPS, "scheduler": "cosine", "weight_decay": 0.5},
        run={"zero_stage": zero, "save_steps": 2, "precision": precision},
    )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_stopped_and_continued_on_other_ranks_ends_with_the_same_weights(
    root: Path, zero: int, before: int, after: int
) -> None:
    name = f"moved-{zero}-{before}-{after}"
    settings = config(root, name, zero)
    run = Ranks(settings, root / f"{name}.log", before)
    assert run.wait_until(lambda: (root / name / "checkpoints" / "checkpoint-2").is_dir()), run.output[-3000:]
    # The signal goes to one rank only, as when one of several machines is taken away.
    run.signal(signal.SIGTERM, before - 1)
    assert run.wait() == [143] * before, run.output[-3000:]
    checkpoint = find_latest_complete(root / name)
    assert checkpoint is not None and checkpoint.step < NUM_STEPS and checkpoint.num_ranks == before
    assert steps_logged(root / name) == list(range(1, checkpoint.step + 1))

    continued = Ranks(settings, root / f"{name}.log", after)
    assert continued.wait() == [0] * after, continued.output[-3000:]
    assert steps_logged(root / name) == list(range(1, NUM_STEPS + 1))
    assert losses(root / name) == pytest.approx(losses(root / "whole"), rel=1e-5)
    assert largest_difference(weights(root / name), weights(root / "whole")) < 5e-6
    assert not (root / name / "checkpoints" / ".universal").exists()
