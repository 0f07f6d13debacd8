"""Recomputing with transformers finds scores that are not the teacher's."""

import json
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError, ProvenanceError
from common.shards.manifest import read_manifest, write_with_digest
from common.shards.scores import scores_from_topk
from precompute.config import PrecomputeConfig
from precompute.logits.run import run_capture
from precompute.verify.recompute_logits import bucketed_kl, recompute_logits
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config
from tests.support.models import tiny_llava
from tests.support.outputs import render_text


@pytest.fixture(scope="module")
def fake_scores(tmp_path_factory: pytest.TempPathFactory, llava_dir: Path) -> PrecomputeConfig:
    """An output whose scores are not the teacher's."""
    root = tmp_path_factory.mktemp("invented")
    config = make_config(root, llava_dir, conversation_records(root, 10))
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    return config


def test_scores_that_are_not_the_teachers_are_found(fake_scores: PrecomputeConfig, llava_dir: Path) -> None:
    result = recompute_logits(fake_scores.output, llava_dir, 3, progress=False)
    assert not result.ok
    assert result.num_rows == 3
    assert json.loads(result.to_json())["ok"] is False
    text = render_text(result.render())
    assert f"3 rows, {result.num_scored_tokens:,} tokens scored again in float32" in text
    assert f"{result.max_kl:.2e}" in text
    assert f"{result.top1_agreement:.2%}" in text


def test_an_output_without_rows_is_an_error(fake_scores: PrecomputeConfig, llava_dir: Path, tmp_path: Path) -> None:
    write_with_digest(tmp_path / "manifest.json", read_manifest(fake_scores.output))
    with pytest.raises(DataError, match="holds no rows to score again"):
        recompute_logits(tmp_path, llava_dir, 3, progress=False)


def test_drawn_entries_are_compared_only_by_their_own_log_probs(tmp_path: Path, llava_dir: Path) -> None:
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 4), top_k=0, num_draws=20)
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    result = recompute_logits(config.output, llava_dir, 2, progress=False)
    assert (result.mean_kl, result.max_kl, result.top1_agreement) == (None, None, None)
    assert not result.ok
    assert result.num_scored_tokens > 2


def test_rows_of_top_p_are_compared_by_kl(tmp_path: Path, llava_dir: Path) -> None:
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 4), top_k=50, top_p=0.5)
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    result = recompute_logits(config.output, llava_dir, 2, progress=False)
    assert result.max_kl is not None
    assert result.max_kl > result.tolerance


def test_the_seed_chooses_the_rows(fake_scores: PrecomputeConfig, llava_dir: Path) -> None:
    first, again, other = (
        recompute_logits(fake_scores.output, llava_dir, 4, seed=s, progress=False) for s in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_no_row_is_drawn_twice(fake_scores: PrecomputeConfig, llava_dir: Path) -> None:
    everything = recompute_logits(fake_scores.output, llava_dir, 99, progress=False)
    assert everything.num_rows == 10


def test_another_teacher_is_refused(fake_scores: PrecomputeConfig, tmp_path: Path) -> None:
    other = tiny_llava(tmp_path, seed=1)
    with pytest.raises(ProvenanceError, match=r"is not the teacher of .*\n  weights_sha256"):
        recompute_logits(fake_scores.output, other, 1, progress=False)


def test_a_missing_image_is_named(fake_scores: PrecomputeConfig, llava_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        recompute_logits(fake_scores.output, llava_dir, 10, image_root=tmp_path, progress=False)


def test_kl_is_computed_over_the_kept_entries_and_one_bucket_for_the_rest() -> None:
    ids = np.array([[0, 1], [3, 2]])
    kept = np.log(np.array([[0.5, 0.3], [0.75, 0.25]], np.float32))
    scores = scores_from_topk(np.zeros(2, np.float32), ids, kept)
    uniform = np.log(np.full((2, 4), 0.25, np.float32))
    first = 0.5 * np.log(2) + 0.3 * np.log(1.2) + 0.2 * np.log(0.4)
    second = 0.75 * np.log(3)
    np.testing.assert_allclose(bucketed_kl(scores, uniform), [first, second], rtol=1e-6)


def test_kl_of_a_distribution_with_itself_is_zero_for_rows_of_different_lengths() -> None:
    logprobs = np.log(np.random.default_rng(0).dirichlet(np.ones(6), 3)).astype(np.float32)
    order = np.argsort(-logprobs, axis=1)[:, :4]
    kept = np.take_along_axis(logprobs, order, axis=1)
    kept[1, 2:] = -np.inf
    kept[2] = -np.inf
    scores = scores_from_topk(np.zeros(3, np.float32), order, kept)
    assert scores.counts.tolist() == [4, 2, 0]
    np.testing.assert_allclose(bucketed_kl(scores, logprobs), 0.0, atol=1e-6)
