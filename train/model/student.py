"""Loads, freezes and saves the student, a standard model of transformers.

    student directory, as train.model.compose or transformers made it ── load_student ──> model
    model ── set_trainable ──> what a stage trains ── save_student ──> student directory

A student is transformers' own class of a LLaVA, of another model that takes images and text, or of a plain causal
language model, dense or sparse. It is never subclassed, because a subclass loses transformers' key conversion, and its
weights stay random without an error.
"""

import functools
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.integrations import deepspeed
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from common.adapter_inputs import is_in_adapter
from common.errors import ModelError, StorageError
from common.model_layout import check_not_original_layout
from train.choices import PARAMETER_GROUPS, ParameterGroup
from train.model.adapter import is_adapter_block, is_frozen_identity
from train.model.cached_tower import cached_tower_config, full_config, full_state_dict, has_cached_tower
from train.model.skipped_tower import has_skipped_tower, skip_tower

# A setting in the text config of an upcycled Qwen2-MoE: its shared expert is frozen zeros, see train.moe.upcycle.
ZERO_SHARED_EXPERT = "zero_shared_expert"

# The files of a model directory beside config, weights and generation config.
_ASSETS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


# Keys are safetensors' names.
_FLOAT_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}

# Loading uses no network, no code from the directory and no pickle, because directories come from others.
_SAFE_OPTIONS: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
SAFE_WEIGHTS: dict[str, Any] = {**_SAFE_OPTIONS, "use_safetensors": True}

# Errors of transformers and safetensors for a directory that is no model or a damaged one.
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def load_student(path: Path, *, dtype: torch.dtype, tower: bool = True) -> PreTrainedModel:
    """Loads a model that takes images, or a causal language model, from a Hugging Face directory, in evaluation mode.

    Args:
        path: a local directory with config.json and safetensors.
        dtype: of all parameters.
        tower: False to leave out the vision tower of a LLaVA, which then takes the tower's output instead of images
            (train.model.cached_tower). Other students are loaded whole; `leave_out_tower` drops their tower.

    Raises:
        ModelError: the directory holds no model, one of another architecture, or damaged weights; or a weight has the
            wrong shape, is missing, or is unknown to the architecture. No weight is ever left at its random start.
    """
    config = load_config(path)
    model_class = find_model_class(config)
    if model_class is None:
        raise ModelError(
            f"{path}: found model type '{config.model_type}', expected a model that transformers trains on images and "
            "text (AutoModelForImageTextToText), or a causal language model"
        )
    options = {**SAFE_WEIGHTS, "config": config if tower else cached_tower_config(config)}
    try:
        model, report = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    except LOAD_ERRORS as error:
        raise ModelError(
            f"{path}: the weights cannot be loaded ({error}). Expected safetensors that fit config.json"
        ) from error
    check_all_weights_loaded(path, report)
    return model


def leave_out_tower(model: PreTrainedModel) -> None:
    """Drops the vision tower of a student that was loaded with it, so that it takes cached features."""
    if not has_cached_tower(model):
        skip_tower(model)


def stored_dtype(path: Path) -> torch.dtype:
    """Returns the narrowest dtype that all weights of a model directory convert to without loss.

    Raises:
        ModelError: the directory has no readable safetensors.
    """
    found: set[torch.dtype] = set()
    for file in path.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as weights:
                kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118 - not a dict
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: cannot be read as safetensors ({error}); copy or save it again") from error
        found |= {_FLOAT_DTYPES[kind] for kind in kinds if kind in _FLOAT_DTYPES}
    if not found:
        raise ModelError(f"{path}: found no floating-point weights in *.safetensors; expected a saved model")
    return functools.reduce(torch.promote_types, found)


def find_model_class(config: PreTrainedConfig) -> Any:
    """Returns transformers' class, or auto class, of a student with this configuration; None if it cannot be one."""
    if config.model_type == "llava":
        return LlavaForConditionalGeneration
    if getattr(config, "vision_config", None) is not None:
        return AutoModelForImageTextToText if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else None
    return AutoModelForCausalLM if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


def is_multimodal(model: PreTrainedModel) -> bool:
    """Returns True if the student takes images."""
    return getattr(model.config, "vision_config", None) is not None


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the decoder stack without the output layer: a Qwen2Model, LlamaModel, Qwen2MoeModel, ..."""
    decoder: PreTrainedModel = model.get_decoder() if is_multimodal(model) else model.model
    return decoder


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Returns the config object that `language_model(model)` reads."""
    config: PreTrainedConfig = model.config.text_config if is_multimodal(model) else model.config
    return config


def trained_groups(
    model: PreTrainedModel, groups: frozenset[ParameterGroup], *, is_default: bool
) -> frozenset[ParameterGroup]:
    """Returns the parameter groups to train: a stage's default ones made to fit the student.

    A dense student has its language model trained in place of experts and router; a text-only one has no adapter.

    Raises:
        ModelError: no group is left.
    """
    if not is_default:
        return groups
    fitting = groups
    if not any("experts" in found for found in parameter_groups(model).values()):
        fitting = frozenset("language_model" if group in ("experts", "router") else group for group in groups)
    if not is_multimodal(model):
        fitting -= {"adapter"}
    if fitting:
        return fitting
    raise ModelError(
        f"{type(model).__name__}: takes no images, so it has no adapter, which is all that this stage trains; leave "
        "the stage out, or name what to train (trainable)"
    )


def set_trainable(model: PreTrainedModel, trainable: frozenset[str]) -> int:
    """Makes the parameters of the named groups trainable and freezes all others.

    Groups: "language_model", everything of the text model with its embeddings and output layer; "experts", the expert
    FFNs of its sparse layers; "router"; "vision_tower"; "adapter", all the rest, which may have its own self-attention
    blocks (train.model.adapter). The zero shared expert of an upcycled Qwen2-MoE and the identity of a linear adapter
    always stay frozen.

    Returns:
        The number of trainable parameters; one that ZeRO-3 has partitioned is counted whole.

    Raises:
        ModelError: a group is unknown, or this model does not have it.
    """
    found = parameter_groups(model)
    present = frozenset[str]().union(*found.values())
    if absent := trainable - present:
        raise ModelError(
            f"{type(model).__name__}: cannot train {sorted(absent)}; this model has {sorted(present)}"
            + (f" of {sorted(PARAMETER_GROUPS)}" if present != PARAMETER_GROUPS else "")
        )
    keeps_zeros = getattr(text_config(model), ZERO_SHARED_EXPERT, False)
    num_trainable = 0
    for name, parameter in model.named_parameters():
        frozen = (keeps_zeros and ".mlp.shared_expert" in name) or is_frozen_identity(name, model.config)
        parameter.requires_grad_(bool(found[name] & trainable) and not frozen)
        if parameter.requires_grad:
            num_trainable += getattr(parameter, "ds_numel", parameter.numel())
    return num_trainable


def save_student(
    model: PreTrainedModel, assets_from: Path, out: Path, *, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a model directory that both transformers and vLLM load.

    The weights have the names of the hub's llava-hf checkpoints (`vision_tower.vision_model...`), which both
    read; transformers' own new names are unknown to vLLM. Tokenizer, chat template and image processor are
    copied from `assets_from` byte for byte, so that their fingerprints stay the same.

    Args:
        model: its config and generation config are written too.
        assets_from: the model directory that the tokenizer and processor files come from.
        out: created if it does not exist; files of the same names are replaced.
        state_dict: the whole weights if `model` itself holds only a part of them (ZeRO-3).

    Raises:
        ModelError: `assets_from` has no tokenizer, or transformers could not read the experts back.
        StorageError: `out` cannot be written.
    """
    assets = [path for name in _ASSETS if (path := assets_from / name).is_file()]
    if not any(path.name.startswith("tokenizer") for path in assets):
        raise ModelError(f"{assets_from}: has no tokenizer files to go with the saved model; name its directory")
    # Attached explicitly, because otherwise the names depend on how this model object was created.
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if model.config.model_type == "qwen3_vl_moe":
        # Published ones, which vLLM reads, have each expert's matrices transposed. transformers transposes what it
        # reads, but nothing of what it saves, because its conversion leaves alone what has the model's shapes.
        _check_experts_not_square(model, out)
        conversions = [found for found in conversions if "mlp.experts" not in str(found.source_patterns)]
        state_dict = {
            name: weight.transpose(1, 2).contiguous() if ".mlp.experts." in name else weight
            for name, weight in (state_dict or model.state_dict()).items()
        }
    model._weight_conversions = conversions  # noqa: SLF001 - transformers has no public way to choose the names
    try:
        weights = full_state_dict(model, state_dict, assets_from)
        if has_skipped_tower(model):
            weights = _tower_weights(assets_from, model.dtype) | dict(weights or model.state_dict())
        if weights is not None:
            # In a gathered state dict a tied weight is a copy, which transformers would store a second time.
            weights = {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}
        with _any_generation_config(model, out):
            model.save_pretrained(out, state_dict=weights)
        full_config(model, assets_from).save_pretrained(out)
        for path in assets:
            if path.parent.resolve() != out.resolve():
                shutil.copyfile(path, out / path.name)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{out}: the model could not be written ({error}); free space or choose another") from error


@contextmanager
def _any_generation_config(model: PreTrainedModel, out: Path) -> Iterator[None]:
    """Writes the generation config as it is, also one that transformers reads but refuses to write.

    Vicuna's, for example, has a temperature and no `do_sample`.
    """
    own = model.generation_config
    try:
        own.validate(strict=True)
    except ValueError:
        model.generation_config = GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = own
        (out / "generation_config.json").write_text(own.to_json_string(), encoding="utf-8")
    else:
        yield


def _tower_weights(model_dir: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the weights of a student's vision tower by name, whole even under ZeRO-3."""
    with _without_partitioning():
        model = load_student(model_dir, dtype=dtype)
    groups = parameter_groups(model)
    return {name: weight for name, weight in model.state_dict().items() if "vision_tower" in groups.get(name, ())}


@contextmanager
def _without_partitioning() -> Iterator[None]:
    """Keeps transformers from dividing what it loads among the ranks, which all would have to take part in."""
    current = deepspeed._hf_deepspeed_config_weak_ref  # noqa: SLF001 - transformers has no public way to get it
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if current is not None and (config := current()) is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _check_experts_not_square(model: PreTrainedModel, out: Path) -> None:
    """Raises ModelError if transformers could not tell a transposed expert from one that is not."""
    config = text_config(model)
    if config.hidden_size in (config.moe_intermediate_size, 2 * config.moe_intermediate_size):
        raise ModelError(
            f"{out}: its experts have matrices of {config.hidden_size} x {config.hidden_size}, of which transformers "
            "cannot tell whether they are transposed as in published Qwen3-VL-MoE; take a student of another width"
        )


@contextmanager
def atomic_directory(out: Path) -> Iterator[Path]:
    """Yields a new directory beside `out`; it is renamed to `out` at the end of the block, or removed after an error.

    Raises:
        StorageError: `out` exists and is not an empty directory, or its parent cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"{out}: exists and is not empty; choose a new directory or remove this one")
    staging = out.with_name(f".{out.name}.partial")
    try:
        # A killed process may have left one.
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        staging.replace(out)
    except OSError as error:
        raise StorageError(f"{out}: could not be written ({error}); free space or choose another") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_config(path: Path) -> PreTrainedConfig:
    """Loads the configuration of a model directory.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: has no config.json; expected a local Hugging Face model directory")
    check_not_original_layout(path)
    return load_component(AutoConfig, path, "config")


def load_component(auto_class: Any, path: Path, what: str) -> Any:
    """Loads an object of one of transformers' auto classes from a model directory; errors name it `what`.

    Raises:
        ModelError: it cannot be loaded.
    """
    try:
        return auto_class.from_pretrained(path, **_SAFE_OPTIONS)
    except LOAD_ERRORS as error:
        raise ModelError(f"{path}: the {what} cannot be loaded: {error}") from error


def check_all_weights_loaded(path: Path, report: Mapping[str, Any]) -> None:
    """Checks transformers' loading report, because transformers tolerates weights that stay random or are dropped.

    Raises:
        ModelError: names the first weights of each kind of problem.
    """
    kinds = {
        "missing_keys": "weights are missing and would be random",
        "mismatched_keys": "weights have another shape than config.json says",
        "unexpected_keys": "weights are unknown to the architecture",
        "error_msgs": "weights failed to convert",
    }
    found = [
        f"{len(keys)} {text}: {', '.join(map(str, keys[:5]))}{', ...' if len(keys) > 5 else ''}"
        for kind, text in kinds.items()
        if (keys := sorted(report.get(kind) or (), key=str))
    ]
    if found:
        raise ModelError(f"{path}: {'; '.join(found)}. Expected weights that match config.json exactly")


def parameter_groups(model: PreTrainedModel) -> dict[str, frozenset[str]]:
    """Returns the groups (see `set_trainable`) of each parameter by name, by the parts that the model itself names."""
    if not is_multimodal(model):
        return {name: _text_groups(name) for name, _ in model.named_parameters()}
    tower = _parameter_ids(model.get_encoder(modality="image"))
    text = _parameter_ids(language_model(model)) | _parameter_ids(model.get_output_embeddings())
    groups = {}
    for name, parameter in model.named_parameters():
        in_tower = id(parameter) in tower and not is_in_adapter(name)
        if id(parameter) in text:
            groups[name] = _text_groups(name)
        elif in_tower and not is_adapter_block(name, model.config):
            groups[name] = frozenset({"vision_tower"})
        else:
            groups[name] = frozenset({"adapter"})
    return groups


def _parameter_ids(module: Any) -> set[int]:
    return {id(parameter) for parameter in module.parameters()}


def _text_groups(name: str) -> frozenset[str]:
    """Returns the groups of a parameter of a text model; Llama 4 calls its MLP a feed_forward."""
    if ".mlp.experts." in name or ".feed_forward.experts." in name:
        return frozenset({"language_model", "experts"})
    # gpt-oss and Llama 4 call their gate a router.
    if ".mlp.gate." in name or ".mlp.router." in name or ".feed_forward.router." in name:
        return frozenset({"language_model", "router"})
    return frozenset({"language_model"})
