"""Capture inside vLLM: only the wanted rows reach the output layer, and their scores stay arrays.

    SamplingParams.extra_args ─> worker: rows due in this step ─> score_rows ─> LogprobsTensors
                                 front end: LogprobsProcessor keeps the arrays ─> RequestOutput.prompt_logprobs

`install_patches` is called through the plugin in every process of the engine; it wraps the functions that would make
Python objects of each entry. Once the engine runs, `start_capture` has each worker wrap one function of its model
runner, behind vLLM's own result, so that requests for vLLM's own prompt log-probs are served as before. A function
whose parameters are not the ones that this was written for is left alone, and the reason is returned. vLLM may compute
a prompt in several steps, and start over when it has preempted it; rows are therefore kept by their place in the
prompt, not by their order of arrival.

Legend: R wanted rows of a request, K kept entries, D draws.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from precompute.engine.row_request import (
    CapturedSamplerSteps,
    RowRequest,
    pack_row_scores,
    request_uniforms,
    unpack_row_scores,
)
from precompute.engine.row_scores import LogitsFunction, RowScores, score_rows

# Attribute under which our state hangs on vLLM's objects.
_KEY = "decant_capture"

_WORKER_METHOD = "decant_start_capture"

# What this process's vLLM lacks, "" for nothing; empty until `install_patches` has run.
_front_end_lacks: list[str] = []


class Progress:
    """The rows of one request that are scored so far."""

    def __init__(self, wish: RowRequest) -> None:
        self.wish = wish
        self._uniforms_RD = request_uniforms(wish)
        self._scores: RowScores | None = None
        self._num_done = 0

    def due(self, start: int, stop: int) -> slice:
        """Which of the wanted rows lie in positions [start, stop)."""
        return slice(*np.searchsorted(self.wish.rows, [start, stop]).tolist())

    def uniforms(self, due: slice) -> npt.NDArray[np.float64]:
        """Random numbers of these rows."""
        return self._uniforms_RD[due]

    def put(self, due: slice, scores: RowScores) -> None:
        """Keeps the scores of these rows, in the memory that they are on."""
        if self._scores is None:
            num_rows = len(self.wish.rows)
            self._scores = RowScores(
                **{name: part.new_empty(num_rows, *part.shape[1:]) for name, part in vars(scores).items()}
            )
        for name, part in vars(scores).items():
            getattr(self._scores, name)[due].copy_(part)
        # Rows before a gap do not count: they would be delivered with others that nobody computed.
        if due.start <= self._num_done:
            self._num_done = max(self._num_done, due.stop)

    def result(self) -> RowScores | None:
        """All rows; None if one is missing, as when a cache served its position."""
        return self._scores if self._num_done == len(self.wish.rows) else None


@dataclass(frozen=True)
class Step:
    """A request's part in a step: positions [start, stop) of its prompt stand in the batch from `offset` on."""

    request_id: str
    progress: Progress
    start: int
    stop: int
    offset: int
    is_last: bool


def score_step(
    steps: Iterable[Step],
    hidden_states: Tensor,
    compute_logits: LogitsFunction,
    *,
    to_cpu: bool,
) -> dict[str, RowScores]:
    """Scores the rows that are due in a step, all requests together, and returns those of finished prompts."""
    steps = list(steps)
    groups: dict[tuple[int, int, int], list[tuple[Step, slice]]] = {}
    for step in steps:
        due = step.progress.due(step.start, step.stop)
        if due.start < due.stop:
            wish = step.progress.wish
            groups.setdefault((wish.vocab_size, wish.top_k, wish.num_draws), []).append((step, due))
    device = hidden_states.device
    for (vocab_size, top_k, num_draws), members in groups.items():
        rows = np.concatenate([step.progress.wish.rows[due] - step.start + step.offset for step, due in members])
        targets = np.concatenate([step.progress.wish.targets[due] for step, due in members])
        drawn = [step.progress.uniforms(due) for step, due in members]
        scores = score_rows(
            hidden_states[torch.from_numpy(rows).to(device)],
            torch.from_numpy(targets).to(device, torch.int64),
            compute_logits,
            vocab_size=vocab_size,
            top_k=top_k,
            uniforms_RD=torch.from_numpy(np.concatenate(drawn)).to(device) if num_draws else None,
        )
        if scores is None:
            return {}
        if to_cpu:
            scores = RowScores(**{name: part.cpu() for name, part in vars(scores).items()})
        edges = np.cumsum([0, *(due.stop - due.start for _, due in members)]).tolist()
        for (step, due), start, stop in zip(members, edges[:-1], edges[1:], strict=True):
            step.progress.put(due, RowScores(**{name: part[start:stop] for name, part in vars(scores).items()}))
    finished = {step.request_id: step.progress.result() for step in steps if step.is_last}
    return {request_id: scores for request_id, scores in finished.items() if scores is not None}


def install_patches() -> None:
    """Makes this process ready: wraps the front end, and lets workers wrap their runner when they are asked to.

    Calling it again changes nothing.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, _WORKER_METHOD):
        return
    _front_end_lacks.append(_try_wrapping(_wrap_front_end))
    setattr(WorkerBase, _WORKER_METHOD, _wrap_runner)


def start_capture(collective_rpc: Callable[[str], list[str]]) -> str:
    """Turns capture on in each worker of a started engine; "" if all can, else why one cannot."""
    lacks = _front_end_lacks[0] if _front_end_lacks else "the plugin is not loaded in this process"
    if lacks:
        return lacks
    try:
        answers = collective_rpc(_WORKER_METHOD)
    except Exception as error:
        # Of any type: that a worker has no such method is told through several layers of vLLM.
        return f"the plugin is not loaded in the engine's workers ({type(error).__name__}: {error})"
    return next(filter(None, answers), "")


def _wrap_runner(worker: Any) -> str:
    runner = type(worker.model_runner)
    if getattr(runner, _KEY, None) is None:
        is_v2 = runner.__module__.startswith("vllm.v1.worker.gpu.")
        setattr(runner, _KEY, _try_wrapping(_wrap_v2 if is_v2 else _wrap_v1))
    lacks: str = getattr(runner, _KEY)
    return lacks


def _try_wrapping(wrap: Callable[[], None]) -> str:
    try:
        wrap()
    except (ImportError, AttributeError, _SignatureError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


class _SignatureError(Exception):
    """A function of vLLM is not the one that this module was written for."""


def _check_signature(owner: Any, name: str, parameters: str) -> Any:
    function = getattr(owner, name)
    found = ", ".join(inspect.signature(function).parameters)
    if found != parameters:
        raise _SignatureError(f"{owner.__name__}.{name} takes ({found}), expected ({parameters})")
    return function


def _wrap_front_end() -> None:
    from vllm.v1.engine.logprobs import LogprobsProcessor as Processor
    from vllm.v1.outputs import LogprobsTensors

    if LogprobsTensors._fields[:3] != ("logprob_token_ids", "logprobs", "selected_token_ranks"):
        raise _SignatureError(f"LogprobsTensors holds {LogprobsTensors._fields}")
    stock_new = _check_signature(Processor, "from_new_request", "tokenizer, request").__func__
    stock_prompt = _check_signature(Processor, "_update_prompt_logprobs", "self, prompt_logprobs_tensors")
    stock_sample = _check_signature(Processor, "_update_sample_logprobs", "self, logprobs_lists")

    @wraps(stock_new)
    def from_new_request(cls: Any, tokenizer: Any, request: Any) -> Any:
        processor = stock_new(cls, tokenizer, request)
        if steps := CapturedSamplerSteps.of(request.sampling_params):
            processor.logprobs = steps
        return processor

    @wraps(stock_prompt)
    def update_prompt(self: Any, prompt_logprobs_tensors: Any) -> None:
        # Ours come for requests that did not ask for vLLM's.
        if self.num_prompt_logprobs is None:
            self.prompt_logprobs = unpack_row_scores(prompt_logprobs_tensors)
        else:
            stock_prompt(self, prompt_logprobs_tensors)

    @wraps(stock_sample)
    def update_sample(self: Any, logprobs_lists: Any) -> None:
        if isinstance(self.logprobs, CapturedSamplerSteps):
            self.logprobs.append(logprobs_lists)
        else:
            stock_sample(self, logprobs_lists)

    Processor.from_new_request = classmethod(from_new_request)
    Processor._update_prompt_logprobs = update_prompt
    Processor._update_sample_logprobs = update_sample


def _wrap_v1() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    stock = _check_signature(GPUModelRunner, "_get_prompt_logprobs_dict", "self, hidden_states, num_scheduled_tokens")

    @wraps(stock)
    def with_capture(self: Any, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        result: dict[str, Any] = stock(self, hidden_states, num_scheduled_tokens)
        steps = list(_v1_steps(self, num_scheduled_tokens))
        if steps:
            finished = score_step(steps, hidden_states, self.model.compute_logits, to_cpu=True)
            result.update({request_id: pack_row_scores(scores) for request_id, scores in finished.items()})
        return result

    GPUModelRunner._get_prompt_logprobs_dict = with_capture


def _v1_steps(runner: Any, num_scheduled_tokens: Mapping[str, int]) -> Iterable[Step]:
    for request_id, num_tokens in num_scheduled_tokens.items():
        request = runner.requests[request_id]
        start, num_prompt_tokens = request.num_computed_tokens, request.num_prompt_tokens
        # The request's state in vLLM lives exactly as long as ours must.
        progress = getattr(request, _KEY, None)
        if progress is None and start < num_prompt_tokens and (wish := RowRequest.of(request.sampling_params)):
            progress = Progress(wish)
        if progress is None or start >= num_prompt_tokens:
            continue
        setattr(request, _KEY, progress)
        index = runner.input_batch.req_id_to_index[request_id]
        offset = int(runner.query_start_loc.np[index])
        stop = start + num_tokens
        yield Step(request_id, progress, start, stop, offset, is_last=stop >= num_prompt_tokens)


def _wrap_v2() -> None:
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker as Worker

    stock_add = _check_signature(Worker, "add_request", "self, req_id, req_idx, sampling_params")
    stock_remove = _check_signature(Worker, "remove_request", "self, req_id")
    stock_compute = _check_signature(
        Worker,
        "compute_prompt_logprobs",
        "self, logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens",
    )

    def running(worker: Any) -> dict[str, Progress]:
        progress: dict[str, Progress] = worker.__dict__.setdefault(_KEY, {})
        return progress

    @wraps(stock_add)
    def add_request(self: Any, req_id: str, req_idx: int, sampling_params: Any) -> None:
        stock_add(self, req_id, req_idx, sampling_params)
        if wish := RowRequest.of(sampling_params):
            running(self)[req_id] = Progress(wish)

    @wraps(stock_remove)
    def remove_request(self: Any, req_id: str) -> None:
        stock_remove(self, req_id)
        running(self).pop(req_id, None)

    @wraps(stock_compute)
    def compute_prompt_logprobs(
        self: Any,
        logits_fn: LogitsFunction,
        hidden_states: Tensor,
        input_batch: Any,
        all_token_ids: Tensor,
        num_computed_tokens: Tensor,
        prompt_lens: npt.NDArray[np.int32],
    ) -> dict[str, Any]:
        result: dict[str, Any] = stock_compute(
            self, logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
        )
        steps = list(_v2_steps(running(self), input_batch, prompt_lens))
        if steps:
            # Copied to the host by vLLM itself, beside the next step.
            finished = score_step(steps, hidden_states, logits_fn, to_cpu=False)
            result.update({request_id: pack_row_scores(scores) for request_id, scores in finished.items()})
        return result

    Worker.add_request = add_request
    Worker.remove_request = remove_request
    Worker.compute_prompt_logprobs = compute_prompt_logprobs


def _v2_steps(running: dict[str, Progress], input_batch: Any, prompt_lens: npt.NDArray[np.int32]) -> Iterable[Step]:
    for index, request_id in enumerate(input_batch.req_ids):
        progress = running.get(request_id)
        if progress is None:
            continue
        num_prompt_tokens = int(prompt_lens[input_batch.idx_mapping_np[index]])
        start = int(input_batch.num_computed_prefill_tokens_np[index])
        # A request that was preempted while it generated reads its response again; its rows were delivered before.
        if start >= num_prompt_tokens or num_prompt_tokens < int(input_batch.prefill_len_np[index]):
            continue
        stop = start + int(input_batch.num_scheduled_tokens[index])
        offset = int(input_batch.query_start_loc_np[index])
        yield Step(request_id, progress, start, stop, offset, is_last=stop >= num_prompt_tokens)
