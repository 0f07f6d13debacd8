"""The teacher in transformers, in float32: what vLLM's scores are compared with.

Legend: R scored tokens, V the model's vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils.logging import disable_progress_bar

from common.data.chat_encoding import EncodedChat, expand_placeholders, predicting_positions
from common.data.images import AspectRatio, ImageRoot, load_image
from common.data.model_images import find_model_images, merge_arrays
from common.data.samples import Sample
from common.errors import ModelError

# Maximum difference in nats, of own log-probs and of KL, by the engine's dtype. Half precision logits near 20 are
# rounded by up to 0.06, and each layer adds its rounding. float32 engines differ only in the order of their sums.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "float16": 0.25}


class ReferenceTeacher:
    """The teacher in transformers, in float32, on a GPU if there is one. `images` is None for a text model."""

    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        """Loads the model; ids from `vocab_size`, the tokenizer's, stand for no token.

        Raises:
            ModelError: transformers cannot load it.
        """
        self._vocab_size = vocab_size
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self.images = find_model_images(model_dir)
        loader: Any = AutoModelForCausalLM if self.images is None else AutoModelForImageTextToText
        # Its bar would stand inside of the caller's.
        disable_progress_bar()
        try:
            model = loader.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{model_dir}: transformers cannot load it ({error})") from error
        self._model = model.eval().to(self._device)

    def load_images(self, sample: Sample, image_root: ImageRoot | None, aspect_ratio: AspectRatio) -> list[Image.Image]:
        """Returns a sample's images. Raises DataError if one cannot be read."""
        where = f"sample {sample.id!r}"
        assert not sample.images or self.images is not None
        mean_rgb = (0, 0, 0) if self.images is None else self.images.mean_rgb
        return [load_image(ref, image_root, aspect_ratio, mean_rgb, where) for ref in sample.images]

    @torch.inference_mode()
    def logprobs(self, encoded: EncodedChat, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        """Returns float32 [R, V]: the distributions from which the scored tokens of a conversation are drawn.

        Raises:
            DataError: the model's processor cannot take an image.
        """
        processed = [self.images.process(image, "an image") for image in images if self.images is not None]
        token_ids = [image.token_ids for image in processed]
        expanded = expand_placeholders(encoded.input_ids, encoded.image_token_id, token_ids)
        inputs = {"input_ids": expanded.ids[None].astype(np.int64), **(merge_arrays(processed) if processed else {})}
        if self.images is not None and (argument := self.images.types_argument):
            inputs[argument] = expanded.place_types([image.token_types for image in processed])[None]
        tensors = {name: torch.from_numpy(values).to(self._device) for name, values in inputs.items()}
        logits = self._model(**tensors).logits[0]
        rows_R = predicting_positions(expanded.positions[encoded.response_positions])
        logits_RV = logits[torch.from_numpy(rows_R).to(self._device)].float()
        # Padding rows stand for no token.
        logits_RV[:, self._vocab_size :] = float("-inf")
        found: npt.NDArray[np.float32] = torch.log_softmax(logits_RV, dim=-1).cpu().numpy()
        return found
