"""Tests of the limit on skipped samples."""

from pathlib import Path

import pytest

from common.data.bad_samples import check_skipped_share
from common.errors import DataError
from precompute.logits.run import run_capture
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config

PREFIX = "/data/all.json: sample {} (line {}): "


def test_reasons_that_differ_only_in_their_sample_are_counted_together() -> None:
    missing = [PREFIX.format(f"'s{n}'", n) + f"image coco/{n}.jpg does not exist below /images" for n in range(7)]
    long = [f"sample {f's{n}'!r}: has {900 + n} tokens, max_tokens is 512" for n in range(3)]
    with pytest.raises(DataError) as raised:
        check_skipped_share([*long, *missing], 100, 0.05)
    first, second, third, *_ = str(raised.value).splitlines()
    assert first == "10 of 100 samples (10%) cannot be used, but max_skipped = 0.05 allows 5%; most frequent:"
    assert second == f"  7 such as: {missing[0]}"
    assert third == f"  3 such as: {long[0]}"


@pytest.mark.parametrize(("num_skipped", "limit"), [(0, 0.0), (5, 0.05), (100, 1.0)])
def test_a_share_within_the_limit_passes(num_skipped: int, limit: float) -> None:
    check_skipped_share(["x"] * num_skipped, 100, limit)
    if num_skipped < 100:
        with pytest.raises(DataError):
            check_skipped_share(["x"] * (num_skipped + 1), 100, limit)


def test_too_many_bad_samples_end_a_run_before_the_engine_and_a_higher_limit_continues_it(
    tmp_path: Path, llava_dir: Path
) -> None:
    # So long a path that a message of 200 characters would not reach the reason.
    tmp_path /= "x" * 150
    tmp_path.mkdir()
    records = conversation_records(tmp_path, 10)
    for record in records[:3]:
        record["image"] = "nowhere.png"
    settings = {"on_bad_sample": "skip", "max_skipped": 0.2}

    def no_teacher(_: object) -> FakeTeacher:
        raise AssertionError("the engine was started")

    config = make_config(tmp_path, llava_dir, records, **settings)
    with pytest.raises(
        DataError, match=r"3 of 10 samples \(30%\) cannot be used.*\n  2 such as: .*nowhere\.png does not"
    ):
        run_capture(config, progress=False, start_teacher=no_teacher)
    config = make_config(tmp_path, llava_dir, records, **{**settings, "max_skipped": 0.3})
    summary = run_capture(config, progress=False, start_teacher=FakeTeacher)
    assert (summary.complete, summary.num_rows, len(summary.skipped)) == (True, 7, 3)
    summary.check_skipped(0.3)
    with pytest.raises(DataError, match="max_skipped = 0"):
        summary.check_skipped(0.0)
