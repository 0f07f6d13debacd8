"""A Ray cluster of two nodes on this machine, whose actors hold a stand-in for the engine, or the engine itself."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from common.errors import ConfigError, DataError, ModelError, ProvenanceError, StorageError
from common.shards.manifest import published_shards, receipt_path
from precompute.config import PrecomputeConfig
from precompute.logits.ray_backend import _pool, _ShardScorer
from precompute.logits.run import CaptureSummary, run_capture
from precompute.scorer import Scorer, ScoreRequest, ScorerSettings
from precompute.verify.logits import verify_logits
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config
from tests.support.hf_reference import ENGINE, TOP_K
from tests.support.outputs import rows_of

pytestmark = [pytest.mark.slow, pytest.mark.alone]

NUM_SAMPLES = 24

ROOT = Path(__file__).parents[3]


def start_noted(plan: ScorerSettings, notes: Path, delay_s: float = 0.0) -> Scorer:
    """A stand-in that notes on which node it was started."""
    (notes / f"{ray.get_runtime_context().get_node_id()}-{os.getpid()}").touch()
    return FakeTeacher(plan, delay_s=delay_s)


def start_failing(plan: ScorerSettings) -> Scorer:
    raise ModelError(f"{plan.model_dir.name}: no memory for it")


def start_dying(plan: ScorerSettings, notes: Path, num_deaths: int = 1) -> Scorer:
    """Dies of its first request, as a process does that the kernel kills; after `num_deaths` one lives."""

    def die(_: ScoreRequest) -> None:
        if len(list(notes.iterdir())) < num_deaths:
            (notes / str(os.getpid())).touch()
            os._exit(1)

    return FakeTeacher(plan, before=die)


@pytest.fixture(scope="module")
def cluster(engine_in_this_process: None) -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    directory = tmp_path / "notes"
    directory.mkdir()
    return directory


@pytest.fixture
def config(tmp_path: Path, llava_dir: Path) -> PrecomputeConfig:
    return make_config(tmp_path, llava_dir, conversation_records(tmp_path, NUM_SAMPLES))


def local_bytes(config: PrecomputeConfig, root: Path) -> dict[str, bytes]:
    local = config.model_copy(update={"output": root / "local"})
    run_capture(local, progress=False, start_teacher=FakeTeacher)
    return shard_bytes(local.output)


def shard_bytes(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("shard-*"))}


def nodes_in(notes: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in notes.iterdir()}


def test_a_lost_node_costs_no_shard(cluster: Cluster, config: PrecomputeConfig, notes: Path, tmp_path: Path) -> None:
    node = cluster.add_node(num_cpus=1)
    results: list[CaptureSummary] = []
    start = partial(start_noted, notes=notes, delay_s=0.25)
    driver = threading.Thread(
        target=lambda: results.append(run_capture(config, progress=False, start_teacher=start, engine="ray"))
    )
    driver.start()
    deadline_s = time.monotonic() + 120
    while len(nodes_in(notes)) < 2 or not published_shards(config.output):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    lost_at = published_shards(config.output)
    driver.join(180)
    assert len(lost_at) < 6
    assert results
    assert results[0].complete
    assert shard_bytes(config.output) == local_bytes(config, tmp_path)
    assert not list(config.output.glob(".*.partial"))
    assert verify_logits(config.output, config.dataset, progress=False).ok


def test_a_shard_whose_actor_dies_is_done_by_the_next(
    cluster: Cluster, config: PrecomputeConfig, notes: Path, tmp_path: Path
) -> None:
    summary = run_capture(config, progress=False, start_teacher=partial(start_dying, notes=notes), engine="ray")
    assert len(list(notes.iterdir())) == 1
    assert (summary.complete, summary.num_new_shards, summary.num_new_rows) == (True, 6, NUM_SAMPLES)
    assert shard_bytes(config.output) == local_bytes(config, tmp_path)


def test_actors_that_always_die_end_the_run(
    cluster: Cluster, config: PrecomputeConfig, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.logits.ray_backend._MAX_DEATHS", 1)
    start = partial(start_dying, notes=notes, num_deaths=1000)
    with pytest.raises(ModelError, match="actors died more than 1 times"):
        run_capture(config, progress=False, start_teacher=start, engine="ray")
    assert len(list(notes.iterdir())) == 2


def test_only_missing_shards_go_to_the_cluster(cluster: Cluster, config: PrecomputeConfig, notes: Path) -> None:
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    before = shard_bytes(config.output)
    receipt_path(config.output, 3).unlink()
    summary = run_capture(config, progress=False, start_teacher=partial(start_noted, notes=notes), engine="ray")
    assert (summary.complete, summary.num_new_shards, summary.num_new_rows) == (True, 1, 4)
    assert summary.num_new_tokens > summary.num_new_rows
    assert shard_bytes(config.output) == before
    assert len(list(notes.iterdir())) == 1


def test_a_bad_sample_stops_the_cluster_with_its_own_message(
    cluster: Cluster, config: PrecomputeConfig, tmp_path: Path
) -> None:
    (tmp_path / "7-0.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"'s7'.*7-0\.png cannot be decoded.*\n.*are safe") as caught:
        run_capture(config, progress=False, start_teacher=FakeTeacher, engine="ray")
    assert type(caught.value) is DataError
    assert 1 not in published_shards(config.output)


def test_a_teacher_that_does_not_start_is_a_clean_error(cluster: Cluster, config: PrecomputeConfig) -> None:
    with pytest.raises(ModelError, match=r"^llava\d+: no memory for it$"):
        run_capture(config, progress=False, start_teacher=start_failing, engine="ray")


def test_an_actor_that_no_node_has_room_for_is_refused(cluster: Cluster, config: PrecomputeConfig) -> None:
    wanting = config.model_copy(update={"ray": config.ray.model_copy(update={"num_cpus": 100.0})})
    with pytest.raises(ConfigError, match=r"an actor wants 100 CPU\(s\) and 0 GPU\(s\), and no node"):
        run_capture(wanting, progress=False, start_teacher=FakeTeacher, engine="ray")


def test_an_actor_asks_for_the_gpus_that_its_engine_spans(cluster: Cluster, config: PrecomputeConfig) -> None:
    engine = config.engine.model_copy(update={"tensor_parallel_size": 2})
    spanning = config.model_copy(update={"engine": engine})
    assert _pool(spanning, 100) == (0, 1)
    node = cluster.add_node(num_cpus=8, num_gpus=5)
    try:
        assert _pool(spanning, 100) == (2, 2)
        assert _pool(config, 100) == (1, 5)
        assert _pool(config, 3) == (1, 3)
    finally:
        cluster.remove_node(node)


def test_a_cluster_that_is_not_there_is_named(config: PrecomputeConfig) -> None:
    nowhere = config.model_copy(update={"ray": config.ray.model_copy(update={"address": "127.0.0.1:1"})})
    script = "import sys; from precompute.config import PrecomputeConfig; from precompute.logits.run import run\n"
    script += "run(PrecomputeConfig.model_validate_json(sys.argv[1]), progress=False, engine='ray')"
    found = subprocess.run(
        [sys.executable, "-c", script, nowhere.model_dump_json()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "ConfigError: ray.address = 127.0.0.1:1: no Ray cluster answers there" in found.stderr


def test_without_ray_the_extra_is_named(config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "precompute.logits.ray_backend")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'decant\[ray\]'"):
        run_capture(config, progress=False, start_teacher=FakeTeacher, engine="ray")


def test_an_output_that_an_actor_does_not_see_is_refused(config: PrecomputeConfig) -> None:
    """As on a node without the shared file system; nothing is begun there."""
    actor = _ShardScorer(config, FakeTeacher)
    row = actor({"number": np.array([0])})
    assert row["error"] == [StorageError.__name__]
    assert "is not visible from node" in row["message"][0]
    assert not config.output.exists()


def test_an_actor_with_another_teacher_is_refused(config: PrecomputeConfig, tmp_path: Path, text_dir: Path) -> None:
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    actor = _ShardScorer(config.model_copy(update={"teacher": text_dir}), FakeTeacher)
    row = actor({"number": np.array([0])})
    assert row["error"] == [ProvenanceError.__name__]
    assert "teacher.weights_sha256" in row["message"][0]


@pytest.mark.vllm
def test_the_engine_in_an_actor_scores_as_it_does_here(cluster: Cluster, llava_dir: Path, tmp_path: Path) -> None:
    records = conversation_records(tmp_path, 9)
    config = make_config(tmp_path, llava_dir, records, engine=ENGINE, top_k=TOP_K, precision="fp32")
    local = config.model_copy(update={"output": tmp_path / "local"})
    assert run_capture(config, progress=False, engine="ray").complete
    assert run_capture(local, progress=False).complete
    for number in range(3):
        for there, here in zip(rows_of(config.output, number), rows_of(local.output, number), strict=True):
            assert there.sample == here.sample
            (a,), (b,) = there.conversations, here.conversations
            np.testing.assert_allclose(a.scores.own_logprobs, b.scores.own_logprobs, rtol=0, atol=1e-5)
            np.testing.assert_allclose(a.scores.rest_mass, b.scores.rest_mass, rtol=0, atol=1e-5)
            np.testing.assert_allclose(a.scores.logprobs, b.scores.logprobs, rtol=0, atol=1e-5)
