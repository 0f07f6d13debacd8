"""One training stage: Hugging Face's Trainer on DeepSpeed, with the stream, the objective and whole checkpoints.

    train(config) ── prepare ──> student, plan, collator ── StudentTrainer.train ──> checkpoints, metrics
                                                          └─ save_final ──> output/final, a plain model directory

The overrides are few: where batches come from, what the loss is, what it is divided by, how a checkpoint becomes
visible, and validation.
"""

import itertools
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from common.errors import ConfigError, DataError, DecantError, StorageError
from train.batch import Batch, Collator
from train.checkpoint import mark_complete
from train.config import LossConfig, OptimConfig
from train.loader import Loader, MicroBatches
from train.moe import RouterLogits
from train.objective import UNITS, Term, compute_terms, step_loss, unit_counts
from train.order import StepPlan
from train.stream import Source
from train.student import save_student, text_config


class RowSelector:
    """Makes the output layer see the scored rows alone: [B, T, H] becomes [1, R, H] before the product with V.

    A hook, so that the model stays the vanilla class and ZeRO-3 gathers the layer's weights as always.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.rows: Tensor | None = None
        model.get_output_embeddings().register_forward_pre_hook(self._select)

    def _select(self, _module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self.rows is None:
            return None
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[self.rows].unsqueeze(0),)


class StudentTrainer(Trainer):
    """Trains a student on the micro-batches of a `StepPlan`."""

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
        source: Source,
        plan: StepPlan,
        collator: Collator,
        validation: tuple[Source, StepPlan] | None,
        vocab_size: int,
        router_logits: RouterLogits | None,
        start_step: int,
        num_workers: int,
        keep_checkpoints: int,
        assets_from: Path,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        ranks = args.process_index, args.world_size
        held_out = None if validation is None else MicroBatches(*validation, collator, *ranks, accumulation=1)
        super().__init__(model=model, args=args, eval_dataset=held_out, callbacks=list(callbacks))
        self._loss = loss
        self._optim = optim
        self._source = source
        self._plan = plan
        self._collator = collator
        self._vocab_size = vocab_size
        self._router_logits = router_logits
        self._router_top_k = getattr(text_config(model), "num_experts_per_tok", 1)
        self._start_step = start_step
        self._num_workers = num_workers
        self._keep_checkpoints = keep_checkpoints
        self._assets_from = assets_from
        self._selector = RowSelector(model)
        self._step_counts: dict[str, float] = {}
        self._sums: defaultdict[str, Tensor | float] = defaultdict(float)
        self._units: dict[str, str] = {}
        self._logged_at = time.monotonic()
        self._waited_s = 0.0
        # It prints every log as a dictionary; ours go to the progress bar and to files.
        self.remove_callback(PrinterCallback)

    # Batches

    def get_train_dataloader(self) -> Loader:
        """The rank's remaining micro-batches; nothing before the start step is ever decoded."""
        accumulation = self.args.gradient_accumulation_steps
        dataset = MicroBatches(
            self._source, self._plan, self._collator, self.args.process_index, self.args.world_size, accumulation
        )
        items = range(self._start_step * accumulation, self.args.max_steps * accumulation)
        return Loader(dataset, items, self._num_workers)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor]:
        """Collects a step's micro-batches and counts its rows, pairs and tokens over all ranks."""
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
        sums = [*(sum(c[unit] for c in counts) for unit in UNITS), failure is not None]
        local = torch.tensor(sums, dtype=torch.float64, device=device)
        total = self.accelerator.reduce(local, "sum")
        *totals, num_failures = total.tolist()
        if num_failures:
            self._stop_on_every_rank(failure)
        self._step_counts = dict(zip(UNITS, totals, strict=True))
        for unit, count in self._step_counts.items():
            self._sums[unit] += count
        return batches, total[0]

    def _stop_on_every_rank(self, failure: DecantError | None) -> NoReturn:
        """A rank that stopped alone would leave the others waiting for it; so all name what stopped one of them."""
        reasons = gather_object([None if failure is None else str(failure)])
        raise failure or DataError(next(f"rank {n}: {reason}" for n, reason in enumerate(reasons) if reason))

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Batch) -> int:
        """Not estimated: images and sparse layers make the Trainer's formula wrong."""
        return 0

    # Loss

    def compute_loss(self, model: Any, inputs: Batch, **_: Any) -> Tensor:
        """The micro-batch's share of the step's loss, times the number of ranks that DeepSpeed averages over."""
        terms = self._terms(model, inputs)
        for name, term in terms.items():
            # Stays on the device: reading it here would make every micro-batch wait.
            self._sums[name] = self._sums[name] + term.total.detach().double()
            self._units[name] = term.unit
        return step_loss(terms, self._step_counts) * self.args.world_size

    def _terms(self, model: Any, batch: Batch) -> dict[str, Term]:
        self._selector.rows = batch.rows
        images = {} if batch.pixel_values is None else {"pixel_values": batch.pixel_values}
        try:
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **images)
        finally:
            self._selector.rows = None
        return compute_terms(
            output.logits[0],
            batch,
            self._loss,
            vocab_size=self._vocab_size,
            router_logits=self._router_logits.take() if self._router_logits else (),
            router_top_k=self._router_top_k,
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters; vectors are not decayed, and no group is empty (ZeRO needs that)."""
        if self.optimizer is None:
            trainable = [p for p in self.model.parameters() if p.requires_grad]
            vectors = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) < 2]
            matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) >= 2]
            groups = [
                {"params": matrices, "weight_decay": self._optim.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ]
            self.optimizer = torch.optim.AdamW(
                [group for group in groups if group["params"]], lr=self._optim.learning_rate, betas=self._optim.betas
            )
        return self.optimizer

    # Logs and validation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each term's mean since the last log, over all ranks, tokens/s and the time waited for data (0 to 1)."""
        if "loss" in logs and self._units:
            logs |= self._means(self._sums, self._units, counted_globally=True)
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
            for batch in Loader(self.eval_dataset, range(self.eval_dataset.num_steps), num_workers=0):
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
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, StorageError) as error:
            # torch reports a full disk as a RuntimeError.
            raise StorageError(
                f"{partial.parent}: the checkpoint of step {self.state.global_step} could not be written ({error}); "
                "earlier ones are whole. Free space and run the same command again: it continues"
            ) from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            written = partial / f"checkpoint-{self.state.global_step}"
            mark_complete(written, self.state.global_step)
            final = partial.parent / written.name
            shutil.rmtree(final, ignore_errors=True)
            written.rename(final)
            rotate_checkpoints(str(partial.parent), save_total_limit=self._keep_checkpoints, use_mtime=False)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Writes the student as transformers and vLLM load it, with its tokenizer and image processor."""
        assert output_dir is not None
        save_student(self.model, self._assets_from, Path(output_dir), state_dict=state_dict)


def accumulation_steps(optim: OptimConfig, num_ranks: int) -> int:
    """Micro-batches that each rank accumulates for a global step.

    Raises:
        ConfigError: the global batch cannot be dealt out evenly.
    """
    at_once = optim.micro_batch_size * num_ranks
    if optim.global_batch_size % at_once:
        raise ConfigError(
            f"optim.global_batch_size {optim.global_batch_size} is not a multiple of micro_batch_size "
            f"{optim.micro_batch_size} x {num_ranks} ranks; change one of them"
        )
    return optim.global_batch_size // at_once
