"""Feeding vLLM, with its engine object replaced: what enters when, and how failures are told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import EngineArgs, RequestOutput, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from common.errors import ConfigError, DataError, ModelError
from precompute.config import EngineConfig
from precompute.engine import Engine, Prompt

PARAMS = SamplingParams(max_tokens=1)


class FakeEngine:
    """Finishes the newest request at every step."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self.most = 0
        self.added: list[list[int]] = []
        self.failure: Exception | None = None

    def add_request(self, name: str, prompt: dict[str, Any], params: SamplingParams) -> None:
        if prompt["prompt_token_ids"] == [99]:
            raise VLLMValidationError("unlucky")
        self.added.append(prompt["prompt_token_ids"])
        self.running.append(name)
        self.most = max(self.most, len(self.running))

    def step(self) -> list[RequestOutput]:
        if self.failure:
            raise self.failure
        name = self.running.pop()
        return [RequestOutput(name, None, [], None, [], finished=True)]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine()
    monkeypatch.setattr("precompute.engine.LLMEngine.from_engine_args", lambda args: engine)
    return engine


def start(**settings: Any) -> Engine:
    config = EngineConfig.model_validate({"max_num_seqs": 2, **settings})
    # Any directory will do: offline, vLLM only looks whether it exists.
    return Engine(Path(__file__).parent, config, max_model_len=8, max_images=1, max_logprobs=3)


def prompts(*tokens: int) -> Iterator[tuple[int, Prompt]]:
    for token in tokens:
        yield token, Prompt(np.array([token], np.int32), (), f"sample {token}")


def test_each_prompt_comes_back_once_with_its_companion(fake: FakeEngine) -> None:
    assert sorted(token for token, _ in start().run(prompts(*range(10)), PARAMS)) == list(range(10))
    assert fake.added == [[token] for token in range(10)]


def test_prompts_are_drawn_only_when_there_is_room(fake: FakeEngine) -> None:
    num_drawn = 0

    def counted() -> Iterator[tuple[int, Prompt]]:
        nonlocal num_drawn
        for pair in prompts(*range(50)):
            num_drawn += 1
            yield pair

    for num_finished, _ in enumerate(start().run(counted(), PARAMS)):
        assert num_drawn <= num_finished + 4
    assert (num_drawn, fake.most) == (50, 4)


def test_without_prompts_nothing_runs(fake: FakeEngine) -> None:
    fake.failure = AssertionError("the engine was stepped")
    assert list(start().run(prompts(), PARAMS)) == []


def test_a_refused_prompt_is_named(fake: FakeEngine) -> None:
    with pytest.raises(DataError, match=r"sample 99: vLLM refuses it .unlucky"):
        list(start().run(prompts(1, 99), PARAMS))


@pytest.mark.parametrize("failure", [EngineDeadError(), RuntimeError("out of memory")])
def test_a_dead_engine_is_told_with_what_to_do(fake: FakeEngine, failure: Exception) -> None:
    fake.failure = failure
    with pytest.raises(ModelError, match=r"engine stopped.*run the same command again: it continues"):
        list(start().run(prompts(1), PARAMS))


def test_an_option_that_vllm_does_not_have_is_named() -> None:
    with pytest.raises(ConfigError, match=r"vLLM .* has no max_num_sequences"):
        start(options={"max_num_sequences": 3})


def test_scoring_settings_reach_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[EngineArgs] = []
    monkeypatch.setattr("precompute.engine.LLMEngine.from_engine_args", received.append)
    start(options={"block_size": 32})
    arguments = received[0]
    assert arguments.block_size == 32
    assert not arguments.enable_prefix_caching
    assert (arguments.max_logprobs, arguments.max_model_len, arguments.seed) == (3, 8, 0)
    assert arguments.limit_mm_per_prompt == {"image": 1}
    assert arguments.load_format == "safetensors"


def test_a_model_that_vllm_cannot_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path}: vLLM cannot start with it"):
        Engine(tmp_path, EngineConfig(), max_model_len=8, max_images=0, max_logprobs=1)
