"""vLLM's prompt log-probs as teacher scores, on values written by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.data.chat_encoding import EncodedChat
from common.errors import ModelError
from common.shards.scores import TeacherScores
from precompute.config import EngineConfig
from precompute.engine.row_request import RowRequest
from precompute.engine.score_conversion import (
    ExpandedPrompt,
    draw_seed,
    expanded_positions,
    rows_from_flat_logprobs,
    scores_from_rows,
)
from precompute.scorer import ScorerSettings

IMAGE = 9

# Own sequence: two text tokens, an image, two text tokens, of which the last two and the second are scored.
ENCODED = EncodedChat(np.array([4, 5, IMAGE, 6, 7], np.int32), np.array([[1, 2], [3, 5]], np.int32), IMAGE)
EXPANDED = [4, 5, IMAGE, IMAGE, IMAGE, 6, 7]

Row = list[tuple[int, float]]


class FlatRows:
    """The fields of vLLM's FlatLogprobs: entries of all rows, and where each row's entries are. Row 0 has none."""

    def __init__(self, rows: list[Row]) -> None:
        stops = np.cumsum([0, 0, *map(len, rows)]).tolist()
        self.start_indices, self.end_indices = stops[:-1], stops[1:]
        self.token_ids = [token for row in rows for token, _ in row]
        self.logprobs = [logprob for row in rows for _, logprob in row]

    def __len__(self) -> int:
        return len(self.start_indices)


def make_settings(**changes: Any) -> ScorerSettings:
    settings = {
        "model_dir": Path(),
        "engine": EngineConfig(),
        "max_tokens": 8,
        "max_images": 1,
        "top_k": 0 if changes.get("num_draws") else 2,
        "top_p": None,
        "min_k": 1,
        "num_draws": None,
        "seed": 0,
        "generate": None,
        "node_rank": 0,
        "vocab_size": 10,
        "output_vocab_size": 12,
    }
    return ScorerSettings(**{**settings, **changes})


def convert(
    rows: list[Row], ids: list[int] = EXPANDED, encoded: EncodedChat = ENCODED, **settings: Any
) -> TeacherScores:
    """Returns the scores that rows of vLLM give a conversation; a row has the own token first, then the best ones."""
    scorer_settings = make_settings(**settings)
    where = "sample 'a'"
    images = ((ids.index(IMAGE), ids.count(IMAGE)),) if IMAGE in ids else ()
    positions = expanded_positions(ExpandedPrompt(np.array(ids, np.int32), images), encoded, where)
    request = RowRequest(
        rows=(positions - 1).astype(np.int32),
        targets=encoded.response_ids,
        vocab_size=scorer_settings.output_vocab_size,
        top_k=scorer_settings.top_k,
        num_draws=scorer_settings.num_draws or 0,
        seed="5",
    )
    found = rows_from_flat_logprobs(FlatRows(rows), request, request.rows + 1, where)
    return scores_from_rows(found, scorer_settings, where)


def certain(token: int) -> Row:
    return [(token, -0.1), (token, -0.1), (0, -2.5)]


ROWS = [
    [(5, -3.0), (2, -0.5), (1, -1.5)],  # the own token is not among the best two
    certain(IMAGE),
    certain(IMAGE),
    certain(IMAGE),
    [(6, -0.25), (6, -0.25), (3, -2.0)],
    [(7, -1.0), (1, -1.0), (7, -1.0)],  # a tie that is not in the order of ids, after sorting it is
]


def test_rows_are_those_of_the_scored_tokens_around_an_expanded_image() -> None:
    scores = convert(ROWS)
    assert scores.own_logprobs.tolist() == [-3.0, -0.25, -1.0]
    assert scores.counts.tolist() == [2, 2, 2]
    assert scores.ids.tolist() == [2, 1, 6, 3, 1, 7]
    assert scores.logprobs.tolist() == [-0.5, -1.5, -0.25, -2.0, -1.0, -1.0]
    rest = [1 - np.exp(a) - np.exp(b) for a, b in ((-0.5, -1.5), (-0.25, -2.0), (-1.0, -1.0))]
    np.testing.assert_allclose(scores.rest_mass, rest, rtol=1e-6)


def test_the_own_token_is_not_kept_beyond_the_best() -> None:
    assert 5 not in convert(ROWS).ids[:2]


def test_masked_padding_of_the_output_layer_is_left_out_and_other_padding_is_refused() -> None:
    rows = [*ROWS[:4], [(6, -0.25), (6, -0.25), (11, -np.inf)], ROWS[5]]
    assert convert(rows).counts.tolist() == [2, 1, 2]
    rows[4] = [(6, -0.25), (6, -0.25), (11, -2.0)]
    with pytest.raises(ModelError, match=r"sample 'a': vLLM gives padding rows .*from 10 on, a probability"):
        convert(rows)


def test_without_kept_entries_own_logprobs_remain() -> None:
    scores = convert([row[:1] for row in ROWS])
    assert scores.own_logprobs.tolist() == [-3.0, -0.25, -1.0]
    assert scores.counts.tolist() == [0, 0, 0]
    assert scores.rest_mass.tolist() == [1.0, 1.0, 1.0]


def test_text_without_images_needs_no_image_token() -> None:
    encoded = EncodedChat(np.array([1, 2, 3], np.int32), np.array([[1, 3]], np.int32), None)
    rows = [[(2, -0.5), (2, -0.5)], [(3, -0.75), (1, -0.7)]]
    scores = convert(rows, [1, 2, 3], encoded)
    assert scores.own_logprobs.tolist() == [-0.5, -0.75]
    assert scores.ids.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([4, 5, IMAGE, 6, 6], ROWS[:2] + ROWS[4:], r"sample 'a': vLLM does not read the conversation's tokens"),
        ([4, 5, 6, 7], ROWS[:1] + ROWS[4:], r"sample 'a': vLLM read 0 images, the conversation has 1"),
        (
            [4, 5, IMAGE, 6, 6],
            ROWS[:2] + ROWS[4:],
            r"from 0: \[4, 5, 9, 6, 7\]\n  vLLM, 5 ids, from 0: \[4, 5, 9, 6, 6\]",
        ),
        ([1, 4, 5, IMAGE, 6, 7], ROWS[:1] + ROWS[:2] + ROWS[4:], r"cannot be aligned"),
        (EXPANDED, ROWS[:-1], r"returned 6 rows, row 6 is wanted"),
        (EXPANDED, [*ROWS[:5], certain(2)], r"not those of the response tokens"),
        (EXPANDED, [*ROWS[:5], [(7, float("nan")), (1, -1.0), (2, -1.0)]], r"log-prob nan"),
        (EXPANDED, [*ROWS[:5], [(7, float("-inf")), (1, -1.0), (2, -1.0)]], r"log-prob -inf"),
    ],
)
def test_rows_that_do_not_fit_the_conversation_are_an_error(ids: list[int], rows: list[Row], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        convert(rows, ids)


def test_with_top_p_a_row_keeps_what_holds_the_mass() -> None:
    scores = convert(ROWS, top_p=0.7)
    assert scores.counts.tolist() == [2, 1, 2]
    assert scores.rest_mass[1] == pytest.approx(1 - np.exp(-0.25))


def test_ids_of_the_whole_vocabulary_are_drawn_by_their_probability() -> None:
    probs = np.array([0.5, 0.25, 0.125, 0.125, 0, 0, 0, 0, 0, 0, 0, 0])
    order = np.argsort(-probs, kind="stable")
    with np.errstate(divide="ignore"):
        row = [(int(i), float(np.log(probs[i]))) for i in order]
    encoded = EncodedChat(np.array([1, 2, 3], np.int32), np.array([[1, 3]], np.int32), None)
    rows = [[(2, float(np.log(0.125))), *row], [(3, float(np.log(0.125))), *row]]
    scores = convert(rows, [1, 2, 3], encoded, num_draws=40_000, vocab_size=4)
    assert scores.draws is not None
    drawn = scores.draws[: scores.counts[0]] / 40_000
    np.testing.assert_allclose(drawn[np.argsort(scores.ids[: scores.counts[0]])], probs[:4], atol=0.012)
    assert not scores.rest_mass.any()
    again = convert(rows, [1, 2, 3], encoded, num_draws=40_000, vocab_size=4)
    np.testing.assert_array_equal(scores.draws, again.draws)


def test_each_conversation_draws_by_a_seed_of_its_own() -> None:
    seeds = {draw_seed(seed, name, number) for seed in (0, 1) for name in ("a", "b") for number in (0, 1)}
    assert len(seeds) == 8
    assert draw_seed(0, "a", 0) == draw_seed(0, "a", 0)
    assert all(0 <= int(seed, 16) < 2**128 for seed in seeds)
