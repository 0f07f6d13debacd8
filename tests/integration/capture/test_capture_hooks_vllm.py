"""The patched functions of vLLM's model runners and front end, on records of requests and steps; no engine is started.

The second runner serves GPUs. Its functions run here on records made by hand, as vLLM 0.32 makes them.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.engine.logprobs import LogprobsProcessor
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from precompute.engine import vllm_patch
from precompute.engine.row_request import (
    CapturedRows,
    CapturedSamplerSteps,
    RowRequest,
    pack_row_scores,
    unpack_row_scores,
)
from precompute.engine.row_scores import RowScores
from precompute.engine.vllm_patch import patch_v1_runner, patch_v2_runner, start_capture, try_patch

pytestmark = pytest.mark.vllm

VOCAB, HIDDEN, K = 200, 8, 5
WEIGHT = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))

# Prompts by name: hidden states [T, H] and the wanted rows.
LENGTHS = {"a": 12, "b": 7}
ROWS = {"a": [2, 3, 8, 10], "b": [0, 5]}
STATES = {name: torch.randn(n, HIDDEN, generator=torch.Generator().manual_seed(n)) for name, n in LENGTHS.items()}


def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ WEIGHT.T


def make_params(name: str) -> SamplingParams:
    rows = np.array(ROWS[name], np.int32)
    return SamplingParams(max_tokens=1, extra_args=RowRequest(rows, rows * 3 + 1, VOCAB, K).extra_args())


def assert_right(found: CapturedRows, name: str) -> None:
    rows = np.array(ROWS[name])
    logprobs_RV = torch.log_softmax((STATES[name] @ WEIGHT.T).double(), dim=1)[rows].numpy()
    np.testing.assert_allclose(found.own, logprobs_RV[np.arange(len(rows)), rows * 3 + 1], atol=2e-6)
    np.testing.assert_allclose(found.logprobs, -np.sort(-logprobs_RV, axis=1)[:, :K], atol=2e-6)
    np.testing.assert_array_equal(found.ids, np.argsort(-logprobs_RV, axis=1)[:, :K])


# The function of the first runner that is patched.
V1_FUNCTION = "_get_prompt_logprobs_dict"


class V1:
    """A fake of the first runner that has just the attributes that the real, patched function reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(GPUModelRunner, V1_FUNCTION, getattr(GPUModelRunner, V1_FUNCTION))
        patch_v1_runner()
        self.num_prompt_logprobs: dict[str, int] = {}
        self.model = SimpleNamespace(compute_logits=compute_logits)
        self.requests: dict[str, Any] = {}

    def add(self, name: str, params: SamplingParams | None = None) -> None:
        self.requests[name] = SimpleNamespace(
            sampling_params=params or make_params(name), num_prompt_tokens=LENGTHS[name], num_computed_tokens=0
        )

    def remove(self, name: str) -> None:
        del self.requests[name]

    def preempt(self, name: str) -> None:
        self.requests[name].num_computed_tokens = 0

    def step(self, scheduled: dict[str, int]) -> dict[str, Any]:
        starts = np.cumsum([0, *scheduled.values()])
        self.query_start_loc = SimpleNamespace(np=starts)
        self.input_batch = SimpleNamespace(req_id_to_index={name: i for i, name in enumerate(scheduled)})
        done = {name: self.requests[name].num_computed_tokens for name in scheduled}
        hidden = torch.cat([states(name, done[name], n) for name, n in scheduled.items()])
        result: dict[str, Any] = getattr(GPUModelRunner, V1_FUNCTION)(self, hidden, scheduled)
        for name, n in scheduled.items():
            self.requests[name].num_computed_tokens += n
        return result


class V2:
    """The second runner's real worker for prompt log-probs, fed with batches made by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for method in ("add_request", "remove_request", "compute_prompt_logprobs"):
            monkeypatch.setattr(PromptLogprobsWorker, method, getattr(PromptLogprobsWorker, method))
        patch_v2_runner()
        self.worker = PromptLogprobsWorker(max_num_reqs=4, device=torch.device("cpu"))
        self.slots = {"b": 0, "a": 2}
        self.done: dict[str, int] = {}

    def add(self, name: str, params: SamplingParams | None = None) -> None:
        self.worker.add_request(name, self.slots[name], params or make_params(name))
        self.done[name] = 0

    def remove(self, name: str) -> None:
        self.worker.remove_request(name)

    def preempt(self, name: str) -> None:
        # This runner forgets a preempted request, and meets it again as a new one.
        self.remove(name)
        self.add(name)

    def step(self, scheduled: dict[str, int], prefill: dict[str, int] | None = None) -> dict[str, Any]:
        lens = np.zeros(4, np.int32)
        for name, slot in self.slots.items():
            lens[slot] = LENGTHS[name]
        batch = SimpleNamespace(
            req_ids=list(scheduled),
            idx_mapping_np=np.array([self.slots[name] for name in scheduled]),
            num_scheduled_tokens=np.array(list(scheduled.values())),
            num_computed_prefill_tokens_np=np.array([self.done[name] for name in scheduled]),
            prefill_len_np=np.array([(prefill or LENGTHS)[name] for name in scheduled]),
            query_start_loc_np=np.cumsum([0, *scheduled.values()]),
        )
        hidden = torch.cat([states(name, self.done[name], n) for name, n in scheduled.items()])
        none = torch.zeros(0)
        result: dict[str, Any] = self.worker.compute_prompt_logprobs(compute_logits, hidden, batch, none, none, lens)
        for name, n in scheduled.items():
            self.done[name] += n
        return result


def states(name: str, start: int, count: int) -> torch.Tensor:
    """Returns the hidden states of a step; those past the prompt belong to generated tokens."""
    return torch.cat([STATES[name], torch.full((50, HIDDEN), 9.0)])[start : start + count]


@pytest.fixture(params=[V1, V2])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    return request.param(monkeypatch)


def test_whole_prompts_in_one_step(runner: Any) -> None:
    runner.add("a")
    runner.add("b")
    found = runner.step({"b": 7, "a": 12})
    for name in "ab":
        assert_right(unpack_row_scores(found[name]), name)


def test_a_prompt_in_chunks_is_delivered_with_its_last_one(runner: Any) -> None:
    runner.add("a")
    runner.add("b")
    assert runner.step({"a": 3}) == {}
    found = runner.step({"a": 2, "b": 7})
    assert list(found) == ["b"]
    assert_right(unpack_row_scores(found["b"]), "b")
    assert runner.step({"b": 1, "a": 6}) == {}
    assert_right(unpack_row_scores(runner.step({"a": 1, "b": 1})["a"]), "a")
    assert runner.step({"a": 1}) == {}


def test_a_preempted_prompt_starts_over(runner: Any) -> None:
    runner.add("a")
    runner.step({"a": 9})
    runner.preempt("a")
    assert runner.step({"a": 5}) == {}
    assert_right(unpack_row_scores(runner.step({"a": 7})["a"]), "a")


def test_a_finished_request_leaves_nothing_behind(runner: Any) -> None:
    runner.add("a")
    runner.step({"a": 5})
    runner.remove("a")
    runner.add("a")
    assert_right(unpack_row_scores(runner.step({"a": 12})["a"]), "a")


def test_a_request_that_resumes_its_generation_is_not_scored_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = V2(monkeypatch)
    runner.add("a")
    assert runner.step({"a": 14}, prefill={"a": 15}) == {}


def test_requests_that_want_no_rows_pass_untouched(runner: Any) -> None:
    runner.add("a", SamplingParams(max_tokens=1))
    assert runner.step({"a": 12}) == {}


def test_another_signature_is_named_and_nothing_is_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Any, hidden_states: Any, num_scheduled_tokens: Any, more: Any) -> None: ...

    monkeypatch.setattr(GPUModelRunner, V1_FUNCTION, changed)
    problem = try_patch(patch_v1_runner)
    assert f"{V1_FUNCTION} takes (self, hidden_states, num_scheduled_tokens, more), expected" in problem
    assert getattr(GPUModelRunner, V1_FUNCTION) is changed


def test_a_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PromptLogprobsWorker, "remove_request")
    assert "remove_request" in try_patch(patch_v2_runner)


def test_each_part_that_cannot_be_patched_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PromptLogprobsWorker, "remove_request")
    problems = vllm_patch.find_patch_problems()
    assert {part for part, problem in problems.items() if problem} == {"second model runner"}
    assert "remove_request" in problems["second model runner"]


def test_workers_answer_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_patch, "_front_end_problem", "")
    assert start_capture(lambda _: ["", ""]) == ""
    assert start_capture(lambda _: ["", "no such function"]) == "no such function"

    def unknown(method: str) -> list[str]:
        raise AttributeError(method)

    assert "not loaded in the engine's workers" in start_capture(unknown)
    monkeypatch.setattr(vllm_patch, "_front_end_problem", None)
    assert "not loaded in this process" in start_capture(lambda _: [""])


def test_arrays_survive_the_way_through_the_engine() -> None:
    own, ids = torch.arange(3.0), torch.arange(6, dtype=torch.int32).reshape(3, 2)
    scores = RowScores(own, ids, own[:, None] + ids, ids + 7)
    sent = MsgpackEncoder().encode({"a": LogprobsTensors(*pack_row_scores(scores))})
    found = unpack_row_scores(MsgpackDecoder(dict[str, LogprobsTensors]).decode(sent)["a"])
    for name in ("own", "ids", "logprobs", "drawn"):
        np.testing.assert_array_equal(getattr(found, name), getattr(scores, name).numpy())


def test_generated_steps_stay_arrays() -> None:
    vllm_patch.install_patches()
    request = SimpleNamespace(
        sampling_params=SamplingParams(max_tokens=4, logprobs=2, extra_args=CapturedSamplerSteps.extra_args())
    )
    processor = LogprobsProcessor.from_new_request(None, request)
    steps = [([5, 5, 3], [-0.5, -0.5, -1.0]), ([7, 1, 2], [-3.0, -0.2, -2.0])]
    for ids, logprobs in steps:
        processor._update_sample_logprobs(  # noqa: SLF001 - the patched function has no public caller without an engine
            LogprobsLists(np.array([ids]), np.array([logprobs], np.float32), np.array([1]), None)
        )
    assert isinstance(processor.logprobs, CapturedSamplerSteps)
    found = processor.logprobs.rows()
    assert found.own.tolist() == [-0.5, -3.0]
    assert found.ids.tolist() == [[5, 3], [1, 2]]
    np.testing.assert_allclose(found.logprobs, [[-0.5, -1.0], [-0.2, -2.0]])
