"""The rank of this process among several: from flags, else from the configuration, else from SLURM."""

import logging
from collections.abc import Mapping

from common.errors import ConfigError
from precompute.config import PrecomputeConfig

logger = logging.getLogger(__name__)

_NUM_TASKS = "SLURM_STEP_NUM_TASKS"
_RANK = "SLURM_PROCID"


def resolve_nodes(
    config: PrecomputeConfig, node_rank: int | None, num_nodes: int | None, environ: Mapping[str, str]
) -> PrecomputeConfig:
    """Returns `config` with the number of nodes and this one's rank among them, and logs them if there are several.

    The flags `node_rank` and `num_nodes` override the configuration's keys. If none of them names several nodes, a
    task of an srun step takes both from SLURM. A batch script or a salloc shell has a SLURM_PROCID too, but no
    SLURM_STEP_NUM_TASKS, because it is no task of a step: it is one process that does everything.

    Raises:
        ConfigError: a rank outside 0 .. num_nodes - 1, or a variable of SLURM that is missing or no number.
    """
    source, rank_name = "", "node_rank"
    if node_rank is None and num_nodes is None and config.num_nodes == 1 and _NUM_TASKS in environ:
        node_rank, num_nodes = _read_number(environ, _RANK), _read_number(environ, _NUM_TASKS)
        source, rank_name = " (from SLURM)", _RANK
    rank = config.node_rank if node_rank is None else node_rank
    count = config.num_nodes if num_nodes is None else num_nodes
    if not 0 <= rank < count:
        raise ConfigError(
            f"{rank_name} = {rank} of {count} node(s){source}: nodes count from 0 to num_nodes - 1; "
            "give --node-rank and --num-nodes, or the keys node_rank and num_nodes"
        )
    if count > 1:
        logger.info(
            "node %d of %d%s: shards %d, %d, %d, ...", rank, count, source, rank, rank + count, rank + 2 * count
        )
    return config.model_copy(update={"node_rank": rank, "num_nodes": count})


def _read_number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name)
    if value is None or not value.isdecimal():
        raise ConfigError(
            f"{name} is {'not set' if value is None else repr(value)}, expected a number; "
            "give --node-rank and --num-nodes, or start the tasks with srun"
        )
    return int(value)
