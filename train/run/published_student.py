"""Adds to an exported student what depends on how it was trained: the treatment of images, and the model card."""

import json
from pathlib import Path
from typing import Any

from common.data.images import read_json
from common.data.model_images import LlavaImages, find_model_images
from train.run.history import find_stages
from train.run.model_card import write_card


def finish_export(source: Path, out: Path) -> None:
    """Writes the model card, and makes a LLaVA's processor pad images to squares if its training did.

    transformers' own processor of CLIP crops an image to a square, so other programs would show the student less than
    it was trained on. That of LLaVA pads it with the mean colour, as captures and training do.

    Args:
        source: what the student was exported from.
        out: its directory.

    Raises:
        StorageError: `out` cannot be written.
    """
    stages, _ = find_stages(source)
    images = find_model_images(out)
    if isinstance(images, LlavaImages):
        data = (stages[-1].config.get("data") if stages else None) or {}
        if (data.get("image_aspect_ratio") or images.default_aspect_ratio) == "pad":
            _make_processor_pad(out)
    write_card(source, out)


def _make_processor_pad(model_dir: Path) -> None:
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = model_dir / name
        if not path.is_file():
            continue
        settings = read_json(path)
        processor: dict[str, Any] = settings.get("image_processor", settings)
        if "image_mean" in processor:
            processor |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
