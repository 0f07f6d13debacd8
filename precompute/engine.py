"""The only door to vLLM: starts an engine on a local model and feeds it.

The engine runs in a process of its own, or in this one with VLLM_ENABLE_V1_MULTIPROCESSING=0, which starts
faster. Prompts are added while earlier ones run, at most `max_in_flight` at a time, so that memory stays bounded
whatever the length of the input.
"""

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
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

from common.errors import ConfigError, DataError, ModelError
from precompute.config import EngineConfig

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
    ) -> None:
        """Starts the engine for sequences of up to `max_model_len` tokens, the generated ones included.

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
            # Positions served from a cache have no scores.
            "enable_prefix_caching": False,
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
        with torch.random.fork_rng(devices=[]), nullcontext() if compiled else _nothing_compiled():
            try:
                self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
            except (RuntimeError, ValueError, OSError, TypeError, VLLMError) as error:
                raise ModelError(f"{model_dir}: vLLM cannot start with it: {error}") from error

    def run(self, prompts: Iterable[tuple[T, Prompt]], params: SamplingParams) -> Iterator[tuple[T, RequestOutput]]:
        """Each prompt's companion with its finished output, in the order in which they finish.

        Prompts enter in their own order, and a new one is drawn only when there is room for it.

        Raises:
            DataError: vLLM refuses a prompt.
            ModelError: the engine died.
        """
        running: dict[str, T] = {}
        numbered = enumerate(prompts)
        while True:
            for number, (companion, prompt) in islice(numbered, self.max_in_flight - len(running)):
                self._add(str(number), prompt, params)
                running[str(number)] = companion
            if not running:
                return
            for output in self._step():
                if output.finished:
                    yield running.pop(output.request_id), output

    def close(self) -> None:
        """Stops the engine and its processes and frees its memory."""
        self._engine.engine_core.shutdown()
        del self._engine
        cleanup_dist_env_and_memory()
        torch.set_num_threads, torch._dynamo.config.disable = self._before

    def _add(self, name: str, prompt: Prompt, params: SamplingParams) -> None:
        inputs: dict[str, Any] = {"prompt_token_ids": prompt.input_ids.tolist()}
        if prompt.images:
            inputs["multi_modal_data"] = {"image": list(prompt.images)}
        try:
            self._engine.add_request(name, inputs, params)
        except (ValueError, VLLMError) as error:
            raise DataError(f"{prompt.where}: vLLM refuses it ({error})") from error

    def _step(self) -> list[RequestOutput]:
        try:
            return self._engine.step()
        except (RuntimeError, VLLMError) as error:
            raise ModelError(
                f"the vLLM engine stopped: {error}; if its memory ran out, lower engine.max_num_batched_tokens or "
                "engine.gpu_memory_utilization, then run the same command again: it continues"
            ) from error


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
    before = os.environ.get(_NO_COMPILER)
    os.environ[_NO_COMPILER] = "1"
    torch._dynamo.config.disable = True
    try:
        yield
    finally:
        del os.environ[_NO_COMPILER]
        if before is not None:
            os.environ[_NO_COMPILER] = before
