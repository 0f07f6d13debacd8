"""The order of the teacher's requests, and how much is held in memory meanwhile."""

import weakref
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from common.data.samples import Sample
from common.errors import DataError
from common.shards.score_shard import ShardRow
from precompute.config import PrecomputeConfig
from precompute.logits.job import CaptureJob
from precompute.logits.run import CaptureSummary, run_capture
from precompute.scorer import RejectedRequest, Scorer, ScoreRequest, ScorerSettings
from precompute.verify.logits import verify_logits
from tests.support.captures import NUM_SAMPLES, score, shard_bytes
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config, preference_records
from tests.support.outputs import read_all_rows


class Recorder(FakeTeacher):
    """Records its requests and counts calls of `score`. `rejected` conversations are pairs of sample id and number."""

    def __init__(
        self, settings: ScorerSettings, rejected: frozenset[tuple[str, int]] = frozenset(), **teacher: Any
    ) -> None:
        self.seen: list[ScoreRequest] = []
        self.num_calls = 0
        self._rejected = rejected
        self._keys: dict[tuple[int, int], str] = {}
        super().__init__(settings, before=self.seen.append, **teacher)

    def score(self, requests: Any) -> Any:
        self.num_calls += 1
        for key, scores in super().score(requests):
            name = next(request.sample_id for request in self.seen if request.key == key)
            rejected = (name, key[1]) in self._rejected
            yield key, (RejectedRequest(f"sample {name!r}: too strange") if rejected else scores)


def record(config: PrecomputeConfig, **teacher: Any) -> tuple[Recorder, CaptureSummary]:
    teachers: list[Recorder] = []

    def start(settings: ScorerSettings) -> Scorer:
        teachers.append(Recorder(settings, **teacher))
        return teachers[-1]

    summary = run_capture(config, progress=False, start_teacher=start)
    return teachers[0], summary


def test_all_shards_are_one_stream_and_the_longest_of_a_window_comes_first(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("precompute.logits.pipeline._WINDOW", 5)
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


@pytest.mark.slow
@pytest.mark.parametrize("window", [1, 3, 256])
def test_shards_do_not_depend_on_the_order_of_scoring(
    config: PrecomputeConfig, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    score(config)
    monkeypatch.setattr("precompute.logits.pipeline._WINDOW", window)
    other = config.model_copy(update={"output": config.output / "other"})
    score(other, batch_size=7)
    assert shard_bytes(other.output) == shard_bytes(config.output)


def test_a_rejected_sample_stops_the_run(config: PrecomputeConfig) -> None:
    with pytest.raises(DataError, match=r"^sample 's4': too strange\n\d shard\(s\) were written"):
        record(config, rejected=frozenset({("s4", 0)}))


def test_a_pair_with_one_rejected_conversation_is_skipped(tmp_path: Path, llava_dir: Path) -> None:
    records = preference_records(tmp_path, NUM_SAMPLES)
    config = make_config(tmp_path, llava_dir, records, kind="dpo", on_bad_sample="skip")
    _, summary = record(config, rejected=frozenset({("s4", 0), ("s6", 1)}))
    assert [(entry.id, entry.reason) for entry in summary.skipped] == [
        ("s4", "sample 's4': too strange"),
        ("s6", "sample 's6': too strange"),
    ]
    assert [row.index for row in read_all_rows(config.output)] == [i for i in range(NUM_SAMPLES) if i not in (4, 6)]
    assert verify_logits(config.output, config.dataset, progress=False).ok


def test_images_and_finished_shards_are_not_kept(
    tmp_path: Path, llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 samples, at most a small window and a few decoded ones may be in memory."""
    monkeypatch.setattr("precompute.logits.pipeline._WINDOW", 8)
    monkeypatch.setattr("precompute.logits.pipeline._DECODED_AHEAD", 2)
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 60))
    images: list[weakref.ref[Image.Image]] = []
    rows: list[weakref.ref[ShardRow]] = []
    peak = {"images": 0, "rows": 0}

    def load_images(job: CaptureJob, index: int, sample: Sample, real: Any = CaptureJob.load_images) -> Any:
        found = real(job, index, sample)
        images.extend(map(weakref.ref, found))
        return found

    class TrackedRow(ShardRow):
        def __init__(self, *values: Any) -> None:
            super().__init__(*values)
            rows.append(weakref.ref(self))

    def measure(_: ScoreRequest) -> None:
        peak["images"] = max(peak["images"], sum(ref() is not None for ref in images))
        peak["rows"] = max(peak["rows"], sum(ref() is not None for ref in rows))

    monkeypatch.setattr(CaptureJob, "load_images", load_images)
    monkeypatch.setattr("precompute.logits.pipeline.ShardRow", TrackedRow)
    score(config, before=measure, delay_s=0.005)
    # Three belong to the two samples on which a started teacher is checked.
    assert len(images) == 60 + 3
    assert len(rows) == 60
    # Six samples of two images: three at the teacher, one taken, two decoded ahead.
    assert 0 < peak["images"] <= 2 * 6
    # Shards of a window, the one that is written, and two that wait.
    assert 0 < peak["rows"] <= 4 * 6
    assert not any(ref() for ref in images)
