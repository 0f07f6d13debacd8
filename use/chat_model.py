"""A model that answers conversations: any model directory, whole, in 4 or 8 bit, or with LoRA weights.

turns, images ─> token ids, as in training (common.data.chat_encoding) ─> transformers' generate ─> pieces of text
"""

import importlib.util
import json
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import BitsAndBytesConfig, GenerationConfig, StoppingCriteria, TextIteratorStreamer

from common.data.chat_encoding import ChatEncoder, expand_placeholders
from common.data.model_images import find_model_images, find_placeholder
from common.data.samples import ImageRef, Turn
from common.errors import ConfigError, DataError, ModelError, shorten
from train.data.image_cache import BatchImages, ImageCache, ImageRequest
from train.model.student import LOAD_ERRORS, SAFE_WEIGHTS, find_model_class, load_config, load_student, text_config

Quantization = Literal["4bit", "8bit"]

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn. `temperature` 0 takes the most probable token each time, and then `seed` is not used."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0


class ChatModel:
    """A model in memory, on a GPU if there is one."""

    def __init__(self, path: Path, quantization: Quantization | None = None) -> None:
        """Loads a model directory, or a directory of LoRA weights with the base that it names.

        Raises:
            ModelError: no model, a damaged one, or LoRA weights whose base is gone or another model.
            ConfigError: a package is missing, or there is no chat template.
        """
        self.path = path
        base = _find_base(path)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model_images = find_model_images(base)
        # Keeps the images of a conversation, which each of its questions needs again.
        self._images = None if model_images is None else ImageCache(model_images, None)
        self._encoder = ChatEncoder.load(base, placeholder=find_placeholder(model_images))
        model = _load(base, quantization, self._device)
        self._model: Any = model if base == path else _add_lora(model, path, base)
        self._model.eval()
        self._context: int | None = getattr(text_config(model), "max_position_embeddings", None)
        loaded = "bfloat16" if model.dtype == torch.bfloat16 else "float32"
        form = loaded if quantization is None else f"{quantization} (bitsandbytes), linear layers alone"
        lora = "" if base == path else f" with LoRA weights of {path}"
        num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.description = f"{base}{lora}: {type(model).__name__}, {num_bytes / 2**20:,.0f} MiB, {form}, {self._device}"

    @property
    def takes_images(self) -> bool:
        """True if it has a vision tower."""
        return self._images is not None

    def answer(self, turns: Sequence[Turn], images: Sequence[Path], sampling: Sampling) -> Iterator[str]:
        """Yields the answer to a conversation piece by piece; closing the iterator stops the generation.

        Images are padded to squares for a LLaVA, as in training.

        Args:
            turns: of which the last is the user's; `<image>` stands for each of `images`, in order.
            images: files.
            sampling: how the answer is drawn.

        Raises:
            DataError: an image cannot be read, the model takes none, or the conversation is too long.
        """
        inputs = self._encode(turns, images)
        num_tokens = inputs["input_ids"].shape[1]
        room = (
            sampling.max_new_tokens
            if self._context is None
            else min(sampling.max_new_tokens, self._context - num_tokens)
        )
        if room < 1:
            raise DataError(
                f"the conversation has {num_tokens:,} tokens, images included; this model reads {self._context:,}. "
                "Begin a new one (/reset)"
            )
        streamer = TextIteratorStreamer(self._encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = _StopWhenSet()
        failed: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.inference_mode():
                    torch.manual_seed(sampling.seed)
                    self._model.generate(
                        **inputs,
                        streamer=streamer,
                        stopping_criteria=[stop],
                        generation_config=self._generation_config(room, sampling.temperature),
                    )
            except BaseException as error:  # noqa: BLE001 - raised again below, in the caller's thread
                failed.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.wanted.set()
            thread.join()
        if failed:
            raise failed[0]

    def _generation_config(self, room: int, temperature: float) -> GenerationConfig:
        own = self._model.generation_config
        stops = own.eos_token_id if own.eos_token_id is not None else self._encoder.tokenizer.eos_token_id
        pad = own.pad_token_id if own.pad_token_id is not None else self._encoder.tokenizer.pad_token_id
        first = stops[0] if isinstance(stops, list) else stops
        drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        return GenerationConfig(
            max_new_tokens=room, eos_token_id=stops, pad_token_id=first if pad is None else pad, **drawn
        )

    def _encode(self, turns: Sequence[Turn], images: Sequence[Path]) -> dict[str, Any]:
        """Returns the arguments of `generate`: one sequence, with the arrays of its images."""
        ids_T = self._encoder.encode_prompt(turns, len(images), "the conversation")
        if self._images is None:
            if images:
                raise DataError(f"{self.path}: takes no images; ask without one")
            return self._to_inputs(ids_T, {}, None)
        requests = [ImageRequest(ImageRef(path.name), path.resolve().parent, str(path)) for path in images]
        read = self._images.read(requests) if requests else BatchImages([], None, {})
        expanded = expand_placeholders(ids_T, self._encoder.image_token_id, read.token_ids)
        types = None
        if self._images.types_argument is not None:
            types = np.zeros(len(expanded.ids), np.int64)
            if read.token_types is not None:
                types[expanded.is_image] = np.concatenate(read.token_types)
        return self._to_inputs(expanded.ids, read.tensors, types)

    def _to_inputs(self, ids_T: Any, images: Mapping[str, torch.Tensor], types_T: Any) -> dict[str, Any]:
        dtype = self._model.dtype
        tensors = {name: each.to(dtype) if each.is_floating_point() else each for name, each in images.items()}
        tensors["input_ids"] = torch.from_numpy(np.asarray(ids_T, np.int64))[None]
        tensors["attention_mask"] = torch.ones_like(tensors["input_ids"])
        if types_T is not None:
            assert self._images is not None
            assert self._images.types_argument is not None
            tensors[self._images.types_argument] = torch.from_numpy(types_T)[None]
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}


class _StopWhenSet(StoppingCriteria):
    """Stops a generation that another thread does not want any more."""

    def __init__(self) -> None:
        self.wanted = threading.Event()

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> Any:
        return torch.full((len(input_ids),), self.wanted.is_set(), device=input_ids.device)


def _find_base(path: Path) -> Path:
    """Returns the directory of the whole model: `path` itself, or the base that its LoRA weights name."""
    file = path / ADAPTER_CONFIG
    if not file.is_file():
        return path
    try:
        base = Path(json.loads(file.read_text("utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file}: names no base model ({error}); copy or save the weights again") from error
    if not base.is_dir():
        raise ModelError(
            f"{file}: its base model {base} is no directory here; correct base_model_name_or_path in this file"
        )
    return base


def _load(path: Path, quantization: Quantization | None, device: str) -> Any:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if quantization is None:
        return load_student(path, dtype=dtype).to(device)
    _require("bitsandbytes", "quantized", "a model in 4 or 8 bit")
    settings = (
        {"load_in_8bit": True}
        if quantization == "8bit"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    )
    model_class = find_model_class(load_config(path))
    if model_class is None:
        raise ModelError(f"{path}: is no model that answers conversations")
    try:
        return model_class.from_pretrained(
            path,
            # The type that bitsandbytes multiplies 8-bit weights in.
            dtype=torch.float16 if quantization == "8bit" else torch.bfloat16,
            device_map={"": device},
            quantization_config=BitsAndBytesConfig(**settings),
            **SAFE_WEIGHTS,
        )
    except LOAD_ERRORS as error:
        raise ModelError(f"{path}: cannot be loaded in {quantization} ({error})") from error


def _add_lora(model: Any, path: Path, base: Path) -> Any:
    _require("peft", "lora", "LoRA weights")
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # peft goes on with random weights where the file has none for a layer.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, path)
    except (*LOAD_ERRORS, UserWarning) as error:
        raise ModelError(f"{path}: these LoRA weights do not fit {base} ({shorten(str(error))})") from error


def _require(package: str, extra: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{what} needs {package}, which is not installed: pip install '.[{extra}]'")
