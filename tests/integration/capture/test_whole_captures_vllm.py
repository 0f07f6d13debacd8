"""The real engine against transformers in float32: a tiny LLaVA, in one engine for all tests of this file."""

import dataclasses
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from common.data.chat_encoding import ChatEncoder
from common.data.samples import Kind
from common.shards.manifest import published_shards
from common.shards.scores import TeacherScores
from precompute.config import PrecomputeConfig
from precompute.engine.teacher import Teacher
from precompute.logits.job import prepare_job
from precompute.logits.run import run_capture
from precompute.scorer import RequestKey, ScoreRequest, ScoringResult
from precompute.verify.logits import verify_logits
from precompute.verify.recompute_logits import recompute_logits
from tests.support.fake_teacher import conversation_records, make_config, preference_records
from tests.support.fused_rows import row_logits
from tests.support.hf_reference import ENGINE, TOP_K, assert_agrees, read_rows, reference_rows
from train.config import LossConfig
from train.data.collator import Collator, StudentInputs
from train.data.image_cache import ImageCache
from train.data.sources import ShardSource
from train.loss.objective import compute_terms

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("engine_in_this_process")]

NUM_SAMPLES = 9


class Reused:
    """A started teacher whose `close` leaves the engine open."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def score(self, requests: Iterable[ScoreRequest]) -> Generator[tuple[RequestKey, ScoringResult], None, None]:
        return self._teacher.score(requests)

    def close(self) -> None:
        pass


class Shifted(Reused):
    """A teacher whose own log-probs are off by 0.01."""

    def score(self, requests: Iterable[ScoreRequest]) -> Generator[tuple[RequestKey, ScoringResult], None, None]:
        for key, scores in super().score(requests):
            assert isinstance(scores, TeacherScores)
            yield key, dataclasses.replace(scores, own_logprobs=scores.own_logprobs - np.float32(0.01))


def configure(root: Path, teacher: Path, records: list[dict[str, Any]], **settings: Any) -> PrecomputeConfig:
    return make_config(root, teacher, records, engine=ENGINE, **{"top_k": TOP_K, "precision": "fp32", **settings})


@pytest.fixture(scope="module")
def llava(llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    root = tmp_path_factory.mktemp("settings")
    teacher = Teacher(prepare_job(configure(root, llava_dir, conversation_records(root, 1))).scorer_settings)
    yield teacher
    teacher.close()


@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_scores_of_a_llava_are_those_of_transformers(
    kind: str, llava: Teacher, llava_dir: Path, tmp_path: Path
) -> None:
    """Samples have no image, one and two, and one turn and two; shared turns of a preference pair are not scored."""
    records = (conversation_records if kind == "kd" else preference_records)(tmp_path, NUM_SAMPLES)
    config = configure(tmp_path, llava_dir, records, kind=kind)
    assert run_capture(config, progress=False, start_teacher=lambda _: Reused(llava)).complete
    assert verify_logits(config.output, config.dataset, progress=False).ok
    model = LlavaForConditionalGeneration.from_pretrained(llava_dir, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(llava_dir)
    rows = read_rows(config.output)
    assert {len(row.sample.images) for row in rows} == {0, 1, 2}
    for row in rows:
        for number, scored in enumerate(row.conversations):
            tokens, logprobs_RV = reference_rows(model, processor, row, number, tmp_path)
            assert_agrees(scored, tokens, logprobs_RV, len(processor.tokenizer), 1e-4)


def test_a_run_in_two_parts_writes_what_one_run_writes(llava: Teacher, llava_dir: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, llava_dir, conversation_records(tmp_path, NUM_SAMPLES))
    run_capture(config, progress=False, start_teacher=lambda _: Reused(llava))
    parts = config.model_copy(update={"output": tmp_path / "parts", "num_nodes": 2})
    for node in (1, 0):
        part = parts.model_copy(update={"node_rank": node})
        run_capture(part, progress=False, start_teacher=lambda _: Reused(llava))
    assert published_shards(parts.output) == published_shards(config.output)
    # Other samples share a step of the engine, so the last bits may differ.
    for one, other in zip(read_rows(config.output), read_rows(parts.output), strict=True):
        assert one.sample == other.sample
        for a, b in zip(one.conversations, other.conversations, strict=True):
            np.testing.assert_array_equal(a.encoded.input_ids, b.encoded.input_ids)
            np.testing.assert_allclose(a.scores.own_logprobs, b.scores.own_logprobs, atol=1e-5)
            np.testing.assert_allclose(a.scores.logprobs, b.scores.logprobs, atol=1e-5)


def test_recomputed_rows_agree_and_other_scores_are_found(llava: Teacher, llava_dir: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, llava_dir, conversation_records(tmp_path, NUM_SAMPLES))
    run_capture(config, progress=False, start_teacher=lambda _: Reused(llava))
    result = recompute_logits(config.output, llava_dir, 5, progress=False)
    assert result.ok
    assert result.num_rows == 5
    assert result.max_own_difference < 1e-4
    assert result.max_kl is not None
    assert abs(result.max_kl) < 1e-5
    assert result.top1_agreement == 1.0

    shifted = config.model_copy(update={"output": tmp_path / "shifted"})
    run_capture(shifted, progress=False, start_teacher=lambda _: Shifted(llava))
    wrong = recompute_logits(shifted.output, llava_dir, 5, progress=False)
    assert not wrong.ok
    assert wrong.max_own_difference == pytest.approx(0.01, abs=1e-4)


@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    kind: Kind, llava: Teacher, llava_dir: Path, tmp_path: Path
) -> None:
    """The output layer has 13 padding rows, which neither side's softmax may hold."""
    records = (conversation_records if kind == "kd" else preference_records)(tmp_path, NUM_SAMPLES)
    config = configure(tmp_path, llava_dir, records, kind=kind)
    run_capture(config, progress=False, start_teacher=lambda _: Reused(llava))
    encoder = ChatEncoder.load(llava_dir)
    source = ShardSource(config.output, encoder, "pad")
    student = StudentInputs(ImageCache.load(llava_dir, "pad"), encoder.image_token_id, 0)
    batch = Collator(student, kind=kind, image_root=tmp_path, max_tokens=512)([source[i] for i in range(NUM_SAMPLES)])
    model = LlavaForConditionalGeneration.from_pretrained(llava_dir, dtype=torch.float32)
    with torch.no_grad():
        logits = model(**batch.model_inputs).logits.flatten(0, 1)[batch.rows]
    assert logits.shape[1] == encoder.vocab_size + 13
    filled = None if batch.topk_logprobs is None else batch.topk_logprobs > -torch.inf
    ids = None if kind == "dpo" else batch.topk_ids
    rows = row_logits(logits, batch.targets, ids, None if ids is None else filled, vocab_size=encoder.vocab_size)
    loss = LossConfig(distillation=1.0) if kind == "kd" else LossConfig(preference=1.0)
    terms = compute_terms(rows, batch, loss, vocab_size=encoder.vocab_size)
    if kind == "kd":
        assert abs(float(terms["distillation"].total)) / batch.num_rows < 1e-5
    else:
        assert float(terms["preference"].total) / NUM_SAMPLES == pytest.approx(np.log(2), abs=1e-5)
        assert float(terms["rewards/margins"].total) / NUM_SAMPLES == pytest.approx(0.0, abs=1e-4)
