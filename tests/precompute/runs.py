"""Captures with a stand-in for the engine, and what they left."""

from pathlib import Path
from typing import Any

from precompute.config import PrecomputeConfig
from precompute.run import Summary, run
from precompute.scoring import Scorer, ScoringPlan
from tests.precompute.stand_in import StandInTeacher

NUM_SAMPLES = 10


def score(config: PrecomputeConfig, **teacher: Any) -> Summary:
    return run(config, progress=False, start_teacher=lambda plan: StandInTeacher(plan, **teacher))


def no_teacher(_: ScoringPlan) -> Scorer:
    raise AssertionError("the teacher was started")


def shard_bytes(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("shard-*"))}
