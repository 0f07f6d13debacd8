"""The loop with a stand-in for the engine: everything but the scores is real."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.errors import ConfigError, DataError, DecantError, ModelError, ProvenanceError, StorageError
from common.manifest import Receipt, published_shards, read_manifest, receipt_path, shard_path
from common.samples import Dataset, Sample
from common.shards import ShardFile, ShardRow, write_shard
from precompute.config import PrecomputeConfig
from precompute.feed import Feed
from precompute.plan import Job
from precompute.run import Summary, run
from precompute.scoring import Refused, Scorer, ScoreRequest, ScoringPlan
from precompute.verify import verify
from tests.models import tiny_llava
from tests.precompute.stand_in import StandInTeacher, conversation_records, make_config, preference_records
from tests.real_weights import write_jsonl

NUM_SAMPLES = 10

ROOT = Path(__file__).parents[2]


def score(config: PrecomputeConfig, **teacher: Any) -> Summary:
    return run(config, progress=False, start_teacher=lambda plan: StandInTeacher(plan, **teacher))


def no_teacher(_: ScoringPlan) -> Scorer:
    raise AssertionError("the teacher was started")


def rows_of(output: Path) -> list[ShardRow]:
    manifest = read_manifest(output)
    rows: list[ShardRow] = []
    for number in published_shards(output):
        shard = ShardFile(shard_path(output, number), manifest, number)
        rows += list(shard)
        shard.close()
    return rows


def shard_bytes(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(output.glob("shard-*"))}


@pytest.fixture
def config(tmp_path: Path, llava_dir: Path) -> PrecomputeConfig:
    return make_config(tmp_path, llava_dir, conversation_records(tmp_path, NUM_SAMPLES))


@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_every_sample_has_its_row_in_dataset_order(tmp_path: Path, llava_dir: Path, kind: str) -> None:
    records = (conversation_records if kind == "kd" else preference_records)(tmp_path, NUM_SAMPLES)
    config = make_config(tmp_path, llava_dir, records, kind=kind)
    summary = score(config)
    rows = rows_of(config.output)
    assert [row.index for row in rows] == list(range(NUM_SAMPLES))
    assert [row.sample.id for row in rows] == [record["id"] for record in records]
    assert {len(row.conversations) for row in rows} == {1 if kind == "kd" else 2}
    assert (summary.num_rows, summary.num_new_rows, summary.num_shards, summary.complete) == (10, 10, 3, True)
    assert summary.num_scored_tokens == sum(c.scores.num_rows for row in rows for c in row.conversations)
    assert verify(config.output, config.dataset, progress=False).ok


def test_tokens_read_count_images_by_the_tokens_they_expand_to(tmp_path: Path, llava_dir: Path) -> None:
    records = conversation_records(tmp_path, 3)
    summary = score(make_config(tmp_path, llava_dir, records))
    own = sum(len(c.encoded.input_ids) for row in rows_of(tmp_path / "out") for c in row.conversations)
    assert summary.num_new_tokens == own + 3 * 15  # three images of 16 tokens, each with a placeholder already


def test_a_complete_output_starts_no_teacher(config: PrecomputeConfig) -> None:
    score(config)
    before = shard_bytes(config.output)
    summary = run(config, progress=False, start_teacher=no_teacher)
    assert "nothing was left to do" in summary.message
    assert (summary.num_rows, summary.num_new_rows) == (NUM_SAMPLES, 0)
    assert shard_bytes(config.output) == before


def test_only_missing_shards_are_written(config: PrecomputeConfig) -> None:
    score(config)
    before = shard_bytes(config.output)
    receipt_path(config.output, 1).unlink()
    shard_path(config.output, 2).unlink()
    teachers: list[StandInTeacher] = []

    def start(plan: ScoringPlan) -> Scorer:
        teachers.append(StandInTeacher(plan))
        return teachers[-1]

    summary = run(config, progress=False, start_teacher=start)
    assert (summary.num_new_shards, teachers[0].num_requests) == (2, 6)
    assert shard_bytes(config.output) == before


def test_nodes_share_the_shards(config: PrecomputeConfig) -> None:
    parts = [config.model_copy(update={"num_nodes": 2, "node_rank": node}) for node in range(2)]
    assert [score(part).num_new_shards for part in parts] == [2, 1]
    assert verify(config.output, config.dataset, progress=False).ok


def test_the_resolved_configuration_lies_beside_the_shards(config: PrecomputeConfig) -> None:
    score(config)
    written = json.loads((config.output / "config.json").read_text())
    assert PrecomputeConfig.model_validate(written["config"]) == config


def test_an_interrupt_keeps_complete_shards_and_drops_those_under_way(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.pipeline._WINDOW", 4)

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
    teachers: list[StandInTeacher] = []

    def fail(_: ScoreRequest) -> None:
        raise ModelError("the engine died")

    def start(plan: ScoringPlan) -> Scorer:
        teachers.append(StandInTeacher(plan, before=fail))
        return teachers[-1]

    with pytest.raises(ModelError, match="the engine died"):
        run(config, progress=False, start_teacher=start)
    assert teachers[0].closed


def spoil(records: list[dict[str, Any]], how: str, root: Path) -> None:
    record = records[7]
    if how == "missing image":
        record["image"] = "nowhere.png"
    elif how == "image outside":
        record["image"] = "../secret.png"
    elif how == "unreadable image":
        (root / "7-0.png").write_bytes(b"not a picture")
    elif how == "no assistant turn":
        record["conversations"] = record["conversations"][:1]
    elif how == "too long":
        record["conversations"][1]["value"] = "x" * 600


BAD_SAMPLES = {
    "missing image": r"'s7'.*nowhere\.png does not exist; check image_root",
    "image outside": r"'s7'.*lies outside image_root",
    "unreadable image": r"'s7'.*7-0\.png cannot be decoded",
    "no assistant turn": r"'s7'.*no assistant turn",
    "too long": r"'s7': needs \d+ tokens, images expanded; the limit is 512",
}


@pytest.mark.parametrize("how", BAD_SAMPLES)
def test_a_bad_sample_stops_the_run_and_is_named(
    tmp_path: Path, llava_dir: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = conversation_records(tmp_path, NUM_SAMPLES)
    spoil(records, how, tmp_path)
    config = make_config(tmp_path, llava_dir, records)
    monkeypatch.setattr("precompute.pipeline._WINDOW", 4)
    with pytest.raises(DataError, match=BAD_SAMPLES[how]):
        score(config, batch_size=1)
    # Bytes of images are read as they are needed; everything else is found before anything is scored.
    assert published_shards(config.output) == ((0,) if how == "unreadable image" else ())


@pytest.mark.parametrize("how", BAD_SAMPLES)
def test_a_bad_sample_is_skipped_by_choice_and_listed(tmp_path: Path, llava_dir: Path, how: str) -> None:
    records = conversation_records(tmp_path, NUM_SAMPLES)
    spoil(records, how, tmp_path)
    config = make_config(tmp_path, llava_dir, records, on_bad_sample="skip")
    summary = score(config)
    assert [(skipped.index, skipped.id) for skipped in summary.skipped] == [(7, "s7")]
    assert [row.index for row in rows_of(config.output)] == [i for i in range(NUM_SAMPLES) if i != 7]
    assert verify(config.output, config.dataset, progress=False).ok
    assert run(config, progress=False, start_teacher=no_teacher).skipped == summary.skipped


def test_all_bad_samples_are_found_at_once(tmp_path: Path, llava_dir: Path) -> None:
    records = conversation_records(tmp_path, NUM_SAMPLES)
    records[1]["image"] = "gone.png"
    records[4]["conversations"][1]["value"] = ""
    records[4]["conversations"][1]["from"] = "human"
    with pytest.raises(DataError, match=r"2 samples cannot be used\n.*'s1'.*\n.*'s4'") as caught:
        score(make_config(tmp_path, llava_dir, records))
    assert "gone.png" in str(caught.value)


def test_without_preflight_complete_shards_survive_a_bad_sample(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.pipeline._WINDOW", 1)
    monkeypatch.setattr("precompute.pipeline._DECODED_AHEAD", 1)
    records = conversation_records(tmp_path, NUM_SAMPLES)
    spoil(records, "missing image", tmp_path)
    config = make_config(tmp_path, llava_dir, records, preflight=False)
    with pytest.raises(DataError, match=r"1 shard\(s\) were written in this run and are safe"):
        score(config)
    assert published_shards(config.output) == (0,)


def test_images_for_a_teacher_without_eyes_are_refused(tmp_path: Path, text_dir: Path) -> None:
    records = conversation_records(tmp_path, 2)
    with pytest.raises(DataError, match=r"'s1'.*the teacher has no vision tower"):
        score(make_config(tmp_path, text_dir, records))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the dataset is empty"),
        ('{"id": "a"}\n{"id": \n', "line 2, column 8: broken JSON"),
        ('{"id": "a"}\n{"id": "a"}\n', "id 'a' stands at line 1 and again at line 2"),
        ('{"conversations": []}\n', 'no "id"'),
    ],
)
def test_a_broken_dataset_is_refused_before_anything_starts(
    tmp_path: Path, llava_dir: Path, content: str, message: str
) -> None:
    config = make_config(tmp_path, llava_dir, [])
    config.dataset.write_text(content)
    with pytest.raises(DataError, match=message):
        run(config, progress=False, start_teacher=no_teacher)
    assert not config.output.exists()


def test_an_output_begun_by_another_teacher_or_dataset_is_refused(
    config: PrecomputeConfig, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    score(config)
    before = shard_bytes(config.output)
    teacher = tiny_llava(tmp_path_factory.mktemp("other"), seed=1)
    dataset = write_jsonl(tmp_path / "other.jsonl", conversation_records(tmp_path, 3))
    other = config.model_copy(update={"teacher": teacher, "dataset": dataset, "top_k": 9})
    with pytest.raises(ProvenanceError) as caught:
        run(other, progress=False, start_teacher=no_teacher)
    for difference in ("teacher.weights_sha256", "dataset.sha256", "dataset.num_samples", "capture.top_k"):
        assert difference in str(caught.value)
    assert shard_bytes(config.output) == before


def test_a_teacher_without_safetensors_is_refused(config: PrecomputeConfig, tmp_path: Path, llava_dir: Path) -> None:
    bare = shutil.copytree(llava_dir, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        score(config.model_copy(update={"teacher": bare}))


def test_a_teacher_that_is_not_there_is_named(config: PrecomputeConfig, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such model directory"):
        score(config.model_copy(update={"teacher": tmp_path / "nowhere"}))


@pytest.mark.parametrize("failing_file", range(4))
def test_a_full_disk_stops_the_run_and_a_rerun_completes_it(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch, failing_file: int
) -> None:
    """At the rows of the first shard that is written, at its receipt, and the same of the second."""
    count = 0

    def full(_: int) -> None:
        nonlocal count
        count += 1
        if count > 4 + 2 * failing_file:  # publishing a file flushes it and then its directory
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("common.storage.os.fsync", full)
        with pytest.raises(StorageError, match=r"No space left on device.*run the same command again"):
            score(config)
    assert len(published_shards(config.output)) == failing_file // 2
    assert not list(config.output.glob(".*.partial"))
    score(config)
    assert verify(config.output, config.dataset, progress=False).ok


KILLER = """
import os, random, signal, sys, time
from precompute.config import PrecomputeConfig
from precompute.run import run
from tests.precompute.stand_in import StandInTeacher

config = PrecomputeConfig.model_validate_json(sys.argv[1])
moments = random.Random(0)
num_killed = 0
for _ in range(12):
    child = os.fork()
    if not child:
        run(config, progress=False, start_teacher=lambda plan: StandInTeacher(plan, delay_s=0.1))
        os._exit(0)
    time.sleep(moments.uniform(0.1, 0.5))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    num_killed += os.WIFSIGNALED(status)
sys.stdout.write(f"{num_killed}")
"""


@pytest.mark.slow
def test_what_killed_runs_left_is_completed_with_the_same_bytes(
    config: PrecomputeConfig, tmp_path: Path, llava_dir: Path
) -> None:
    """SIGKILL at random moments of one run after the other; what is visible between them is right, or absent."""
    undisturbed = config.model_copy(update={"output": tmp_path / "undisturbed"})
    score(undisturbed)
    killer = subprocess.run(
        [sys.executable, "-c", KILLER, config.model_dump_json()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killer.returncode == 0, killer.stderr
    assert int(killer.stdout) >= 3
    for number in published_shards(config.output):
        path = shard_path(config.output, number)
        assert path.read_bytes() == shard_path(undisturbed.output, number).read_bytes()
    score(config)
    assert shard_bytes(config.output) == shard_bytes(undisturbed.output)
    assert verify(config.output, config.dataset, progress=False).ok


def test_two_runs_on_one_output_do_not_hurt_each_other(config: PrecomputeConfig) -> None:
    results: list[Summary] = []
    runs = [threading.Thread(target=lambda: results.append(score(config, delay_s=0.01))) for _ in range(2)]
    for thread in runs:
        thread.start()
    for thread in runs:
        thread.join()
    assert [result.complete for result in results] == [True, True]
    assert sum(result.num_new_shards for result in results) == 3
    assert verify(config.output, config.dataset, progress=False).ok


def test_the_whole_vocabulary_is_kept_on_request(tmp_path: Path, llava_dir: Path) -> None:
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 3), top_k="all")
    score(config)
    manifest = read_manifest(config.output)
    assert manifest.capture.top_k == manifest.teacher.vocab_size
    for row in rows_of(config.output):
        assert set(row.conversations[0].scores.counts.tolist()) == {manifest.tokenizer.vocab_size}


def test_padding_reaches_the_teacher_as_a_square(tmp_path: Path, llava_dir: Path) -> None:
    sizes: dict[str, set[bool]] = {"pad": set(), "keep": set()}
    records = conversation_records(tmp_path, 3)
    for choice, square in sizes.items():
        config = make_config(tmp_path, llava_dir, records, image_aspect_ratio=choice, output=tmp_path / choice)

        def note(request: ScoreRequest, square: set[bool] = square) -> None:
            square.update(image.width == image.height for image in request.images)

        score(config, before=note)
    assert sizes == {"pad": {True}, "keep": {False}}


def test_a_limit_beyond_the_teachers_context_is_lowered_to_it(tmp_path: Path, llava_dir: Path) -> None:
    plans: list[ScoringPlan] = []

    def start(plan: ScoringPlan) -> Scorer:
        plans.append(plan)
        return StandInTeacher(plan)

    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 2), max_tokens=100_000)
    run(config, progress=False, start_teacher=start)
    assert plans[0].max_tokens == 2047  # of 2,048 positions one goes to the token that the engine generates


def test_images_are_given_to_the_teacher_as_they_are(tmp_path: Path, llava_dir: Path) -> None:
    seen: list[bytes] = []
    records = conversation_records(tmp_path, 2)
    config = make_config(tmp_path, llava_dir, records, image_aspect_ratio="keep")
    score(config, before=lambda request: seen.extend(image.tobytes() for image in request.images))
    assert seen == [Image.open(tmp_path / "1-0.png").tobytes()]
    assert Dataset.open(config.dataset, "kd")[1].images[0].path == "1-0.png"


class Recorder(StandInTeacher):
    """Notes the order of its requests and how often it was asked to score; refuses the samples in `refused`."""

    def __init__(self, plan: ScoringPlan, refused: frozenset[tuple[str, int]] = frozenset(), **teacher: Any) -> None:
        self.seen: list[ScoreRequest] = []
        self.num_calls = 0
        self._refused = refused
        self._keys: dict[tuple[int, int], str] = {}
        super().__init__(plan, before=self.seen.append, **teacher)

    def score(self, requests: Any) -> Any:
        self.num_calls += 1
        for key, scores in super().score(requests):
            name = next(request.sample_id for request in self.seen if request.key == key)
            refused = (name, key[1]) in self._refused
            yield key, (Refused(f"sample {name!r}: too strange") if refused else scores)


def record(config: PrecomputeConfig, **teacher: Any) -> tuple[Recorder, Summary]:
    teachers: list[Recorder] = []

    def start(plan: ScoringPlan) -> Scorer:
        teachers.append(Recorder(plan, **teacher))
        return teachers[-1]

    summary = run(config, progress=False, start_teacher=start)
    return teachers[0], summary


def test_all_shards_are_one_stream_and_the_longest_of_a_window_comes_first(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.pipeline._WINDOW", 5)
    teacher, _ = record(config)
    assert teacher.num_calls == 1
    lengths = [len(request.encoded.input_ids) + 15 * len(request.images) for request in teacher.seen]
    assert [sorted(request.key[0] for request in teacher.seen[i : i + 5]) for i in (0, 5)] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
    ]
    assert lengths[:5] == sorted(lengths[:5], reverse=True)
    assert lengths[5:] == sorted(lengths[5:], reverse=True)


def test_the_order_is_the_same_in_every_run(config: PrecomputeConfig) -> None:
    orders = []
    for number in range(3):
        teacher, _ = record(config.model_copy(update={"output": config.output / str(number)}))
        orders.append([request.key for request in teacher.seen])
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize("window", [1, 3, 256])
def test_the_order_of_scoring_does_not_show_in_the_shards(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    score(config)
    monkeypatch.setattr("precompute.pipeline._WINDOW", window)
    other = config.model_copy(update={"output": config.output / "other"})
    score(other, batch_size=7)
    assert shard_bytes(other.output) == shard_bytes(config.output)


def test_what_the_teacher_refuses_stops_the_run(config: PrecomputeConfig) -> None:
    with pytest.raises(DataError, match=r"^sample 's4': too strange\n\d shard\(s\) were written"):
        record(config, refused=frozenset({("s4", 0)}))


def test_a_pair_of_which_the_teacher_refuses_one_is_skipped_whole(tmp_path: Path, llava_dir: Path) -> None:
    records = preference_records(tmp_path, NUM_SAMPLES)
    config = make_config(tmp_path, llava_dir, records, kind="dpo", on_bad_sample="skip")
    _, summary = record(config, refused=frozenset({("s4", 0), ("s6", 1)}))
    assert [(entry.id, entry.reason) for entry in summary.skipped] == [
        ("s4", "sample 's4': too strange"),
        ("s6", "sample 's6': too strange"),
    ]
    assert [row.index for row in rows_of(config.output)] == [i for i in range(NUM_SAMPLES) if i not in (4, 6)]
    assert verify(config.output, config.dataset, progress=False).ok


def test_images_and_finished_shards_are_not_kept(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 samples only so many may be in memory as a small window and few decoded ones allow."""
    monkeypatch.setattr("precompute.pipeline._WINDOW", 8)
    monkeypatch.setattr("precompute.pipeline._DECODED_AHEAD", 2)
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 60))
    images: list[weakref.ref[Image.Image]] = []
    rows: list[weakref.ref[ShardRow]] = []
    most = {"images": 0, "rows": 0}

    def decode(job: Job, index: int, sample: Sample, real: Any = Job.decode) -> Any:
        found = real(job, index, sample)
        images.extend(map(weakref.ref, found))
        return found

    class Noted(ShardRow):
        def __init__(self, *values: Any) -> None:
            super().__init__(*values)
            rows.append(weakref.ref(self))

    def measure(_: ScoreRequest) -> None:
        most["images"] = max(most["images"], sum(ref() is not None for ref in images))
        most["rows"] = max(most["rows"], sum(ref() is not None for ref in rows))

    monkeypatch.setattr(Job, "decode", decode)
    monkeypatch.setattr("precompute.pipeline.ShardRow", Noted)
    score(config, before=measure, delay_s=0.005)
    assert len(images) == 60
    assert len(rows) == 60
    # Samples of two images each: three at the teacher, one drawn, two decoded ahead.
    assert 0 < most["images"] <= 2 * 6
    # The shards that a window touches, one that is written, two that wait.
    assert 0 < most["rows"] <= 4 * 6
    assert not any(ref() for ref in images)


class StopError(Exception):
    pass


def test_the_loop_waits_for_a_writer_that_falls_behind(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While no shard can be written, two wait, one is under way, and the loop stands with the fourth."""
    monkeypatch.setattr("precompute.pipeline._WINDOW", 4)
    go_on = threading.Event()
    num_scored = 0

    def write(*arguments: Any) -> Receipt:
        assert go_on.wait(30)
        return write_shard(*arguments)

    def count(_: ScoreRequest) -> None:
        nonlocal num_scored
        num_scored += 1

    monkeypatch.setattr("precompute.pipeline.write_shard", write)
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 60))
    runner = threading.Thread(target=lambda: score(config, before=count))
    runner.start()
    time.sleep(1)
    assert 16 <= num_scored <= 16 + 3
    assert published_shards(config.output) == ()
    go_on.set()
    runner.join()
    assert len(published_shards(config.output)) == 15


def test_a_writer_that_fails_stops_the_run_at_the_next_result(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.pipeline._WINDOW", 4)
    num_scored = 0

    def write(*_: Any) -> Receipt:
        raise StorageError("the disk is gone")

    def count(_: ScoreRequest) -> None:
        nonlocal num_scored
        num_scored += 1

    monkeypatch.setattr("precompute.pipeline.write_shard", write)
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 60))
    with pytest.raises(StorageError, match=r"^the disk is gone$"):
        score(config, before=count, delay_s=0.01)
    assert num_scored < 12


@pytest.mark.parametrize("failure", [ModelError("the engine died"), KeyboardInterrupt(), StopError("a defect")])
def test_shards_that_were_handed_to_the_writer_are_published_whatever_ends_the_run(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    monkeypatch.setattr("precompute.pipeline._WINDOW", 4)

    def write(*arguments: Any) -> Receipt:
        time.sleep(0.2)
        return write_shard(*arguments)

    def fail(request: ScoreRequest) -> None:
        if request.key[0] >= 12:
            raise failure

    monkeypatch.setattr("precompute.pipeline.write_shard", write)
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 20))
    if isinstance(failure, KeyboardInterrupt):
        assert score(config, before=fail, batch_size=1).interrupted
    else:
        with pytest.raises(type(failure), match=str(failure)):
            score(config, before=fail, batch_size=1)
    assert published_shards(config.output) == (0, 1, 2)
    assert not list(config.output.glob(".*.partial"))


def test_a_second_failure_while_finishing_does_not_hide_the_first(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("precompute.pipeline._WINDOW", 4)

    def write(*_: Any) -> Receipt:
        time.sleep(0.3)
        raise StorageError("the disk is gone")

    def fail(request: ScoreRequest) -> None:
        if request.key[0] >= 4:
            raise ModelError("the engine died")

    monkeypatch.setattr("precompute.pipeline.write_shard", write)
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 8))
    with pytest.raises(ModelError, match="the engine died"):
        score(config, before=fail, batch_size=1)
    assert "and while finishing: the disk is gone" in caplog.text


@pytest.mark.parametrize(("nodes", "engine"), [(1, "local"), (2, "ray"), (3, "local")])
def test_replicas_that_work_in_step_need_a_process_each(
    nodes: int, engine: Any, tmp_path: Path, llava_dir: Path
) -> None:
    records = conversation_records(tmp_path, 2)
    config = make_config(tmp_path, llava_dir, records, num_nodes=nodes, engine={"data_parallel_size": 2})
    with pytest.raises(ConfigError, match=r"data_parallel_size = 2 wants 2 processes.* --num-nodes 2"):
        run(config, progress=False, start_teacher=no_teacher, engine=engine)
    assert not config.output.exists()


class DrawingAside(StandInTeacher):
    """Draws its requests in a thread of its own, a few ahead of its answers, as the real one does."""

    def score(self, requests: Any) -> Any:
        feed = Feed(requests, ahead=3)

        def drawn() -> Iterator[ScoreRequest]:
            while not feed.ended:
                yield from feed.ready(1, wait=True)

        try:
            yield from super().score(drawn())
        finally:
            feed.close()


@pytest.mark.parametrize("part", ["writer", "loader", "teacher"])
def test_a_failure_anywhere_is_the_one_that_is_told_while_a_thread_draws(
    part: str, tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: dict[str, DecantError] = {
        "writer": StorageError("the disk is gone"),
        "loader": DataError("the image is gone"),
        "teacher": ModelError("the engine is gone"),
    }
    count = 0

    def fail(*_: Any, **__: Any) -> Any:
        nonlocal count
        count += 1
        if part == "writer" or count > 9:
            raise failures[part]
        return ()

    targets = {"writer": "precompute.pipeline.write_shard", "loader": "precompute.plan.Job.decode"}
    if part in targets:
        monkeypatch.setattr(targets[part], fail)
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 40))
    with pytest.raises(type(failures[part]), match=f"{failures[part]}"):
        run(
            config,
            progress=False,
            start_teacher=lambda plan: DrawingAside(plan, before=fail if part == "teacher" else None, delay_s=0.001),
        )


def test_a_teacher_may_draw_its_requests_in_another_thread(tmp_path: Path, llava_dir: Path) -> None:
    records = conversation_records(tmp_path, 40)
    for record in records[4:12] + records[13:40:2]:
        record["image"] = "nowhere.png"
    config = make_config(tmp_path, llava_dir, records, on_bad_sample="skip")
    summary = run(config, progress=False, start_teacher=DrawingAside)
    assert (summary.complete, summary.num_new_shards, len(summary.skipped)) == (True, 10, 8 + 14)
    assert verify(config.output, config.dataset, progress=False).ok
