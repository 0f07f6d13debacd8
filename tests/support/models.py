"""Makes tiny random models in complete Hugging Face directories.

Every directory loads in transformers and in vLLM. All parameters are drawn at random, biases and norms
included, so that a test fails if any of them is lost or mixed up.

Images are 56 x 56 pixels in patches of 14: 16 placeholders an image.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping

IMAGE_SIZE = 56
PATCH_SIZE = 14
TOKENS_PER_IMAGE = (IMAGE_SIZE // PATCH_SIZE) ** 2

TextFamily = Literal["qwen2", "qwen3", "llama", "mistral"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Merged from left to right into byte pairs, so that these words are one token and everything else is bytes.
_WORDS = ("the", "\u0120the", "\u0120a", "\u0120is", "\u0120digit", "image", "user", "assistant", "system")


def tiny_tokenizer(directory: Path, *, image_token: bool = True) -> PreTrainedTokenizerFast:
    """Saves a byte-level BPE tokenizer with ChatML tokens into `directory` and returns it.

    It encodes any text. eos is `<|im_end|>`, pad is `<|endoftext|>`; `image_token=False` leaves out `<image>`.
    """
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        for end in range(1, len(word)):
            if word[: end + 1] not in vocab:
                vocab[word[: end + 1]] = len(vocab)
                merges.append((word[:end], word[end]))
    backend = Tokenizer(BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(["<image>"] if image_token else [])]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[token for token in special if token not in ("<|endoftext|>", "<|im_end|>")],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def tiny_llava(  # noqa: PLR0913 - keyword options, of which a test names one or two
    directory: Path,
    text: TextFamily = "qwen2",
    *,
    tied: bool = False,
    seed: int = 0,
    num_layers: int = 4,
    hidden_size: int = 64,
    padded_rows: int = 13,
    dtype: torch.dtype = torch.float32,
    **text_overrides: Any,
) -> Path:
    """Saves a random LLaVA (CLIP tower, GELU adapter, `text` decoder) with its processor and returns `directory`.

    The vocabulary has `padded_rows` rows more than the tokenizer has tokens.
    """
    tokenizer = tiny_tokenizer(directory)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=64,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=_text_config(
            text,
            tokenizer,
            tied=tied,
            num_layers=num_layers,
            hidden_size=hidden_size,
            padded_rows=padded_rows,
            overrides=text_overrides,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _save(LlavaForConditionalGeneration(config).to(dtype), tokenizer, seed, directory)
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(directory)
    images.save_pretrained(directory)
    return directory


def tiny_siglip(directory: Path, *, seed: int = 0) -> Path:
    """Saves a random SigLIP vision tower, pooling head included, with its image processor and returns `directory`."""
    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        )
    )
    randomise(model.named_parameters(), seed)
    model.save_pretrained(directory)
    SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(directory)
    return directory


def tiny_causal_lm(  # noqa: PLR0913 - keyword options, of which a test names one or two
    directory: Path,
    text: TextFamily = "qwen2",
    *,
    tied: bool = False,
    seed: int = 0,
    num_layers: int = 4,
    hidden_size: int = 64,
    padded_rows: int = 13,
    image_token: bool = True,
    dtype: torch.dtype = torch.float32,
    **text_overrides: Any,
) -> Path:
    """Saves a random text-only language model with its tokenizer and returns `directory`."""
    tokenizer = tiny_tokenizer(directory, image_token=image_token)
    config = _text_config(
        text,
        tokenizer,
        tied=tied,
        num_layers=num_layers,
        hidden_size=hidden_size,
        padded_rows=padded_rows,
        overrides=text_overrides,
    )
    _save(AutoModelForCausalLM.from_config(config).to(dtype), tokenizer, seed, directory)
    return directory


def randomise(named_parameters: Iterable[tuple[str, torch.nn.Parameter]], seed: int, std: float = 0.1) -> None:
    """Redraws parameters in place from normal(0, std), and the scales of norms from normal(1, std)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in named_parameters:
            is_norm_scale = "norm" in name and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + (1.0 if is_norm_scale else 0.0))


def _text_config(  # noqa: PLR0913 - the keyword options of both kinds of models
    text: TextFamily,
    tokenizer: PreTrainedTokenizerFast,
    *,
    tied: bool,
    num_layers: int,
    hidden_size: int,
    padded_rows: int,
    overrides: dict[str, Any],
) -> PreTrainedConfig:
    # vLLM's attention on CPU needs a head dimension that is a multiple of 32.
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer) + padded_rows,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": 1,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    family: dict[TextFamily, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
        "qwen2": (Qwen2Config, {}),
        "qwen3": (Qwen3Config, {"head_dim": 32}),
        "llama": (LlamaConfig, {"rms_norm_eps": 1e-5}),
        "mistral": (MistralConfig, {"sliding_window": None}),
    }
    config_class, family_settings = family[text]
    return config_class(**{**settings, **family_settings, **overrides})


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int, directory: Path) -> None:
    randomise(model.named_parameters(), seed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # The hub's names of weights, which both transformers and vLLM read.
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = conversions  # noqa: SLF001 - transformers has no public way to choose the names
    model.save_pretrained(directory)
