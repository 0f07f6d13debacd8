"""Composes a new student: one model's vision tower, another's language model, and a fresh adapter between them."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from common.data.samples import IMAGE_MARKER
from common.errors import ModelError
from train.model.logit_transform import find_logit_transform
from train.model.student import (
    LOAD_ERRORS,
    SAFE_WEIGHTS,
    atomic_directory,
    check_all_weights_loaded,
    language_model,
    load_component,
    load_config,
    load_student,
    save_student,
    text_config,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ComposedStudent:
    """Summary of a composed student.

    `image_token_row` is the origin of the embedding of `<image>`: the tokenizer "had" the token, it took an unused
    "padding" row of the embedding, or the embedding was "resized".
    """

    image_token_id: int
    image_token_row: Literal["had", "padding", "resized"]
    num_parameters: int


def compose_student(
    vision_from: Path, language_from: Path, out: Path, *, seed: int, dtype: torch.dtype = torch.float32
) -> ComposedStudent:
    """Joins a CLIP vision tower and a language model by a fresh adapter, and saves the resulting LLaVA.

    The adapter is LLaVA-1.5's (arXiv 2310.03744): linear, GELU, linear, on the patches of the second-to-last
    vision layer, initialised as `nn.Linear` is by default: uniform on +-1/sqrt(inputs).

    Args:
        vision_from: a LLaVA or CLIP directory: its vision tower and image processor settings are taken.
        language_from: a causal language model or LLaVA directory: its text model and tokenizer are taken. If
            the tokenizer has no `<image>`, it becomes a special token.
        out: a new or empty directory.
        seed: of the adapter, and of the new rows if the embedding is resized.
        dtype: of all saved parameters.

    Raises:
        ModelError: either directory cannot be used; see the message.
        StorageError: `out` is not empty or cannot be written.
    """
    with atomic_directory(out) as staging:
        tower, processor = _load_vision(vision_from, dtype)
        source = load_student(language_from, dtype=dtype)
        _check_logits_unchanged(source, language_from)
        tokenizer = load_component(AutoTokenizer, language_from, "tokenizer")
        had_image_token = IMAGE_MARKER in tokenizer.get_added_vocab()
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_MARKER]}, replace_extra_special_tokens=False)
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)

        model = _join_models(tower, source, image_token_id, seed)
        row: Literal["had", "padding", "resized"] = "had" if had_image_token else "padding"
        if len(tokenizer) > text_config(model).vocab_size:
            row = "resized"
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                # A multiple of 64 suits tensor cores and leaves rows for the next token.
                model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
        _log.info("%s: %s has id %d, embedding row: %s", language_from, IMAGE_MARKER, image_token_id, row)

        save_student(model, language_from, staging)
        # An unchanged tokenizer stays a copy, byte for byte, because teacher and student compare fingerprints.
        if not had_image_token:
            tokenizer.save_pretrained(staging)
        processor.save_pretrained(staging)
        LlavaProcessor(
            image_processor=processor,
            tokenizer=tokenizer,
            patch_size=tower.config.patch_size,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        ).to_json_file(staging / "processor_config.json")
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return ComposedStudent(image_token_id, row, num_parameters)


def _check_logits_unchanged(source: PreTrainedModel, path: Path) -> None:
    transform = find_logit_transform(source)
    if not transform.is_identity:
        raise ModelError(
            f"{path}: {type(source).__name__} changes its logits after the output layer (scale {transform.scale:.6g}, "
            f"cap {transform.cap}), which transformers' LLaVA leaves out and vLLM's does not; take a language model "
            "whose logits are those of its output layer, such as Qwen, Llama or Mistral"
        )


def _join_models(tower: CLIPVisionModel, source: PreTrainedModel, image_token_id: int, seed: int) -> PreTrainedModel:
    decoder = language_model(source)
    # Otherwise the path of this machine would be saved in the student's config.json.
    decoder.config._name_or_path = ""  # noqa: SLF001 - transformers has no public name for it
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=image_token_id,
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=decoder.config.tie_word_embeddings,
    )
    # On the meta device, because random weights would be replaced at once.
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = decoder
    model.lm_head = source.lm_head
    model.generation_config = source.generation_config
    adapter = model.model.multi_modal_projector
    adapter.to(dtype=source.dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for linear in (adapter.linear_1, adapter.linear_2):
        bound = linear.in_features**-0.5
        nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
    return model


def _load_vision(path: Path, dtype: torch.dtype) -> tuple[CLIPVisionModel, Any]:
    """Loads the vision tower and the image processor of a LLaVA or CLIP directory."""
    config = load_config(path)
    if config.model_type == "llava":
        tower = load_student(path, dtype=dtype).model.vision_tower
    elif config.model_type in ("clip", "clip_vision_model"):
        try:
            tower, report = CLIPVisionModel.from_pretrained(path, dtype=dtype, output_loading_info=True, **SAFE_WEIGHTS)
        except LOAD_ERRORS as error:
            raise ModelError(
                f"{path}: the vision tower cannot be loaded ({error}). Expected safetensors that fit config.json"
            ) from error
        # A whole CLIP also has the weights of a text tower, which stays unused.
        check_all_weights_loaded(path, {**report, "unexpected_keys": ()})
    else:
        raise ModelError(f"{path}: found model type '{config.model_type}', expected 'llava' or 'clip'")
    if not isinstance(tower, CLIPVisionModel):
        # Other towers have no class token, which the "default" selection would drop.
        raise ModelError(f"{path}: found a {type(tower).__name__}, expected a CLIP vision tower")
    processor = load_component(AutoImageProcessor, path, "image processor")
    size = dict(processor.crop_size if processor.do_center_crop else processor.size)
    side = size.get("height") or size.get("shortest_edge")
    if side != tower.config.image_size:
        raise ModelError(
            f"{path}: the image processor makes images of {side} pixels, the vision tower expects "
            f"{tower.config.image_size}; correct preprocessor_config.json"
        )
    return tower, processor
