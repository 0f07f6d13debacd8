"""The outcome of a capture in words."""

from dataclasses import replace
from pathlib import Path

from common.shards.manifest import SkippedSample
from precompute.logits.run import CaptureSummary
from tests.support.captures import rendered

COMPLETE = CaptureSummary(
    output=Path("out"),
    num_samples=32,
    num_shards=8,
    num_complete_shards=8,
    num_rows=32,
    num_scored_tokens=1000,
    num_bytes=2000,
    skipped=(),
    num_own_shards=4,
    num_own_missing=0,
    num_new_shards=4,
    num_new_rows=16,
    num_new_tokens=600,
    scoring_s=3.0,
    interrupted=False,
)
MISSING = replace(COMPLETE, num_complete_shards=6)


def test_the_message_says_what_is_left_to_do() -> None:
    assert COMPLETE.message == "all 8 shards are complete"
    assert replace(COMPLETE, num_new_shards=0).message == "all 8 shards are complete; nothing was left to do"
    assert MISSING.message == "this node's 4 shards are complete; 2 of 8 are left to the other nodes"
    again = "6 of 8 shards are complete; run the same command again to continue"
    assert replace(MISSING, num_own_missing=2).message == again
    assert replace(MISSING, num_own_missing=2, interrupted=True).message == f"interrupted: {again}"


def test_the_speed_is_that_of_this_run() -> None:
    assert COMPLETE.new_tokens_per_s == 200.0
    assert "600 tokens in 3 s, 200 tokens/s" in rendered(COMPLETE)
    nothing_new = replace(COMPLETE, num_new_tokens=0, scoring_s=0.0)
    assert nothing_new.new_tokens_per_s == 0.0
    assert "teacher read" not in rendered(nothing_new)


def test_the_first_skipped_samples_are_listed() -> None:
    skipped = tuple(SkippedSample(index=index, id=f"s{index}", reason="too long") for index in range(23))
    text = rendered(replace(COMPLETE, skipped=skipped))
    assert "skipped 's19': too long" in text
    assert "s20" not in text
    assert "and 3 more, listed in the receipts beside the shards" in text
