"""Starts a vLLM engine on a local model and feeds it. The only module that does.

The engine runs in a process of its own, or in this one with VLLM_ENABLE_V1_MULTIPROCESSING=0, which starts
faster. Prompts are added while earlier ones run, at most `max_in_flight` at a time, so that memory stays bounded
whatever the length of the input. A thread takes them and has vLLM process their images, because that takes as long as
the engine's step.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import vllm
from PIL import Image
from torch._dynamo import config as compiler_config
from vllm import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMError
from vllm.platforms import current_platform
from vllm.renderers import renderer_from_config

from common.concurrency import Prefetcher
from common.errors import ConfigError, DataError, ModelError
from precompute.config import EngineConfig
from precompute.engine.score_conversion import ExpandedPrompt
from precompute.scorer import RejectedRequest

logger = logging.getLogger(__name__)

_NO_COMPILER = "TORCHDYNAMO_DISABLE"

KeyT = TypeVar("KeyT")


@dataclass(frozen=True)
class Prompt:
    """Token ids int32 [T] with one placeholder an image, and the images. `where` names it in errors."""

    input_ids: npt.NDArray[np.int32]
    images: tuple[Image.Image, ...]
    where: str


@dataclass(frozen=True)
class EngineLimits:
    """The largest requests that an engine takes.

    `max_model_len` counts a sequence's tokens, images expanded and generated ones included; `max_images` its images (0:
    no vision tower); `max_logprobs` the entries of vLLM's own log-probs that a request may want (-1: all).
    """

    max_model_len: int
    max_images: int
    max_logprobs: int


@dataclass(frozen=True)
class _RenderedPrompt:
    """A prompt as the engine reads it, with its sampling parameters."""

    inputs: Any
    params: SamplingParams
    where: str


class PromptRenderer:
    """Makes of prompts what an engine of vLLM reads, images by the model's processor. Needs config.json, no weights."""

    def __init__(self, renderer: Any) -> None:
        self._renderer = renderer

    @classmethod
    @contextmanager
    def without_engine(
        cls, model_dir: Path, settings: EngineConfig, limits: EngineLimits
    ) -> Iterator["PromptRenderer"]:
        """Yields the renderer that an engine of these settings would have.

        Raises:
            ConfigError: an unknown key in `settings.options`.
            ModelError: vLLM has no class for the model, or cannot read its configuration or processor.
        """
        _disable_logs_and_usage_reports()
        arguments = _engine_arguments(model_dir, settings, limits, prefix_caching=False)
        with torch.random.fork_rng(devices=[]), _start_errors(model_dir):
            renderer = renderer_from_config(EngineArgs(**arguments).create_engine_config())
        try:
            yield cls(renderer)
        finally:
            renderer.shutdown()

    def render(self, prompt: Prompt) -> Any:
        """Returns vLLM's own form of a prompt. Raises ValueError or VLLMError if vLLM refuses it."""
        inputs: dict[str, Any] = {"prompt_token_ids": prompt.input_ids.tolist()}
        if prompt.images:
            inputs["multi_modal_data"] = {"image": list(prompt.images)}
        return self._renderer.render_cmpl([inputs])[0]

    def expand(self, prompt: Prompt) -> ExpandedPrompt:
        """Returns a prompt as the engine reads it. Raises DataError if vLLM refuses it."""
        try:
            return _read_expansion(self.render(prompt))
        except (ValueError, VLLMError) as error:
            raise DataError(_make_rejected(prompt.where, error).reason) from error


class Engine:
    """A running vLLM engine. Close it to free the device."""

    def __init__(
        self,
        model_dir: Path,
        settings: EngineConfig,
        limits: EngineLimits,
        *,
        prefix_caching: bool = False,
        data_parallel_rank: int = 0,
    ) -> None:
        """Starts the engine.

        With `prefix_caching` a prompt that begins like another is not read again from its start. Of
        `settings.data_parallel_size` processes this one is `data_parallel_rank`.

        Raises:
            ConfigError: an unknown key in `settings.options`.
            ModelError: vLLM cannot load the model, or the device has too little memory.
        """
        _disable_logs_and_usage_reports()
        # vLLM's CPU worker replaces the function if it runs in this process, and `_compiler_disabled` sets the flag.
        # `close` restores both.
        self._torch_state_before = (torch.set_num_threads, compiler_config.disable)
        arguments = _engine_arguments(model_dir, settings, limits, prefix_caching)
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
        compiled = not (settings.enforce_eager and current_platform.is_cpu())
        with (
            # vLLM draws its random seeds from the global state, which belongs to the caller.
            torch.random.fork_rng(devices=[]),
            nullcontext() if compiled else _compiler_disabled(),
            _data_parallel(settings.data_parallel_size, data_parallel_rank),
            _start_errors(model_dir),
        ):
            self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._renderer = PromptRenderer(self._engine.renderer)

    def run(
        self, prompts: Iterable[tuple[KeyT, Prompt]], params: Callable[[KeyT, ExpandedPrompt], SamplingParams]
    ) -> Generator[tuple[KeyT, RequestOutput | RejectedRequest], None, None]:
        """Yields the key of each prompt with its finished output, in the order in which they finish.

        A prompt that vLLM refuses is yielded as a RejectedRequest. Prompts are taken in a thread and enter in their
        own order; `params` is called there with the key and the prompt as the engine reads it.

        Raises:
            ModelError: the engine died. Whatever `prompts` or `params` raises.
        """
        running: dict[str, KeyT] = {}
        names = map(str, count())
        rendered = Prefetcher(self._render_all(prompts, params), ahead=self.max_in_flight // 2)
        try:
            while True:
                for key, prompt in rendered.take(self.max_in_flight - len(running), wait=not running):
                    name = next(names)
                    rejected = self._add_request(name, prompt)
                    if rejected is not None:
                        yield key, rejected
                    else:
                        running[name] = key
                # Under vLLM's data parallelism an engine has to step as long as any of them has work.
                if not running and rendered.is_exhausted and not self._engine.has_unfinished_requests():
                    return
                for output in self._step() if running or rendered.is_exhausted else ():
                    if output.finished:
                        yield running.pop(output.request_id), output
        finally:
            rendered.close()
            # A dead engine cannot abort its requests; the error that it died of must not be hidden by this one.
            with suppress(RuntimeError, VLLMError):
                self._engine.abort_request(list(running))

    def collective_rpc(self, method: str, *args: Any) -> list[Any]:
        """Calls a method of each of the engine's workers and returns what they return."""
        answers: list[Any] = self._engine.collective_rpc(method, args=args)
        return answers

    def close(self) -> None:
        """Stops the engine and its processes and frees its memory."""
        self._engine.engine_core.shutdown()
        del self._engine
        cleanup_dist_env_and_memory()
        torch.set_num_threads, compiler_config.disable = self._torch_state_before

    def _render_all(
        self, prompts: Iterable[tuple[KeyT, Prompt]], params: Callable[[KeyT, ExpandedPrompt], SamplingParams]
    ) -> Iterator[tuple[KeyT, _RenderedPrompt | RejectedRequest]]:
        """Yields each prompt as the engine reads it, or the reason why vLLM's renderer refuses it."""
        for key, prompt in prompts:
            try:
                inputs = self._renderer.render(prompt)
            except (ValueError, VLLMError) as error:
                yield key, _make_rejected(prompt.where, error)
            else:
                yield key, _RenderedPrompt(inputs, params(key, _read_expansion(inputs)), prompt.where)

    def _add_request(self, name: str, prompt: _RenderedPrompt | RejectedRequest) -> RejectedRequest | None:
        """Gives a prompt to the engine; returns None, or the reason why vLLM refuses it."""
        if isinstance(prompt, RejectedRequest):
            return prompt
        try:
            self._engine.add_request(name, prompt.inputs, prompt.params)
        except (ValueError, VLLMError) as error:
            return _make_rejected(prompt.where, error)
        return None

    def _step(self) -> list[RequestOutput]:
        try:
            outputs: list[RequestOutput] = self._engine.step()
        except (RuntimeError, ValueError, VLLMError) as error:
            raise ModelError(
                f"the vLLM engine stopped: {error}; if its memory ran out, lower engine.max_num_batched_tokens or "
                "engine.gpu_memory_utilization, then run the same command again: it continues"
            ) from error
        return outputs


def _engine_arguments(
    model_dir: Path, settings: EngineConfig, limits: EngineLimits, prefix_caching: bool
) -> dict[str, Any]:
    """Returns the arguments of vLLM's EngineArgs.

    Raises:
        ConfigError: an unknown key in `settings.options`.
    """
    arguments: dict[str, Any] = {
        **settings.options,
        "model": str(model_dir),
        "load_format": "safetensors",
        "dtype": settings.dtype,
        "seed": 0,
        "max_model_len": limits.max_model_len,
        "max_logprobs": limits.max_logprobs,
        "enable_prefix_caching": prefix_caching,
        # This cache is not safe with a thread that renders prompts while the engine steps.
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
    if limits.max_images:
        arguments["limit_mm_per_prompt"] = {"image": limits.max_images}
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    if unknown := sorted(set(arguments) - known):
        raise ConfigError(f"engine.options: vLLM {vllm.__version__} has no {', '.join(unknown)}")
    return arguments


@contextmanager
def _start_errors(model_dir: Path) -> Iterator[None]:
    """Turns whatever vLLM raises while it reads a model into one ModelError."""
    try:
        yield
    except Exception as error:
        reason = error if isinstance(error, RuntimeError | ValueError | VLLMError) else repr(error)
        raise ModelError(f"{model_dir}: vLLM cannot start with it: {reason}") from error


def _read_expansion(inputs: Any) -> ExpandedPrompt:
    """Returns the token ids of a rendered prompt, and where its images stand."""
    found = inputs.get("mm_placeholders", {}).get("image", ())
    token_ids = np.asarray(inputs["prompt_token_ids"], np.int32)
    return ExpandedPrompt(token_ids, tuple((image.offset, image.length) for image in found))


def _make_rejected(where: str, error: Exception) -> RejectedRequest:
    return RejectedRequest(f"{where}: vLLM refuses it ({error})")


def _disable_logs_and_usage_reports() -> None:
    """Turns off vLLM's logs and usage reports, in its child processes too."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    # It warns at every start that a machine without a GPU has no Triton.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)


@contextmanager
def _compiler_disabled() -> Iterator[None]:
    """Disables torch's compiler, because vLLM's eager mode still compiles its ranking of prompt log-probs (30 s).

    The variable is for processes that start in this context; the flag is for this process and stays.
    """
    compiler_config.disable = True
    with _environment({_NO_COMPILER: "1"}):
        yield


def _data_parallel(size: int, rank: int) -> AbstractContextManager[None]:
    """Sets the variables by which vLLM knows that a process is one replica of a data-parallel engine."""
    return _environment({"VLLM_DP_SIZE": str(size), "VLLM_DP_RANK": str(rank)} if size > 1 else {})


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables, and restores them on leaving."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value
