"""One training stage: Hugging Face's Trainer on DeepSpeed, with the stream, the objective and whole checkpoints.

    train(config) ── prepare ──> student, plan, collator ── StudentTrainer.train ──> checkpoints, metrics
                                                          └─ save_final ──> output/final, a plain model directory

The overrides are few: where batches come from, what the loss is, what it is divided by, how a checkpoint becomes
visible, and validation.
"""

import itertools
import json
import math
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from common.errors import DataError, DecantError, StorageError
from common.storage.files import publish
from train.config import LossConfig, OptimConfig
from train.data.collator import Batch, Collator
from train.data.loader import MicroBatchDataset, MicroBatchLoader
from train.data.sampling import GlobalBatchSampler
from train.data.sources import ExampleSource
from train.loss.fused_output import FusedOutput
from train.loss.objective import UNITS, Term, compute_terms, step_loss, unit_counts
from train.model.student import save_student
from train.moe.expert_parallel import gather_full_state_dict, split_experts
from train.moe.router_monitor import RouterMonitor
from train.run.checkpoint import mark_complete
from train.run.divergence import DivergedError, DivergenceDetector
from train.run.shutdown import GracefulShutdown, TrainingInterrupted
from train.run.universal_checkpoint import remove_universal

# Samples that a message names.
_MAX_NAMED_SAMPLES = 32


class StudentTrainer(Trainer):
    """Trains a student on the micro-batches of a `GlobalBatchSampler`."""

    optimizer: Any
    control: Any
    # The loss is divided by the counts of the global step here, never by the Trainer.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        loss: LossConfig,
        optim: OptimConfig,
        source: ExampleSource,
        plan: GlobalBatchSampler,
        collator: Collator,
        validation: tuple[ExampleSource, GlobalBatchSampler] | None,
        vocab_size: int,
        router: RouterMonitor | None,
        start_step: int,
        num_workers: int,
        keep_checkpoints: int,
        other_ranks: bool,
        expert_parallel_size: int,
        watch: DivergenceDetector,
        stop: GracefulShutdown,
        assets_from: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        ranks = args.process_index, args.world_size
        held_out = None if validation is None else MicroBatchDataset(*validation, collator, *ranks, accumulation=1)
        super().__init__(model=model, args=args, eval_dataset=held_out, callbacks=list(callbacks))
        self._loss = loss
        self._optim = optim
        self._source = source
        self._plan = plan
        self._collator = collator
        self._vocab_size = vocab_size
        self._router = router
        self._start_step = start_step
        self._num_workers = num_workers
        self._keep_checkpoints = keep_checkpoints
        self._saved_step = start_step
        self._other_ranks = other_ranks
        self._expert_parallel_size = expert_parallel_size
        self._watch = watch
        self._stop = stop
        # Micro-batches of the step that has not been judged yet, and whether its gradient is finite.
        self._unchecked_losses: list[tuple[tuple[str, ...], Tensor]] = []
        self._finite_gradient = True
        self._assets_from = assets_from
        self._output = FusedOutput(model, vocab_size)
        self._step_counts: dict[str, float] = {}
        self._sums: defaultdict[str, Tensor | float] = defaultdict(float)
        self._units: dict[str, str] = {}
        self._logged_at = time.monotonic()
        self._waited_s = 0.0
        # It prints every log as a dictionary; ours go to the progress bar and to files.
        self.remove_callback(PrinterCallback)

    # Batches

    def get_train_dataloader(self) -> MicroBatchLoader:
        """The rank's remaining micro-batches; nothing before the start step is ever decoded."""
        accumulation = self.args.gradient_accumulation_steps
        dataset = MicroBatchDataset(
            self._source, self._plan, self._collator, self.args.process_index, self.args.world_size, accumulation
        )
        items = range(self._start_step * accumulation, self.args.max_steps * accumulation)
        return MicroBatchLoader(dataset, items, self._num_workers)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Collects a step's micro-batches and counts its rows, pairs and tokens over all ranks.

        The same reduction tells all ranks whether the step before went well and whether one of them is to stop.
        """
        if self._router:
            self._router.begin_step()
        started = time.monotonic()
        batches: list[Batch] = []
        failure: DecantError | None = None
        try:
            # Fewer, or none, only where a run is continued at its very end.
            batches += itertools.islice(epoch_iterator, num_batches)
        except DecantError as error:
            failure = error
        self._waited_s += time.monotonic() - started
        counts = [unit_counts(batch) for batch in batches]
        sums = [
            *(sum(c[unit] for c in counts) for unit in UNITS),
            failure is not None,
            self._stop.signum == signal.SIGTERM,
            self._stop.signum == signal.SIGINT,
        ]
        local = torch.tensor(sums, dtype=torch.float64, device=device)
        total = self.accelerator.reduce(torch.cat([local, self._step_state()]), "sum")
        *totals, num_failures, num_terminated, num_interrupted, loss, num_bad_gradients = total.tolist()
        if num_failures:
            self._raise_on_every_rank(failure)
        self._stop_if_diverged(loss, num_bad_gradients)
        if num_terminated or num_interrupted:
            self._save_and_exit(signal.SIGTERM if num_terminated else signal.SIGINT)
        self._step_counts = dict(zip(UNITS, totals, strict=True))
        for unit, count in self._step_counts.items():
            self._sums[unit] += count
        return batches, total[0]

    def _raise_on_every_rank(self, failure: DecantError | None) -> NoReturn:
        """A rank that stopped alone would leave the others waiting for it; so all name what stopped one of them."""
        reasons = gather_object([None if failure is None else str(failure)])
        raise failure or DataError(next(f"rank {n}: {reason}" for n, reason in enumerate(reasons) if reason))

    def _save_and_exit(self, signum: signal.Signals) -> NoReturn:
        step = self.state.global_step
        if step > self._saved_step:
            self._save_checkpoint(self.model_wrapped, None)
        # Bars and metric writers are closed.
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        raise TrainingInterrupted(
            f"{self.args.output_dir}: stopped by {signum.name} after step {step} of {self.state.max_steps}, which is "
            "saved; the same command continues from there",
            signum,
        )

    # The loss of each step

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """Keeps each micro-batch's loss, unread, beside the ids of its samples until the step is judged."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._unchecked_losses.append((inputs.sample_ids, loss))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # DeepSpeed says -1 for a norm that is no number.
        self._finite_gradient = norm is None or (math.isfinite(norm) and norm >= 0)
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """No broken step is validated or saved."""
        if self.control.should_save or self.control.should_evaluate:
            self._stop_if_diverged(*self.accelerator.reduce(self._step_state(), "sum").tolist())
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _step_state(self) -> Tensor:
        """This rank's part of what `_stop_if_diverged` takes, float64 [2]."""
        losses = [loss.double() for _, loss in self._unchecked_losses]
        bad = torch.tensor(float(not self._finite_gradient), dtype=torch.float64, device=self.args.device)
        return torch.stack([sum(losses, torch.zeros_like(bad)), bad])

    def _stop_if_diverged(self, loss: float, num_bad_gradients: float) -> None:
        """Stops every rank if the latest step broke; the arguments are sums over all ranks."""
        if not self._unchecked_losses:
            return
        batches, self._unchecked_losses = self._unchecked_losses, []
        problem = self._watch.judge(loss / self.args.world_size, finite_gradient=not num_bad_gradients)
        if problem is None:
            return
        found = gather_object([(self.args.process_index, list(ids), loss.item()) for ids, loss in batches])
        broken = [ids for _, ids, loss in found if not math.isfinite(loss)] or [ids for _, ids, _ in found]
        ids = [name for micro_batch in broken for name in micro_batch]
        record = Path(self.args.output_dir) / "broken-step.json"
        if self.args.should_save:
            shares = [{"rank": rank, "loss": repr(loss), "sample_ids": names} for rank, names, loss in found]
            content = {"step": self.state.global_step, "problem": problem, "micro_batches": shares}
            publish(record, json.dumps(content, indent=1).encode())
        raise DivergedError(
            f"step {self.state.global_step}: {problem}. Its samples: {', '.join(map(repr, ids[:_MAX_NAMED_SAMPLES]))}"
            + (f" and {len(ids) - _MAX_NAMED_SAMPLES} more" if len(ids) > _MAX_NAMED_SAMPLES else "")
            + f" (all micro-batches: {record}). Nothing of this step was saved. Look at these samples first; lower "
            "optim.learning_rate or leave samples out, which makes it another run, or raise run.max_loss_ratio if the "
            "loss is no surprise: the same command continues from the newest checkpoint"
        )

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not estimated: images and sparse layers make the Trainer's formula wrong."""
        return 0

    # Loss

    def compute_loss(self, model: Any, inputs: Batch, **_: Any) -> Tensor:
        """The micro-batch's share of the step's loss, times the number of ranks that DeepSpeed averages over."""
        terms = self._terms(model, inputs)
        if self._router:
            self._router.count(inputs)
        for name, term in terms.items():
            # Stays on the device: reading it here would make every micro-batch wait.
            self._sums[name] = self._sums[name] + term.total.detach().double()
            self._units[name] = term.unit
        return step_loss(terms, self._step_counts) * self.args.world_size

    def _terms(self, model: Any, batch: Batch) -> dict[str, Term]:
        images = {} if batch.pixel_values is None else {"pixel_values": batch.pixel_values}
        with self._output.scoring(batch, kept=self._loss.distillation > 0):
            output = model(**batch.sequence_inputs, **images)
            logits = self._output.read(output.logits)
        return compute_terms(
            logits,
            batch,
            self._loss,
            vocab_size=self._vocab_size,
            router_logits=self._router.take() if self._router else (),
            router_top_k=self._router.top_k if self._router else 1,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters; vectors are not decayed, and no group is empty (ZeRO needs that)."""
        if self.optimizer is None:
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) < 2]
            matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2]
            groups: list[dict[str, Any]] = [
                {"params": matrices, "weight_decay": self._optim.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
            if self._expert_parallel_size > 1:
                groups = split_experts(self.model, groups, self._expert_parallel_size)
            groups = [group for group in groups if group["params"]]
            self._decays = [group["weight_decay"] for group in groups]
            optim = self._optim
            self.optimizer = torch.optim.AdamW(groups, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps)
        return self.optimizer

    # Logs and validation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each term's mean since the last log, over all ranks, tokens/s and the time waited for data (0 to 1)."""
        if "loss" in logs and self._units:
            logs |= self._means(self._sums, self._units, counted_globally=True)
            if self._router:
                logs |= self._router.metrics(self.accelerator.reduce, self.args.world_size)
            now = time.monotonic()
            elapsed_s = max(now - self._logged_at, 1e-9)
            logs["tokens_per_s"] = float(self._sums["tokens"]) / elapsed_s
            logs["wait_fraction"] = self._waited_s / elapsed_s
            self._logged_at, self._waited_s = now, 0.0
            self._sums.clear()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Means of all terms over the held-out samples, as eval_<term>."""
        if self.eval_dataset is None:
            return {}
        model = self.model_wrapped
        model.eval()
        sums: defaultdict[str, Tensor | float] = defaultdict(float)
        units: dict[str, str] = {}
        with torch.no_grad():
            for batch in MicroBatchLoader(self.eval_dataset, range(self.eval_dataset.num_steps), num_workers=0):
                for unit, count in unit_counts(batch).items():
                    sums[unit] += count
                for name, term in self._terms(model, batch.to(self.args.device)).items():
                    sums[name] = sums[name] + term.total.double()
                    units[name] = term.unit
        metrics = {f"eval_{k}": v for k, v in self._means(sums, units, counted_globally=False).items()}
        self._logged_at = time.monotonic()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _means(
        self, sums: Mapping[str, Tensor | float], units: Mapping[str, str], *, counted_globally: bool
    ) -> dict[str, float]:
        names = sorted(units)
        device = self.args.device
        values = torch.stack(
            [torch.as_tensor(sums[name], dtype=torch.float64, device=device) for name in (*names, *UNITS)]
        )
        if counted_globally:
            totals = torch.cat([self.accelerator.reduce(values[: len(names)], "sum"), values[len(names) :]])
        else:
            totals = self.accelerator.reduce(values, "sum")
        counts = dict(zip(UNITS, totals[len(names) :].tolist(), strict=True))
        return {n: float(t) / max(counts[units[n]], 1) for n, t in zip(names, totals.tolist(), strict=False)}

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(self.args.output_dir) / "checkpoints" / ".partial")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Writes the checkpoint aside, marks it complete, renames it, and only then removes old ones."""
        partial = Path(self._get_output_dir(trial))
        written = partial / f"checkpoint-{self.state.global_step}"
        load = None
        if self._router:
            load = self._router.pop_load(self.accelerator.reduce, self.state.global_step, self._saved_step)
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
            rotate_checkpoints(str(partial.parent), save_total_limit=self._keep_checkpoints, use_mtime=False)
            remove_universal(partial.parent)
        self._saved_step = self.state.global_step
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Mends what DeepSpeed's universal form leaves wrong in the optimiser under ZeRO-3.

        All groups get the weight decay of the first, and all partitions share one step counter, a tensor that each
        of them then counts up.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self._other_ranks:
            return
        for state in self.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
        for group, decay in zip(self.optimizer.param_groups, self._decays, strict=True):
            group["weight_decay"] = decay

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Random states belong to ranks; other ranks draw anew, from the seed and the step."""
        if self._other_ranks:
            set_seed((self.args.seed + 1_000_003 * self._start_step) % 2**32)
        else:
            super()._load_rng_state(checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Divided experts are put together first."""
        if self._expert_parallel_size == 1:
            super().save_model(output_dir, _internal_call)
            return
        weights = gather_full_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes the student as transformers and vLLM load it, with its tokenizer and image processor."""
        assert output_dir is not None
        save_student(self.model, self._assets_from, Path(output_dir), state_dict=state_dict)
