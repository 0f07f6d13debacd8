"""The only door to vLLM: starts an engine on a local model and feeds it.

The engine runs in a process of its own, or in this one with VLLM_ENABLE_V1_MULTIPROCESSING=0, which starts
faster. Prompts are added while earlier ones run, at most `max_in_flight` at a time, so that memory stays bounded
whatever the length of the input. A thread draws them and lets vLLM process their images, which takes as long as the
engine's step.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import vllm
from PIL import Image
from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMError
from vllm.platforms import current_platform

from common.concurrency import Prefetcher
from common.errors import ConfigError, ModelError
from precompute.config import EngineConfig
from precompute.scorer import RejectedRequest

logger = logging.getLogger(__name__)

_NO_COMPILER = "TORCHDYNAMO_DISABLE"

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """Token ids int32 [T] with one placeholder an image, and the images. `where` names it in errors."""

    input_ids: npt.NDArray[np.int32]
    images: tuple[Image.Image, ...]
    where: str


class Engine:
    """A running vLLM engine. Close it to free the device."""

    def __init__(
        self,
        model_dir: Path,
        settings: EngineConfig,
        *,
        max_model_len: int,
        max_images: int,
        max_logprobs: int,
        prefix_caching: bool = False,
        data_parallel_rank: int = 0,
    ) -> None:
        """Starts the engine for sequences of up to `max_model_len` tokens, the generated ones included.

        With `prefix_caching` a prompt that begins like another is not read again from its start. Of
        `settings.data_parallel_size` processes this one is `data_parallel_rank`.

        Raises:
            ConfigError: an unknown key in `settings.options`.
            ModelError: vLLM cannot load the model, or the device has too little memory.
        """
        _keep_quiet_and_offline()
        # In this process vLLM's CPU worker replaces the one, and we set the other; `close` puts both back.
        self._before = (torch.set_num_threads, torch._dynamo.config.disable)
        arguments: dict[str, Any] = {
            **settings.options,
            "model": str(model_dir),
            "load_format": "safetensors",
            "dtype": settings.dtype,
            "seed": 0,
            "max_model_len": max_model_len,
            "max_logprobs": max_logprobs,
            "enable_prefix_caching": prefix_caching,
            # Its cache is not made for a thread that renders prompts beside the engine's steps.
            "mm_processor_cache_gb": 0,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "pipeline_parallel_size": settings.pipeline_parallel_size,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "kv_cache_memory_bytes": None if settings.kv_cache_gib is None else int(settings.kv_cache_gib * 2**30),
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": max(settings.max_num_batched_tokens, settings.max_num_seqs),
            "enforce_eager": settings.enforce_eager,
            "disable_log_stats": settings.options.get("disable_log_stats", True),
            "use_tqdm_on_load": settings.options.get("use_tqdm_on_load", False),
        }
        if max_images:
            arguments["limit_mm_per_prompt"] = {"image": max_images}
        known = {field.name for field in dataclasses.fields(EngineArgs)}
        if unknown := sorted(set(arguments) - known):
            raise ConfigError(f"engine.options: vLLM {vllm.__version__} has no {', '.join(unknown)}")
        self.max_in_flight = 2 * settings.max_num_seqs
        in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "1") == "0"
        logger.info(
            "starting vLLM %s on %s in %s, %s, at most %d requests in flight",
            vllm.__version__,
            current_platform.device_type,
            settings.dtype,
            "in this process" if in_process else "in a process of its own",
            self.max_in_flight,
        )
        # vLLM draws its random seeds from the global state, which belongs to the caller.
        compiled = not (settings.enforce_eager and current_platform.is_cpu())
        with (
            torch.random.fork_rng(devices=[]),
            nullcontext() if compiled else _nothing_compiled(),
            _data_parallel(settings.data_parallel_size, data_parallel_rank),
        ):
            try:
                self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
            except (RuntimeError, ValueError, OSError, TypeError, VLLMError) as error:
                raise ModelError(f"{model_dir}: vLLM cannot start with it: {error}") from error

    def run(
        self, prompts: Iterable[tuple[T, Prompt]], params: Callable[[T, list[int]], SamplingParams]
    ) -> Generator[tuple[T, RequestOutput | RejectedRequest], None, None]:
        """Each prompt's companion with its finished output, in the order in which they finish.

        Prompts are drawn in a thread and enter in their own order; `params` is called there with the companion and
        the ids of the prompt as the engine reads it, images expanded. A prompt that vLLM refuses comes back so.

        Raises:
            ModelError: the engine died. Whatever drawing a prompt or `params` raises.
        """

        def rendered() -> Iterator[tuple[T, str, Any, SamplingParams | RejectedRequest]]:
            for companion, prompt in prompts:
                try:
                    inputs = self._render(prompt)
                except (ValueError, VLLMError) as error:
                    yield companion, prompt.where, None, _refused(prompt.where, error)
                else:
                    yield companion, prompt.where, inputs, params(companion, inputs["prompt_token_ids"])

        running: dict[str, T] = {}
        count = 0
        feed = Prefetcher(rendered(), ahead=self.max_in_flight // 2)
        try:
            while True:
                room = self.max_in_flight - len(running)
                for companion, where, inputs, choice in feed.ready(room, wait=not running):
                    if isinstance(choice, RejectedRequest):
                        yield companion, choice
                        continue
                    name, count = str(count), count + 1
                    try:
                        self._engine.add_request(name, inputs, choice)
                    except (ValueError, VLLMError) as error:
                        yield companion, _refused(where, error)
                    else:
                        running[name] = companion
                # Under vLLM's data parallelism an engine has to step as long as any of them has work.
                if not running and feed.ended and not self._engine.has_unfinished_requests():
                    return
                for output in self._step() if running or feed.ended else ():
                    if output.finished:
                        yield running.pop(output.request_id), output
        finally:
            feed.close()
            # A dead engine has nothing left to stop, and what it died of must be told.
            with suppress(RuntimeError, VLLMError):
                self._engine.abort_request(list(running))

    def collective_rpc(self, method: str) -> list[Any]:
        """Calls a method of each of the engine's workers."""
        answers: list[Any] = self._engine.collective_rpc(method)
        return answers

    def close(self) -> None:
        """Stops the engine and its processes and frees its memory."""
        self._engine.engine_core.shutdown()
        del self._engine
        cleanup_dist_env_and_memory()
        torch.set_num_threads, torch._dynamo.config.disable = self._before

    def _render(self, prompt: Prompt) -> Any:
        inputs: dict[str, Any] = {"prompt_token_ids": prompt.input_ids.tolist()}
        if prompt.images:
            inputs["multi_modal_data"] = {"image": list(prompt.images)}
        return self._engine.renderer.render_cmpl([inputs])[0]

    def _step(self) -> list[RequestOutput]:
        try:
            return self._engine.step()
        except (RuntimeError, VLLMError) as error:
            raise ModelError(
                f"the vLLM engine stopped: {error}; if its memory ran out, lower engine.max_num_batched_tokens or "
                "engine.gpu_memory_utilization, then run the same command again: it continues"
            ) from error


def _refused(where: str, error: Exception) -> RejectedRequest:
    return RejectedRequest(f"{where}: vLLM refuses it ({error})")


def _keep_quiet_and_offline() -> None:
    """vLLM logs and reports usage to its makers unless told otherwise; its child processes inherit this."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    # Says at every start that a machine without a GPU has no Triton.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Eager means eager: vLLM would still compile the function that ranks prompt log-probs, for half a minute.

    The variable is for processes that start in this context, the setting is for this one and stays.
    """
    torch._dynamo.config.disable = True
    with _environment({_NO_COMPILER: "1"}):
        yield


def _data_parallel(size: int, rank: int) -> AbstractContextManager[None]:
    """vLLM's own way to tell one process of several that it is a replica of a data-parallel engine."""
    return _environment({"VLLM_DP_SIZE": str(size), "VLLM_DP_RANK": str(rank)} if size > 1 else {})


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
