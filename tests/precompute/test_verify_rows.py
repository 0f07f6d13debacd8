"""Every kind of damage to a row, behind a receipt that matches it, is found under its own name."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from common.manifest import read_manifest
from common.scores import TeacherScores
from common.shards import ShardRow, write_shard
from precompute.verify import verify
from tests.precompute.outputs import failed, rows_of


def with_scores(row: ShardRow, **changes: object) -> ShardRow:
    conversation = row.conversations[0]
    scores = dataclasses.replace(conversation.scores, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(row, conversations=(dataclasses.replace(conversation, scores=scores),))


def with_tokens(row: ShardRow, **changes: object) -> ShardRow:
    conversation = row.conversations[0]
    encoded = dataclasses.replace(conversation.encoded, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(row, conversations=(dataclasses.replace(conversation, encoded=encoded),))


def scores_of(row: ShardRow) -> TeacherScores:
    return row.conversations[0].scores


def put(array: np.ndarray, position: int, value: float) -> np.ndarray:
    changed = array.copy()
    changed[position] = value
    return changed


def swap_first_entries(row: ShardRow) -> ShardRow:
    ids, logprobs = scores_of(row).ids.copy(), scores_of(row).logprobs.copy()
    ids[:2], logprobs[:2] = ids[1::-1], logprobs[1::-1]
    return with_scores(row, ids=ids, logprobs=logprobs)


def raise_first_entry(row: ShardRow) -> ShardRow:
    """Kept mass beyond 1: the two best entries get a log-prob of -0.1 each."""
    logprobs = put(put(scores_of(row).logprobs, 0, -0.1), 1, -0.1)
    return with_scores(row, logprobs=logprobs)


def disown(row: ShardRow) -> ShardRow:
    """Changes the own log-prob of a token that is kept."""
    scores = scores_of(row)
    rows = np.repeat(np.arange(scores.num_rows), scores.counts)
    kept = np.flatnonzero(scores.ids == row.conversations[0].encoded.response_ids[rows])
    return with_scores(row, own_logprobs=put(scores.own_logprobs, rows[kept[0]], scores.logprobs[kept[0]] - 0.01))


def keep_own(row: ShardRow) -> ShardRow:
    """Puts the first response token at the head of its row's kept entries, with its own log-prob."""
    scores = scores_of(row)
    own = float(scores.logprobs[0])
    ids = put(scores.ids, 0, float(row.conversations[0].encoded.response_ids[0]))
    return with_scores(row, ids=ids, own_logprobs=put(scores.own_logprobs, 0, own))


ROW_DAMAGE: dict[str, tuple[Callable[[ShardRow], ShardRow], str, str]] = {
    "token id too large": (
        lambda row: with_tokens(row, input_ids=put(row.conversations[0].encoded.input_ids, 0, 295)),
        "tokens",
        "the tokenizer has 293",
    ),
    "negative token id": (
        lambda row: with_tokens(row, input_ids=put(row.conversations[0].encoded.input_ids, 0, -1)),
        "tokens",
        "token ids from -1",
    ),
    "placeholder lost": (
        lambda row: dataclasses.replace(row, sample=dataclasses.replace(row.sample, images=())),
        "tokens",
        "1 image placeholders for 0 images",
    ),
    "span outside": (
        lambda row: with_tokens(row, spans=row.conversations[0].encoded.spans + 1000),
        "tokens",
        "leave the sequence",
    ),
    "span at the first token": (
        lambda row: with_tokens(row, spans=np.array([[0, scores_of(row).num_rows]], np.int32)),
        "tokens",
        "spans",
    ),
    "overlapping spans": (
        lambda row: with_tokens(row, spans=np.array([[1, 3], [2, scores_of(row).num_rows]], np.int32)),
        "tokens",
        "overlap",
    ),
    "kept id of the padding": (
        lambda row: with_scores(row, ids=put(scores_of(row).ids, 0, 300)),
        "kept",
        "kept ids from",
    ),
    "kept log-prob infinite": (
        lambda row: with_scores(row, logprobs=put(scores_of(row).logprobs, 0, np.inf)),
        "kept",
        "1 kept log-probs are not finite",
    ),
    "kept log-prob nan": (
        lambda row: with_scores(row, logprobs=put(scores_of(row).logprobs, 0, np.nan)),
        "kept",
        "not finite",
    ),
    "kept log-prob positive": (
        lambda row: with_scores(row, logprobs=put(scores_of(row).logprobs, 0, 0.5)),
        "kept",
        "expected at most 0",
    ),
    "kept twice": (
        lambda row: with_scores(row, ids=put(scores_of(row).ids, 1, scores_of(row).ids[0])),
        "kept",
        "same id twice",
    ),
    "not sorted": (swap_first_entries, "kept", "row 0 is not in descending order"),
    "mass beyond one": (raise_first_entry, "mass", "expected at most 1"),
    "rest mass off": (
        lambda row: with_scores(row, rest_mass=put(scores_of(row).rest_mass, 2, 0.1)),
        "mass",
        "row 2 keeps",
    ),
    "rest mass nan": (
        lambda row: with_scores(row, rest_mass=put(scores_of(row).rest_mass, 2, np.nan)),
        "mass",
        "not finite",
    ),
    "own log-prob nan": (
        lambda row: with_scores(row, own_logprobs=put(scores_of(row).own_logprobs, 0, np.nan)),
        "own",
        "1 own log-probs are not finite",
    ),
    "own log-prob positive": (
        lambda row: with_scores(row, own_logprobs=put(scores_of(row).own_logprobs, 0, 0.5)),
        "own",
        "expected at most 0",
    ),
    "own log-prob not the kept one": (lambda row: disown(keep_own(row)), "own", "not that of its kept entry"),
    "own log-prob above the kept ones": (
        lambda row: with_scores(row, own_logprobs=put(scores_of(row).own_logprobs, 0, -0.001)),
        "own",
        "higher log-prob than a kept one|not that of its kept entry",
    ),
    "index of another shard": (lambda row: dataclasses.replace(row, index=1), "order", "holds rows 4 to 7"),
    "id of another row": (
        lambda row: dataclasses.replace(row, sample=dataclasses.replace(row.sample, id="s2")),
        "order",
        "its id occurs twice",
    ),
}


@pytest.mark.parametrize("what", ROW_DAMAGE)
def test_damage_to_a_row_is_found(output: Path, what: str) -> None:
    damage, check, message = ROW_DAMAGE[what]
    rows = rows_of(output, 1)
    write_shard(output, 1, read_manifest(output), [damage(rows[0]), *rows[1:]], [])
    report = verify(output, progress=False)
    assert re.search(message, failed(report)[check]), failed(report)
    assert json.loads(report.to_json())["ok"] is False
