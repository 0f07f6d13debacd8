"""Composes a new student: one model's vision tower, another's language model, and a fresh adapter between them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

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
)

_log = logging.getLogger(__name__)

# CLIP's class token, which "default" drops again.
_NUM_ADDITIONAL_IMAGE_TOKENS = 1


@dataclass(frozen=True)
class ComposedStudent:
    """Summary of a composed student.

    `image_token_row` is the origin of the embedding of `<image>`: the tokenizer "had" the token, it took an unused
    "padding" row of the embedding, or the embedding was "resized".
    """

    image_token_id: int
    image_token_row: Literal["had", "padding", "resized"]
    num_parameters: int


@dataclass(frozen=True)
class LlavaParts:
    """Parts of a LLaVA, all of one dtype.

    tower, processor    vision tower, and the image processor that goes with it
    language            causal language model, dense or sparse
    tokenizer           its tokenizer; changed if it has no `<image>`, which becomes a special token
    tokenizer_from      the directory that the tokenizer was loaded from
    template            chat template to give the tokenizer; None for its own
    adapter             state of the adapter (`linear_1`, `linear_2`); None to draw a fresh one
    feature_layer       hidden state of the tower that is taken, counted from the end if negative
    select_strategy     "default" drops the first token of the tower's output, "full" keeps it
    grid                resolutions [height, width] into which LLaVA-NeXT cuts a large image; None for LLaVA
    image_newline       embedding after each row of such a grid, [H]; with `grid`
    """

    tower: CLIPVisionModel
    processor: Any
    language: PreTrainedModel
    tokenizer: Any
    tokenizer_from: Path
    template: str | None = None
    adapter: Mapping[str, Tensor] | None = None
    feature_layer: int = -2
    select_strategy: Literal["default", "full"] = "default"
    grid: Sequence[Sequence[int]] | None = None
    image_newline: Tensor | None = None


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
        tower, processor = load_vision(vision_from, dtype)
        source = load_student(language_from, dtype=dtype)
        _check_logits_unchanged(source, language_from)
        tokenizer = load_component(AutoTokenizer, language_from, "tokenizer")
        parts = LlavaParts(tower, processor, source, tokenizer, tokenizer_from=language_from)
        return save_llava(parts, staging, seed=seed)


def save_llava(parts: LlavaParts, out: Path, *, seed: int) -> ComposedStudent:
    """Joins the parts to a LLaVA, gives it an `<image>` token, and writes its directory into `out`, which exists.

    Args:
        seed: of a fresh adapter, and of the new rows if the embedding is resized.

    Raises:
        ModelError: `parts.tokenizer_from` has no tokenizer files, or the language model's output layer has a bias.
        StorageError: `out` cannot be written.
    """
    tokenizer = parts.tokenizer
    had_image_token = IMAGE_MARKER in tokenizer.get_added_vocab()
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_MARKER]}, replace_extra_special_tokens=False)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_MARKER)

    model = _join_models(parts, image_token_id, seed)
    row: Literal["had", "padding", "resized"] = "had" if had_image_token else "padding"
    if len(tokenizer) > model.config.text_config.vocab_size:
        row = "resized"
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # A multiple of 64 suits tensor cores and leaves rows for the next token.
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    _log.info("%s: %s has id %d, embedding row: %s", parts.tokenizer_from, IMAGE_MARKER, image_token_id, row)

    save_student(model, parts.tokenizer_from, out)
    if parts.template is not None:
        tokenizer.chat_template = parts.template
    # An unchanged tokenizer stays a copy, byte for byte, because teacher and student compare fingerprints.
    if not had_image_token or parts.template is not None:
        tokenizer.save_pretrained(out)
    _save_processor(parts, out)
    return ComposedStudent(image_token_id, row, sum(parameter.numel() for parameter in model.parameters()))


def _check_logits_unchanged(source: PreTrainedModel, path: Path) -> None:
    transform = find_logit_transform(source)
    if not transform.is_identity:
        raise ModelError(
            f"{path}: {type(source).__name__} changes its logits after the output layer (scale {transform.scale:.6g}, "
            f"cap {transform.cap}), which transformers' LLaVA leaves out and vLLM's does not; take a language model "
            "whose logits are those of its output layer, such as Qwen, Llama or Mistral"
        )


def _join_models(parts: LlavaParts, image_token_id: int, seed: int) -> PreTrainedModel:
    tower, source = parts.tower, parts.language
    if source.get_output_embeddings().bias is not None:
        raise ModelError(
            f"{parts.tokenizer_from}: the output layer of {type(source).__name__} has a bias, which transformers' "
            "LLaVA does not have; take another language model"
        )
    decoder = language_model(source)
    # Otherwise the path of this machine would be saved in the student's config.json.
    decoder.config._name_or_path = ""  # noqa: SLF001 - transformers has no public name for it
    has_grid = parts.grid is not None
    config: PreTrainedConfig = (LlavaNextConfig if has_grid else LlavaConfig)(
        vision_config=tower.config,
        text_config=decoder.config,
        image_token_index=image_token_id,
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=parts.feature_layer,
        vision_feature_select_strategy=parts.select_strategy,
        tie_word_embeddings=decoder.config.tie_word_embeddings,
        **({"image_grid_pinpoints": parts.grid} if has_grid else {}),
    )
    # On the meta device, because random weights would be replaced at once.
    with torch.device("meta"):
        model: PreTrainedModel = (LlavaNextForConditionalGeneration if has_grid else LlavaForConditionalGeneration)(
            config
        )
    model.model.vision_tower = tower
    model.model.language_model = decoder
    model.lm_head = source.lm_head
    model.generation_config = source.generation_config
    adapter = model.model.multi_modal_projector
    adapter.to(dtype=source.dtype).to_empty(device="cpu")
    if parts.image_newline is not None:
        model.model.image_newline = nn.Parameter(parts.image_newline)
    if parts.adapter is not None:
        adapter.load_state_dict(parts.adapter)
        return model
    generator = torch.Generator().manual_seed(seed)
    for linear in (adapter.linear_1, adapter.linear_2):
        bound = linear.in_features**-0.5
        nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
        nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
    return model


def _save_processor(parts: LlavaParts, out: Path) -> None:
    settings = {
        "tokenizer": parts.tokenizer,
        "patch_size": parts.tower.config.patch_size,
        "vision_feature_select_strategy": parts.select_strategy,
        "num_additional_image_tokens": _NUM_ADDITIONAL_IMAGE_TOKENS,
    }
    if parts.grid is None:
        parts.processor.save_pretrained(out)
        LlavaProcessor(image_processor=parts.processor, **settings).to_json_file(out / "processor_config.json")
        return
    kept = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    images = LlavaNextImageProcessorPil(
        **{name: getattr(parts.processor, name) for name in kept}, image_grid_pinpoints=[*map(list, parts.grid)]
    )
    images.save_pretrained(out)
    LlavaNextProcessor(image_processor=images, **settings).to_json_file(out / "processor_config.json")


def load_vision(path: Path, dtype: torch.dtype) -> tuple[CLIPVisionModel, Any]:
    """Loads the vision tower and the image processor of a LLaVA or CLIP directory.

    Raises:
        ModelError: the directory holds no CLIP tower, or an image processor for images of another size.
    """
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
