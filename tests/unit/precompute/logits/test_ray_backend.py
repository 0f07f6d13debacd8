"""Parts of the Ray backend that need no cluster: the size of its pool, and an actor's object."""

import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import ConfigError, ModelError, ProvenanceError, StorageError
from common.shards.manifest import open_output, published_shards
from precompute.config import PrecomputeConfig
from precompute.logits.job import prepare_job
from precompute.logits.ray_backend import ShardScorer, check_reachable, plan_pool, with_absolute_paths
from precompute.logits.run import run_capture
from precompute.scorer import Scorer, ScorerSettings
from tests.support.captures import score, shard_bytes
from tests.support.fake_teacher import FakeTeacher


def configure(**settings: object) -> PrecomputeConfig:
    return PrecomputeConfig.model_validate({"teacher": "t", "dataset": "d.jsonl", "output": "o", **settings})


HEAD = {"CPU": 1.0, "memory": 1e9}
GPU_NODE = {"CPU": 8.0, "GPU": 5.0}
SPANNING = {"tensor_parallel_size": 2}


@pytest.mark.parametrize(
    ("settings", "nodes", "num_shards", "expected"),
    [
        ({"engine": SPANNING}, [HEAD], 100, (0, 1)),
        ({"engine": SPANNING}, [HEAD, GPU_NODE], 100, (2, 2)),
        ({"engine": {**SPANNING, "pipeline_parallel_size": 2}}, [GPU_NODE, GPU_NODE], 100, (4, 2)),
        ({}, [HEAD, GPU_NODE], 100, (1, 5)),
        ({}, [HEAD, GPU_NODE], 3, (1, 3)),
        ({"ray": {"max_actors": 2}}, [HEAD, GPU_NODE], 100, (1, 2)),
        ({"ray": {"num_gpus": 0}}, [HEAD, GPU_NODE], 100, (0, 9)),
        ({"ray": {"num_gpus": 0.5, "num_cpus": 2}}, [HEAD, GPU_NODE], 100, (0.5, 4)),
    ],
)
def test_the_pool_has_room_for_what_each_actor_needs(
    settings: dict[str, object], nodes: list[dict[str, float]], num_shards: int, expected: tuple[float, int]
) -> None:
    assert plan_pool(configure(**settings), nodes, num_shards) == expected


def test_an_actor_that_no_node_has_room_for_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"an actor wants 1 CPU\(s\) and 8 GPU\(s\), and no node"):
        plan_pool(configure(engine={"tensor_parallel_size": 8}), [HEAD, GPU_NODE], 1)


def test_an_address_where_nothing_listens_is_named() -> None:
    with pytest.raises(ConfigError, match=r"ray\.address = 127\.0\.0\.1:1: no Ray cluster answers there"):
        check_reachable("127.0.0.1:1")


@pytest.mark.parametrize("address", [None, "auto", "local", "ray://127.0.0.1:1"])
def test_addresses_without_host_and_port_are_left_to_ray(address: str | None) -> None:
    check_reachable(address)


def test_paths_become_absolute_and_addresses_stay() -> None:
    config = with_absolute_paths(configure(output="s3://bucket/out"))
    assert (config.teacher, config.dataset) == (Path.cwd() / "t", Path.cwd() / "d.jsonl")
    assert str(config.output) == "s3://bucket/out"


def test_without_ray_the_extra_is_named(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "precompute.logits.ray_backend")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[ray\]'"):
        run_capture(config, progress=False, start_teacher=FakeTeacher, engine="ray")


def score_one(actor: ShardScorer, number: int) -> dict[str, object]:
    """Returns the row that an actor gives for a shard."""
    return {name: column.tolist()[0] for name, column in actor({"number": np.array([number])}).items()}


def test_an_actor_publishes_a_shard_and_returns_its_counts(config: PrecomputeConfig, tmp_path: Path) -> None:
    open_output(config.output, prepare_job(config).manifest)
    actor = ShardScorer(config, FakeTeacher)
    row = score_one(actor, 1)
    assert (row["number"], row["num_shards"], row["num_rows"], row["error"], row["message"]) == (1, 1, 4, "", "")
    assert score_one(actor, 1)["num_shards"] == 0
    local = config.model_copy(update={"output": tmp_path / "local"})
    score(local)
    expected = shard_bytes(local.output)
    assert shard_bytes(config.output) == {name: expected[name] for name in ("shard-00001.json", "shard-00001.parquet")}


def test_an_output_that_an_actor_does_not_see_is_an_error(config: PrecomputeConfig) -> None:
    """The node lacks the shared file system; nothing is begun there."""
    row = score_one(ShardScorer(config, FakeTeacher), 0)
    assert row["error"] == StorageError.__name__
    assert "is not visible from node" in str(row["message"])
    assert not config.output.exists()


def test_an_actor_with_another_teacher_is_refused(config: PrecomputeConfig, text_dir: Path) -> None:
    open_output(config.output, prepare_job(config).manifest)
    row = score_one(ShardScorer(config.model_copy(update={"teacher": text_dir}), FakeTeacher), 0)
    assert row["error"] == ProvenanceError.__name__
    assert "teacher.weights_sha256" in str(row["message"])
    assert published_shards(config.output) == ()


def test_a_teacher_that_fails_to_start_fails_each_shard(config: PrecomputeConfig) -> None:
    def start(_: ScorerSettings) -> Scorer:
        raise ModelError("no memory for it")

    open_output(config.output, prepare_job(config).manifest)
    row = score_one(ShardScorer(config, start), 0)
    assert (row["error"], row["message"]) == (ModelError.__name__, "no memory for it")


def test_a_defect_in_an_actor_is_raised_by_its_first_call(config: PrecomputeConfig) -> None:
    def start(_: ScorerSettings) -> Scorer:
        raise ZeroDivisionError("a defect")

    open_output(config.output, prepare_job(config).manifest)
    actor = ShardScorer(config, start)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        score_one(actor, 0)
