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
    SiglipVisionModel,
)
from transformers.initialization import no_init_weights
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from common.adapter_inputs import FIRST_ADAPTER_LAYER
from common.data.samples import IMAGE_MARKER
from common.errors import ModelError
from common.shards.encoder_identity import load_tower_weights
from train.choices import AdapterType
from train.model.adapter import LINEAR, add_attention_blocks, initialise_projector
from train.model.chat_files import write_chat_files
from train.model.logit_transform import find_logit_transform
from train.model.student import (
    LOAD_ERRORS,
    atomic_directory,
    language_model,
    load_component,
    load_config,
    load_student,
    save_student,
)

_log = logging.getLogger(__name__)

# Vision towers by their type in config.json. The patches of a SigLIP 2 of fixed resolution are a SigLIP's.
_TOWERS: dict[str, type[PreTrainedModel]] = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}


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
    adapter             state of the projector (`linear_1`, `linear_2`); None to draw a fresh one
    is_linear           True for a projector of one linear layer
    feature_layer       hidden state of the tower that is taken, counted from the end if negative
    select_strategy     "default" drops the first token of the tower's output, "full" keeps it
    grid                resolutions [height, width] that LLaVA-NeXT cuts into slices; None for LLaVA
    image_newline       embedding after each row of such a grid, [H]; with `grid`
    """

    tower: PreTrainedModel
    processor: Any
    language: PreTrainedModel
    tokenizer: Any
    tokenizer_from: Path
    template: str | None = None
    adapter: Mapping[str, Tensor] | None = None
    is_linear: bool = False
    feature_layer: int = -2
    select_strategy: Literal["default", "full"] = "default"
    grid: Sequence[Sequence[int]] | None = None
    image_newline: Tensor | None = None


def compose_student(  # noqa: PLR0913 - where the parts come from, and what is drawn
    vision_from: Path,
    language_from: Path,
    out: Path,
    *,
    seed: int,
    adapter: AdapterType = "mlp",
    num_slices: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> ComposedStudent:
    """Joins a vision tower and a language model by a fresh adapter, and saves the resulting LLaVA or LLaVA-NeXT.

    The adapter (train.model.adapter) takes the patches of the second-to-last vision layer, as LLaVA-1.5 does.

    Args:
        vision_from: a directory that holds a CLIP or SigLIP tower, alone or in a LLaVA, CLIP or SigLIP: the tower and
            the image processor's settings are taken.
        language_from: a causal language model or LLaVA directory: its text model and tokenizer are taken. If
            the tokenizer has no `<image>`, it becomes a special token.
        out: a new or empty directory.
        seed: of the adapter, and of the new rows if the embedding is resized.
        adapter: its kind.
        num_slices: the most slices, each of the tower's size, that an image is cut into beside the whole one, two at
            least (LLaVA-NeXT; LLaVA-UHD, arXiv 2403.11703); None for one image of that size, as in LLaVA-1.5.
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
        feature_layer = LlavaParts.feature_layer
        if adapter == "attention":
            # Another seed than the projector's, whose weights would be the same numbers.
            add_attention_blocks(tower, feature_layer, torch.Generator().manual_seed(seed + 1))
            feature_layer = -1
        parts = LlavaParts(
            tower,
            processor,
            source,
            tokenizer,
            tokenizer_from=language_from,
            is_linear=adapter == "linear",
            feature_layer=feature_layer,
            # CLIP's first token is that of the class, a SigLIP's one is a patch.
            select_strategy="default" if _num_class_tokens(tower) else "full",
            grid=None if num_slices is None else _slice_grid(num_slices, tower.config.image_size),
            image_newline=None if num_slices is None else _draw_image_newline(source, seed + 2),
        )
        return save_llava(parts, staging, seed=seed)


def _slice_grid(num_slices: int, side: int) -> list[list[int]]:
    """Returns the resolutions [height, width] of every grid of two to `num_slices` slices."""
    sizes = range(1, num_slices + 1)
    return [[rows * side, columns * side] for rows in sizes for columns in sizes if 2 <= rows * columns <= num_slices]


def _draw_image_newline(language: PreTrainedModel, seed: int) -> Tensor:
    """Returns the embedding that ends each row of an image, [H], drawn as LLaVA-NeXT draws it."""
    size = language_model(language).config.hidden_size
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(seed)) / size**0.5
    return drawn.to(language.dtype)


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
    write_chat_files(out)
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
        projector_hidden_act=LINEAR if parts.is_linear else "gelu",
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
    initialise_projector(adapter, torch.Generator().manual_seed(seed), is_linear=parts.is_linear)
    return model


def _num_class_tokens(tower: PreTrainedModel) -> int:
    return 1 if isinstance(tower, CLIPVisionModel) else 0


def _save_processor(parts: LlavaParts, out: Path) -> None:
    settings = {
        "tokenizer": parts.tokenizer,
        "patch_size": parts.tower.config.patch_size,
        "vision_feature_select_strategy": parts.select_strategy,
        "num_additional_image_tokens": _num_class_tokens(parts.tower),
    }
    if parts.grid is None:
        parts.processor.save_pretrained(out)
        LlavaProcessor(image_processor=parts.processor, **settings).to_json_file(out / "processor_config.json")
        return
    kept = ("size", "image_mean", "image_std", "resample", "rescale_factor")
    is_cropped = bool(getattr(parts.processor, "do_center_crop", False))
    images = LlavaNextImageProcessorPil(
        **{name: getattr(parts.processor, name) for name in kept},
        do_center_crop=is_cropped,
        # Without cropping transformers still reads a slice's size from here.
        crop_size=parts.processor.crop_size if is_cropped else parts.processor.size,
        image_grid_pinpoints=[*map(list, parts.grid)],
    )
    images.save_pretrained(out)
    LlavaNextProcessor(image_processor=images, **settings).to_json_file(out / "processor_config.json")


def load_vision(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Loads the vision tower and the image processor of a directory; the weights of other parts are not read.

    SigLIP's pooling head is left out, because a LLaVA does not use it.

    Raises:
        ModelError: the directory holds no CLIP or SigLIP tower, or one that ends in an adapter; weights are missing,
            unknown or of another shape; or the image processor is for images of another size.
    """
    config = load_config(path)
    vision = getattr(config, "vision_config", config)
    if vision.model_type not in _TOWERS:
        found = f"'{config.model_type}'" + (f" with a '{vision.model_type}'" if vision is not config else "")
        raise ModelError(f"{path}: found a model of type {found}, expected one with a vision tower of CLIP or SigLIP")
    if hasattr(vision, FIRST_ADAPTER_LAYER):
        raise ModelError(
            f"{path}: the last layers of its vision tower are an adapter; take the tower from the directory that this "
            "student was made from"
        )
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False
    try:
        with no_init_weights():
            tower = _TOWERS[vision.model_type](vision).to(dtype).eval()
    except LOAD_ERRORS as error:
        raise ModelError(f"{path}/config.json: describes no vision tower that can be made ({error})") from error
    load_tower_weights(tower, path)
    processor = load_component(AutoImageProcessor, path, "image processor")
    # An exported LLaVA's processor pads. In training, data.image_aspect_ratio decides that.
    if getattr(processor, "do_pad", False):
        processor.do_pad = False
    size = dict(processor.crop_size if getattr(processor, "do_center_crop", None) else processor.size)
    side = size.get("height") or size.get("shortest_edge")
    if side != vision.image_size:
        raise ModelError(
            f"{path}: the image processor makes images of {side} pixels, the vision tower expects "
            f"{vision.image_size}; correct preprocessor_config.json"
        )
    return tower, processor
