"""The vision tower of a LLaVA, from images to features. The language model is never read.

Legend: I images, P tokens that the tower gives an image, D channels.

On a CPU each call computes with one thread, and several calls run at once. With more threads, the split of a matrix
product over them, and so the last bits, would depend on the number of images in it. With one thread an image's features
do not depend on the images beside it, and so are those of a training run in bfloat16, bit for bit.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
from transformers.initialization import no_init_weights
from transformers.utils import is_flash_attn_2_available

from common.errors import ModelError
from common.shards.encoder_identity import load_tower_weights, load_vision_config
from common.shards.manifest import EncoderIdentity


class VisionTower:
    """A vision tower in bfloat16, on a GPU if there is one."""

    def __init__(self, model_dir: Path, encoder: EncoderIdentity) -> None:
        """Loads the tower, every tensor of it, and checks that its features have the shape that `encoder` says.

        Raises:
            ModelError: tensors are missing, unknown or of another shape; or features are.
        """
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        config, self._layers, self._strategy = load_vision_config(model_dir)
        self._processor = AutoImageProcessor.from_pretrained(model_dir, local_files_only=True)
        with no_init_weights():
            model = AutoModel.from_config(config).to(torch.bfloat16)
        load_tower_weights(model, model_dir)
        # The trainer makes the same choice.
        if self.device == "cuda" and is_flash_attn_2_available():
            model.set_attn_implementation("flash_attention_2")
        self._model = model.eval().to(self.device)
        expected = encoder.tokens_per_image, encoder.num_channels
        try:
            found = self.encode(self.preprocess([Image.new("RGB", (32, 32))])).shape[1:]
        except ValueError as error:
            raise ModelError(f"{model_dir}: its image processor and its vision tower do not fit: {error}") from error
        if found != expected:
            raise ModelError(
                f"{model_dir}: its vision tower gives {found} values an image, config.json says {expected}"
            )

    @property
    def description(self) -> str:
        """Tower and its device in one line."""
        config, millions = self._model.config, sum(p.numel() for p in self._model.parameters()) / 1e6
        device = describe_device(self.device)
        return (
            f"{type(self._model).__name__}, {config.num_hidden_layers} layers, {millions:,.1f}M parameters; {device}, "
            f"bfloat16, attention {config._attn_implementation}"  # noqa: SLF001 - transformers has no public name
        )

    @property
    def num_threads(self) -> int:
        """Number of calls of `encode` to run at once."""
        return num_parallel_calls(self.device)

    def preprocess(self, images: Sequence[Image.Image]) -> Any:
        """Returns opened images as the image processor prepares them, a float32 tensor [I, 3, height, width]."""
        return self._processor(images=list(images), return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def encode(self, pixels: Any) -> npt.NDArray[np.float32]:
        """Returns the hidden states that LLaVA gives to its projector: float32 [I, P, D], of bfloat16 values."""
        states = self._model(pixels.to(self.device), output_hidden_states=True, return_dict=True).hidden_states
        chosen = [states[layer] for layer in self._layers]
        if self._strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        found: npt.NDArray[np.float32] = torch.cat(chosen, dim=-1).float().cpu().numpy()
        return found


def num_parallel_calls(device: str) -> int:
    """Returns how many calls of a tower to run at once: on a CPU one a core."""
    return 1 if device == "cuda" else int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def describe_device(device: str) -> str:
    """Returns the name of the GPU, or how many calls run at once on the CPU."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {num_parallel_calls(device)} thread(s)"


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Limits each of torch's calls on a CPU to one thread; see the module's docstring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
