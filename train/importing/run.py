"""Imports a checkpoint of the original code: from its files to a directory that transformers and vLLM load.

config.json ── read_original_config ──> OriginalConfig
tensors     ── read_weights, split_weights ──> language model, adapter, tower
parts       ── train.model.compose.save_llava ──> LlavaForConditionalGeneration or LlavaNextForConditionalGeneration
"""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.initialization import no_init_weights

from common.errors import ConfigError, ModelError, shorten
from train.importing.conversation_templates import TemplateName, conversation_template, end_of_turn
from train.importing.original_config import OriginalConfig, read_original_config
from train.importing.original_weights import OriginalWeights, read_weights, split_weights
from train.model.compose import LlavaParts, load_vision, save_llava
from train.model.student import LOAD_ERRORS, atomic_directory
from train.moe.upcycle import load_sparse_weights, sparse_config, sparse_model

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportedModel:
    """Summary of an import; `notes` say what was chosen, what was not used, and what differs from the original code."""

    num_parameters: int
    notes: tuple[str, ...]


def import_checkpoint(  # noqa: PLR0913 - each argument is an option of the command
    source: Path,
    out: Path,
    *,
    vision: Path | None = None,
    template: TemplateName | None = None,
    base: Path | None = None,
    tokenizer: Path | None = None,
) -> ImportedModel:
    """Writes an original checkpoint as a model directory of transformers, with the same logits.

    Args:
        source: directory of the checkpoint.
        out: a new or empty directory.
        vision: directory of the vision tower, which original checkpoints only name.
        template: conversation style of the chat template; None for the one that the original code takes.
        base: language model of a checkpoint that holds only a projector or LoRA weights.
        tokenizer: directory of a fast tokenizer in place of the checkpoint's.

    Raises:
        ModelError: the checkpoint is damaged, or what it describes has no standard class.
        ConfigError: `vision` is needed; or the tokenizer does not have the tokens of the template.
        StorageError: `out` is not empty or cannot be written.
    """
    config = read_original_config(source)
    if vision is None:
        raise ConfigError(
            f"{source}: names its vision tower {config.vision_name}, but does not hold its settings; download it and "
            "give its directory with --vision DIR"
        )
    weights = split_weights(read_weights(source, base), is_first_qwen=config.family == "qwen")
    if weights.adapter.keys() != _ADAPTER_NAMES:
        raise ModelError(f"{source}: holds the projector tensors {sorted(weights.adapter)}, expected two linear layers")
    if (config.grid is None) != (weights.image_newline is None):
        raise ModelError(
            f"{source}: image_aspect_ratio and the tensor model.image_newline do not agree, of which LLaVA 1.6 has both"
        )
    dtype = _widest_dtype(weights)
    with atomic_directory(out) as staging:
        tower, processor = load_vision(vision, dtype)
        _load_tower(tower, weights.tower, source)
        tokenizer_from = tokenizer or (source if _has_tokenizer(source) else base or source)
        name = template or config.template
        loaded = _load_tokenizer(tokenizer_from, config)
        language = _load_language_model(config, weights.language, source, dtype)
        _set_special_tokens(language, loaded)
        parts = LlavaParts(
            tower,
            processor,
            language,
            loaded,
            tokenizer_from,
            template=_make_template(name, config, loaded, tokenizer_from),
            adapter={key: tensor.to(dtype) for key, tensor in weights.adapter.items()},
            feature_layer=config.feature_layer,
            select_strategy=config.select_strategy,
            grid=config.grid,
            image_newline=None if weights.image_newline is None else weights.image_newline.to(dtype),
        )
        saved = save_llava(parts, staging, seed=0)
    return ImportedModel(saved.num_parameters, tuple(_notes(config, name, template is None, weights)))


_ADAPTER_NAMES = {f"linear_{number}.{part}" for number in (1, 2) for part in ("weight", "bias")}


def _widest_dtype(weights: OriginalWeights) -> torch.dtype:
    tensors = [*weights.language.values(), *weights.adapter.values(), *weights.tower.values()]
    return functools.reduce(torch.promote_types, {tensor.dtype for tensor in tensors})


def _load_tower(tower: PreTrainedModel, weights: Mapping[str, Tensor], source: Path) -> None:
    """Replaces the tower's weights by those that the checkpoint holds, if it was trained too."""
    if not weights:
        return
    prefix = "vision_model."
    names = tower.state_dict().keys()
    # transformers names them with or without the prefix, depending on its version.
    renamed = {
        name if name in names else name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        # SigLIP's pooling head is not used, and load_vision leaves it out.
        if not name.endswith("position_ids") and not name.removeprefix(prefix).startswith("head.")
    }
    try:
        tower.load_state_dict(renamed, strict=True)
    except RuntimeError as error:
        raise ModelError(f"{source}: its vision tower does not fit --vision ({shorten(str(error))})") from error


def _load_language_model(
    config: OriginalConfig, weights: dict[str, Tensor], source: Path, dtype: torch.dtype
) -> PreTrainedModel:
    text = config.text
    rows = weights.get("model.embed_tokens.weight")
    if rows is not None:
        # Tokens that were added for training have rows that vocab_size does not count.
        text.vocab_size = rows.shape[0]
    text.tie_word_embeddings = "lm_head.weight" not in weights
    text.dtype = dtype
    if config.sparse is None:
        with no_init_weights():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(text)
    else:
        # DeepSpeed divides the weights of two experts by their sum, and leaves the weight of one as it is.
        model = sparse_model(sparse_config(text, config.sparse, normalise=config.sparse.top_k > 1))
    model.to(dtype)
    model.tie_weights()
    if text.tie_word_embeddings and rows is not None:
        weights = {**weights, "lm_head.weight": rows}
    try:
        if config.sparse is None:
            model.load_state_dict(weights, strict=True)
        else:
            load_sparse_weights(model, weights)
    except RuntimeError as error:
        raise ModelError(
            f"{source}: its weights do not fit its config.json ({shorten(str(error))}); expected a whole checkpoint"
        ) from error
    return model.eval()


def _has_tokenizer(directory: Path) -> bool:
    return any(directory.glob("tokenizer*"))


def _load_tokenizer(directory: Path, config: OriginalConfig) -> Any:
    try:
        # With the configuration given, transformers does not try the original one, whose model type it does not know.
        tokenizer = AutoTokenizer.from_pretrained(directory, config=config.text, local_files_only=True)
    except LOAD_ERRORS as error:
        raise ModelError(f"{directory}: the tokenizer cannot be loaded ({shorten(str(error))})") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{directory}: has no fast tokenizer (tokenizer.json); give the directory of one with the same ids with "
            "--tokenizer DIR"
        )
    return tokenizer


def _set_special_tokens(model: PreTrainedModel, tokenizer: Any) -> None:
    """Gives the generation config an end, which some original checkpoints lack."""
    if model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id


def _make_template(name: TemplateName, config: OriginalConfig, tokenizer: Any, directory: Path) -> str:
    wanted = [end_of_turn(name), *(("<im_start>", "<im_end>") if config.marks_images else ())]
    if missing := [token for token in wanted if token not in tokenizer.get_vocab()]:
        raise ConfigError(
            f"{directory}: the tokenizer has no {', '.join(missing)}, which the conversation style {name} writes; "
            "choose another with --template, or the right tokenizer with --tokenizer DIR"
        )
    first = tokenizer("a")["input_ids"][0]
    begins_with_bos = tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id
    return conversation_template(name, begins_with_bos=begins_with_bos, marks_images=config.marks_images)


def _notes(config: OriginalConfig, name: TemplateName, is_default: bool, weights: OriginalWeights) -> list[str]:
    notes = [f"chat template: {name}{', by the model type; --template chooses another' if is_default else ''}"]
    if not weights.tower:
        notes.append(f"vision tower: of --vision; the checkpoint names {config.vision_name}")
    if config.unused:
        notes.append(f"settings not used: {', '.join(config.unused)}")
    if config.sparse is not None:
        notes.append(
            "the original code drops tokens beyond an expert's capacity, and draws the second expert at random in some "
            "versions of DeepSpeed; this model does neither"
        )
    if config.family == "qwen":
        notes.append(
            "logn attention and dynamic NTK, which the first Qwen has beyond its training length, are left out"
        )
    return notes
