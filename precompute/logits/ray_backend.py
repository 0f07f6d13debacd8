"""`precompute-logits --engine ray`: the same loop in the actors of a Ray cluster, one teacher an actor.

    missing shard numbers ─> ray.data.from_items, one block each ─> map_batches over a pool of actors
        actor: prepare_job ─> start the teacher once ─> for each number: score_shards ─> shard and receipt
    rows that say what was written ─> the driver counts them

Ray Data decides which actor takes which shard, and gives the shard of a lost actor to another. The output directory,
the teacher and the dataset must be visible under the same paths from every node, as an address of an object store is.
Each actor prepares the job for itself, like a process of its own on that node, so that another teacher, dataset or
engine there is refused.

Scores do not pass through Ray: an actor publishes its shards, and a shard that is scored twice is published once.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from common import errors
from common.errors import ConfigError, DecantError, ModelError, StorageError
from common.shards.manifest import MANIFEST_NAME, open_output
from common.storage.files import is_file
from precompute.config import PrecomputeConfig
from precompute.logits.job import CaptureJob, prepare_job
from precompute.logits.pipeline import CaptureCounter, score_shards
from precompute.scorer import Scorer, ScorerSettings

# Set before the import, because Ray reads them there. They turn off usage reports and warnings about its defaults.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")

try:
    import ray
    import ray.data
except ImportError as error:
    raise ConfigError(f"--engine ray needs Ray, which is not installed ({error}); run: pip install '.[ray]'") from error

# An actor that dies more often is assumed to be killed by its shard or its teacher, not by lost nodes.
_MAX_DEATHS = 10

_CONNECT_TIMEOUT_S = 10

# Columns of Ray's rows. A row is one shard: its number, counts of what was written of it, and the type and message of
# the failure that ended it, both empty if there was none.
_Rows = dict[str, npt.NDArray[Any]]


def score_on_ray(
    job: CaptureJob,
    missing: list[int],
    counter: CaptureCounter,
    bar: Any,
    start_teacher: Callable[[ScorerSettings], Scorer],
) -> None:
    """Scores and publishes the missing shards on a cluster. `start_teacher` must be picklable.

    Raises:
        ConfigError: no cluster at the address, or none whose nodes have room for an actor.
        ModelError: the actors die again and again.
        DecantError: what preparing or scoring raised in an actor, with its type and message.
    """
    config = with_absolute_paths(job.config)
    with _cluster(config.ray.address):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_gpus, num_actors = plan_pool(config, nodes, len(missing))
        counter.started_s = time.monotonic()
        shards = ray.data.from_items([{"number": number} for number in missing], override_num_blocks=len(missing))
        # A pool of fixed size would wait for the actor of a lost node until a new node takes its place. With a range,
        # an idle actor ends, and the lost one starts again with its resources.
        pool = ray.data.ActorPoolStrategy(
            min_size=1, max_size=num_actors, initial_size=num_actors, max_tasks_in_flight_per_actor=1
        )
        written = shards.map_batches(
            ShardScorer,
            fn_constructor_args=(config, start_teacher),
            batch_size=1,
            compute=pool,
            num_gpus=num_gpus,
            num_cpus=config.ray.num_cpus,
            max_restarts=_MAX_DEATHS,
            # Unlimited, because Ray makes several tries a second until it knows that a node is lost.
            max_task_retries=-1,
        )
        for row in _read_rows(written.iter_rows()):
            if row["error"]:
                raise getattr(errors, row["error"])(row["message"])
            counter.num_shards += int(row["num_shards"])
            counter.num_rows += int(row["num_rows"])
            counter.num_tokens += int(row["num_tokens"])
            bar.update(len(job.manifest.shard_range(int(row["number"]))))
            bar.set_postfix_str(f"{counter.tokens_per_s:,.0f} tokens/s", refresh=False)


def _read_rows(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the actors' rows.

    Raises:
        ModelError: the actors die again and again.
    """
    try:
        yield from rows
    except ray.exceptions.RayActorError as error:
        raise ModelError(
            f"actors died more than {_MAX_DEATHS} times ({str(error).splitlines()[0]}); if their memory ran out, lower "
            "engine.max_num_batched_tokens or engine.gpu_memory_utilization, then run the same command again: it "
            "continues"
        ) from error


class ShardScorer:
    """An actor's job and started teacher; a call scores one shard.

    A failure that the user must see is returned in the row, because Ray would wrap it if it were raised. Any other
    failure of the constructor is raised by the first call, because Ray takes a constructor that raises for a dead actor
    and tries it again.
    """

    def __init__(self, config: PrecomputeConfig, start_teacher: Callable[[ScorerSettings], Scorer]) -> None:
        logging.getLogger("precompute").setLevel(logging.INFO)
        self._teacher: Scorer | None = None
        self._failure: Exception | None = None
        try:
            self._job = prepare_job(config)
            if not is_file(config.output / MANIFEST_NAME):
                raise StorageError(
                    f"{config.output}: this output is not visible from node {ray.util.get_node_ip_address()}; "
                    "choose one on a file system that all nodes of the cluster share"
                )
            open_output(config.output, self._job.manifest)
            self._teacher = start_teacher(self._job.scorer_settings)
        except Exception as error:  # noqa: BLE001 - raised by the first call, because Ray retries constructors
            self._failure = error

    def __call__(self, batch: _Rows) -> _Rows:
        """Scores the shard of a batch of one row, and returns its row of counts."""
        (number,) = batch["number"].tolist()
        counter = CaptureCounter()
        failure = self._failure
        if self._teacher is not None:
            try:
                with tqdm(disable=True) as bar:
                    score_shards(self._job, self._teacher, [number], counter, bar)
            except DecantError as error:
                failure = error
        if failure is not None and not isinstance(failure, DecantError):
            raise failure
        row = {
            "number": number,
            "num_shards": counter.num_shards,
            "num_rows": counter.num_rows,
            "num_tokens": counter.num_tokens,
            "error": type(failure).__name__ if failure else "",
            "message": str(failure) if failure else "",
        }
        return {name: np.array([value]) for name, value in row.items()}

    def __del__(self) -> None:
        # Ray ends an actor of a pool by dropping the object while the process still lives.
        if self._teacher is not None:
            self._teacher.close()


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """Connects to a cluster, or starts one, quietly. A connection of the caller is used and left open."""
    quiet = {"ray": logging.ERROR, "ray.data": logging.CRITICAL}
    for name, level in quiet.items():
        logging.getLogger(name).setLevel(level)
    connected = ray.is_initialized()
    if not connected:
        check_reachable(address or os.environ.get("RAY_ADDRESS"))
        try:
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"ray.address = {address!r}: no Ray cluster could be reached or started ({error})"
            ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # A shard of a large teacher may take longer than the half hour after which Ray Data gives up by default.
    context.execution_no_progress_timeout_s = -1
    # An actor that dies while it starts has lost its node, because its own failures come back as rows.
    context.max_consecutive_actor_init_deaths = _MAX_DEATHS
    try:
        yield
    finally:
        if not connected:
            ray.shutdown()


def check_reachable(address: str | None) -> None:
    """Checks that something listens at a `host:port`, because Ray would try for twenty minutes.

    Raises:
        ConfigError: nothing answers.
    """
    host, _, port = (address or "").rpartition(":")
    if "/" in host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"ray.address = {address}: no Ray cluster answers there ({error}); give the address that `ray start` told"
        ) from error


def plan_pool(config: PrecomputeConfig, nodes: Sequence[Mapping[str, float]], num_shards: int) -> tuple[float, int]:
    """Returns the GPUs of an actor, and the number of actors that the nodes have room for, at most one a shard.

    `nodes` are the resources of each node that is alive, by name.

    Raises:
        ConfigError: no node has room for an actor.
    """
    settings = config.ray
    num_gpus = settings.num_gpus
    if num_gpus is None:
        has_gpus = any(node.get("GPU", 0) for node in nodes)
        num_gpus = config.engine.tensor_parallel_size * config.engine.pipeline_parallel_size if has_gpus else 0
    wanted = {"CPU": settings.num_cpus, "GPU": num_gpus}
    room = sum(min(int(node.get(name, 0) // each) for name, each in wanted.items() if each) for node in nodes)
    if not room:
        raise ConfigError(
            f"ray: an actor wants {settings.num_cpus:g} CPU(s) and {num_gpus:g} GPU(s), and no node of the cluster has "
            "them; correct ray.num_cpus, ray.num_gpus or the engine's parallel sizes"
        )
    return num_gpus, min(settings.max_actors or room, room, num_shards)


def with_absolute_paths(config: PrecomputeConfig) -> PrecomputeConfig:
    """Returns `config` with absolute paths, because actors do not start in the driver's working directory."""
    paths = {name: value.absolute() for name, value in config if isinstance(value, Path)}
    return config.model_copy(update=paths)
