"""Runs one stage: from a configuration to a trained student in `output/final`.

    output/
      config.json, starts.json         what was asked for, and what ran it, start by start
      metrics.jsonl, tensorboard/      one line and one point a log
      checkpoints/checkpoint-<step>/   DeepSpeed state, whole or not there; of a sparse student expert-load.json, .png
      expert-load.json, .png           the newest of these
      final/                           the student as a plain Hugging Face directory

The only module that starts DeepSpeed.
"""

import functools
import importlib.util
import json
import logging
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.utils import is_flash_attn_2_available

from common.data.chat_encoding import ChatEncoder
from common.data.images import ImageSpec
from common.data.samples import Kind
from common.errors import ConfigError, StorageError
from train.config import LossConfig, SetConfig, TrainConfig
from train.data.collator import Collator, StudentInputs
from train.data.feature_source import FeatureSource, open_feature_source
from train.data.image_cache import ImageCache
from train.data.sampling import GlobalBatchSampler, SampleSet, split_validation
from train.data.sources import ExampleSource, MixtureSource, ShardSource, open_source
from train.model.packing import check_packing_supported
from train.model.student import load_student, set_trainable, text_config
from train.moe.expert_parallel import check_expert_parallel_supported, check_same_num_ranks, expert_parallel_settings
from train.moe.router_monitor import RouterMonitor
from train.moe.upcycle import is_sparse, upcycle
from train.run.callbacks import MetricsWriter, ProgressBar
from train.run.checkpoint import find_latest_complete, read_num_ranks
from train.run.divergence import DivergenceDetector
from train.run.run_record import append_start, check_continuation, device_name, write_config
from train.run.shutdown import GracefulShutdown
from train.run.trainer import StudentTrainer
from train.run.universal_checkpoint import to_universal

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageResult:
    """`metrics` are those of the last validation, `final` the directory of the trained student."""

    final: Path
    steps: int
    metrics: dict[str, float]


def train_stage(config: TrainConfig) -> StageResult:
    """Trains a stage, or continues it from its newest whole checkpoint.

    Under a launcher (deepspeed, torchrun) every process calls this; alone it makes a group of one.

    Raises:
        ConfigError, DataError, ModelError, ProvenanceError, ShardError, StorageError: before the first step as
            far as it can be known then.
        DivergedError: a step's loss or gradient is no number, or its loss exploded; on every rank.
        Interrupted: SIGTERM or Ctrl-C came, and a checkpoint of the step that was under way is saved.
    """
    _check_reports(config)
    _join_launcher()
    main = os.environ["RANK"] == "0"
    num_ranks = int(os.environ["WORLD_SIZE"])
    accumulation = config.optim.accumulation_steps(num_ranks)

    encoder = ChatEncoder.load(config.model.path, config.model.chat_template, config.data.score)
    source, plan, validation = _data(config, encoder)
    loss = _with_tail(config, source, validation[0] if validation else source)
    resume = find_latest_complete(config.output)
    if resume:
        check_continuation(config, source)
    elif main:
        write_config(config, source)
    max_steps = config.optim.max_steps or plan.steps_per_epoch * config.optim.epochs
    start_step = resume[1] if resume else 0
    final = config.output / "final"
    if start_step >= max_steps and (final / "config.json").is_file():
        _log.info("%s is complete at step %d; nothing to do", config.output, start_step)
        return StageResult(final, start_step, {})

    # Before the training arguments: from then on ZeRO-3 partitions what is loaded, and upcycling needs it whole.
    features = open_feature_source(config)
    model = _student(config)
    num_trainable = set_trainable(model, config.groups)
    deepspeed = _deepspeed(config)
    other_ranks = resume is not None and read_num_ranks(resume[0]) != num_ranks
    if (ep_size := config.run.expert_parallel_size) > 1:
        zero_stage = deepspeed["zero_optimization"]["stage"]
        check_expert_parallel_supported(model, ep_size, num_ranks=num_ranks, zero_stage=zero_stage)
        if resume and other_ranks:
            check_same_num_ranks(resume[0], read_num_ranks(resume[0]), num_ranks)
        deepspeed["expert_parallel"] = expert_parallel_settings(model, ep_size)
    # Without ZeRO every rank has all of the states, and any number of them loads one rank's.
    convert = other_ranks and deepspeed["zero_optimization"]["stage"] > 0
    if convert:
        deepspeed["checkpoint"] = {**deepspeed.get("checkpoint", {}), "load_universal": True}
    args = _training_arguments(config, deepspeed, accumulation, max_steps)
    checkpoint = resume[0] if resume else None
    if checkpoint is not None and convert:
        checkpoint = _convert(checkpoint, num_ranks, main)
    set_seed(config.seed)
    stop = GracefulShutdown()
    trainer = StudentTrainer(
        model,
        args,
        loss=loss,
        optim=config.optim,
        source=source,
        plan=plan,
        collator=_collator(config, encoder, features),
        validation=validation,
        vocab_size=encoder.vocab_size,
        router=RouterMonitor(model) if is_sparse(model) else None,
        start_step=start_step,
        num_workers=config.data.num_workers,
        keep_checkpoints=config.run.keep_checkpoints,
        other_ranks=other_ranks,
        expert_parallel_size=ep_size,
        watch=DivergenceDetector(config.run.max_loss_ratio),
        stop=stop,
        assets_from=config.model.path,
        callbacks=[ProgressBar(config.stage), MetricsWriter(config.output / "metrics.jsonl")] if main else [],
    )
    if main:
        append_start(config, source, step=start_step, num_ranks=num_ranks, device=device_name(args.device))
        _log.info(
            "%s: %s, %.1fM parameters, %.1fM trained (%s); %s, %s, ZeRO %d, attention %s, %d rank(s) x %d x %d; "
            "steps %d to %d",
            config.stage,
            type(model).__name__,
            sum(p.numel() for p in model.parameters()) / 1e6,
            num_trainable / 1e6,
            ", ".join(sorted(config.groups)),
            args.device,
            config.run.precision,
            config.run.zero_stage,
            text_config(model)._attn_implementation,
            num_ranks,
            accumulation,
            config.optim.micro_batch_size,
            start_step,
            max_steps,
        )
        if config.run.precision == "bf16" and config.run.zero_stage == 0:
            _log.warning(
                "bf16 with zero_stage 0: DeepSpeed's bf16 optimiser starts Adam at another step there, and losses "
                "differ from those of stages 1 to 3; prefer zero_stage 1, which costs nothing on one rank"
            )
    with stop:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # From here on a signal ends the process: the last step is saved, and the next start goes on from here.
    metrics = trainer.evaluate()
    partial = config.output / ".final.partial"
    trainer.save_model(str(partial))
    if main:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    trainer.accelerator.wait_for_everyone()
    return StageResult(final, max_steps, metrics)


def _join_launcher() -> None:
    """Makes a process group of one where no launcher made one, and keeps DeepSpeed from compiling for the CPU."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        import deepspeed.ops

        # An optional shared-memory reduction whose compilation takes most of a minute at every first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _data(
    config: TrainConfig, encoder: ChatEncoder
) -> tuple[ExampleSource, GlobalBatchSampler, tuple[ExampleSource, GlobalBatchSampler] | None]:
    data, optim = config.data, config.optim
    kind: Kind = "dpo" if config.loss.preference else "kd"
    sources = [open_source(each, kind, encoder, data.image_aspect_ratio) for each in data.sets]
    source = MixtureSource(sources, [each.image_root for each in data.sets]) if data.mix else sources[0]
    sets, held_out, first = [], [], 0
    for each, one in zip(data.sets, sources, strict=True):
        selected, out = split_validation(len(one), data.validation_fraction)
        sets.append(SampleSet(np.array(selected, np.int64) + first, each.weight))
        held_out += [first + position for position in out]
        first += len(one)
    length_of = None
    if data.group_by_length:
        spec = ImageSpec.load(config.model.path)
        length_of = functools.partial(source.length, tokens_per_image=1 if spec is None else spec.tokens_per_image)
    sizes = optim.global_batch_size, optim.micro_batch_size
    plan = GlobalBatchSampler(sets, *sizes, config.seed, data.shuffle_window, length_of)
    for one, window in zip(sources, plan.windows, strict=True):
        if isinstance(one, ShardSource):
            one.hold(window)
    validation: tuple[ExampleSource, GlobalBatchSampler] | None = None
    if data.validation is not None:
        where = SetConfig(**{"shards" if data.has_scores else "dataset": data.validation})
        other = open_source(where, kind, encoder, data.image_aspect_ratio)
        validation = other, _validation_plan(range(len(other)), config)
    elif held_out:
        validation = source, _validation_plan(held_out, config)
    return source, plan, validation


def _with_tail(config: TrainConfig, source: ExampleSource, validation: ExampleSource) -> LossConfig:
    """The loss with the tail that fits the source's entries.

    Raises:
        ConfigError: a tail that would bias it.
    """
    loss, data = config.loss, config.data
    if not loss.distillation:
        return loss
    tail = loss.tail or ("ignore" if source.sampled else "bucket")
    for sampled, name, path in (
        (source.sampled, "data.mix" if data.mix else "data.shards", data.sets[0].location),
        (validation.sampled, "data.validation", data.validation),
    ):
        if sampled and tail != "ignore":
            raise ConfigError(
                f'{path}: {name} holds ids drawn from the teacher\'s distribution, which loss.tail "{tail}" does not '
                "fit: they are not its best ones, so a bucket for the rest, or dividing by their mass, would bias "
                'the loss; use tail = "ignore", whose gradient is right on average, or leave the key out'
            )
        if sampled and loss.divergence != "forward_kl":
            raise ConfigError(
                f"{path}: {name} holds ids drawn from the teacher's distribution, which give an unbiased gradient for "
                f'the forward KL alone, found loss.divergence "{loss.divergence}"; use "forward_kl"'
            )
    return loss.model_copy(update={"tail": tail})


def _validation_plan(selected: range | list[int], config: TrainConfig) -> GlobalBatchSampler:
    at_once = config.optim.micro_batch_size * int(os.environ["WORLD_SIZE"])
    # The window of 1 keeps validation samples in their order on disk, run by run.
    return GlobalBatchSampler([SampleSet(selected)], at_once, config.optim.micro_batch_size, 0, window=1)


def _student(config: TrainConfig) -> PreTrainedModel:
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    model = load_student(config.model.path, dtype=dtype, tower=not config.data.has_features)
    if config.moe is not None and not is_sparse(model):
        model = upcycle(model, config.moe, seed=config.seed)
    if (weight := config.loss.of_routers) and not is_sparse(model):
        raise ConfigError(f"loss.{weight} needs a sparse student, {config.model.path} is dense; add a [moe] table")
    if torch.cuda.is_available() and is_flash_attn_2_available() and config.run.precision == "bf16":
        model.set_attn_implementation("flash_attention_2")
    if config.data.batching == "packed":
        check_packing_supported(model)
    return model


def _collator(config: TrainConfig, encoder: ChatEncoder, features: FeatureSource | None) -> Collator:
    images = features or ImageCache.load(config.model.path, config.data.image_aspect_ratio)
    return Collator(
        StudentInputs(images, encoder.image_token_id, encoder.tokenizer.pad_token_id or 0),
        kind="dpo" if config.loss.preference else "kd",
        image_root=config.data.image_root,
        max_tokens=config.data.max_tokens,
        packed=config.data.batching == "packed",
    )


def _check_reports(config: TrainConfig) -> None:
    missing = [name for name in config.run.report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"run.report_to: {', '.join(missing)} is not installed; leave it out, or run: pip install "
            + " ".join(missing)
        )


def _convert(checkpoint: Path, num_ranks: int, main: bool) -> Path:
    """The checkpoint for this number of ranks, made by the first of them while the others wait."""
    outcome: list[Any] = [None]
    if main:
        _log.info("%s: converting from %d to %d rank(s)", checkpoint, read_num_ranks(checkpoint), num_ranks)
        try:
            outcome = [to_universal(checkpoint)]
        except StorageError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], StorageError):
        raise outcome[0]
    found: Path = outcome[0]
    return found


def _training_arguments(
    config: TrainConfig, deepspeed: dict[str, Any], accumulation: int, max_steps: int
) -> TrainingArguments:
    run, optim = config.run, config.optim
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(config.output / "tensorboard")
    ours: dict[str, Any] = {
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
    if clash := sorted(set(ours) & set(run.training_arguments)):
        raise ConfigError(f"run.training_arguments: {', '.join(clash)} follow from other settings of this file")
    try:
        # A name that can be changed, for W&B and trackio.
        return TrainingArguments(**{**ours, "run_name": config.output.name, **run.training_arguments})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"run.training_arguments: {error}") from error


def _deepspeed(config: TrainConfig) -> dict[str, Any]:
    """The DeepSpeed configuration, with the user's own JSON laid over it."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": config.run.precision == "bf16"},
        "zero_optimization": {
            "stage": config.run.zero_stage,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        # The optimiser is torch's AdamW: no kernel has to be compiled, and it is exact in float32.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.run.deepspeed is not None:
        try:
            given = json.loads(config.run.deepspeed.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{config.run.deepspeed}: cannot be read as DeepSpeed JSON ({error})") from error
        if "expert_parallel" in given:
            raise ConfigError(
                f"{config.run.deepspeed}: expert_parallel follows from run.expert_parallel_size; set that"
            )
        for key, value in given.items():
            both = isinstance(value, dict) and isinstance(settings.get(key), dict)
            settings[key] = {**settings[key], **value} if both else value
    return settings
