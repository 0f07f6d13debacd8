"""Writes what other programs need to talk to a student: a template that takes parts, and where generation stops."""

import json
import logging
from pathlib import Path
from typing import Any

from common.data.chat_encoding import ChatEncoder, load_tokenizer
from common.data.images import read_json
from common.data.model_images import find_model_images, find_placeholder
from common.data.portable_template import find_problem, make_portable
from common.data.samples import Turn
from common.errors import DecantError

_log = logging.getLogger(__name__)


def write_chat_files(model_dir: Path) -> None:
    """Writes chat_template.jinja and generation_config.json of a student directory.

    The template takes strings and lists of parts; one that cannot be made to stays, which is logged, as does one that
    takes parts. Generation stops at the model's own tokens and at the one with which the template ends a response.
    Nothing is written for a model without a template.
    """
    images = find_model_images(model_dir)
    placeholder = find_placeholder(images)
    try:
        encoder = ChatEncoder.load(model_dir, placeholder=placeholder)
    except DecantError as error:
        _log.info("%s; other programs cannot chat with this student", error)
        return
    _write_generation_config(model_dir, encoder)
    if images is None or encoder.template.takes_parts:
        return
    tokenizer = load_tokenizer(model_dir)
    template = make_portable(str(encoder.tokenizer.chat_template), placeholder)
    if (problem := find_problem(tokenizer, template, placeholder)) is not None:
        _log.warning("%s: its chat template takes strings alone; made to take parts, %s", model_dir, problem)
        return
    (model_dir / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_generation_config(model_dir: Path, encoder: ChatEncoder) -> None:
    # Written as JSON, because transformers refuses to write some configs that it reads, such as Vicuna's.
    path = model_dir / "generation_config.json"
    config: dict[str, Any] = read_json(path) if path.is_file() else {}
    tokenizer = encoder.tokenizer
    own = config.get("eos_token_id", tokenizer.eos_token_id)
    stops = own if isinstance(own, list) else [] if own is None else [own]
    if (end := _find_end_of_turn(encoder)) is not None and end not in stops:
        stops = [*stops, end]
    if stops:
        config["eos_token_id"] = stops[0] if len(stops) == 1 else stops
        if config.get("pad_token_id") is None:
            config["pad_token_id"] = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _find_end_of_turn(encoder: ChatEncoder) -> int | None:
    """Returns the first special token after a response, None if the template ends responses without one."""
    try:
        encoded = encoder.encode([Turn("user", "a question"), Turn("assistant", "an answer")], 0, "a trial")
    except DecantError:
        return None
    return next((int(each) for each in encoded.response_ids if int(each) in encoder.special_ids), None)
