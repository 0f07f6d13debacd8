"""A real checkpoint in which one bit is flipped is passed over, and one trainer at a time writes into an output."""

import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from common.shards.manifest import file_sha256
from tests.integration.training.test_parallel import make_sparse
from tests.support.forked import Ranks, steps_logged
from tests.support.models import tiny_llava
from tests.support.training import losses, stage, weights, write_mixed_dataset
from train.run.checkpoint import MARKER, Checkpoint, find_latest_complete
from train.run.universal_checkpoint import to_universal

pytestmark = pytest.mark.slow

NUM_STEPS = 6
FLIPS_PER_FILE = 10


def config(root: Path, name: str, max_steps: int = NUM_STEPS) -> dict[str, object]:
    return stage(
        root / name,
        root / "student",
        trainable=["adapter", "language_model"],
        data={"dataset": str(root / "data" / "kd.json"), "image_root": str(root / "data")},
        loss={"cross_entropy": 1.0},
        optim={"max_steps": max_steps, "scheduler": "constant"},
        run={"zero_stage": 2, "save_steps": 2, "keep_checkpoints": 3},
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damaged")
    write_mixed_dataset(root / "data", 36)
    make_sparse(tiny_llava(root / "dense", num_layers=2), root / "student")
    run = Ranks(config(root, "whole"), root / "whole.log", num_ranks=2)
    assert run.wait() == [0, 0], run.output[-3000:]
    return root


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def test_one_flipped_bit_in_any_file_of_a_real_checkpoint_is_found(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    shutil.copytree(root / "whole", output)
    older, newer = (output / "checkpoints" / f"checkpoint-{step}" for step in (NUM_STEPS - 2, NUM_STEPS))
    whole = Checkpoint(newer, NUM_STEPS, 2)
    assert find_latest_complete(output) == whole
    names = {path.relative_to(newer).as_posix() for path in files(newer)}
    wanted = {"trainer_state.json", "scheduler.pt", "latest", "rng_state_0.pth", "rng_state_1.pth", "expert-load.json"}
    assert wanted <= names
    assert sum(name.startswith("global_step") and "optim_states" in name for name in names) == 2
    draw = random.Random(0)
    num_flips = 0
    for path in files(newer):
        content = path.read_bytes()
        for _ in range(FLIPS_PER_FILE if content else 0):
            flip(path, draw)
            caplog.clear()
            found = find_latest_complete(output)
            if path.name == MARKER and found == whole:
                # White space between keys.
                continue
            assert found == Checkpoint(older, NUM_STEPS - 2, 2), path
            assert path.name == MARKER or f"{path.relative_to(newer)}: damaged" in caplog.text
            num_flips += 1
        path.write_bytes(content)
    assert find_latest_complete(output) == whole
    print(f"{num_flips} flips in {len(names)} files of a checkpoint, all found")  # noqa: T201


def test_a_run_continues_from_the_checkpoint_before_a_damaged_one(root: Path, tmp_path: Path) -> None:
    # Under another name, as if the directory had been moved.
    output = root / "damaged"
    shutil.copytree(root / "whole", output)
    shutil.rmtree(output / "final")
    newest = output / "checkpoints" / f"checkpoint-{NUM_STEPS}"
    (state,) = newest.glob("global_step*/*rank_1*optim_states.pt")
    flip(state, random.Random(1))
    run = Ranks(config(root, "damaged"), tmp_path / "log", num_ranks=2)
    assert run.wait() == [0, 0], run.output[-3000:]
    assert run.output.count(f"{state.relative_to(newest)}: damaged") == 1, "rank 0 says it once"
    assert losses(output) == losses(root / "whole")
    expected, found = weights(root / "whole"), weights(output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # The damaged one is written again when its step is reached.
    assert find_latest_complete(output) == Checkpoint(newest, NUM_STEPS, 2)


def test_a_conversion_is_never_taken_from_an_earlier_start(root: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    shutil.copytree(root / "whole" / "checkpoints" / "checkpoint-2", checkpoint)
    converted = to_universal(checkpoint)
    digests = {path: file_sha256(path) for path in files(converted)}
    assert len(digests) > 10
    draw = random.Random(2)
    for path in digests:
        flip(path, draw)
    assert to_universal(checkpoint) == converted
    assert {path: file_sha256(path) for path in files(converted)} == digests


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_second_trainer_of_an_output_is_refused_on_every_rank(root: Path, tmp_path: Path, num_ranks: int) -> None:
    name = f"shared-{num_ranks}"
    settings = config(root, name, max_steps=400)
    first = Ranks(settings, tmp_path / "first")
    assert first.wait_until(lambda: len(steps_logged(root / name)) > 1), first.output[-3000:]
    second = Ranks(settings, tmp_path / "second", num_ranks)
    assert second.wait(60) == [1] * num_ranks, second.output[-3000:]
    refusal = f"another train writes into it (process {first.processes[0].pid} on {os.uname().nodename}, since"
    errors = [line for line in second.output.splitlines() if line.startswith("common.errors.ConfigError")]
    assert len(errors) == num_ranks and all(refusal in error for error in errors)
    # The first is not disturbed. Killed, it leaves the output to the next.
    first.signal(signal.SIGKILL)
    assert first.wait() == [-signal.SIGKILL]
    third = Ranks(settings, tmp_path / "third", num_ranks)
    step = len(steps_logged(root / name))
    assert third.wait_until(lambda: len(steps_logged(root / name)) > step + 1), third.output[-3000:]
    third.signal(signal.SIGTERM)
    assert third.wait() == [143] * num_ranks, third.output[-3000:]
