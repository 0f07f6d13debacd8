"""Scores of prompts that an engine computes chunk by chunk, against a float64 softmax of the whole prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from precompute.engine.prefill_capture import PrefillChunk, RowAccumulator, score_chunks
from precompute.engine.row_request import RowRequest, pack_row_scores, unpack_row_scores
from precompute.engine.row_scores import RowScores

VOCAB_SIZE, HIDDEN_SIZE, TOP_K = 200, 8, 5
WEIGHT_VH = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))


@dataclass
class Prompt:
    """A prompt of `num_tokens` hidden states whose rows are wanted, as an engine holds it."""

    name: str
    num_tokens: int
    rows: tuple[int, ...]
    top_k: int = TOP_K
    num_draws: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.num_tokens)
        self.hidden_TH = torch.randn(self.num_tokens, HIDDEN_SIZE, generator=generator)
        self.targets = np.array(self.rows, np.int32) * 3 + 1
        self.start_over()

    def start_over(self) -> None:
        """Forgets what was computed, as an engine does when it preempts a request."""
        rows = np.array(self.rows, np.int32)
        request = RowRequest(rows, self.targets, VOCAB_SIZE, self.top_k, self.num_draws, seed=f"{self.num_tokens:x}")
        self.accumulator = RowAccumulator(request)
        self.num_computed = 0

    def assert_right(self, scores: RowScores) -> None:
        """Compares scores with a float64 softmax of the wanted rows."""
        logprobs_RV = torch.log_softmax((self.hidden_TH @ WEIGHT_VH.T).double(), dim=1)[list(self.rows)].numpy()
        np.testing.assert_allclose(scores.own, logprobs_RV[np.arange(len(self.rows)), self.targets], atol=2e-6)
        np.testing.assert_allclose(scores.logprobs, -np.sort(-logprobs_RV, axis=1)[:, : self.top_k], atol=2e-6)
        np.testing.assert_array_equal(scores.ids, np.argsort(-logprobs_RV, axis=1)[:, : self.top_k])


def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ WEIGHT_VH.T


def run_step(scheduled: Sequence[tuple[Prompt, int]], to_cpu: bool = True) -> dict[str, RowScores]:
    """Computes so many more tokens of each prompt in one step."""
    chunks, states, offset = [], [], 0
    for prompt, num_tokens in scheduled:
        start, stop = prompt.num_computed, prompt.num_computed + num_tokens
        is_last = stop >= prompt.num_tokens
        chunks.append(PrefillChunk(prompt.name, prompt.accumulator, start, stop, offset, is_last))
        states.append(prompt.hidden_TH[start:stop])
        prompt.num_computed, offset = stop, offset + num_tokens
    return score_chunks(chunks, torch.cat(states), compute_logits, to_cpu=to_cpu)


@pytest.fixture
def first() -> Prompt:
    return Prompt("first", 12, (2, 3, 8, 10))


@pytest.fixture
def second() -> Prompt:
    return Prompt("second", 7, (0, 5))


@pytest.mark.parametrize("to_cpu", [True, False])
def test_whole_prompts_of_one_step_are_scored_together(first: Prompt, second: Prompt, to_cpu: bool) -> None:
    scores = run_step([(second, 7), (first, 12)], to_cpu)
    assert list(scores) == ["second", "first"]
    first.assert_right(scores["first"])
    second.assert_right(scores["second"])


def test_a_prompt_in_chunks_is_delivered_with_its_last_one(first: Prompt, second: Prompt) -> None:
    # The first chunk ends within the wanted rows, the third has none.
    assert run_step([(first, 3)]) == {}
    scores = run_step([(first, 6), (second, 7)])
    assert list(scores) == ["second"]
    second.assert_right(scores["second"])
    assert run_step([(first, 1)]) == {}
    first.assert_right(run_step([(first, 2)])["first"])


def test_a_prompt_whose_last_chunk_has_no_wanted_row_is_delivered(second: Prompt) -> None:
    assert run_step([(second, 6)]) == {}
    second.assert_right(run_step([(second, 1)])["second"])


def test_a_preempted_prompt_that_starts_over_is_scored_again(first: Prompt) -> None:
    run_step([(first, 9)])
    first.num_computed = 0
    assert run_step([(first, 5)]) == {}
    first.assert_right(run_step([(first, 7)])["first"])
    first.start_over()
    first.assert_right(run_step([(first, 12)])["first"])


def test_a_prompt_with_a_gap_has_no_result(first: Prompt) -> None:
    """A prefix cache serves positions without computing them."""
    first.num_computed = 5
    assert run_step([(first, 7)]) == {}
    assert first.accumulator.result() is None


def test_a_gap_in_the_middle_leaves_no_result(first: Prompt) -> None:
    run_step([(first, 3)])
    first.num_computed = 4
    assert run_step([(first, 8)]) == {}
    assert first.accumulator.result() is None


def test_requests_with_different_settings_share_a_step(first: Prompt, second: Prompt) -> None:
    without_entries = Prompt("without entries", 9, (1, 7), top_k=0)
    drawing = Prompt("drawing", 5, (3,), num_draws=20)
    scores = run_step([(first, 12), (without_entries, 9), (second, 7), (drawing, 5)])
    assert scores.keys() == {"first", "without entries", "second", "drawing"}
    for prompt in (first, second, without_entries, drawing):
        prompt.assert_right(scores[prompt.name])
    assert scores["without entries"].ids.shape == (2, 0)
    assert scores["first"].drawn.shape == (4, 0)
    assert scores["drawing"].drawn.shape == (1, 20)


def test_draws_do_not_depend_on_the_chunks(first: Prompt) -> None:
    first.num_draws = 30
    first.start_over()
    whole = run_step([(first, 12)])["first"]
    first.start_over()
    run_step([(first, 4)])
    chunked = run_step([(first, 8)])["first"]
    assert whole.drawn.shape == (4, 30)
    assert torch.equal(whole.drawn, chunked.drawn)
    first.assert_right(chunked)


def test_a_rank_without_logits_delivers_nothing(first: Prompt) -> None:
    chunk = PrefillChunk("first", first.accumulator, start=0, stop=12, offset=0, is_last=True)
    assert score_chunks([chunk], first.hidden_TH, lambda _: None, to_cpu=True) == {}
    assert first.accumulator.result() is None


def test_scores_survive_packing_for_the_front_end(first: Prompt) -> None:
    first.num_draws = 6
    first.start_over()
    scores = run_step([(first, 12)])["first"]
    found = unpack_row_scores(pack_row_scores(scores))
    for name in ("own", "ids", "logprobs", "drawn"):
        np.testing.assert_array_equal(getattr(found, name), getattr(scores, name).numpy())
