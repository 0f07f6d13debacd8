"""The vision tower of any model that takes images, from images to the inputs of its adapter.

The model's own code runs up to its adapter, so that nothing needs to be known of its family. Legend: P rows of features
of one image, D channels.

As in precompute.features.vision_tower, each call on a CPU computes with one thread, and images are computed alone.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.utils import is_flash_attn_2_available

from common.adapter_inputs import hook_adapter_inputs
from common.data.model_images import ModelImages, ProcessedImage
from common.errors import ModelError
from precompute.features.vision_tower import describe_device, num_parallel_calls


class ModelTower:
    """The tower of a model in bfloat16, on a GPU if there is one."""

    def __init__(self, model_dir: Path, images: ModelImages) -> None:
        """Loads the model, and drops all but its tower and adapter.

        Raises:
            ModelError: the model cannot be loaded, or gives its adapter nothing that can be cached.
        """
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model_dir, self._images = model_dir, images
        try:
            model, report = AutoModelForImageTextToText.from_pretrained(
                model_dir,
                dtype=torch.bfloat16,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"{model_dir}: the model cannot be loaded ({error})") from error
        if missing := [*report["missing_keys"], *report["mismatched_keys"]]:
            raise ModelError(f"{model_dir}: {len(missing)} weights are missing or of another shape: {missing[0]}")
        # The trainer makes the same choice.
        if self.device == "cuda" and is_flash_attn_2_available():
            model.set_attn_implementation("flash_attention_2")
        self._of_thread = threading.local()
        hook_adapter_inputs(model, self._record)
        self._num_parameters = sum(parameter.numel() for parameter in model.get_encoder(modality="image").parameters())
        _drop(model, model.get_decoder(), model.get_output_embeddings())
        self._model = model.eval().to(self.device)
        (probe,) = self.encode(self.preprocess([Image.new("RGB", (32, 32))]))
        self.num_channels = probe.shape[1]

    @property
    def description(self) -> str:
        """Tower and its device in one line."""
        tower = self._model.get_encoder(modality="image")
        return (
            f"{type(tower).__name__}, {self._num_parameters / 1e6:,.1f}M parameters; {describe_device(self.device)}, "
            "bfloat16, attention "
            f"{tower.config._attn_implementation}"  # noqa: SLF001 - transformers has no public name
        )

    @property
    def num_threads(self) -> int:
        """Number of calls of `encode` to run at once."""
        return num_parallel_calls(self.device)

    def preprocess(self, images: Sequence[Image.Image]) -> list[ProcessedImage]:
        """Returns opened images as the model takes them."""
        return [self._images.process(image, str(self._model_dir)) for image in images]

    @torch.inference_mode()
    def encode(self, images: Sequence[ProcessedImage]) -> list[npt.NDArray[np.float32]]:
        """Returns what the model gives its adapter for each image: float32 [P, D], of bfloat16 values.

        If the adapter has several parts, their inputs stand side by side.

        Raises:
            ModelError: the parts of the adapter get different numbers of rows.
        """
        found = []
        for image in images:
            seen: list[torch.Tensor] = []
            self._of_thread.seen = seen
            arrays = {name: torch.from_numpy(array).to(self.device) for name, array in image.arrays.items()}
            arrays = {name: a.to(torch.bfloat16) if a.is_floating_point() else a for name, a in arrays.items()}
            self._model.get_image_features(**arrays)
            if len({len(rows) for rows in seen}) != 1:
                raise ModelError(
                    f"{self._model_dir}: {type(self._model).__name__} gives the parts of its adapter "
                    f"{[list(rows.shape) for rows in seen]} values; expected as many rows for each"
                )
            found.append(torch.cat(seen, dim=1).float().cpu().numpy())
        return found

    def _record(self, features: torch.Tensor) -> torch.Tensor:
        self._of_thread.seen.append(features.flatten(0, -2))
        return features


def _drop(model: Any, *parts: Any) -> None:
    """Takes modules out of a model, so that their memory is free."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if any(child is part for part in parts):
                setattr(parent, name, None)
