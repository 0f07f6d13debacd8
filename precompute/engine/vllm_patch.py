"""Capture inside vLLM: only the wanted rows reach the output layer, and their scores stay arrays.

    SamplingParams.extra_args ─> worker: PrefillChunk of each request in the step ─> score_chunks ─> LogprobsTensors
                                 front end: LogprobsProcessor keeps the arrays ─> RequestOutput.prompt_logprobs

`install_patches` is called through the plugin in every process of the engine; it wraps the functions that would make
a Python object of each entry. Once the engine runs, `start_capture` has each worker wrap one function of its model
runner. The wrapper adds to vLLM's own result, so that requests for vLLM's own prompt log-probs are served as before. A
function whose parameters are not the ones that this was written for is left alone, and the reason is returned.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from precompute.engine.prefill_capture import PrefillChunk, RowAccumulator, score_chunks
from precompute.engine.row_request import CapturedSamplerSteps, RowRequest, pack_row_scores, unpack_row_scores
from precompute.engine.row_scores import LogitsFunction, RowScores

# The attribute of vLLM's objects that holds our state.
_KEY = "decant_capture"

_WORKER_METHOD = "decant_start_capture"
_MASKING_METHOD = "decant_mask_padding_rows"

# Why the front end of this process could not be patched, "" if it could; None until `install_patches` has run.
_front_end_problem: str | None = None


def install_patches() -> None:
    """Patches the front end of this process, and gives its workers a method that patches their model runner.

    Calling it again changes nothing.
    """
    global _front_end_problem
    from vllm.v1.worker.worker_base import WorkerBase

    if hasattr(WorkerBase, _WORKER_METHOD):
        return
    _front_end_problem = try_patch(patch_front_end)
    setattr(WorkerBase, _WORKER_METHOD, _patch_model_runner)
    setattr(WorkerBase, _MASKING_METHOD, _mask_padding_rows)


def start_capture(collective_rpc: Callable[[str], list[str]]) -> str:
    """Turns capture on in each worker of a started engine; returns "" if all can, else why one cannot."""
    if _front_end_problem is None:
        return "the plugin is not loaded in this process"
    if _front_end_problem:
        return _front_end_problem
    try:
        answers = collective_rpc(_WORKER_METHOD)
    except Exception as error:  # noqa: BLE001 - several layers of vLLM report a missing method, each by another type
        return f"the plugin is not loaded in the engine's workers ({type(error).__name__}: {error})"
    return next(filter(None, answers), "")


def mask_padding_rows(collective_rpc: Callable[..., list[Any]], num_ids: int) -> str:
    """Has a started engine give the rows of its output layer from `num_ids` on the logit -inf.

    They stand for no token. With the mask every softmax, and so every log-prob, draw and sampled token, is over the
    tokenizer's ids alone, as the student's is.

    Returns:
        "", or why it cannot be done.
    """
    try:
        collective_rpc(_MASKING_METHOD, num_ids)
    except Exception as error:  # noqa: BLE001 - several layers of vLLM report a missing method, each by another type
        return f"the plugin is not loaded in the engine's workers ({type(error).__name__}: {error})"
    return ""


def find_patch_problems() -> dict[str, str]:
    """Patches all that can be patched in this process, and returns for each part "" or why it cannot be."""
    return {
        "front end": try_patch(patch_front_end),
        "first model runner": try_patch(patch_v1_runner),
        "second model runner": try_patch(patch_v2_runner),
    }


def _patch_model_runner(worker: Any) -> str:
    """Patches the class of a worker's model runner once; returns "" or why it cannot be."""
    runner = type(worker.model_runner)
    if getattr(runner, _KEY, None) is None:
        is_v2 = runner.__module__.startswith("vllm.v1.worker.gpu.")
        setattr(runner, _KEY, try_patch(patch_v2_runner if is_v2 else patch_v1_runner))
    problem: str = getattr(runner, _KEY)
    return problem


def _mask_padding_rows(worker: Any, num_ids: int) -> None:
    """Wraps `compute_logits` of a worker's model, from which vLLM takes all logits."""
    model = worker.model_runner.get_model()
    stock = model.compute_logits

    @wraps(stock)
    def compute_logits(*args: Any, **options: Any) -> Tensor | None:
        logits: Tensor | None = stock(*args, **options)
        if logits is not None:
            logits[..., num_ids:] = float("-inf")
        return logits

    model.compute_logits = compute_logits


def try_patch(patch: Callable[[], None]) -> str:
    """Applies a patch; returns "", or why this vLLM cannot be patched."""
    try:
        patch()
    except (ImportError, AttributeError, _SignatureError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


class _SignatureError(Exception):
    """A function of vLLM is not the one that this module was written for."""


def _get_checked(owner: Any, name: str, parameters: str) -> Any:
    """Returns a function of vLLM after a check of its parameters' names.

    Raises:
        _SignatureError: the names are others. AttributeError: there is no such function.
    """
    function = getattr(owner, name)
    found = ", ".join(inspect.signature(function).parameters)
    if found != parameters:
        raise _SignatureError(f"{owner.__name__}.{name} takes ({found}), expected ({parameters})")
    return function


def patch_front_end() -> None:
    """Has vLLM's LogprobsProcessor keep our scores as arrays."""
    from vllm.v1.engine.logprobs import LogprobsProcessor as Processor
    from vllm.v1.outputs import LogprobsTensors

    if LogprobsTensors._fields[:3] != ("logprob_token_ids", "logprobs", "selected_token_ranks"):
        raise _SignatureError(f"LogprobsTensors holds {LogprobsTensors._fields}")
    stock_new = _get_checked(Processor, "from_new_request", "tokenizer, request").__func__
    stock_prompt = _get_checked(Processor, "_update_prompt_logprobs", "self, prompt_logprobs_tensors")
    stock_sample = _get_checked(Processor, "_update_sample_logprobs", "self, logprobs_lists")

    @wraps(stock_new)
    def from_new_request(cls: Any, tokenizer: Any, request: Any) -> Any:
        processor = stock_new(cls, tokenizer, request)
        if steps := CapturedSamplerSteps.from_sampling_params(request.sampling_params):
            processor.logprobs = steps
        return processor

    @wraps(stock_prompt)
    def update_prompt(self: Any, prompt_logprobs_tensors: Any) -> None:
        # Without vLLM's own prompt log-probs, what arrives here are our scores.
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
    Processor._update_prompt_logprobs = update_prompt  # noqa: SLF001 - vLLM has no public hook here
    Processor._update_sample_logprobs = update_sample  # noqa: SLF001 - vLLM has no public hook here


def patch_v1_runner() -> None:
    """Has vLLM's first model runner, which serves CPUs and GPUs, return our scores beside its own."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    stock = _get_checked(GPUModelRunner, "_get_prompt_logprobs_dict", "self, hidden_states, num_scheduled_tokens")

    @wraps(stock)
    def with_capture(self: Any, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]) -> dict[str, Any]:
        result: dict[str, Any] = stock(self, hidden_states, num_scheduled_tokens)
        chunks = list(_v1_chunks(self, num_scheduled_tokens))
        if chunks:
            result.update(_pack_all(score_chunks(chunks, hidden_states, self.model.compute_logits, to_cpu=True)))
        return result

    GPUModelRunner._get_prompt_logprobs_dict = with_capture  # noqa: SLF001 - vLLM has no public hook here


def _v1_chunks(runner: Any, num_scheduled_tokens: Mapping[str, int]) -> Iterable[PrefillChunk]:
    """Yields the chunks of a step of the first runner."""
    for request_id, num_tokens in num_scheduled_tokens.items():
        state = runner.requests[request_id]
        start, num_prompt_tokens = state.num_computed_tokens, state.num_prompt_tokens
        if start >= num_prompt_tokens:
            continue
        # Stored in vLLM's state of the request, so that the accumulator lives exactly as long.
        accumulator = getattr(state, _KEY, None)
        if accumulator is None:
            request = RowRequest.from_sampling_params(state.sampling_params)
            if request is None:
                continue
            accumulator = RowAccumulator(request)
            setattr(state, _KEY, accumulator)
        index = runner.input_batch.req_id_to_index[request_id]
        offset = int(runner.query_start_loc.np[index])
        stop = start + num_tokens
        yield PrefillChunk(request_id, accumulator, start, stop, offset, is_last=stop >= num_prompt_tokens)


def patch_v2_runner() -> None:
    """Has vLLM's second model runner, which serves GPUs, return our scores beside its own."""
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker as Worker

    stock_add = _get_checked(Worker, "add_request", "self, req_id, req_idx, sampling_params")
    stock_remove = _get_checked(Worker, "remove_request", "self, req_id")
    stock_compute = _get_checked(
        Worker,
        "compute_prompt_logprobs",
        "self, logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens",
    )

    def get_accumulators(worker: Any) -> dict[str, RowAccumulator]:
        accumulators: dict[str, RowAccumulator] = worker.__dict__.setdefault(_KEY, {})
        return accumulators

    @wraps(stock_add)
    def add_request(self: Any, req_id: str, req_idx: int, sampling_params: Any) -> None:
        stock_add(self, req_id, req_idx, sampling_params)
        if request := RowRequest.from_sampling_params(sampling_params):
            get_accumulators(self)[req_id] = RowAccumulator(request)

    @wraps(stock_remove)
    def remove_request(self: Any, req_id: str) -> None:
        stock_remove(self, req_id)
        get_accumulators(self).pop(req_id, None)

    @wraps(stock_compute)
    def compute_prompt_logprobs(  # noqa: PLR0913, PLR0917 - replaces a function of vLLM
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
        chunks = list(_v2_chunks(get_accumulators(self), input_batch, prompt_lens))
        if chunks:
            # vLLM itself copies them to the host while the next step runs.
            result.update(_pack_all(score_chunks(chunks, hidden_states, logits_fn, to_cpu=False)))
        return result

    Worker.add_request = add_request
    Worker.remove_request = remove_request
    Worker.compute_prompt_logprobs = compute_prompt_logprobs


def _v2_chunks(
    accumulators: Mapping[str, RowAccumulator], input_batch: Any, prompt_lens: npt.NDArray[np.int32]
) -> Iterable[PrefillChunk]:
    """Yields the chunks of a step of the second runner."""
    for index, request_id in enumerate(input_batch.req_ids):
        accumulator = accumulators.get(request_id)
        if accumulator is None:
            continue
        num_prompt_tokens = int(prompt_lens[input_batch.idx_mapping_np[index]])
        start = int(input_batch.num_computed_prefill_tokens_np[index])
        # A request that was preempted while it generated reads its response again; its rows were delivered before.
        if start >= num_prompt_tokens or num_prompt_tokens < int(input_batch.prefill_len_np[index]):
            continue
        stop = start + int(input_batch.num_scheduled_tokens[index])
        offset = int(input_batch.query_start_loc_np[index])
        yield PrefillChunk(request_id, accumulator, start, stop, offset, is_last=stop >= num_prompt_tokens)


def _pack_all(finished: Mapping[str, RowScores]) -> dict[str, Any]:
    """Returns scores as the records that vLLM sends from its workers to the front end."""
    from vllm.v1.outputs import LogprobsTensors

    return {request_id: LogprobsTensors(*pack_row_scores(scores)) for request_id, scores in finished.items()}
