"""Responses that the real engine writes: their scores against transformers, and the rows that hold them."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.chat_encoding import ChatEncoder
from precompute.config import PrecomputeConfig
from precompute.engine.teacher import Teacher
from precompute.logits.job import prepare_job
from precompute.logits.run import run_capture
from precompute.scorer import ScorerSettings
from precompute.verify.logits import verify_logits
from precompute.verify.recompute_logits import recompute_logits
from tests.support.fake_teacher import conversation_records, make_config
from tests.support.hf_reference import ENGINE, read_rows
from train.data.sources import ShardSource

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("engine_in_this_process")]

NUM_SAMPLES = 5
GENERATE = {"num_samples": 3, "max_new_tokens": 7, "temperature": 1.0}


def configure(root: Path, model: Path, **settings: Any) -> PrecomputeConfig:
    records = conversation_records(root, NUM_SAMPLES)
    # The last one is a prompt alone.
    del records[-1]["conversations"][1:]
    defaults = {"engine": ENGINE, "generate": GENERATE, "top_k": 16, "seed": 3}
    if "num_draws" not in settings:
        defaults["precision"] = "fp32"
    return make_config(root, model, records, **{**defaults, **settings})


@pytest.fixture(scope="module")
def teacher(llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    # With draws, the engine is started for log-probs of the whole vocabulary, from which ids are drawn on the host.
    config = configure(tmp_path_factory.mktemp("settings"), llava_dir, top_k=0, num_draws=4)
    started = Teacher(prepare_job(config).scorer_settings)
    yield started
    started.close()


def with_settings(teacher: Teacher, settings: ScorerSettings, in_engine: bool = True) -> Any:
    """Returns a teacher with other settings on the running engine, whose `close` leaves it open."""
    other = copy.copy(teacher)
    other.settings, other.in_engine = settings, in_engine
    other.close = lambda: None  # type: ignore[method-assign]
    return other


def test_written_responses_have_the_scores_of_transformers(teacher: Teacher, llava_dir: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, llava_dir)
    run_capture(config, progress=False, start_teacher=partial(with_settings, teacher))
    assert verify_logits(config.output, config.dataset, progress=False).ok
    again = recompute_logits(config.output, llava_dir, 100, progress=False)
    assert again.num_rows == NUM_SAMPLES * 3
    assert again.max_own_difference < 1e-4
    assert again.max_kl is not None
    assert abs(again.max_kl) < 1e-5
    rows = read_rows(config.output)
    assert [row.sample.id for row in rows[:4]] == ["s0#0", "s0#1", "s0#2", "s1#0"]
    assert {len(row.sample.images) for row in rows} == {0, 1, 2}
    encoder = ChatEncoder.load(llava_dir, None)
    responses = set()
    for row in rows:
        (scored,) = row.conversations
        response = scored.encoded.response_ids
        assert 1 <= len(response) <= 7
        assert (response < encoder.vocab_size).all()
        assert row.sample.conversations[0][-1].role == "assistant"
        assert row.sample.conversations[0][-1].content == encoder.tokenizer.decode(response, skip_special_tokens=True)
        responses.add(response.tobytes())
    # Sampled at temperature 1 from a random model, the three responses to a prompt hardly ever agree.
    assert len(responses) > NUM_SAMPLES * 2
    source = ShardSource(config.output, encoder, "pad")
    assert len(source) == len(rows)
    np.testing.assert_array_equal(source[4].conversations[0].input_ids, rows[4].conversations[0].encoded.input_ids)


def test_the_same_seed_writes_the_same_responses_and_both_modes_score_them_alike(
    teacher: Teacher, llava_dir: Path, tmp_path: Path
) -> None:
    rows = []
    for name, in_engine in (("a", True), ("b", False)):
        config = configure(tmp_path, llava_dir, output=tmp_path / name)
        run_capture(config, progress=False, start_teacher=partial(with_settings, teacher, in_engine=in_engine))
        rows.append(read_rows(config.output))
    for ours, theirs in zip(*rows, strict=True):
        a, b = ours.conversations[0], theirs.conversations[0]
        np.testing.assert_array_equal(a.encoded.input_ids, b.encoded.input_ids)
        np.testing.assert_allclose(a.scores.own_logprobs, b.scores.own_logprobs, atol=1e-5)
        np.testing.assert_allclose(a.scores.logprobs, b.scores.logprobs, atol=1e-5)
        np.testing.assert_array_equal(a.scores.counts, b.scores.counts)
    other = configure(tmp_path, llava_dir, output=tmp_path / "c", seed=4)
    run_capture(other, progress=False, start_teacher=partial(with_settings, teacher))
    different = [row.conversations[0].encoded.input_ids.tolist() for row in read_rows(other.output)]
    assert different != [row.conversations[0].encoded.input_ids.tolist() for row in rows[0]]


def test_ids_can_be_drawn_at_every_step_of_a_response(teacher: Teacher, llava_dir: Path, tmp_path: Path) -> None:
    found = []
    for name, in_engine in (("a", True), ("b", False)):
        config = configure(tmp_path, llava_dir, output=tmp_path / name, top_k=0, num_draws=30)
        run_capture(config, progress=False, start_teacher=partial(with_settings, teacher, in_engine=in_engine))
        assert verify_logits(config.output, config.dataset, progress=False).ok
        found.append([row.conversations[0].scores for row in read_rows(config.output)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.draws is not None
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_array_equal(ours.draws, theirs.draws)
