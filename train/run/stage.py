"""Runs one stage: from a configuration to a trained student in `output/final`.

    output/
      config.json, starts.json         the run's configuration and data, and one entry for each start
      metrics.jsonl, tensorboard/      one line and one point for each log
      checkpoints/checkpoint-<step>/   a complete checkpoint; for a sparse student with expert-load.json and .png
      expert-load.json, .png           the newest of these
      final/                           the student as a plain Hugging Face directory
      .train.lock                      held while a process trains into the output

The only module that starts DeepSpeed.
"""

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.utils import is_flash_attn_2_available

from common.data.bad_samples import check_skipped_share, list_problems
from common.data.chat_encoding import ChatEncoder
from common.data.model_images import describe_aspect_ratio, find_model_images, find_placeholder
from common.errors import ConfigError, DataError, DecantError, StorageError
from train.choices import ParameterGroup
from train.config import LossConfig, TrainConfig
from train.data.collator import Collator
from train.data.feature_source import open_feature_source
from train.data.preflight import BadSample, Ranks, find_bad_samples
from train.data.sources import ExampleSource
from train.loss.fused_output import FusedOutput
from train.model.packing import check_packing_supported
from train.model.student import leave_out_tower, load_student, set_trainable, text_config, trained_groups
from train.moe.expert_parallel import check_expert_parallel_supported, check_same_num_ranks, expert_parallel_settings
from train.moe.router_monitor import RouterMonitor
from train.moe.upcycle import is_sparse, upcycle
from train.run.arguments import build_deepspeed_config, build_training_arguments, check_metric_packages
from train.run.callbacks import MetricsWriter, ProgressBar
from train.run.checkpoint import Checkpoint, check_undamaged, find_latest_complete
from train.run.divergence import DivergenceDetector
from train.run.output_lock import lock_output
from train.run.run_record import RunRecord, StartPlace, append_start, device_name, find_template_date
from train.run.shutdown import GracefulShutdown
from train.run.trainer import SaveSettings, StartState, StepSettings, StopConditions, StudentTrainer, TrainingData
from train.run.training_data import DataSplits, build_collator, choose_tail, open_data_splits
from train.run.training_output import check_training_output
from train.run.universal_checkpoint import to_universal

_log = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# For work that rank 0 does while the others wait, such as hashing a checkpoint of hundreds of GB on a slow disk.
_RANK_0_TIMEOUT = timedelta(days=1)

# The default of TrainingArguments.ddp_timeout.
_DEFAULT_TIMEOUT_S = 1800


@dataclass(frozen=True)
class StageResult:
    """Directory of the trained student, the number of steps, and the metrics of the last validation."""

    final: Path
    steps: int
    metrics: dict[str, float]


def train_stage(config: TrainConfig) -> StageResult:
    """Trains a stage, or continues it from its newest complete checkpoint.

    Under a launcher (deepspeed, torchrun) every process calls this; without one the process is the only rank.

    Raises:
        ConfigError, DataError, ModelError, ProvenanceError, ShardError, StorageError: as far as possible before the
            first step.
        DivergedError: a step's loss or gradient is no number, or its loss exploded; on every rank.
        TrainingInterrupted: SIGTERM or Ctrl-C came, and a checkpoint of the step that was under way is saved.
    """
    check_metric_packages(config)
    process = _join_process_group(config)
    process.run_on_rank_0(lambda: check_training_output(config))
    with contextlib.ExitStack() as stack:
        # Before anything else, because a second trainer of the output has to be refused before it reads for minutes.
        process.run_on_rank_0(lambda: stack.enter_context(lock_output(config.output)))
        return _train_locked(config, process)


def _train_locked(config: TrainConfig, process: "_Process") -> StageResult:
    run = _prepare_run(config, process)
    if run.is_complete:
        _log.info("%s is complete at step %d; nothing to do", config.output, run.start_step)
        return StageResult(run.final, run.start_step, {})

    # The student is loaded before the training arguments exist, because from then on ZeRO-3 partitions what is loaded,
    # and upcycling needs whole weights.
    model = prepare_student(config)
    output = FusedOutput(model, run.encoder.vocab_size)
    # Only now, because the output is compared with the model's logits on the CPU, where flash-attn does not run.
    if torch.cuda.is_available() and is_flash_attn_2_available() and config.run.precision == "bf16":
        model.set_attn_implementation("flash_attention_2")
    groups = trained_groups(model, config.groups, is_default=config.trainable is None)
    num_trainable = set_trainable(model, groups)
    deepspeed = _configure_deepspeed(run, model)
    args = build_training_arguments(config, deepspeed, accumulation=run.accumulation, max_steps=run.max_steps)
    checkpoint = _convert_checkpoint(run, deepspeed)
    set_seed(config.seed)

    shutdown = GracefulShutdown()
    trainer = _build_trainer(run, _Student(model, output), args, shutdown)
    if run.process.is_rank_0:
        _record_start(run, model, args, groups, num_trainable)
    with shutdown:
        trainer.train(resume_from_checkpoint=checkpoint)
    # From here on a signal ends the process: the last step is saved, and the next start continues after it.
    metrics = trainer.evaluate()
    _publish_final(run, trainer)
    return StageResult(run.final, run.max_steps, metrics)


@dataclass(frozen=True)
class _Process:
    """This process's rank, the number of ranks, and if there are several a gloo group of them for `run_on_rank_0`."""

    rank: int
    num_ranks: int
    group: torch.distributed.ProcessGroup | None

    @property
    def is_rank_0(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Returns what every rank passes, in the order of the ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def run_on_rank_0(self, function: Callable[[], _Result]) -> _Result:
        """Calls a function on rank 0 alone; every rank returns its result, or raises its DecantError."""
        result: Any = None
        failure: DecantError | None = None
        if self.is_rank_0:
            try:
                result = function()
            except DecantError as error:
                failure = error
            except OSError as error:
                # Raised on every rank, so that none waits for one that has ended.
                failure = StorageError(f"{error.filename or 'a file'}: {error.strerror or error}; check the disk")
        if self.group is not None:
            outcome = [result, failure]
            torch.distributed.broadcast_object_list(outcome, src=0, group=self.group, device=torch.device("cpu"))
            result, failure = outcome
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Run:
    """A start of a stage as far as it is known without the student; `checkpoint` is the one that it continues from."""

    config: TrainConfig
    process: _Process
    accumulation: int
    encoder: ChatEncoder
    collator: Collator
    splits: DataSplits
    loss: LossConfig
    checkpoint: Checkpoint | None
    changes: list[str]

    @property
    def start_step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def max_steps(self) -> int:
        optim = self.config.optim
        return optim.max_steps or self.splits.train.sampler.steps_per_epoch * optim.epochs

    @property
    def final(self) -> Path:
        return self.config.output / "final"

    @property
    def is_complete(self) -> bool:
        return self.start_step >= self.max_steps and (self.final / "config.json").is_file()

    @property
    def num_ranks_changed(self) -> bool:
        return self.checkpoint is not None and self.checkpoint.num_ranks != self.process.num_ranks


@dataclass(frozen=True)
class _Student:
    """The student, and its output layer as the losses use it."""

    model: PreTrainedModel
    output: FusedOutput


def _join_process_group(config: TrainConfig) -> _Process:
    """Joins the launcher's ranks, or prepares a group of one, and keeps DeepSpeed from compiling for the CPU."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        single_rank = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(single_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        import deepspeed.ops

        # An optional shared-memory reduction, which would take most of a minute to compile on each new machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if num_ranks == 1:
        return _Process(rank, num_ranks, None)
    import deepspeed.comm

    # The group that TrainingArguments would make, made before them: rank 0's decisions are needed for them.
    timeout_s: Any = config.run.training_arguments.get("ddp_timeout", _DEFAULT_TIMEOUT_S)
    try:
        timeout = timedelta(seconds=timeout_s)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"run.training_arguments: ddp_timeout = {timeout_s!r}, expected seconds ({error})") from error
    deepspeed.comm.init_distributed(auto_mpi_discovery=False, timeout=timeout)
    return _Process(rank, num_ranks, torch.distributed.new_group(backend="gloo", timeout=_RANK_0_TIMEOUT))


def _prepare_run(config: TrainConfig, process: _Process) -> _Run:
    """Opens the data, and checks the run that is in the output or writes the record of a new one."""
    accumulation = config.optim.accumulation_steps(process.num_ranks)
    process.run_on_rank_0(lambda: check_undamaged(config.model.path))
    # All ranks have to take the same checkpoint, and its files are read once.
    checkpoint = process.run_on_rank_0(lambda: find_latest_complete(config.output))
    date = process.run_on_rank_0(lambda: find_template_date(config, continues=checkpoint is not None))
    images = find_model_images(config.model.path)
    encoder = ChatEncoder.load(
        config.model.path, config.model.chat_template, config.data.score, date, find_placeholder(images)
    )
    aspect_ratio = None if images is None else config.data.image_aspect_ratio or images.default_aspect_ratio
    if images is not None and aspect_ratio is not None and process.is_rank_0:
        _log.info("%s: %s", config.model.path, describe_aspect_ratio(images, aspect_ratio))
    collator = build_collator(config, encoder, images, open_feature_source(config))
    skipped: dict[str, list[BadSample]] = {}
    splits = open_data_splits(
        config,
        encoder,
        process.num_ranks,
        lambda source: _find_skipped(config, process, collator, source, skipped),
        aspect_ratio,
    )
    loss = choose_tail(config, splits)
    record = RunRecord.of(config, splits.train.source, encoder.template.date, skipped)
    changes = process.run_on_rank_0(lambda: _open_record(record, config, continues=checkpoint is not None))
    return _Run(config, process, accumulation, encoder, collator, splits, loss, checkpoint, changes)


def _find_skipped(
    config: TrainConfig,
    process: _Process,
    collator: Collator,
    source: ExampleSource,
    skipped: dict[str, list[BadSample]],
) -> frozenset[int]:
    """Returns the positions of a source's samples that are left out, and adds them to `skipped` by its digest.

    Raises:
        DataError: there are bad samples, and the configuration says to stop, or they are too many.
    """
    data = config.data
    if not data.preflight:
        return frozenset()
    ranks = Ranks(process.rank, process.num_ranks, process.gather)
    bad = find_bad_samples(source, collator, ranks, num_workers=data.num_workers)
    reasons = [sample.reason for sample in bad]
    if bad and data.on_bad_sample == "stop":
        raise DataError(list_problems(reasons))
    if bad:
        check_skipped_share(reasons, len(source), data.max_skipped)
        skipped[source.sha256] = bad
        if process.is_rank_0:
            _log.warning(
                "%d of %d samples cannot be used and are skipped, such as: %s", len(bad), len(source), reasons[0]
            )
    return frozenset(sample.position for sample in bad)


def _open_record(record: RunRecord, config: TrainConfig, *, continues: bool) -> list[str]:
    """Writes the record of a new run, or compares it with that of the run that continues; returns what has changed."""
    changes = record.check_continuation(config) if continues else []
    if not continues or changes:
        record.write(config.output)
    return changes


def prepare_student(config: TrainConfig) -> PreTrainedModel:
    """Loads the student and, if the stage asks for it, makes it sparse.

    Raises:
        ConfigError, ModelError: the student cannot be loaded, or does not fit the stage.
    """
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    model = load_student(config.model.path, dtype=dtype, tower=not config.data.has_features)
    if config.moe is not None and not is_sparse(model):
        model = upcycle(model, config.moe, seed=config.seed)
    if config.data.has_features:
        leave_out_tower(model)
    if (weight := config.loss.router_term) and not is_sparse(model):
        raise ConfigError(f"loss.{weight} needs a sparse student, {config.model.path} is dense; add a [moe] table")
    if config.data.batching == "packed":
        check_packing_supported(model)
    return model


def _configure_deepspeed(run: _Run, model: PreTrainedModel) -> dict[str, Any]:
    """Builds DeepSpeed's configuration for the student, its experts and the checkpoint."""
    deepspeed = build_deepspeed_config(run.config)
    num_ranks, zero_stage = run.process.num_ranks, deepspeed["zero_optimization"]["stage"]
    if (size := run.config.run.expert_parallel_size) > 1:
        check_expert_parallel_supported(model, size, num_ranks=num_ranks, zero_stage=zero_stage)
        if run.checkpoint and run.num_ranks_changed:
            check_same_num_ranks(run.checkpoint.path, run.checkpoint.num_ranks, num_ranks)
        deepspeed["expert_parallel"] = expert_parallel_settings(model, size)
    # Without ZeRO every rank has all of the states, so any number of ranks can load those of one.
    if run.num_ranks_changed and zero_stage > 0:
        deepspeed["checkpoint"] = {**deepspeed.get("checkpoint", {}), "load_universal": True}
    return deepspeed


def _convert_checkpoint(run: _Run, deepspeed: dict[str, Any]) -> str | None:
    """Returns the directory to continue from, or None; rank 0 converts it for another number of ranks if need be.

    Raises:
        StorageError: the checkpoint cannot be converted; on every rank.
    """
    checkpoint = run.checkpoint
    if checkpoint is None:
        return None
    if not (run.num_ranks_changed and deepspeed["zero_optimization"]["stage"] > 0):
        return str(checkpoint.path)

    def convert() -> str:
        _log.info("%s: converting from %d to %d rank(s)", checkpoint.path, checkpoint.num_ranks, run.process.num_ranks)
        return str(to_universal(checkpoint.path))

    return run.process.run_on_rank_0(convert)


def _build_trainer(
    run: _Run,
    student: _Student,
    args: TrainingArguments,
    shutdown: GracefulShutdown,
) -> StudentTrainer:
    config, model = run.config, student.model
    trainer = StudentTrainer(
        model,
        args,
        data=TrainingData(run.splits, run.collator, config.data.num_workers),
        step=StepSettings(
            loss=run.loss,
            optim=config.optim,
            output=student.output,
            router=RouterMonitor(model) if is_sparse(model) else None,
            expert_parallel_size=config.run.expert_parallel_size,
        ),
        start=StartState(run.start_step, run.num_ranks_changed),
        save=SaveSettings(config.run.keep_checkpoints, assets_from=config.model.path),
        stop=StopConditions(DivergenceDetector(config.run.max_loss_ratio), shutdown),
    )
    if run.process.is_rank_0:
        trainer.add_callback(ProgressBar(config.stage))
        trainer.add_callback(MetricsWriter(config.output / "metrics.jsonl"))
    return trainer


def _record_start(
    run: _Run, model: PreTrainedModel, args: TrainingArguments, groups: frozenset[ParameterGroup], num_trainable: int
) -> None:
    """Adds the start to starts.json, and logs the student, the device and the sizes of the run."""
    config, num_ranks = run.config, run.process.num_ranks
    # A JSON file may have changed it.
    zero_stage = build_deepspeed_config(config)["zero_optimization"]["stage"]
    place = StartPlace(run.start_step, num_ranks, device_name(args.device))
    append_start(config, run.splits.train.source, place, run.changes)
    for change in run.changes:
        _log.warning("%s: from step %d on, %s", config.output, run.start_step, change)
    _log.info(
        "%s: %s, %.1fM parameters, %.1fM trained (%s); %s, %s, ZeRO %d, attention %s, %d rank(s) x %d x %d; "
        "steps %d to %d",
        config.stage,
        type(model).__name__,
        sum(p.numel() for p in model.parameters()) / 1e6,
        num_trainable / 1e6,
        ", ".join(sorted(groups)),
        args.device,
        config.run.precision,
        zero_stage,
        text_config(model)._attn_implementation,  # noqa: SLF001 - transformers has no public name for it
        num_ranks,
        run.accumulation,
        config.optim.micro_batch_size,
        run.start_step,
        run.max_steps,
    )
    if config.run.precision == "bf16" and zero_stage == 0:
        _log.warning(
            "bf16 with zero_stage 0: DeepSpeed's bf16 optimiser starts Adam at another step there, and losses "
            "differ from those of stages 1 to 3; prefer zero_stage 1, which costs nothing on one rank"
        )


def _publish_final(run: _Run, trainer: StudentTrainer) -> None:
    """Saves the student aside and renames it to `output/final`; all ranks leave together."""
    partial = run.config.output / ".final.partial"
    trainer.save_model(str(partial))
    if run.process.is_rank_0:
        shutil.rmtree(run.final, ignore_errors=True)
        partial.rename(run.final)
    trainer.accelerator.wait_for_everyone()
