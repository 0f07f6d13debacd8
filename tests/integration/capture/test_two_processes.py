"""Two processes that write one output at the same time, like two nodes on a shared file system."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.shards.manifest import published_shards, read_manifest, read_receipt
from common.storage.files import Location
from precompute.config import PrecomputeConfig
from precompute.logits.run import run_capture
from precompute.verify.logits import verify_logits
from tests.support.captures import shard_bytes
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config

pytestmark = pytest.mark.slow

NUM_SAMPLES = 32
NUM_SHARDS = 8

ROOT = Path(__file__).parents[3]

PROCESS = """
import sys
import precompute.logits.pipeline
from common.storage.files import Location
from precompute.config import PrecomputeConfig
from tests.support.captures import score

# A small window, so that some shards are complete while others are under way.
precompute.logits.pipeline._WINDOW = 4
config = PrecomputeConfig.model_validate_json(sys.argv[1])
summary = score(config, delay_s=float(sys.argv[2]))
sys.stdout.write(summary.message)
"""


def start(config: PrecomputeConfig, delay_s: float = 0.05) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, config.model_dump_json(), str(delay_s)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_messages(processes: "list[subprocess.Popen[str]]") -> list[str]:
    messages = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        messages.append(stdout)
    return messages


def wait_for_shards(output: Location, count: int) -> None:
    deadline_s = time.monotonic() + 60
    while len(published_shards(output)) < count:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture
def config(tmp_path: Path, llava_dir: Path) -> PrecomputeConfig:
    return make_config(tmp_path, llava_dir, conversation_records(tmp_path, NUM_SAMPLES))


@pytest.fixture
def alone(config: PrecomputeConfig, tmp_path: Path) -> Path:
    """The output of one process that works alone."""
    output = tmp_path / "alone"
    run_capture(config.model_copy(update={"output": output}), progress=False, start_teacher=FakeTeacher)
    return output


def assert_complete(config: PrecomputeConfig, alone: Path) -> None:
    assert published_shards(config.output) == tuple(range(NUM_SHARDS))
    assert shard_bytes(config.output) == shard_bytes(alone)
    manifest = read_manifest(config.output)
    assert sum(read_receipt(config.output, number, manifest).num_rows for number in range(NUM_SHARDS)) == NUM_SAMPLES
    assert verify_logits(config.output, config.dataset, progress=False).ok


@pytest.mark.parametrize("ranks", [True, False], ids=["one rank each", "both everything"])
def test_two_processes_write_what_one_writes(config: PrecomputeConfig, alone: Path, ranks: bool) -> None:
    parts = [config.model_copy(update={"num_nodes": 2, "node_rank": rank}) for rank in range(2)] if ranks else [config]
    wait_for_messages([start(part) for part in (parts if ranks else parts * 2)])
    assert_complete(config, alone)
    assert not list(config.output.glob(".*.partial"))


def test_a_node_that_is_done_says_what_is_left_to_the_others(config: PrecomputeConfig) -> None:
    first, second = (config.model_copy(update={"num_nodes": 2, "node_rank": rank}) for rank in range(2))
    expected = "this node's 4 shards are complete; 4 of 8 are left to the other nodes"
    assert wait_for_messages([start(second, 0.0)]) == [expected]
    assert wait_for_messages([start(second, 0.0)]) == [expected]
    assert wait_for_messages([start(first, 0.0)]) == ["all 8 shards are complete"]


@pytest.mark.parametrize("ranks", [True, False], ids=["one rank each", "both everything"])
def test_one_of_two_is_killed_and_a_rerun_completes_its_part(
    config: PrecomputeConfig, alone: Path, ranks: bool
) -> None:
    count = 2 if ranks else 1
    parts = [config.model_copy(update={"num_nodes": count, "node_rank": rank}) for rank in range(count)]
    killed, survivor = start(parts[0], 0.2), start(parts[-1])
    wait_for_shards(config.output, 1)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    wait_for_messages([survivor])
    if ranks:
        assert len(published_shards(config.output)) < NUM_SHARDS
    wait_for_messages([start(parts[0], 0.0)])
    assert_complete(config, alone)
