"""vLLM's prompt log-probs as teacher scores, on values written by hand; no engine is started."""

import numpy as np
import pytest
from vllm import RequestOutput
from vllm.logprobs import FlatLogprobs, create_prompt_logprobs

from common.encoding import Encoded
from common.errors import ModelError
from precompute.teacher import to_scores

IMAGE = 9

# Own sequence: two text tokens, an image, two text tokens, of which the last two and the second are scored.
ENCODED = Encoded(np.array([4, 5, IMAGE, 6, 7], np.int32), np.array([[1, 2], [3, 5]], np.int32), IMAGE)
EXPANDED = [4, 5, IMAGE, IMAGE, IMAGE, 6, 7]


def flat(rows: list[list[tuple[int, float]]]) -> FlatLogprobs:
    """Prompt log-probs of one request; a row is the own token, then the best ones in descending order."""
    logprobs = create_prompt_logprobs(flat_logprobs=True)
    assert isinstance(logprobs, FlatLogprobs)
    for row in rows:
        ids, values = [entry[0] for entry in row], [entry[1] for entry in row]
        logprobs.append_fast(ids, values, iter(range(len(row))), [None] * len(row))
    return logprobs


def output_of(rows: list[list[tuple[int, float]]], ids: list[int] = EXPANDED) -> RequestOutput:
    return RequestOutput("0", None, ids, flat(rows), [], finished=True)


def certain(token: int) -> list[tuple[int, float]]:
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
    scores = to_scores(output_of(ROWS), ENCODED, vocab_size=10, where="sample 'a'")
    assert scores.own_logprobs.tolist() == [-3.0, -0.25, -1.0]
    assert scores.counts.tolist() == [2, 2, 2]
    assert scores.ids.tolist() == [2, 1, 6, 3, 1, 7]
    assert scores.logprobs.tolist() == [-0.5, -1.5, -0.25, -2.0, -1.0, -1.0]
    rest = [1 - np.exp(a) - np.exp(b) for a, b in ((-0.5, -1.5), (-0.25, -2.0), (-1.0, -1.0))]
    np.testing.assert_allclose(scores.rest_mass, rest, rtol=1e-6)


def test_the_own_token_is_not_kept_beyond_the_best() -> None:
    assert 5 not in to_scores(output_of(ROWS), ENCODED, vocab_size=10, where="").ids[:2]


def test_entries_of_the_padded_output_layer_go_into_the_rest() -> None:
    rows = [*ROWS[:4], [(6, -0.25), (6, -0.25), (11, -2.0)], ROWS[5]]
    scores = to_scores(output_of(rows), ENCODED, vocab_size=10, where="")
    assert scores.counts.tolist() == [2, 1, 2]
    assert scores.rest_mass[1] == pytest.approx(1 - np.exp(-0.25))


def test_without_kept_entries_own_logprobs_remain() -> None:
    scores = to_scores(output_of([row[:1] for row in ROWS]), ENCODED, vocab_size=10, where="")
    assert scores.own_logprobs.tolist() == [-3.0, -0.25, -1.0]
    assert scores.counts.tolist() == [0, 0, 0]
    assert scores.rest_mass.tolist() == [1.0, 1.0, 1.0]


def test_text_without_images_needs_no_image_token() -> None:
    encoded = Encoded(np.array([1, 2, 3], np.int32), np.array([[1, 3]], np.int32), None)
    rows = [[(2, -0.5), (2, -0.5)], [(3, -0.75), (1, -0.7)]]
    scores = to_scores(output_of(rows, [1, 2, 3]), encoded, vocab_size=10, where="")
    assert scores.own_logprobs.tolist() == [-0.5, -0.75]
    assert scores.ids.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([4, 5, IMAGE, 6, 6], ROWS[:2] + ROWS[4:], r"sample 'a': vLLM read 4 text tokens"),
        ([1, 4, 5, IMAGE, 6, 7], ROWS[:1] + ROWS[:2] + ROWS[4:], r"cannot be aligned"),
        (EXPANDED, ROWS[:-1], r"6 rows for 7 tokens"),
        (EXPANDED, [*ROWS[:5], certain(2)], r"not those of the response tokens"),
        (EXPANDED, [*ROWS[:5], [(7, float("nan")), (1, -1.0), (2, -1.0)]], r"log-prob nan"),
        (EXPANDED, [*ROWS[:5], [(7, float("-inf")), (1, -1.0), (2, -1.0)]], r"log-prob -inf"),
    ],
)
def test_what_does_not_fit_the_conversation_is_refused(
    ids: list[int], rows: list[list[tuple[int, float]]], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        to_scores(output_of(rows, ids), ENCODED, vocab_size=10, where="sample 'a'")


def test_a_request_without_scores_is_refused() -> None:
    with pytest.raises(ModelError, match="no prompt log-probs"):
        to_scores(RequestOutput("0", None, EXPANDED, None, [], finished=True), ENCODED, vocab_size=10, where="")
