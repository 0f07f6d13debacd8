"""Tiny models with random weights, of the same families as the real ones.

The teacher of the default family is a whole `LlavaForConditionalGeneration` (CLIP, Qwen2); its student is a language
model, to which `init-student` adds a vision tower and an adapter. In another family (`demo.families`) both are whole
models, and the student is given the trained teacher's vision tower by `give_tower`. Teacher and student share a
tokenizer, but pad their output layers differently, as Qwen2-7B (152,064 rows) and Qwen2-0.5B (151,936) do.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.conversion_mapping import get_model_conversion_mapping

from demo.data import IMAGE_SIZE, DemoData, read_lines, write_dataset
from demo.families import FAMILIES, build_model
from train.model.student import atomic_directory, load_student, parameter_groups, save_student

LLAVA = "llava"

PATCH_SIZE = 14
CONTEXT = 512
TOKENIZER_SIZE = 448

# Heads are 32 wide, a size that vLLM's CPU attention takes. Models this narrow learn much faster from larger initial
# weights than the usual standard deviation of 0.02.
_TEACHER_TEXT = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.06,
}
_STUDENT_TEXT = {
    "vocab_size": 480,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.1,
}

PAD, IMAGE, START, END = "<|pad|>", "<image>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# The two files that describe images in `llava-hf` directories. They are written out here, because without torchvision
# transformers would save the name of its fallback class.
_IMAGE_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_PROCESSOR: dict[str, Any] = {
    "processor_class": "LlavaProcessor",
    "image_token": IMAGE,
    "patch_size": PATCH_SIZE,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}


@dataclass(frozen=True)
class DemoModels:
    """Hugging Face directories of an untrained LLaVA, and of an untrained language model for the student."""

    teacher: Path
    student_language: Path


def build_family(name: str, out: Path, data: DemoData, *, seed: int) -> None:
    """Writes an untrained teacher and student of one of `demo.families` into `out`, as `teacher` and `student`."""
    texts = list(_training_texts(data))
    for role, sizes in (("teacher", _TEACHER_TEXT), ("student", _STUDENT_TEXT)):
        build_model(FAMILIES[name], out / role, texts, seed=seed, sizes={**sizes, "num_hidden_layers": 4})


def give_tower(teacher: Path, student: Path, out: Path) -> None:
    """Writes a student into `out` that has the teacher's vision tower; adapter and language model stay its own.

    Raises:
        StorageError: `out` exists and is not empty.
    """
    models = [load_student(path, dtype=torch.float32) for path in (teacher, student)]
    source, target = (dict(model.named_parameters()) for model in models)
    with torch.no_grad():
        for name, groups in parameter_groups(models[1]).items():
            if "vision_tower" in groups:
                target[name].copy_(source[name])
    with atomic_directory(out) as staging:
        save_student(models[1], student, staging)


def build_models(out: Path, data: DemoData, *, seed: int) -> DemoModels:
    """Writes both models with tokenizer and configuration into `out`, which is created if absent; returns their paths.

    The weights are random and depend on `seed`; the tokenizer is trained on the training texts.
    """
    built = DemoModels(teacher=out / "teacher", student_language=out / "student_language")
    tokenizer = _fit_tokenizer(data)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _save(LlavaForConditionalGeneration(_teacher_config(tokenizer)), tokenizer, built.teacher)
        _save(Qwen2ForCausalLM(_text_config(tokenizer, _STUDENT_TEXT)), tokenizer, built.student_language)
    _write(built.teacher / "preprocessor_config.json", _IMAGE_PROCESSOR)
    _write(built.teacher / "processor_config.json", _PROCESSOR)
    return built


def _fit_tokenizer(data: DemoData) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE, which encodes any text, on the texts of the training files."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=[PAD, IMAGE, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_training_texts(data), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[IMAGE, START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _training_texts(data: DemoData) -> Iterator[str]:
    """Yields the role and the text of each turn as in the chat template, so that roles become tokens too."""
    roles = {"human": "user", "gpt": "assistant"}
    for line in read_lines(data.train_conversations) + read_lines(data.train_captions):
        for turn in line["conversations"]:
            yield f"{roles[turn['from']]}\n"
            yield turn["value"].removeprefix(IMAGE)


def _teacher_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        num_hidden_layers=3,
        hidden_size=96,
        intermediate_size=384,
        num_attention_heads=3,
        projection_dim=96,
        initializer_factor=0.2,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=_text_config(tokenizer, _TEACHER_TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )


def _text_config(tokenizer: PreTrainedTokenizerFast, sizes: dict[str, Any]) -> Qwen2Config:
    """Returns the configuration of a Qwen2 of four layers."""
    return Qwen2Config(
        num_hidden_layers=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Saves model and tokenizer with the names of weights that vLLM and published checkpoints use."""
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = conversions  # noqa: SLF001 - transformers has no public way to save with these names
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Runs `python -m demo.models OUT SEED [FAMILY]`, or `python -m demo.models give-tower TEACHER STUDENT OUT`."""
    if arguments[0] == "give-tower":
        give_tower(*map(Path, arguments[1:]))
        return
    out, seed = Path(arguments[0]), int(arguments[1])
    family = arguments[2] if len(arguments) > 2 else LLAVA
    data = write_dataset(out.parent / "data", seed=seed)
    if family == LLAVA:
        build_models(out, data, seed=seed)
    else:
        build_family(family, out, data, seed=seed)


if __name__ == "__main__":
    main(sys.argv[1:])
