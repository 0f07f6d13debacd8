"""Each kind of damage to a row is found by its check, also if the receipt matches the damaged file."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.shards.manifest import read_manifest, shard_path
from common.shards.score_shard import ShardFile, ShardRow, write_shard
from common.shards.scores import TeacherScores, scores_from_draws, scores_from_topk
from precompute.logits.run import run_capture
from precompute.verify.logits import verify_logits
from precompute.verify.score_checks import mass_problems
from tests.support.builders import make_manifest, make_rows
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config
from tests.support.models import tiny_llava
from tests.support.outputs import first_problems, read_rows


def replace_scores(row: ShardRow, **changes: object) -> ShardRow:
    conversation = row.conversations[0]
    scores = dataclasses.replace(conversation.scores, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(row, conversations=(dataclasses.replace(conversation, scores=scores),))


def replace_tokens(row: ShardRow, **changes: object) -> ShardRow:
    conversation = row.conversations[0]
    encoded = dataclasses.replace(conversation.encoded, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(row, conversations=(dataclasses.replace(conversation, encoded=encoded),))


def get_scores(row: ShardRow) -> TeacherScores:
    return row.conversations[0].scores


def with_value(array: np.ndarray, position: int, value: float) -> np.ndarray:
    changed = array.copy()
    changed[position] = value
    return changed


def exceed_mass(row: ShardRow) -> ShardRow:
    """Raises the kept mass above 1: the two best entries get a log-prob of -0.1 each."""
    logprobs = with_value(with_value(get_scores(row).logprobs, 0, -0.1), 1, -0.1)
    return replace_scores(row, logprobs=logprobs)


def change_own_logprob(row: ShardRow) -> ShardRow:
    """Changes the own log-prob of a token that is kept."""
    scores = get_scores(row)
    rows = np.repeat(np.arange(scores.num_rows), scores.counts)
    kept = np.flatnonzero(scores.ids == row.conversations[0].encoded.response_ids[rows])
    return replace_scores(
        row, own_logprobs=with_value(scores.own_logprobs, rows[kept[0]], scores.logprobs[kept[0]] - 0.01)
    )


def keep_own_token(row: ShardRow) -> ShardRow:
    """Makes the first response token the first of its row's kept entries, with that entry's log-prob."""
    scores = get_scores(row)
    own = float(scores.logprobs[0])
    ids = with_value(scores.ids, 0, float(row.conversations[0].encoded.response_ids[0]))
    return replace_scores(row, ids=ids, own_logprobs=with_value(scores.own_logprobs, 0, own))


ROW_DAMAGE: dict[str, tuple[Callable[[ShardRow], ShardRow], str, str]] = {
    "token id too large": (
        lambda row: replace_tokens(row, input_ids=with_value(row.conversations[0].encoded.input_ids, 0, 295)),
        "tokens",
        "the tokenizer has 293",
    ),
    "negative token id": (
        lambda row: replace_tokens(row, input_ids=with_value(row.conversations[0].encoded.input_ids, 0, -1)),
        "tokens",
        "token ids from -1",
    ),
    "placeholder lost": (
        lambda row: dataclasses.replace(row, sample=dataclasses.replace(row.sample, images=())),
        "tokens",
        "1 image placeholders for 0 images",
    ),
    "span outside": (
        lambda row: replace_tokens(row, spans=row.conversations[0].encoded.spans + 1000),
        "tokens",
        "leave the sequence",
    ),
    "span at the first token": (
        lambda row: replace_tokens(row, spans=np.array([[0, get_scores(row).num_rows]], np.int32)),
        "tokens",
        "spans",
    ),
    "too many tokens": (
        lambda row: replace_tokens(
            row, input_ids=np.append(row.conversations[0].encoded.input_ids, np.ones(600, np.int32))
        ),
        "tokens",
        "images expanded; the limit was 512",
    ),
    "overlapping spans": (
        lambda row: replace_tokens(row, spans=np.array([[1, 3], [2, get_scores(row).num_rows]], np.int32)),
        "tokens",
        "overlap",
    ),
    "kept log-prob infinite": (
        lambda row: replace_scores(row, logprobs=with_value(get_scores(row).logprobs, 0, np.inf)),
        "kept",
        "1 kept log-probs are not finite",
    ),
    "kept log-prob nan": (
        lambda row: replace_scores(row, logprobs=with_value(get_scores(row).logprobs, 0, np.nan)),
        "kept",
        "not finite",
    ),
    "kept log-prob positive": (
        lambda row: replace_scores(row, logprobs=with_value(get_scores(row).logprobs, 0, 0.5)),
        "kept",
        "expected at most 0",
    ),
    "mass beyond one": (exceed_mass, "mass", "expected at most 1"),
    "rest mass off": (
        lambda row: replace_scores(row, rest_mass=with_value(get_scores(row).rest_mass, 2, 0.1)),
        "mass",
        "row 2 keeps",
    ),
    "rest mass nan": (
        lambda row: replace_scores(row, rest_mass=with_value(get_scores(row).rest_mass, 2, np.nan)),
        "mass",
        "from nan to nan, expected 0 to 1",
    ),
    "own log-prob nan": (
        lambda row: replace_scores(row, own_logprobs=with_value(get_scores(row).own_logprobs, 0, np.nan)),
        "own",
        "1 own log-probs are not finite",
    ),
    "own log-prob positive": (
        lambda row: replace_scores(row, own_logprobs=with_value(get_scores(row).own_logprobs, 0, 0.5)),
        "own",
        "expected at most 0",
    ),
    "own log-prob not the kept one": (
        lambda row: change_own_logprob(keep_own_token(row)),
        "own",
        "not that of its kept entry",
    ),
    "own log-prob above the kept ones": (
        lambda row: replace_scores(row, own_logprobs=with_value(get_scores(row).own_logprobs, 0, -0.001)),
        "own",
        "higher log-prob than a kept one|not that of its kept entry",
    ),
    "index of another shard": (lambda row: dataclasses.replace(row, index=1), "order", "holds rows 4 to 7"),
    "index of the next row": (lambda row: dataclasses.replace(row, index=5), "order", "comes after row 5"),
    "id of another row": (
        lambda row: dataclasses.replace(row, sample=dataclasses.replace(row.sample, id="s2")),
        "order",
        "its id occurs twice",
    ),
}


def drop_last_entry(row: ShardRow) -> ShardRow:
    """Drops the last entry of row 0, with a count and a rest mass that agree."""
    scores = get_scores(row)
    last = int(scores.counts[0]) - 1
    lost = float(np.exp(scores.logprobs[last], dtype=np.float64))
    return replace_scores(
        row,
        ids=np.delete(scores.ids, last),
        logprobs=np.delete(scores.logprobs, last),
        counts=with_value(scores.counts, 0, last),
        rest_mass=with_value(scores.rest_mass, 0, float(scores.rest_mass[0]) + lost),
    )


def add_entry(row: ShardRow) -> ShardRow:
    """Adds an entry of little mass to row 0, with a count and a rest mass that agree."""
    scores = get_scores(row)
    count, logprob = int(scores.counts[0]), float(scores.logprobs[scores.counts[0] - 1]) - 1.0
    taken = {*scores.ids[:count].tolist(), int(row.conversations[0].encoded.response_ids[0])}
    token_id = next(i for i in range(293) if i not in taken)
    rest = float(scores.rest_mass[0]) - float(np.exp(np.float32(logprob), dtype=np.float64))
    return replace_scores(
        row,
        ids=np.insert(scores.ids, count, token_id),
        logprobs=np.insert(scores.logprobs, count, logprob),
        counts=with_value(scores.counts, 0, count + 1),
        rest_mass=with_value(scores.rest_mass, 0, rest),
    )


@pytest.mark.parametrize("what", ROW_DAMAGE)
def test_damage_to_a_row_is_found(output: Path, what: str) -> None:
    damage, check, message = ROW_DAMAGE[what]
    rows = read_rows(output, 1)
    write_shard(output, 1, read_manifest(output), [damage(rows[0]), *rows[1:]], [])
    report = verify_logits(output, progress=False)
    assert re.search(message, first_problems(report)[check]), first_problems(report)
    assert json.loads(report.to_json())["ok"] is False


@pytest.fixture(scope="module")
def no_padding_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("no-padding"), padded_rows=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "damage", "message"),
    [
        ({"top_k": 8}, drop_last_entry, "row 0 keeps too few entries: 7 with a mass of .*, expected 8"),
        ({"top_k": 40, "top_p": 0.5}, drop_last_entry, "too few entries: .*, expected 0.5 in as few as hold it"),
        ({"top_k": 40, "top_p": 0.5}, add_entry, "too many entries: .*, expected 0.5 in as few as hold it"),
        ({"top_k": 40, "top_p": 0.01, "min_k": 5}, drop_last_entry, "row 0 keeps too few entries: 4"),
        ({"top_k": 40, "top_p": 0.01, "min_k": 5}, add_entry, "row 0 keeps too many entries: 6"),
    ],
)
def test_rows_of_the_wrong_length_are_found(
    tmp_path: Path,
    no_padding_dir: Path,
    settings: dict[str, Any],
    damage: Callable[[ShardRow], ShardRow],
    message: str,
) -> None:
    records = conversation_records(tmp_path, 10)
    config = make_config(tmp_path, no_padding_dir, records, precision="fp32", **settings)
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    assert verify_logits(config.output, config.dataset, progress=False).ok
    rows = read_rows(config.output, 1)
    write_shard(config.output, 1, read_manifest(config.output), [damage(rows[0]), *rows[1:]], [])
    found = first_problems(verify_logits(config.output, progress=False))
    assert found.keys() == {"mass"}
    assert re.search(message, found["mass"]), found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "q8", "q6"])
@pytest.mark.parametrize(
    "settings", [{"top_k": 290, "top_p": 0.9, "min_k": 3}, {"top_k": "all", "top_p": 1.0}, {"top_k": 1}, {"top_k": 40}]
)
def test_intact_rows_pass_in_every_precision_and_selection(
    tmp_path: Path, llava_dir: Path, settings: dict[str, Any], precision: str
) -> None:
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 4), precision=precision, **settings)
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    assert verify_logits(config.output, config.dataset, progress=False).ok


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, llava_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    config = make_config(root, llava_dir, conversation_records(root, 10), top_k=0, num_draws=30, seed=3)
    run_capture(config, progress=False, start_teacher=FakeTeacher)
    return root


def replace_draws(row: ShardRow, position: int, change: int) -> ShardRow:
    """Changes an entry's number of draws; its log-prob is computed from that when it is read."""
    draws = get_scores(row).draws
    assert draws is not None
    return replace_scores(row, draws=with_value(draws, position, draws[position] + change))


def find_row(row: ShardRow, holds: Callable[[np.ndarray], bool]) -> tuple[int, np.ndarray]:
    """Returns where the entries of the first row for which `holds` begin, and their draws."""
    scores = get_scores(row)
    assert scores.draws is not None
    ends = np.cumsum(scores.counts)
    for start, end in zip(ends - scores.counts, ends, strict=True):
        if holds(scores.draws[start:end]):
            return int(start), scores.draws[start:end]
    raise AssertionError("no such row")


def drop_draw(row: ShardRow) -> ShardRow:
    start, draws = find_row(row, lambda draws: draws[0] > draws[1])
    assert draws[0] > 1
    return replace_draws(row, start, -1)


DRAW_DAMAGE: dict[str, tuple[Callable[[ShardRow], ShardRow], str, str]] = {
    "one draw less": (drop_draw, "mass", "expected a sum of 1"),
    "one draw too many": (lambda row: replace_draws(row, 0, 1), "mass", "expected (at most|a sum of) 1"),
    "more draws than there were": (lambda row: replace_draws(row, 0, 30), "pages", "expected at most 30"),
    "rest mass off": (
        lambda row: replace_scores(row, rest_mass=with_value(get_scores(row).rest_mass, 2, 0.5)),
        "mass",
        "row 2 keeps",
    ),
    "own log-prob positive": (
        lambda row: replace_scores(row, own_logprobs=with_value(get_scores(row).own_logprobs, 0, 0.5)),
        "own",
        "expected at most 0",
    ),
}


def test_drawn_entries_pass_every_check_and_are_reproducible(drawn: Path, tmp_path: Path, llava_dir: Path) -> None:
    report = verify_logits(drawn / "out", drawn / "data.jsonl", progress=False)
    assert report.ok
    assert all(check.num_checked for check in report.checks)
    again = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 10), top_k=0, num_draws=30, seed=3)
    run_capture(again, progress=False, start_teacher=FakeTeacher)
    for number in range(3):
        assert shard_path(again.output, number).read_bytes() == shard_path(drawn / "out", number).read_bytes()


def test_a_row_that_keeps_all_draws_has_a_mass_of_1(drawn: Path) -> None:
    """A sum of shares would exceed 1 for some numbers of draws."""
    manifest = read_manifest(drawn / "out")
    for num_draws in range(1, 200):
        capture = manifest.capture.model_copy(update={"num_draws": num_draws})
        scores = scores_from_draws(np.zeros(1), np.arange(num_draws)[None])
        assert list(mass_problems(scores, manifest.model_copy(update={"capture": capture}))) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16", "q8", "q6"])
def test_a_row_that_just_reaches_top_p_is_long_enough_after_rounding(tmp_path: Path, precision: str) -> None:
    # Quantised precisions round a rest mass of 0.3 by up to 6e-5.
    manifest = make_manifest(precision=precision, top_k=300, top_p=0.7)
    (row,) = make_rows("kd", 1)
    conversation = row.conversations[0]
    rng = np.random.default_rng(0)
    probs = np.stack([np.full(8, 0.4), 0.3 + rng.uniform(1e-7, 2e-5, 8)], axis=1)
    own, ids = np.full(8, -9.0), np.tile([5, 7], (8, 1))
    scores = scores_from_topk(own, ids, np.log(probs).astype(np.float32), top_p=0.7)
    assert scores.counts.tolist() == [2] * 8
    conversation = dataclasses.replace(conversation, scores=scores)
    write_shard(tmp_path, 0, manifest, [dataclasses.replace(row, conversations=(conversation,))], ())
    (read,) = ShardFile(shard_path(tmp_path, 0), manifest, 0)
    if precision in ("q8", "q6"):
        assert read.conversations[0].scores.rest_mass.max() > 0.3 + 1.1e-5
    assert list(mass_problems(read.conversations[0].scores, manifest)) == []
    # A single entry is too little in every precision.
    alone = scores_from_topk(own, ids[:, :1], np.log(probs[:, :1]).astype(np.float32))
    assert "too few" in " ".join(mass_problems(alone, manifest))


@pytest.mark.parametrize("what", DRAW_DAMAGE)
def test_damage_to_drawn_entries_is_found(drawn: Path, tmp_path: Path, what: str) -> None:
    damage, check, message = DRAW_DAMAGE[what]
    output = shutil.copytree(drawn / "out", tmp_path / "out")
    rows = read_rows(output, 1)
    write_shard(output, 1, read_manifest(output), [damage(rows[0]), *rows[1:]], [])
    found = first_problems(verify_logits(output, progress=False))
    assert re.search(message, found[check]), found
