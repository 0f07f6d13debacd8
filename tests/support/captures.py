"""Captures with a fake teacher, and the bytes of their shards."""

import io
from typing import Any

from rich.console import Console

from common.storage.files import Location
from precompute.config import PrecomputeConfig
from precompute.features.run import FeatureSummary
from precompute.logits.run import CaptureSummary, run_capture
from precompute.scorer import Scorer, ScorerSettings
from tests.support.fake_teacher import FakeTeacher

NUM_SAMPLES = 10


def score(config: PrecomputeConfig, **teacher: Any) -> CaptureSummary:
    return run_capture(config, progress=False, start_teacher=lambda settings: FakeTeacher(settings, **teacher))


def no_teacher(_: ScorerSettings) -> Scorer:
    raise AssertionError("the teacher was started")


def shard_bytes(output: Location) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("shard-*")}


def rendered(summary: CaptureSummary | FeatureSummary) -> str:
    """Returns a summary as a wide terminal shows it."""
    console = Console(width=300, file=io.StringIO())
    with console.capture() as capture:
        console.print(summary.render())
    return capture.get()
