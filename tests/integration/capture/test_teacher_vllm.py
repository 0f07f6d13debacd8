"""vLLM's prompt log-probs as teacher scores, on values written by hand; no engine is started."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from vllm.logprobs import FlatLogprobs, create_prompt_logprobs

from common.data.chat_encoding import EncodedChat
from common.errors import ModelError
from common.shards.scores import TeacherScores
from precompute.config import CaptureWay, EngineConfig
from precompute.engine.row_request import RowRequest
from precompute.engine.teacher import Teacher, draw_seed, expanded_positions, from_flat, to_scores
from precompute.scorer import ScorerSettings

pytestmark = pytest.mark.vllm

IMAGE = 9

# Own sequence: two text tokens, an image, two text tokens, of which the last two and the second are scored.
ENCODED = EncodedChat(np.array([4, 5, IMAGE, 6, 7], np.int32), np.array([[1, 2], [3, 5]], np.int32), IMAGE)
EXPANDED = [4, 5, IMAGE, IMAGE, IMAGE, 6, 7]


def flat(rows: list[list[tuple[int, float]]]) -> FlatLogprobs:
    """Prompt log-probs of one request; a row is the own token, then the best ones in descending order."""
    logprobs = create_prompt_logprobs(flat_logprobs=True)
    assert isinstance(logprobs, FlatLogprobs)
    for row in rows:
        ids, values = [entry[0] for entry in row], [entry[1] for entry in row]
        logprobs.append_fast(ids, values, iter(range(len(row))), [None] * len(row))
    return logprobs


def plan(vocab_size: int = 10, num_draws: int | None = None, top_p: float | None = None) -> ScorerSettings:
    return ScorerSettings(
        model_dir=Path(),
        engine=EngineConfig(),
        max_tokens=8,
        max_images=1,
        top_k=0 if num_draws else 2,
        top_p=top_p,
        min_k=1,
        num_draws=num_draws,
        seed=0,
        generate=None,
        node_rank=0,
        vocab_size=vocab_size,
        output_vocab_size=12,
    )


def scores_of(
    rows: list[list[tuple[int, float]]],
    ids: list[int] = EXPANDED,
    encoded: EncodedChat = ENCODED,
    settings: ScorerSettings | None = None,
) -> TeacherScores:
    settings = settings or plan()
    where = "sample 'a'"
    positions = expanded_positions(np.array(ids, np.int32), encoded, where)
    wish = RowRequest(
        rows=(positions - 1).astype(np.int32),
        targets=encoded.response_ids,
        vocab_size=settings.output_vocab_size,
        top_k=settings.top_k,
        num_draws=settings.num_draws or 0,
        seed="5",
    )
    return to_scores(from_flat(flat(rows), wish, wish.rows + 1, settings, where), settings, where)


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
    scores = scores_of(ROWS)
    assert scores.own_logprobs.tolist() == [-3.0, -0.25, -1.0]
    assert scores.counts.tolist() == [2, 2, 2]
    assert scores.ids.tolist() == [2, 1, 6, 3, 1, 7]
    assert scores.logprobs.tolist() == [-0.5, -1.5, -0.25, -2.0, -1.0, -1.0]
    rest = [1 - np.exp(a) - np.exp(b) for a, b in ((-0.5, -1.5), (-0.25, -2.0), (-1.0, -1.0))]
    np.testing.assert_allclose(scores.rest_mass, rest, rtol=1e-6)


def test_the_own_token_is_not_kept_beyond_the_best() -> None:
    assert 5 not in scores_of(ROWS).ids[:2]


def test_entries_of_the_padded_output_layer_go_into_the_rest() -> None:
    rows = [*ROWS[:4], [(6, -0.25), (6, -0.25), (11, -2.0)], ROWS[5]]
    scores = scores_of(rows)
    assert scores.counts.tolist() == [2, 1, 2]
    assert scores.rest_mass[1] == pytest.approx(1 - np.exp(-0.25))


def test_without_kept_entries_own_logprobs_remain() -> None:
    scores = scores_of([row[:1] for row in ROWS])
    assert scores.own_logprobs.tolist() == [-3.0, -0.25, -1.0]
    assert scores.counts.tolist() == [0, 0, 0]
    assert scores.rest_mass.tolist() == [1.0, 1.0, 1.0]


def test_text_without_images_needs_no_image_token() -> None:
    encoded = EncodedChat(np.array([1, 2, 3], np.int32), np.array([[1, 3]], np.int32), None)
    rows = [[(2, -0.5), (2, -0.5)], [(3, -0.75), (1, -0.7)]]
    scores = scores_of(rows, [1, 2, 3], encoded)
    assert scores.own_logprobs.tolist() == [-0.5, -0.75]
    assert scores.ids.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("ids", "rows", "message"),
    [
        ([4, 5, IMAGE, 6, 6], ROWS[:2] + ROWS[4:], r"sample 'a': vLLM read 4 text tokens"),
        ([1, 4, 5, IMAGE, 6, 7], ROWS[:1] + ROWS[:2] + ROWS[4:], r"cannot be aligned"),
        (EXPANDED, ROWS[:-1], r"returned 6 rows, row 6 is wanted"),
        (EXPANDED, [*ROWS[:5], certain(2)], r"not those of the response tokens"),
        (EXPANDED, [*ROWS[:5], [(7, float("nan")), (1, -1.0), (2, -1.0)]], r"log-prob nan"),
        (EXPANDED, [*ROWS[:5], [(7, float("-inf")), (1, -1.0), (2, -1.0)]], r"log-prob -inf"),
    ],
)
def test_what_does_not_fit_the_conversation_is_refused(
    ids: list[int], rows: list[list[tuple[int, float]]], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        scores_of(rows, ids)


def test_with_top_p_a_row_keeps_what_holds_the_mass() -> None:
    scores = scores_of(ROWS, settings=plan(top_p=0.7))
    assert scores.counts.tolist() == [2, 1, 2]
    assert scores.rest_mass[1] == pytest.approx(1 - np.exp(-0.25))


def test_of_the_whole_vocabulary_ids_are_drawn_by_their_probability() -> None:
    probs = np.array([0.5, 0.25, 0.125, 0.0625, 0.0625, 0, 0, 0, 0, 0, 0, 0])
    order = np.argsort(-probs, kind="stable")
    with np.errstate(divide="ignore"):
        row = [(int(i), float(np.log(probs[i]))) for i in order]
    encoded = EncodedChat(np.array([1, 2, 3], np.int32), np.array([[1, 3]], np.int32), None)
    rows = [[(2, float(np.log(0.125))), *row], [(3, float(np.log(0.0625))), *row]]
    scores = scores_of(rows, [1, 2, 3], encoded, plan(num_draws=40_000, vocab_size=4))
    assert scores.draws is not None
    drawn = scores.draws[: scores.counts[0]] / 40_000
    np.testing.assert_allclose(drawn[np.argsort(scores.ids[: scores.counts[0]])], probs[:4], atol=0.012)
    np.testing.assert_allclose(scores.rest_mass, 0.0625, atol=0.006)
    again = scores_of(rows, [1, 2, 3], encoded, plan(num_draws=40_000, vocab_size=4))
    np.testing.assert_array_equal(scores.draws, again.draws)


class FakeEngine:
    """Starts at once; its workers lack what `lacks` says."""

    lacks = ""

    def __init__(self, *_: object, **__: object) -> None:
        self.closed = False

    def collective_rpc(self, method: str) -> list[str]:
        return ["", self.lacks]

    def close(self) -> None:
        FakeEngine.closed_ones += 1

    closed_ones = 0


@pytest.fixture
def unknown_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("precompute.engine.teacher.Engine", FakeEngine)
    monkeypatch.setattr("precompute.engine.vllm_patch._front_end_lacks", [""])
    monkeypatch.setattr(FakeEngine, "lacks", "GPUModelRunner.f takes (a), expected (b)")
    monkeypatch.setattr(FakeEngine, "closed_ones", 0)


def with_capture(way: CaptureWay) -> Teacher:
    return Teacher(replace(plan(), engine=EngineConfig(capture=way)))


def test_with_an_unknown_vllm_the_stock_path_serves_and_the_reason_is_told(
    unknown_vllm: None, caplog: pytest.LogCaptureFixture
) -> None:
    assert not with_capture("auto").in_engine
    assert "GPUModelRunner.f takes (a), expected (b)" in caplog.text
    assert caplog.records[0].levelname == "WARNING"


def test_an_unknown_vllm_is_refused_where_capture_in_the_engine_is_demanded(unknown_vllm: None) -> None:
    with pytest.raises(ModelError, match=r"cannot capture in the engine: GPUModelRunner.f .* engine.capture = .stock."):
        with_capture("in-engine")
    assert FakeEngine.closed_ones == 1


def test_the_stock_path_can_be_chosen(unknown_vllm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "lacks", "")
    assert with_capture("auto").in_engine
    assert not with_capture("stock").in_engine


def test_each_conversation_draws_by_a_seed_of_its_own() -> None:
    seeds = {draw_seed(seed, name, number) for seed in (0, 1) for name in ("a", "b") for number in (0, 1)}
    assert len(seeds) == 8
    assert draw_seed(0, "a", 0) == draw_seed(0, "a", 0)
    assert all(0 <= int(seed, 16) < 2**128 for seed in seeds)
