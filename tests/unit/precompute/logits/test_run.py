"""Runs with a fake teacher; everything except the scores is real."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.data.dataset import Dataset
from common.errors import ConfigError, ModelError
from common.shards.manifest import published_shards, read_manifest, receipt_path, shard_path
from precompute.config import PrecomputeConfig
from precompute.logits.run import run_capture
from precompute.scorer import Scorer, ScoreRequest, ScorerSettings
from precompute.verify.logits import verify_logits
from tests.support.captures import NUM_SAMPLES, no_teacher, score, shard_bytes
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config, preference_records
from tests.support.outputs import read_all_rows


@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_every_sample_has_its_row_in_dataset_order(tmp_path: Path, llava_dir: Path, kind: str) -> None:
    records = (conversation_records if kind == "kd" else preference_records)(tmp_path, NUM_SAMPLES)
    config = make_config(tmp_path, llava_dir, records, kind=kind)
    summary = score(config)
    rows = read_all_rows(config.output)
    assert [row.index for row in rows] == list(range(NUM_SAMPLES))
    assert [row.sample.id for row in rows] == [record["id"] for record in records]
    assert {len(row.conversations) for row in rows} == {1 if kind == "kd" else 2}
    assert (summary.num_rows, summary.num_new_rows, summary.num_shards, summary.complete) == (10, 10, 3, True)
    assert summary.num_scored_tokens == sum(c.scores.num_rows for row in rows for c in row.conversations)
    assert verify_logits(config.output, config.dataset, progress=False).ok


def test_tokens_read_count_images_by_the_tokens_they_expand_to(tmp_path: Path, llava_dir: Path) -> None:
    records = conversation_records(tmp_path, 3)
    summary = score(make_config(tmp_path, llava_dir, records))
    own = sum(len(c.encoded.input_ids) for row in read_all_rows(tmp_path / "out") for c in row.conversations)
    assert summary.num_new_tokens == own + 3 * 15  # three images of 16 tokens, each with a placeholder already


def test_a_complete_output_starts_no_teacher(config: PrecomputeConfig) -> None:
    score(config)
    before = shard_bytes(config.output)
    summary = run_capture(config, progress=False, start_teacher=no_teacher)
    assert "nothing was left to do" in summary.message
    assert (summary.num_rows, summary.num_new_rows) == (NUM_SAMPLES, 0)
    assert shard_bytes(config.output) == before


def test_only_missing_shards_are_written(config: PrecomputeConfig) -> None:
    score(config)
    before = shard_bytes(config.output)
    receipt_path(config.output, 1).unlink()
    shard_path(config.output, 2).unlink()
    teachers: list[FakeTeacher] = []

    def start(settings: ScorerSettings) -> Scorer:
        teachers.append(FakeTeacher(settings))
        return teachers[-1]

    summary = run_capture(config, progress=False, start_teacher=start)
    assert (summary.num_new_shards, teachers[0].num_requests) == (2, 6)
    assert shard_bytes(config.output) == before


def test_nodes_share_the_shards(config: PrecomputeConfig) -> None:
    parts = [config.model_copy(update={"num_nodes": 2, "node_rank": node}) for node in range(2)]
    assert [score(part).num_new_shards for part in parts] == [2, 1]
    assert verify_logits(config.output, config.dataset, progress=False).ok


def test_the_resolved_configuration_is_written_beside_the_shards(config: PrecomputeConfig) -> None:
    score(config)
    written = json.loads((config.output / "config.json").read_text())
    assert PrecomputeConfig.model_validate(written["config"]) == config


def test_an_interrupt_keeps_complete_shards_and_drops_incomplete_ones(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.logits.pipeline._WINDOW", 4)

    def interrupt(request: ScoreRequest) -> None:
        if request.key[0] == 6:
            raise KeyboardInterrupt

    summary = score(config, before=interrupt)
    assert summary.interrupted
    assert summary.message == "interrupted: 1 of 3 shards are complete; run the same command again to continue"
    assert published_shards(config.output) == (0,)
    summary = score(config)
    assert (summary.complete, summary.num_new_shards) == (True, 2)


def test_a_run_that_fails_closes_its_teacher(config: PrecomputeConfig) -> None:
    teachers: list[FakeTeacher] = []

    def fail(_: ScoreRequest) -> None:
        raise ModelError("the engine died")

    def start(settings: ScorerSettings) -> Scorer:
        teachers.append(FakeTeacher(settings, before=fail))
        return teachers[-1]

    with pytest.raises(ModelError, match="the engine died"):
        run_capture(config, progress=False, start_teacher=start)
    assert teachers[0].closed


def test_the_whole_vocabulary_is_kept_on_request(tmp_path: Path, llava_dir: Path) -> None:
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 3), top_k="all")
    score(config)
    manifest = read_manifest(config.output)
    assert manifest.capture.top_k == manifest.tokenizer.vocab_size < manifest.teacher.vocab_size
    for row in read_all_rows(config.output):
        assert set(row.conversations[0].scores.counts.tolist()) == {manifest.tokenizer.vocab_size}


def test_more_entries_than_the_output_layer_has_are_refused_before_the_engine_starts(
    tmp_path: Path, llava_dir: Path
) -> None:
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 3), top_k=2**19)
    with pytest.raises(ConfigError, match=r"top_k = 524288 exceeds the \d+ entries .*; give \"all\" to keep every one"):
        run_capture(config, progress=False, start_teacher=no_teacher)
    assert not config.output.exists()


def test_padding_reaches_the_teacher_as_a_square(tmp_path: Path, llava_dir: Path) -> None:
    sizes: dict[str, set[bool]] = {"pad": set(), "keep": set()}
    records = conversation_records(tmp_path, 3)
    for choice, square in sizes.items():
        config = make_config(tmp_path, llava_dir, records, image_aspect_ratio=choice, output=tmp_path / choice)

        def record(request: ScoreRequest, square: set[bool] = square) -> None:
            square.update(image.width == image.height for image in request.images)

        score(config, before=record)
    assert sizes == {"pad": {True}, "keep": {False}}


def test_a_limit_beyond_the_teachers_context_is_lowered_to_it(tmp_path: Path, llava_dir: Path) -> None:
    started: list[ScorerSettings] = []

    def start(settings: ScorerSettings) -> Scorer:
        started.append(settings)
        return FakeTeacher(settings)

    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 2), max_tokens=100_000)
    run_capture(config, progress=False, start_teacher=start)
    assert started[0].max_tokens == 2047  # the token that the engine generates takes one of 2,048 positions


def test_images_are_given_to_the_teacher_as_they_are(tmp_path: Path, llava_dir: Path) -> None:
    seen: list[bytes] = []
    records = conversation_records(tmp_path, 2)
    config = make_config(tmp_path, llava_dir, records, image_aspect_ratio="keep")
    score(config, before=lambda request: seen.extend(image.tobytes() for image in request.images))
    assert seen == [Image.open(tmp_path / "1-0.png").tobytes()]
    assert Dataset.open(config.dataset, "kd")[1].images[0].path == "1-0.png"


@pytest.mark.parametrize(("nodes", "engine"), [(1, "local"), (2, "ray"), (3, "local")])
def test_replicas_that_work_in_step_need_a_process_each(
    nodes: int, engine: Any, tmp_path: Path, llava_dir: Path
) -> None:
    records = conversation_records(tmp_path, 2)
    config = make_config(tmp_path, llava_dir, records, num_nodes=nodes, engine={"data_parallel_size": 2})
    with pytest.raises(ConfigError, match=r"data_parallel_size = 2 wants 2 processes.* --num-nodes 2"):
        run_capture(config, progress=False, start_teacher=no_teacher, engine=engine)
    assert not config.output.exists()
