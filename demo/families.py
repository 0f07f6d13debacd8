"""Tiny vision-language models of many families, with random weights and the families' own processors.

Each family is one function that returns the model's configuration and its processor. Image sizes are small, so that
an image of 60 x 40 pixels is a few dozen tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from train.model.student import save_student

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTEXT = 1024
_PATCH = 14


@dataclass(frozen=True)
class Parts:
    """Configuration and processor of a tiny model."""

    config: Any
    processor: Any


@dataclass(frozen=True)
class Family:
    """Says how a tiny model of a family is made.

    special            the family's special tokens, which its processor looks up
    image_text         what its chat template writes for an image
    attributes         special tokens that the processor finds as attributes of the tokenizer
    words              other tokens that the processor or vLLM looks up
    build              makes configuration and processor from a tokenizer and the text model's sizes; None for a text
                       model
    """

    special: tuple[str, ...] = ()
    image_text: str = ""
    build: Callable[[Any, dict[str, Any]], Parts] | None = None
    attributes: tuple[tuple[str, str], ...] = ()
    words: tuple[str, ...] = ()


def fit_tokenizer(family: Family, texts: Iterable[str], vocab_size: int = 448) -> Any:
    """Trains a byte-level BPE with the special tokens and the chat template of a family."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [PAD, START, END, *family.special]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=dict(family.attributes) or [START, *family.special],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(list(family.words))
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{{ '" + family.image_text + "' }}{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{{ '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return tokenizer


def build_model(
    family: Family, out: Path, texts: Iterable[str], *, seed: int, sizes: dict[str, Any] | None = None
) -> None:
    """Writes a tiny random model of a family with tokenizer and processor into `out`.

    `sizes` are settings of the text model in place of `_TEXT`'s.
    """
    tokenizer = fit_tokenizer(family, texts)
    text = {**_TEXT, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **(sizes or {})}
    assert family.build is not None
    parts = family.build(tokenizer, text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForImageTextToText.from_config(parts.config, dtype=torch.float32)
        _randomize(model)
    model.generation_config = hf.GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    parts.processor.save_pretrained(out)
    tokenizer.save_pretrained(out)
    save_student(model, out, out)


# Heads are 32 wide, a size that vLLM's CPU attention takes.
_TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.06,
    "tie_word_embeddings": False,
    "bos_token_id": None,
}


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True}


def _randomize(model: Any) -> None:
    """Gives parameters that start at a constant, such as norms and position embeddings, random values around it."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.data.add_(torch.randn_like(parameter) * 0.05)


def _qwen_vl_processor(tokenizer: Any, processor: Any, patch_size: int) -> Any:
    sizes = {"shortest_edge": (2 * patch_size) ** 2, "longest_edge": (8 * patch_size) ** 2}
    image = hf.Qwen2VLImageProcessor(patch_size=patch_size, size=sizes)
    video = (hf.Qwen3VLVideoProcessor if "3" in processor.__name__ else hf.Qwen2VLVideoProcessor)(
        patch_size=patch_size, size=sizes
    )
    return processor(image_processor=image, tokenizer=tokenizer, video_processor=video)


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def _mrope(*section: int, interleaved: bool = False) -> dict[str, Any]:
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    return {"rope_parameters": {**found, "mrope_interleaved": True} if interleaved else found}


def _qwen2_vl(tokenizer: Any, text: dict[str, Any]) -> Parts:
    vision = {"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2, "hidden_size": text["hidden_size"]}
    config = hf.Qwen2VLConfig(
        text_config={**text, **_mrope(4, 6, 6)},
        vision_config={**vision, "patch_size": _PATCH},
        tie_word_embeddings=text["tie_word_embeddings"],
        **_qwen_ids(tokenizer),
    )
    return Parts(config, _qwen_vl_processor(tokenizer, hf.Qwen2VLProcessor, _PATCH))


def _qwen2_5_vl(tokenizer: Any, text: dict[str, Any]) -> Parts:
    vision = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "fullatt_block_indexes": [1]}
    config = hf.Qwen2_5_VLConfig(
        text_config={**text, **_mrope(4, 6, 6)},
        vision_config={**vision, "patch_size": _PATCH, "out_hidden_size": text["hidden_size"], "window_size": 56},
        tie_word_embeddings=text["tie_word_embeddings"],
        **_qwen_ids(tokenizer),
    )
    return Parts(config, _qwen_vl_processor(tokenizer, hf.Qwen2_5_VLProcessor, _PATCH))


def _qwen3_vl(tokenizer: Any, text: dict[str, Any]) -> Parts:
    vision = {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "deepstack_visual_indexes": [0]}
    config = hf.Qwen3VLConfig(
        text_config={**text, "head_dim": 32, **_mrope(6, 5, 5, interleaved=True)},
        vision_config={
            **vision,
            "patch_size": 16,
            "out_hidden_size": text["hidden_size"],
            "num_position_embeddings": 64,
        },
        tie_word_embeddings=text["tie_word_embeddings"],
        **_qwen_ids(tokenizer),
    )
    return Parts(config, _qwen_vl_processor(tokenizer, hf.Qwen3VLProcessor, 16))


def _qwen3_vl_moe(tokenizer: Any, text: dict[str, Any]) -> Parts:
    dense = _qwen3_vl(tokenizer, {**text, **_EXPERTS, "decoder_sparse_step": 1})
    settings = dense.config.to_dict()
    for part in (settings, settings["text_config"], settings["vision_config"]):
        part.pop("model_type")
    return Parts(hf.Qwen3VLMoeConfig(**settings), dense.processor)


_CLIP = {
    "model_type": "clip_vision_model",
    "image_size": 28,
    "patch_size": 14,
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "projection_dim": 64,
    "initializer_factor": 0.5,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "image_size": 28,
    "patch_size": 14,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "vision_use_head": False,
}
_PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def _llava_next(tokenizer: Any, text: dict[str, Any]) -> Parts:
    config = hf.LlavaNextConfig(
        text_config={**text, "model_type": "mistral", "head_dim": 32, "sliding_window": None},
        vision_config=_CLIP,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=_PINPOINTS,
        image_seq_length=4,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    image = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=_PINPOINTS
    )
    processor = hf.LlavaNextProcessor(
        image_processor=image,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return Parts(config, processor)


def _llava_onevision(tokenizer: Any, text: dict[str, Any]) -> Parts:
    config = hf.LlavaOnevisionConfig(
        text_config={**text, "model_type": "qwen2"},
        vision_config=_SIGLIP,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_PINPOINTS,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    size = {"height": 28, "width": 28}
    processor = hf.LlavaOnevisionProcessor(
        image_processor=hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=_PINPOINTS),
        tokenizer=tokenizer,
        video_processor=hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )
    return Parts(config, processor)


def _internvl(tokenizer: Any, text: dict[str, Any]) -> Parts:
    config = hf.InternVLConfig(
        text_config={**text, "model_type": "qwen2"},
        vision_config={
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 2,
            "image_size": [28, 28],
            "patch_size": [7, 7],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    size = {"height": 28, "width": 28}
    processor = hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(
            size=size,
            crop_to_patches=True,
            min_patches=1,
            max_patches=4,
            image_mean=[0.485, 0.456, 0.406],
            image_std=[0.229, 0.224, 0.225],
        ),
        tokenizer=tokenizer,
        video_processor=hf.InternVLVideoProcessor(size=size),
        image_seq_length=4,
    )
    return Parts(config, processor)


_IDEFICS_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}


def _smolvlm(tokenizer: Any, text: dict[str, Any]) -> Parts:
    config = hf.SmolVLMConfig(
        text_config={**text, "model_type": "llama"},
        vision_config=_IDEFICS_VISION,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=text["pad_token_id"],
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    image = hf.SmolVLMImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    video = hf.SmolVLMVideoProcessor(
        size={"longest_edge": 28},
        max_image_size={"longest_edge": 28},
        fps=1,
        num_frames=4,
        video_sampling={"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 28}},
    )
    return Parts(config, hf.SmolVLMProcessor(image, tokenizer, video, image_seq_len=4))


def _idefics3(tokenizer: Any, text: dict[str, Any]) -> Parts:
    config = hf.Idefics3Config(
        text_config={**text, "model_type": "llama"},
        vision_config=_IDEFICS_VISION,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=text["pad_token_id"],
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    image = hf.Idefics3ImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    return Parts(config, hf.Idefics3Processor(image, tokenizer, image_seq_len=4))


_PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 14,
}


def _pixtral(tokenizer: Any, text: dict[str, Any]) -> Parts:
    config = hf.LlavaConfig(
        text_config={**text, "model_type": "mistral", "head_dim": 32, "sliding_window": None},
        vision_config=_PIXTRAL,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    # vLLM bounds the size by the tower's image_size.
    image = hf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    return Parts(config, hf.PixtralProcessor(image, tokenizer, patch_size=14))


def _mistral3(tokenizer: Any, text: dict[str, Any]) -> Parts:
    config = hf.Mistral3Config(
        text_config={**text, "model_type": "mistral", "head_dim": 32, "sliding_window": None},
        vision_config=_PIXTRAL,
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    image = hf.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    return Parts(config, hf.PixtralProcessor(image, tokenizer, patch_size=14, spatial_merge_size=2))


def _glm4v(tokenizer: Any, text: dict[str, Any]) -> Parts:
    names = {
        f"{kind}_{name}": f"<|{token}|>"
        for kind in ("image", "video")
        for name, token in (
            ("token_id", kind),
            ("start_token_id", f"begin_of_{kind}"),
            ("end_token_id", f"end_of_{kind}"),
        )
    }
    rope = {**_mrope(4, 2, 2)["rope_parameters"], "partial_rotary_factor": 0.5}
    config = hf.Glm4vConfig(
        text_config={**text, "rope_parameters": rope, "attention_bias": True},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "image_size": 112,
            "patch_size": 14,
            "out_hidden_size": text["hidden_size"],
        },
        tie_word_embeddings=text["tie_word_embeddings"],
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()},
    )
    sizes = {"shortest_edge": 28 * 28 * 2, "longest_edge": 112 * 112 * 2}
    processor = hf.Glm4vProcessor(
        image_processor=hf.Glm4vImageProcessor(size=sizes),
        tokenizer=tokenizer,
        video_processor=hf.Glm4vVideoProcessor(size=sizes),
    )
    return Parts(config, processor)


def _llama4(tokenizer: Any, text: dict[str, Any]) -> Parts:
    config = hf.Llama4Config(
        text_config={
            **text,
            "head_dim": 32,
            "intermediate_size_mlp": 256,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": CONTEXT,
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    image = hf.Llama4ImageProcessor(size={"height": 28, "width": 28}, max_patches=4)
    return Parts(config, hf.Llama4Processor(image, tokenizer, patch_size=7))


def _gemma3(tokenizer: Any, text: dict[str, Any]) -> Parts:
    config = hf.Gemma3Config(
        text_config={**text, "head_dim": 32, "sliding_window": CONTEXT, "query_pre_attn_scalar": 32},
        vision_config={**_SIGLIP, "num_attention_heads": 2},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    image = hf.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return Parts(config, hf.Gemma3Processor(image, tokenizer, image_seq_length=4))


def _gemma4(tokenizer: Any, text: dict[str, Any]) -> Parts:
    config = hf.Gemma4Config(
        text_config={
            **text,
            "head_dim": 32,
            "global_head_dim": 32,
            "sliding_window": CONTEXT,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": text["vocab_size"],
            "layer_types": ["sliding_attention", "full_attention"] * (text["num_hidden_layers"] // 2),
        },
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "patch_size": 8,
            "position_embedding_size": 64,
            "default_output_length": 70,
        },
        audio_config=None,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    options = {"patch_size": 8, "max_soft_tokens": 70}
    processor = hf.Gemma4Processor(
        feature_extractor=hf.Gemma4AudioFeatureExtractor(),
        image_processor=hf.Gemma4ImageProcessor(**options),
        tokenizer=tokenizer,
        video_processor=hf.Gemma4VideoProcessor(**options),
        image_seq_length=70,
    )
    return Parts(config, processor)


_QWEN_SPECIAL = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_ROWS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_IDEFICS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_ROWS)
_PIXTRAL_SPECIAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
_INTERNVL = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_LLAMA4 = ("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>")
_LLAMA4_TILES = ("<|tile_x_separator|>", "<|tile_y_separator|>")
_GEMMA3 = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
_NEWLINES = tuple("\n" * count for count in range(1, 5))
_GEMMA4 = {
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "image_token": "<|image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
    "video_token": "<|video|>",
}

FAMILIES = {
    "qwen2-vl": Family(_QWEN_SPECIAL, _QWEN_IMAGE, _qwen2_vl),
    "qwen2.5-vl": Family(_QWEN_SPECIAL, _QWEN_IMAGE, _qwen2_5_vl),
    "qwen3-vl": Family(_QWEN_SPECIAL, _QWEN_IMAGE, _qwen3_vl),
    "qwen3-vl-moe": Family(_QWEN_SPECIAL, _QWEN_IMAGE, _qwen3_vl_moe),
    "llava-next": Family(("<image>",), "<image>", _llava_next),
    "llava-onevision": Family(("<image>", "<video>"), "<image>", _llava_onevision),
    "internvl": Family(tuple(_INTERNVL.values()), "<IMG_CONTEXT>", _internvl, tuple(_INTERNVL.items())),
    "smolvlm": Family(_IDEFICS, "<image>", _smolvlm),
    "idefics3": Family(_IDEFICS, "<image>", _idefics3),
    "pixtral": Family(_PIXTRAL_SPECIAL, "[IMG]", _pixtral),
    "mistral3": Family(_PIXTRAL_SPECIAL, "[IMG]", _mistral3),
    "glm-4v": Family(
        ("<|image|>", "<|begin_of_image|>", "<|end_of_image|>", "<|video|>", "<|begin_of_video|>", "<|end_of_video|>"),
        "<|begin_of_image|><|image|><|end_of_image|>",
        _glm4v,
    ),
    "llama4": Family((*_LLAMA4, *_LLAMA4_TILES), "<|image|>", _llama4),
    "gemma3": Family(tuple(_GEMMA3.values()), "<start_of_image>", _gemma3, tuple(_GEMMA3.items()), _NEWLINES),
    "gemma4": Family(tuple(_GEMMA4.values()), "<|image|>", _gemma4, tuple(_GEMMA4.items())),
}


def build_text_model(
    name: str, out: Path, texts: Iterable[str], *, seed: int, sizes: dict[str, Any] | None = None
) -> None:
    """Writes a tiny random text model of one of `TEXT_FAMILIES` with its tokenizer into `out`.

    `sizes` are settings of the model in place of the family's.
    """
    tokenizer = fit_tokenizer(Family(), texts)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config_class, changes = TEXT_FAMILIES[name]
    config = config_class(**{**_TEXT, **ids, **changes, **(sizes or {})})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomize(model)
    model.generation_config = hf.GenerationConfig(do_sample=False, **ids)
    tokenizer.save_pretrained(out)
    save_student(model, out, out)
    # Saved again as the class that transformers takes for this type of model, so that any directory loads the same one.
    hf.AutoTokenizer.from_pretrained(out, local_files_only=True).save_pretrained(out)


# Configuration class and settings beside `_TEXT` of each family.
TEXT_FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "qwen2": (hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 32}),
    "qwen3-moe": (hf.Qwen3MoeConfig, {**_EXPERTS, "head_dim": 32}),
    "qwen2-moe": (hf.Qwen2MoeConfig, {**_EXPERTS, "shared_expert_intermediate_size": 64}),
    "llama": (hf.LlamaConfig, {}),
    "mistral": (hf.MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "gemma3": (
        hf.Gemma3TextConfig,
        {"head_dim": 32, "sliding_window": CONTEXT, "query_pre_attn_scalar": 32, "bos_token_id": 1},
    ),
    "smollm3": (hf.SmolLM3Config, {}),
    "phi": (hf.PhiConfig, {"num_key_value_heads": 4}),
    "phi3": (hf.Phi3Config, {}),
    "stablelm": (hf.StableLmConfig, {"partial_rotary_factor": 0.25}),
    "gpt-oss": (
        hf.GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": CONTEXT},
    ),
    "granite": (
        hf.GraniteConfig,
        {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.2},
    ),
}
