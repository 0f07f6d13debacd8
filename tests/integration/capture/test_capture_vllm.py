"""Capture inside the real engine against vLLM's own prompt log-probs: the scores are the same.

One engine serves two teachers: one that captures in the engine, and one that requests vLLM's own log-probs.
"""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.shards.scores import TeacherScores
from precompute.engine.teacher import Teacher
from precompute.logits.job import CaptureJob, prepare_job
from precompute.scorer import RejectedRequest, RequestKey, ScoreRequest
from tests.support.fake_teacher import conversation_records, make_config
from tests.support.hf_reference import ENGINE

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("engine_in_this_process")]

NUM_SAMPLES = 33
TOP_K = 16


def make_job(root: Path, model: Path, engine: dict[str, Any] | None = None, **settings: Any) -> CaptureJob:
    """Returns a job whose conversations have no image, one and two, and one turn and two."""
    records = conversation_records(root, NUM_SAMPLES)
    return prepare_job(make_config(root, model, records, engine={**ENGINE, **(engine or {})}, top_k=TOP_K, **settings))


def make_requests(job: CaptureJob) -> list[ScoreRequest]:
    requests = []
    for index in range(NUM_SAMPLES):
        found = job.load_encoded(index)
        images = job.load_images(index, found.sample)
        requests += [
            ScoreRequest((index, number), found.sample.id, encoded, images, job.where(index))
            for number, encoded in enumerate(found.encoded)
        ]
    return requests


def score(teacher: Teacher, requests: list[ScoreRequest]) -> dict[RequestKey, TeacherScores]:
    found = dict(teacher.score(requests))
    assert not any(isinstance(scores, RejectedRequest) for scores in found.values())
    return found  # type: ignore[return-value]


def with_stock_logprobs(teacher: Teacher) -> Teacher:
    """Returns a teacher on the same engine that requests vLLM's own prompt log-probs."""
    other = copy.copy(teacher)
    other.in_engine = False
    return other


def assert_same(a: dict[RequestKey, TeacherScores], b: dict[RequestKey, TeacherScores]) -> None:
    assert a.keys() == b.keys()
    for key, ours in a.items():
        theirs = b[key]
        np.testing.assert_allclose(ours.own_logprobs, theirs.own_logprobs, atol=1e-5)
        np.testing.assert_allclose(ours.rest_mass, theirs.rest_mass, atol=1e-5)
        np.testing.assert_array_equal(ours.counts, theirs.counts)
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
        # Ids may differ where values tie.
        differ = ours.ids != theirs.ids
        rows = np.repeat(np.arange(ours.num_rows), ours.counts)
        for row in np.unique(rows[differ]):
            unequal = set(ours.ids[rows == row]) ^ set(theirs.ids[rows == row])
            last = ours.logprobs[rows == row][-1]
            assert all(abs(lp - last) < 1e-5 for i, lp in zip(*entries(ours, row), strict=True) if i in unequal)


def entries(scores: TeacherScores, row: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.repeat(np.arange(scores.num_rows), scores.counts)
    return scores.ids[rows == row], scores.logprobs[rows == row]


@pytest.fixture(scope="module")
def started(llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A job, and a teacher whose engine takes 32 conversations at a time and at most 16 tokens of each in a step.

    The engine's cache is too small for all of them, so that some are preempted and start over.
    """
    options = {"long_prefill_token_threshold": 16, "num_gpu_blocks_override": 24, "block_size": 32}
    engine = {"max_num_seqs": 32, "max_num_batched_tokens": 512, "capture": "in-engine", "options": options}
    job = make_job(tmp_path_factory.mktemp("job"), llava_dir, engine, max_tokens=256)
    teacher = Teacher(job.scorer_settings)
    yield job, teacher
    teacher.close()


def test_both_modes_agree_for_many_requests_at_once_and_for_one_at_a_time(
    started: tuple[CaptureJob, Teacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, teacher = started
    scheduler = teacher._engine._engine.engine_core.engine_core.scheduler  # noqa: SLF001 - vLLM reports no preemption
    preempted = []
    original = scheduler._preempt_request  # noqa: SLF001 - vLLM reports no preemption

    def counting(*given: Any, **named: Any) -> Any:
        preempted.append(given[0])
        return original(*given, **named)

    monkeypatch.setattr(scheduler, "_preempt_request", counting)
    requests = make_requests(job)
    together = score(teacher, requests)
    assert preempted
    assert_same(together, score(with_stock_logprobs(teacher), requests))
    preempted.clear()
    alone: dict[RequestKey, TeacherScores] = {}
    for request in requests:
        alone |= score(teacher, [request])
    assert not preempted
    assert_same(together, alone)


def test_draws_are_the_same_in_every_order(started: tuple[CaptureJob, Teacher]) -> None:
    job, teacher = started
    drawing = copy.copy(teacher)
    drawing.settings = dataclasses.replace(teacher.settings, num_draws=50, top_k=0)
    requests = make_requests(job)[:6]
    found = score(drawing, requests)
    assert all(scores.draws is not None for scores in found.values())
    for key, again in score(drawing, requests[::-1]).items():
        np.testing.assert_array_equal(found[key].ids, again.ids)
        np.testing.assert_array_equal(found[key].draws, again.draws)
        np.testing.assert_array_equal(found[key].rest_mass, again.rest_mass)
