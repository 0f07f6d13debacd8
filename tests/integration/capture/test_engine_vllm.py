"""Feeding vLLM with a fake engine object: which prompts enter when, and how failures are reported."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import EngineArgs, RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from common.errors import ConfigError, ModelError
from precompute.config import EngineConfig
from precompute.engine.score_conversion import ExpandedPrompt
from precompute.engine.vllm_engine import Engine, EngineLimits, Prompt
from precompute.scorer import RejectedRequest

pytestmark = pytest.mark.vllm


LIMITS = EngineLimits(max_model_len=8, max_images=1, max_logprobs=3)


def params(key: int, prompt: ExpandedPrompt) -> SamplingParams:
    return SamplingParams(max_tokens=1, extra_args={"key": key, "ids": prompt.token_ids.tolist()})


class FakeRenderer:
    """Expands an image's placeholder, 7, to three."""

    def render_cmpl(self, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ids = [i for token in prompts[0]["prompt_token_ids"] for i in ([token] * (3 if token == 7 else 1))]
        if ids == [98]:
            raise ValueError("no such image")
        return [{"prompt_token_ids": ids}]


class FakeEngine:
    """Finishes the newest request at every step."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.max_running = 0
        self.added: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.aborted: list[str] = []
        self.others_running = 0
        self.failure: Exception | None = None
        self.renderer = FakeRenderer()

    def has_unfinished_requests(self) -> bool:
        return bool(self.running) or self.others_running > 0

    def abort_request(self, names: list[str]) -> None:
        if self.failure:
            raise EngineDeadError
        self.aborted += names

    def add_request(self, name: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        if prompt["prompt_token_ids"] == [99]:
            raise VLLMValidationError("unlucky")
        self.added.append(prompt["prompt_token_ids"])
        self.params.append(params)
        self.running.append(name)
        self.max_running = max(self.max_running, len(self.running))

    def step(self) -> list[RequestOutput]:
        if self.failure:
            raise self.failure
        if not self.running:
            self.others_running -= 1
            return []
        name = self.running.pop()
        return [RequestOutput(name, None, [], None, [], finished=True)]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr("precompute.engine.vllm_engine.LLMEngine.from_engine_args", lambda _: engine)
    return engine


def start(**settings: Any) -> Engine:
    config = EngineConfig.model_validate({"max_num_seqs": 2, **settings})
    # Any directory will do, because vLLM, offline, only checks that it exists.
    return Engine(Path(__file__).parent, config, LIMITS)


def prompts(*tokens: int) -> Iterator[tuple[int, Prompt]]:
    for token in tokens:
        yield token, Prompt(np.array([token], np.int32), (), f"sample {token}")


def test_each_prompt_comes_back_once_with_its_key(fake: FakeEngine) -> None:
    assert sorted(token for token, _ in start().run(prompts(*range(10, 20)), params)) == list(range(10, 20))
    assert fake.added == [[token] for token in range(10, 20)]


def test_prompts_are_taken_only_when_there_is_room(fake: FakeEngine) -> None:
    num_taken = 0

    def counted() -> Iterator[tuple[int, Prompt]]:
        nonlocal num_taken
        for pair in prompts(*range(50)):
            num_taken += 1
            yield pair

    for num_finished, _ in enumerate(start().run(counted(), params)):
        # Four run, two more wait in the queue, and the thread holds one.
        assert num_taken <= num_finished + 7
    assert num_taken == 50
    assert fake.max_running <= 4


def test_an_engine_steps_on_while_others_that_depend_on_it_have_work(fake: FakeEngine) -> None:
    fake.others_running = 3
    assert len(list(start().run(prompts(1, 2), params))) == 2
    assert fake.others_running == 0


def test_without_prompts_nothing_runs(fake: FakeEngine) -> None:
    fake.failure = AssertionError("the engine was stepped")
    assert list(start().run(prompts(), params)) == []


@pytest.mark.parametrize(("token", "reason"), [(98, "no such image"), (99, "unlucky")])
@pytest.mark.usefixtures("fake")
def test_a_rejected_prompt_comes_back_with_its_reason_and_the_others_go_on(token: int, reason: str) -> None:
    found = dict(start().run(prompts(1, token, 2), params))
    rejected = found.pop(token)
    assert isinstance(rejected, RejectedRequest)
    assert rejected.reason == f"sample {token}: vLLM refuses it ({reason})"
    assert set(found) == {1, 2}
    assert not any(isinstance(output, RejectedRequest) for output in found.values())


def test_parameters_are_made_for_the_prompt_as_the_engine_reads_it(fake: FakeEngine) -> None:
    list(start().run(prompts(7), params))
    assert fake.params[0].extra_args == {"key": 7, "ids": [7, 7, 7]}


def test_an_error_of_the_prompts_ends_the_run_and_aborts_running_requests(fake: FakeEngine) -> None:
    def broken() -> Iterator[tuple[int, Prompt]]:
        yield from prompts(1, 2)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(start().run(broken(), params))
    assert fake.aborted == fake.running


@pytest.mark.parametrize("failure", [EngineDeadError(), RuntimeError("out of memory")])
def test_the_error_of_a_dead_engine_says_what_to_do(fake: FakeEngine, failure: Exception) -> None:
    fake.failure = failure
    with pytest.raises(ModelError, match=r"engine stopped.*run the same command again: it continues"):
        list(start().run(prompts(1), params))


def test_an_option_that_vllm_does_not_have_is_named() -> None:
    with pytest.raises(ConfigError, match=r"vLLM .* has no max_num_sequences"):
        start(options={"max_num_sequences": 3})


def test_scoring_settings_reach_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[EngineArgs] = []

    def start_engine(arguments: EngineArgs) -> FakeEngine:
        received.append(arguments)
        return FakeEngine()

    monkeypatch.setattr("precompute.engine.vllm_engine.LLMEngine.from_engine_args", start_engine)
    start(options={"block_size": 32})
    arguments = received[0]
    assert arguments.block_size == 32
    assert not arguments.enable_prefix_caching
    assert (arguments.max_logprobs, arguments.max_model_len, arguments.seed) == (3, 8, 0)
    assert arguments.limit_mm_per_prompt == {"image": 1}
    assert arguments.load_format == "safetensors"


def test_a_replica_tells_vllm_its_rank_while_the_engine_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_DP_RANK", "9")
    seen: dict[str, str | None] = {}

    def start_engine(_: EngineArgs) -> FakeEngine:
        seen.update({name: os.environ.get(name) for name in ("VLLM_DP_SIZE", "VLLM_DP_RANK")})
        return FakeEngine()

    monkeypatch.setattr("precompute.engine.vllm_engine.LLMEngine.from_engine_args", start_engine)
    settings = EngineConfig(data_parallel_size=4)
    Engine(Path(__file__).parent, settings, LIMITS, data_parallel_rank=2)
    assert seen == {"VLLM_DP_SIZE": "4", "VLLM_DP_RANK": "2"}
    assert (os.environ.get("VLLM_DP_SIZE"), os.environ["VLLM_DP_RANK"]) == (None, "9")


def test_a_model_that_vllm_cannot_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path}: vLLM cannot start with it"):
        Engine(tmp_path, EngineConfig(), LIMITS)
