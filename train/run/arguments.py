"""Translates the configuration into DeepSpeed's and Hugging Face's settings."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from common.errors import ConfigError
from common.storage.files import read_bytes
from train.config import TrainConfig

# Longest part of a message that repeats a value.
_MAX_SHOWN = 200


def check_metric_packages(config: TrainConfig) -> None:
    """Checks that the packages of `run.report_to` are installed.

    Raises:
        ConfigError: lists the missing ones.
    """
    missing = [name for name in config.run.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"run.report_to: {', '.join(missing)} is not installed; leave it out, or run: pip install "
            + " ".join(missing)
        )


def build_deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """Builds the DeepSpeed configuration; the user's own JSON file overrides it.

    Raises:
        ConfigError: the user's file cannot be read, or sets what another key sets.
    """
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": config.run.precision == "bf16"},
        "zero_optimization": {
            "stage": config.run.zero_stage,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        # The optimiser is torch's AdamW, because it needs no compiled kernel and is exact in float32.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.run.deepspeed is not None:
        try:
            user_settings = json.loads(read_bytes(config.run.deepspeed))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{config.run.deepspeed}: cannot be read as DeepSpeed JSON ({error})") from error
        _check_deepspeed_file(config.run.deepspeed, user_settings)
        if "expert_parallel" in user_settings:
            raise ConfigError(
                f"{config.run.deepspeed}: expert_parallel follows from run.expert_parallel_size; set that"
            )
        for key, value in user_settings.items():
            both_tables = isinstance(value, dict) and isinstance(settings.get(key), dict)
            settings[key] = {**settings[key], **value} if both_tables else value
    return settings


def _check_deepspeed_file(path: Path, settings: Any) -> None:
    """Raises ConfigError if the file is no table of settings, or its ZeRO stage none of DeepSpeed's."""
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{path}: expected a JSON object of DeepSpeed's settings, found {str(settings)[:_MAX_SHOWN]!r}"
        )
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if not isinstance(stage, int) or isinstance(stage, bool) or stage not in range(4):
        raise ConfigError(
            f"{path}: zero_optimization: expected an object whose stage is 0, 1, 2 or 3, "
            f"found {str(zero)[:_MAX_SHOWN]!r}"
        )


def build_training_arguments(
    config: TrainConfig, deepspeed: dict[str, Any], *, accumulation: int, max_steps: int
) -> TrainingArguments:
    """Builds Hugging Face's arguments; from then on ZeRO-3 partitions every model that is loaded.

    Raises:
        ConfigError: `run.training_arguments` has an unknown name, or sets what another key sets.
    """
    run, optim = config.run, config.optim
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.output / "tensorboard")
    arguments: dict[str, Any] = {
        "output_dir": str(config.output),
        "per_device_train_batch_size": optim.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": max_steps,
        "learning_rate": optim.learning_rate,
        "lr_scheduler_type": optim.scheduler,
        "warmup_steps": round(optim.warmup_ratio * max_steps),
        "max_grad_norm": optim.max_grad_norm,
        "bf16": run.precision == "bf16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": run.activation_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "deepspeed": deepspeed,
        "logging_steps": run.log_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": run.save_steps,
        "eval_strategy": "steps" if config.data.validation or config.data.validation_fraction else "no",
        "eval_steps": run.eval_steps,
        "seed": config.seed,
        "data_seed": config.seed,
        "ignore_data_skip": True,
        "disable_tqdm": True,
        "report_to": list(run.report_to),
        "remove_unused_columns": False,
    }
    if clash := sorted(set(arguments) & set(run.training_arguments)):
        raise ConfigError(f"run.training_arguments: {', '.join(clash)} follow from other settings of this file")
    try:
        # The user may change the run's name, which W&B and trackio show.
        return TrainingArguments(**{**arguments, "run_name": config.output.name, **run.training_arguments})
    # An error of any type, because transformers uses most values before it has checked them.
    except Exception as error:
        raise ConfigError(f"run.training_arguments: {error}") from error
