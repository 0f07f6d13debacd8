"""Recognises model directories in the layout of the original LLaVA code, which transformers misreads."""

import json
from pathlib import Path

from common.errors import ModelError, describe_value

_TOWER_KEYS = ("mm_vision_tower", "mm_image_tower")


def check_not_original_layout(model_dir: Path) -> None:
    """Raises ModelError if config.json is one of the original LLaVA code.

    transformers takes its `model_type` "llava" for its own and makes a model of 7B parameters of defaults.
    """
    path = model_dir / "config.json"
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        # transformers says what is wrong with the file.
        return
    if isinstance(raw, dict) and raw.get("text_config") is None and any(key in raw for key in _TOWER_KEYS):
        raise ModelError(
            f"{path}: is a checkpoint of the original LLaVA code (model type {describe_value(raw.get('model_type'))}); "
            f"convert it first: decant import-checkpoint {model_dir} OUT --vision CLIP_DIR"
        )
