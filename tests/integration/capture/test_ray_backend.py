"""A Ray cluster on this machine, of one or two nodes, whose actors hold a fake teacher or the engine itself."""

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

from common.errors import ConfigError, DataError, ModelError
from common.shards.manifest import published_shards, receipt_path
from precompute.config import PrecomputeConfig
from precompute.logits.run import CaptureSummary, run_capture
from precompute.scorer import Scorer, ScoreRequest, ScorerSettings
from precompute.verify.logits import verify_logits
from tests.support.captures import shard_bytes
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config
from tests.support.hf_reference import ENGINE, TOP_K
from tests.support.outputs import read_rows

pytestmark = [pytest.mark.slow, pytest.mark.alone]

NUM_SAMPLES = 24

ROOT = Path(__file__).parents[3]


def start_logging(settings: ScorerSettings, started_dir: Path, delay_s: float = 0.0) -> Scorer:
    """Starts a fake teacher, and leaves a file that names the node and the process."""
    (started_dir / f"{ray.get_runtime_context().get_node_id()}-{os.getpid()}").touch()
    return FakeTeacher(settings, delay_s=delay_s)


def start_failing(settings: ScorerSettings) -> Scorer:
    raise ModelError(f"{settings.model_dir.name}: no memory for it")


def start_dying(settings: ScorerSettings, started_dir: Path, num_deaths: int = 1) -> Scorer:
    """Starts a teacher whose process dies of its first request, `num_deaths` times in all."""

    def die(_: ScoreRequest) -> None:
        if len(list(started_dir.iterdir())) < num_deaths:
            (started_dir / str(os.getpid())).touch()
            os._exit(1)

    return FakeTeacher(settings, before=die)


@pytest.fixture(scope="module")
def cluster(engine_in_this_process: None) -> Iterator[Cluster]:  # noqa: ARG001 - requested for its effect, which a mark cannot do here
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def started_dir(tmp_path: Path) -> Path:
    """A directory in which each teacher that starts leaves a file."""
    directory = tmp_path / "started"
    directory.mkdir()
    return directory


@pytest.fixture
def config(tmp_path: Path, llava_dir: Path) -> PrecomputeConfig:
    return make_config(tmp_path, llava_dir, conversation_records(tmp_path, NUM_SAMPLES))


def make_local_shards(config: PrecomputeConfig, root: Path) -> dict[str, bytes]:
    local = config.model_copy(update={"output": root / "local"})
    run_capture(local, progress=False, start_teacher=FakeTeacher)
    return shard_bytes(local.output)


def started_nodes(started_dir: Path) -> set[str]:
    return {path.name.partition("-")[0] for path in started_dir.iterdir()}


def test_a_lost_node_costs_no_shard(
    cluster: Cluster, config: PrecomputeConfig, started_dir: Path, tmp_path: Path
) -> None:
    node = cluster.add_node(num_cpus=1)
    results: list[CaptureSummary] = []
    start = partial(start_logging, started_dir=started_dir, delay_s=0.25)
    driver = threading.Thread(
        target=lambda: results.append(run_capture(config, progress=False, start_teacher=start, engine="ray"))
    )
    driver.start()
    deadline_s = time.monotonic() + 120
    while len(started_nodes(started_dir)) < 2 or not published_shards(config.output):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    published_at_loss = published_shards(config.output)
    driver.join(180)
    assert len(published_at_loss) < 6
    assert results
    assert results[0].complete
    assert shard_bytes(config.output) == make_local_shards(config, tmp_path)
    assert not list(config.output.glob(".*.partial"))
    assert verify_logits(config.output, config.dataset, progress=False).ok


@pytest.mark.usefixtures("cluster")
def test_a_shard_whose_actor_dies_is_scored_by_the_next(
    config: PrecomputeConfig, started_dir: Path, tmp_path: Path
) -> None:
    summary = run_capture(
        config, progress=False, start_teacher=partial(start_dying, started_dir=started_dir), engine="ray"
    )
    assert len(list(started_dir.iterdir())) == 1
    assert (summary.complete, summary.num_new_shards, summary.num_new_rows) == (True, 6, NUM_SAMPLES)
    assert shard_bytes(config.output) == make_local_shards(config, tmp_path)


@pytest.mark.usefixtures("cluster")
def test_actors_that_always_die_end_the_run(
    config: PrecomputeConfig, started_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.logits.ray_backend._MAX_DEATHS", 1)
    start = partial(start_dying, started_dir=started_dir, num_deaths=1000)
    with pytest.raises(ModelError, match="actors died more than 1 times"):
        run_capture(config, progress=False, start_teacher=start, engine="ray")
    assert len(list(started_dir.iterdir())) == 2


@pytest.mark.usefixtures("cluster")
def test_only_missing_shards_go_to_the_cluster(config: PrecomputeConfig, started_dir: Path) -> None:
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    before = shard_bytes(config.output)
    receipt_path(config.output, 3).unlink()
    summary = run_capture(
        config, progress=False, start_teacher=partial(start_logging, started_dir=started_dir), engine="ray"
    )
    assert (summary.complete, summary.num_new_shards, summary.num_new_rows) == (True, 1, 4)
    assert summary.num_new_tokens > summary.num_new_rows
    assert shard_bytes(config.output) == before
    assert len(list(started_dir.iterdir())) == 1


@pytest.mark.usefixtures("cluster")
def test_a_bad_sample_stops_the_cluster_with_its_own_message(config: PrecomputeConfig, tmp_path: Path) -> None:
    # Cut after its header, so that only decoding finds it.
    image = tmp_path / "7-0.png"
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(DataError, match=r"'s7'.*7-0\.png cannot be decoded.*\n.*are safe") as caught:
        run_capture(config, progress=False, start_teacher=FakeTeacher, engine="ray")
    assert type(caught.value) is DataError
    assert 1 not in published_shards(config.output)


@pytest.mark.usefixtures("cluster")
def test_a_teacher_that_does_not_start_is_a_clean_error(config: PrecomputeConfig) -> None:
    with pytest.raises(ModelError, match=r"^llava\d+: no memory for it$"):
        run_capture(config, progress=False, start_teacher=start_failing, engine="ray")


@pytest.mark.usefixtures("cluster")
def test_an_actor_that_no_node_has_room_for_is_refused(config: PrecomputeConfig) -> None:
    wanting = config.model_copy(update={"ray": config.ray.model_copy(update={"num_cpus": 100.0})})
    with pytest.raises(ConfigError, match=r"an actor wants 100 CPU\(s\) and 0 GPU\(s\), and no node"):
        run_capture(wanting, progress=False, start_teacher=FakeTeacher, engine="ray")


def test_a_cluster_that_is_not_there_is_named(config: PrecomputeConfig) -> None:
    nowhere = config.model_copy(update={"ray": config.ray.model_copy(update={"address": "127.0.0.1:1"})})
    script = (
        "import sys; from precompute.config import PrecomputeConfig; from precompute.logits.run import run_capture\n"
    )
    script += "run_capture(PrecomputeConfig.model_validate_json(sys.argv[1]), progress=False, engine='ray')"
    found = subprocess.run(
        [sys.executable, "-c", script, nowhere.model_dump_json()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "ConfigError: ray.address = 127.0.0.1:1: no Ray cluster answers there" in found.stderr


@pytest.mark.usefixtures("cluster")
@pytest.mark.vllm
def test_the_engine_in_an_actor_scores_as_it_does_here(llava_dir: Path, tmp_path: Path) -> None:
    records = conversation_records(tmp_path, 9)
    config = make_config(tmp_path, llava_dir, records, engine=ENGINE, top_k=TOP_K, precision="fp32")
    local = config.model_copy(update={"output": tmp_path / "local"})
    assert run_capture(config, progress=False, engine="ray").complete
    assert run_capture(local, progress=False).complete
    for number in range(3):
        for there, here in zip(read_rows(config.output, number), read_rows(local.output, number), strict=True):
            assert there.sample == here.sample
            (a,), (b,) = there.conversations, here.conversations
            np.testing.assert_allclose(a.scores.own_logprobs, b.scores.own_logprobs, rtol=0, atol=1e-5)
            np.testing.assert_allclose(a.scores.rest_mass, b.scores.rest_mass, rtol=0, atol=1e-5)
            np.testing.assert_allclose(a.scores.logprobs, b.scores.logprobs, rtol=0, atol=1e-5)
