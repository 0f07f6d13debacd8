"""The choice between capture in the engine and vLLM's own log-probs; no engine is started."""

from pathlib import Path

import numpy as np
import pytest
from vllm.logprobs import FlatLogprobs, create_prompt_logprobs

from common.errors import ModelError
from precompute.config import CaptureMode, EngineConfig
from precompute.engine.row_request import RowRequest
from precompute.engine.score_conversion import rows_from_flat_logprobs
from precompute.engine.teacher import Teacher
from precompute.scorer import ScorerSettings

pytestmark = pytest.mark.vllm


def start_teacher(mode: CaptureMode) -> Teacher:
    settings = ScorerSettings(
        model_dir=Path(),
        engine=EngineConfig(capture=mode),
        max_tokens=8,
        max_images=1,
        top_k=2,
        top_p=None,
        min_k=1,
        num_draws=None,
        seed=0,
        generate=None,
        node_rank=0,
        vocab_size=10,
        output_vocab_size=12,
    )
    return Teacher(settings)


class FakeEngine:
    """Starts at once; one of its two workers answers with `problem`."""

    problem = ""
    masking_problem = ""
    num_closed = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def collective_rpc(self, _: str, *args: object) -> list[str]:
        if self.masking_problem and args:
            raise AttributeError(self.masking_problem)
        return ["", self.problem]

    def close(self) -> None:
        FakeEngine.num_closed += 1


@pytest.fixture(autouse=True)
def _unknown_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the engine by one whose workers meet a vLLM that cannot be patched."""
    monkeypatch.setattr("precompute.engine.teacher.Engine", FakeEngine)
    monkeypatch.setattr("precompute.engine.vllm_patch._front_end_problem", "")
    monkeypatch.setattr(FakeEngine, "problem", "GPUModelRunner.f takes (a), expected (b)")
    monkeypatch.setattr(FakeEngine, "num_closed", 0)


def test_with_an_unknown_vllm_the_stock_path_serves_and_the_reason_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert not start_teacher("auto").in_engine
    assert "GPUModelRunner.f takes (a), expected (b)" in caplog.text
    assert caplog.records[0].levelname == "WARNING"


def test_an_unknown_vllm_is_refused_where_capture_in_the_engine_is_demanded() -> None:
    with pytest.raises(ModelError, match=r"cannot capture in the engine: GPUModelRunner.f .* engine.capture = .stock."):
        start_teacher("in-engine")
    assert FakeEngine.num_closed == 1


@pytest.mark.parametrize("mode", ["auto", "stock"])
def test_padding_rows_that_cannot_be_masked_are_refused(monkeypatch: pytest.MonkeyPatch, mode: CaptureMode) -> None:
    monkeypatch.setattr(FakeEngine, "masking_problem", "no such method")
    with pytest.raises(ModelError, match=r"2 rows more than the tokenizer has ids, .*no such method.*pip install"):
        start_teacher(mode)
    assert FakeEngine.num_closed == 1


def test_the_stock_path_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "problem", "")
    assert start_teacher("auto").in_engine
    assert not start_teacher("stock").in_engine


def test_rows_are_read_out_of_vllms_own_record() -> None:
    flat = create_prompt_logprobs(flat_logprobs=True)
    assert isinstance(flat, FlatLogprobs)
    for token in range(1, 6):
        flat.append_fast([token, 7, 8], [-3.0, -0.5, -token], iter(range(3)), [None] * 3)
    request = RowRequest(np.array([0, 3], np.int32), np.array([1, 4], np.int32), vocab_size=12, top_k=2)
    rows = rows_from_flat_logprobs(flat, request, request.rows + 1, "sample 'a'")
    assert rows.own.tolist() == [-3.0, -3.0]
    assert rows.ids.tolist() == [[7, 8], [7, 8]]
    assert rows.logprobs.tolist() == [[-0.5, -1.0], [-0.5, -4.0]]
