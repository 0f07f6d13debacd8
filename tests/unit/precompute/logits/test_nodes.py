"""The rank of a process among several, from flags, the configuration and SLURM."""

import logging
from pathlib import Path

import pytest

from common.errors import ConfigError
from precompute.config import PrecomputeConfig
from precompute.logits.nodes import resolve_nodes

STEP = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "2"}


def configure(**settings: int) -> PrecomputeConfig:
    return PrecomputeConfig.model_validate(
        {"teacher": Path("t"), "dataset": Path("d"), "output": Path("o"), **settings}
    )


@pytest.mark.parametrize(
    ("settings", "flags", "environ", "expected"),
    [
        ({}, (None, None), {}, (0, 1)),
        ({}, (1, 4), {}, (1, 4)),
        ({"num_nodes": 4, "node_rank": 3}, (None, None), {}, (3, 4)),
        ({"num_nodes": 4, "node_rank": 3}, (1, None), {}, (1, 4)),
        ({"num_nodes": 4, "node_rank": 3}, (None, 5), {}, (3, 5)),
        ({}, (None, None), STEP, (2, 8)),
        ({"num_nodes": 4, "node_rank": 3}, (None, None), STEP, (3, 4)),
        ({}, (1, 4), STEP, (1, 4)),
        ({}, (None, 1), STEP, (0, 1)),
        # A batch script and a salloc shell belong to a job with many tasks, but are none of them.
        ({}, (None, None), {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, (0, 1)),
        ({}, (None, None), {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (0, 1)),
    ],
)
def test_flags_override_the_configuration_which_overrides_slurm(
    settings: dict[str, int], flags: tuple[int | None, int | None], environ: dict[str, str], expected: tuple[int, int]
) -> None:
    resolved = resolve_nodes(configure(**settings), *flags, environ)
    assert (resolved.node_rank, resolved.num_nodes) == expected
    assert resolved == configure(node_rank=expected[0], num_nodes=expected[1])


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ((4, 4), {}, r"node_rank = 4 of 4 node\(s\)"),
        ((-1, 4), {}, r"node_rank = -1 of 4 node\(s\)"),
        ((1, None), {}, r"node_rank = 1 of 1 node\(s\)"),
        ((None, 0), {}, r"of 0 node\(s\)"),
        ((None, None), {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "8"}, r"SLURM_PROCID = 8 of 8 .*from SLURM"),
        ((None, None), {"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_PROCID is not set"),
        ((None, None), {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "x"}, "SLURM_PROCID is 'x', expected a number"),
        ((None, None), {"SLURM_STEP_NUM_TASKS": "", "SLURM_PROCID": "1"}, "SLURM_STEP_NUM_TASKS is '', expected"),
        ((None, None), {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "-1"}, "SLURM_PROCID is '-1', expected"),
    ],
)
def test_a_wrong_rank_is_an_error_that_names_its_source(
    flags: tuple[int | None, int | None], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_nodes(configure(), *flags, environ)


def test_the_log_names_the_shards_of_this_node(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "precompute"):
        resolve_nodes(configure(), None, None, {})
        resolve_nodes(configure(), None, None, STEP)
        resolve_nodes(configure(), 0, 4, STEP)
    assert caplog.messages == [
        "node 2 of 8 (from SLURM): shards 2, 10, 18, ...",
        "node 0 of 4: shards 0, 4, 8, ...",
    ]
