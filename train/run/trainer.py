"""Hugging Face's Trainer on DeepSpeed, with our micro-batches, objective, divergence check and complete checkpoints.

One global step on each rank, in order; brackets name the method of Hugging Face's Trainer that is overridden for it:

1. Takes the rank's micro-batches from the loader and counts their rows, pairs, tokens and positions.
   [get_batch_samples]
2. Adds up the reports of all ranks in one reduction: the counts of the whole step, failures, stop signals, and loss and
   gradient of the step before. [get_batch_samples]
3. Stops all ranks together if one of them failed, if the step before diverged or, after saving, if a signal came.
   [get_batch_samples]
4. For each micro-batch [training_step]
   a. moves it to the device; [_prepare_inputs]
   b. runs the model forward, computes the sums of all terms, and divides them by the counts of the whole step;
      [compute_loss]
   c. runs backward. After the last micro-batch DeepSpeed's engine averages the gradients over ranks, computes their
      norm, clips them and steps the optimiser, all before the Trainer asks for it; its own calls then change nothing.
5. Keeps whether the gradient norm is finite. [_get_grad_norm]
6. Checks for divergence if this step is to be validated or saved. Otherwise item 3 of the next step does it, which
   saves a reduction. [_maybe_log_save_evaluate]
7. Logs [log], validates [evaluate] and saves [_save_checkpoint, _get_output_dir, save_model, _save], each if it is due.

Before the first step the Trainer asks for the loader [get_train_dataloader] and the optimiser [create_optimizer], and
loads the checkpoint [_load_optimizer_and_scheduler, _load_rng_state]. The methods stand in the order of their use.
"""

import itertools
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from common.errors import DataError, DecantError, StorageError
from common.storage.files import publish
from train.config import LossConfig, OptimConfig
from train.data.collator import Batch, Collator
from train.data.loader import MicroBatchDataset, MicroBatchLoader
from train.loss.fused_output import FusedOutput
from train.loss.objective import Term, compute_terms, step_loss, unit_counts
from train.model.packing import rope_position_ids
from train.model.student import save_student
from train.moe.expert_parallel import gather_full_state_dict, split_experts
from train.moe.router_monitor import RouterMonitor
from train.run.checkpoint import mark_complete, remove_old
from train.run.divergence import DivergedStep, DivergenceDetector, RankLoss
from train.run.optimizer import repair_universal_state, weight_decay_groups
from train.run.shutdown import GracefulShutdown, TrainingInterrupted
from train.run.step_report import StepOutcome, StepReport, pack_report
from train.run.term_sums import TermSums
from train.run.training_data import DataSplit, DataSplits
from train.run.universal_checkpoint import remove_universal


@dataclass(frozen=True)
class TrainingData:
    """The samples of a run, the collator that makes batches of them, and the number of worker processes per rank."""

    splits: DataSplits
    collator: Collator
    num_workers: int


@dataclass(frozen=True)
class StepSettings:
    """Objective and optimiser of a step.

    `output` computes the scored rows of the student, `router` is the monitor of a sparse one. The experts are divided
    among `expert_parallel_size` ranks.
    """

    loss: LossConfig
    optim: OptimConfig
    output: FusedOutput
    router: RouterMonitor | None
    expert_parallel_size: int


@dataclass(frozen=True)
class StartState:
    """Global step that a start continues from, and whether another number of ranks wrote its checkpoint."""

    step: int
    num_ranks_changed: bool


@dataclass(frozen=True)
class SaveSettings:
    """Number of checkpoints that are kept, and the model directory whose tokenizer and processor go with each."""

    num_checkpoints: int
    assets_from: Path


@dataclass(frozen=True)
class StopConditions:
    """Reasons to stop before the last step: a diverged step, and a stop signal."""

    divergence: DivergenceDetector
    shutdown: GracefulShutdown


class StudentTrainer(Trainer):
    """Trains a student on the micro-batches of a `GlobalBatchSampler`."""

    optimizer: Any
    control: Any
    # Keeps the Trainer from dividing the loss, because compute_loss divides it by the counts of the global step.
    loss_is_scaled_for_ga = True

    def __init__(  # noqa: PLR0913 - the Trainer's own two, and one record for each subject
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        data: TrainingData,
        step: StepSettings,
        start: StartState,
        save: SaveSettings,
        stop: StopConditions,
    ) -> None:
        validation = None
        if data.splits.validation is not None:
            validation = _rank_dataset(data.splits.validation, data.collator, args, accumulation=1)
        super().__init__(model=model, args=args, eval_dataset=validation)
        self._data = data
        self._step = step
        self._start = start
        self._save_settings = save
        self._stop = stop
        self._saved_step = start.step
        self._weight_decays: list[float] = []
        self._step_counts: Mapping[str, float] = {}
        self._outcome = StepOutcome()
        self._since_log = TermSums()
        self._logged_at = time.monotonic()
        self._waited_s = 0.0
        # The step of the last validation, and its metrics.
        self._evaluated: tuple[int, dict[str, float]] | None = None
        # PrinterCallback prints every log as a dictionary, but our logs go to the progress bar and to files.
        self.remove_callback(PrinterCallback)

    # Before the first step: loader, optimiser, checkpoint

    def get_train_dataloader(self) -> MicroBatchLoader:
        """Returns the rank's remaining micro-batches; those before the start step are never decoded."""
        accumulation = self.args.gradient_accumulation_steps
        dataset = _rank_dataset(self._data.splits.train, self._data.collator, self.args, accumulation)
        items = range(self._start.step * accumulation, self.args.max_steps * accumulation)
        return MicroBatchLoader(dataset, items, self._data.num_workers)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:  # noqa: ARG002 - the Trainer's signature
        """Returns AdamW over the trainable parameters. No group is empty, because ZeRO needs that."""
        if self.optimizer is None:
            optim, size = self._step.optim, self._step.expert_parallel_size
            groups = weight_decay_groups(self.model.parameters(), optim.weight_decay)
            if size > 1:
                groups = split_experts(self.model, groups, size)
            groups = [group for group in groups if group["params"]]
            self._weight_decays = [group["weight_decay"] for group in groups]
            self.optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps)
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._start.num_ranks_changed:
            repair_universal_state(self.optimizer, self._weight_decays)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Loads each rank's random state; a changed number of ranks gets new ones, from the seed and the step."""
        if self._start.num_ranks_changed:
            set_seed((self.args.seed + 1_000_003 * self._start.step) % 2**32)
        else:
            super()._load_rng_state(checkpoint)

    # 1 to 3: micro-batches, counts, and reasons to stop

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Takes the step's micro-batches and counts its rows, pairs, tokens and positions over all ranks.

        Raises:
            DecantError: a rank could not make a micro-batch; on every rank.
            DivergedError: the step before diverged; on every rank.
            TrainingInterrupted: a stop signal came to a rank, and a checkpoint is saved; on every rank.
        """
        if self._step.router:
            self._step.router.clear_gradients()
        started = time.monotonic()
        batches: list[Batch] = []
        failure: DecantError | None = None
        try:
            # Fewer, or none, only if a run is continued at its very end.
            batches += itertools.islice(epoch_iterator, num_batches)
        except DecantError as error:
            failure = error
        self._waited_s += time.monotonic() - started
        local = pack_report(
            map(unit_counts, batches),
            self._outcome.pack(self.args.device),
            failed=failure is not None,
            signum=self._stop.shutdown.signum,
            device=device,
        )
        total = self.accelerator.reduce(local, "sum")
        report = StepReport.unpack(total)
        if report.num_failed:
            self._raise_on_every_rank(failure)
        self._stop_if_diverged(report.loss, report.num_bad_gradients)
        if report.stop_signal is not None:
            self._save_and_exit(report.stop_signal)
        self._step_counts = report.counts
        self._since_log.add_counts(report.counts)
        return batches, total[0]

    def _raise_on_every_rank(self, failure: DecantError | None) -> NoReturn:
        """Raises on every rank, so that none waits in a collective for one that failed."""
        reasons = gather_object([None if failure is None else str(failure)])
        raise failure or DataError(next(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason))

    def _save_and_exit(self, signum: Signals) -> NoReturn:
        step = self.state.global_step
        if step > self._saved_step:
            self._save_checkpoint(self.model_wrapped, None)
        # Closes progress bars and metric writers.
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        raise TrainingInterrupted(
            f"{self.args.output_dir}: stopped by {signum.name} after step {step} of {self.state.max_steps}, which is "
            "saved; the same command continues from there",
            signum,
        )

    # 4: forward and backward of each micro-batch

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Runs forward and backward, and keeps the loss on the device until the step is checked for divergence."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._outcome.add_loss(inputs.sample_ids, loss)
        return loss

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs.to(self.args.device)

    def compute_loss(self, model: Any, inputs: Batch, **_: Any) -> Tensor:
        """Returns the micro-batch's share of the step's loss, times the number of ranks, because DeepSpeed averages."""
        terms = self.compute_batch_terms(model, inputs)
        if self._step.router:
            self._step.router.count_batch(inputs)
        self._since_log.add_terms(terms)
        return step_loss(terms, self._step_counts) * self.args.world_size

    def compute_batch_terms(self, model: Any, batch: Batch) -> dict[str, Term]:
        """Runs the model forward and returns the terms of the objective, each a sum over the micro-batch."""
        loss, router = self._step.loss, self._step.router
        with self._step.output.scoring(batch, kept=loss.distillation > 0):
            model(**self._model_inputs(batch))
            logits = self._step.output.read()
        return compute_terms(
            logits,
            batch,
            loss,
            vocab_size=self._step.output.vocab_size,
            router_logits=router.pop_router_logits() if router else (),
            router_top_k=router.top_k if router else 1,
        )

    def _model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Returns the arguments of the model's forward; floats are in the model's dtype."""
        inputs = batch.model_inputs
        positions = rope_position_ids(self.model, inputs)
        floats = {name: value.to(self.model.dtype) for name, value in batch.images.items() if value.is_floating_point()}
        return {**inputs, **floats, **({} if positions is None else {"position_ids": positions})}

    def floating_point_ops(self, inputs: Batch) -> int:  # noqa: ARG002 - the Trainer's signature
        """Returns 0: the Trainer's formula is wrong for images and sparse layers."""
        return 0

    # 5 and 6: gradient norm, divergence

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._outcome.set_gradient_norm(norm)
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Stops before a diverged step is validated or saved."""
        if self.control.should_save or self.control.should_evaluate:
            self._stop_if_diverged(*self.accelerator.reduce(self._outcome.pack(self.args.device), "sum").tolist())
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _stop_if_diverged(self, loss: float, num_bad_gradients: float) -> None:
        """Raises on every rank if the latest step diverged.

        Args:
            loss: sum of the losses of its micro-batches over all ranks.
            num_bad_gradients: number of ranks whose gradient is not finite.

        Raises:
            DivergedError: names the samples; the report is written beside the checkpoints.
        """
        if self._outcome.is_checked:
            return
        losses = self._outcome.pop_losses()
        problem = self._stop.divergence.find_problem(loss / self.args.world_size, finite_gradient=not num_bad_gradients)
        if problem is None:
            return
        rank = self.args.process_index
        gathered = gather_object([RankLoss(rank, m.sample_ids, m.loss.item()) for m in losses])
        diverged = DivergedStep(self.state.global_step, problem, tuple(gathered))
        record = Path(self.args.output_dir) / "broken-step.json"
        if self.args.should_save:
            publish(record, diverged.to_json())
        raise diverged.to_error(record)

    # 7: logs, validation, checkpoints

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, beside the Trainer's own values, the means of all terms since the last log over all ranks.

        Adds tokens_per_s and wait_fraction, the share of the time in which the rank waited for data.
        """
        if "loss" in logs and self._since_log:
            logs |= self._since_log.means(self.accelerator.reduce, self.args.device, counts_are_global=True)
            if self._step.router:
                logs |= self._step.router.metrics(self.accelerator.reduce, self.args.world_size)
            now = time.monotonic()
            elapsed_s = max(now - self._logged_at, 1e-9)
            logs["tokens_per_s"] = self._since_log.counts["tokens"] / elapsed_s
            logs["wait_fraction"] = self._waited_s / elapsed_s
            self._logged_at, self._waited_s = now, 0.0
            self._since_log = TermSums()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Logs and returns the means of all terms over the held-out samples, as eval_<term>; {} without any."""
        if self.eval_dataset is None:
            return {}
        if self._evaluated is not None and self._evaluated[0] == self.state.global_step:
            return self._evaluated[1]
        started = time.monotonic()
        model = self.model_wrapped
        model.eval()
        sums = TermSums()
        with torch.no_grad():
            for batch in MicroBatchLoader(self.eval_dataset, range(self.eval_dataset.num_steps), num_workers=0):
                sums.add_counts(unit_counts(batch))
                sums.add_terms(self.compute_batch_terms(model, batch.to(self.args.device)))
        means = sums.means(self.accelerator.reduce, self.args.device, counts_are_global=False)
        metrics = {f"eval_{name}": mean for name, mean in means.items()}
        # The time of validation is no part of the next line's, whose counts begin before it.
        self._logged_at += time.monotonic() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._evaluated = self.state.global_step, metrics
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes the checkpoint aside, marks it complete, renames it, and only then removes old ones.

        Raises:
            StorageError: it could not be written; earlier checkpoints stay.
        """
        partial = Path(self._get_output_dir(trial))
        written = partial / f"checkpoint-{self.state.global_step}"
        load = None
        if self._step.router:
            load = self._step.router.pop_expert_load(self.accelerator.reduce, self.state.global_step, self._saved_step)
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            if load is not None and self.args.should_save:
                load.write(written, Path(self.args.output_dir))
        except (OSError, RuntimeError, StorageError) as error:
            # torch reports a full disk as a RuntimeError.
            raise StorageError(
                f"{partial.parent}: the checkpoint of step {self.state.global_step} could not be written ({error}); "
                "earlier ones are whole. Free space and run the same command again: it continues"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(written, self.state.global_step, num_ranks=self.args.world_size)
            final = partial.parent / written.name
            shutil.rmtree(final, ignore_errors=True)
            written.rename(final)
            remove_old(partial.parent, self.state.global_step, self._save_settings.num_checkpoints)
            remove_universal(partial.parent)
        self._saved_step = self.state.global_step
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ARG002 - the Trainer's signature
        return str(Path(self.args.output_dir) / "checkpoints" / ".partial")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the student; experts that ranks divide are gathered for it."""
        if self._step.expert_parallel_size == 1:
            super().save_model(output_dir, _internal_call)
            return
        weights = gather_full_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes the student as transformers and vLLM load it, with its tokenizer and image processor."""
        assert output_dir is not None
        save_student(self.model, self._save_settings.assets_from, Path(output_dir), state_dict=state_dict)


def _rank_dataset(
    split: DataSplit, collator: Collator, args: TrainingArguments, accumulation: int
) -> MicroBatchDataset:
    """Returns this rank's micro-batches of a split."""
    return MicroBatchDataset(
        split.source, split.sampler, collator, args.process_index, args.world_size, accumulation=accumulation
    )
