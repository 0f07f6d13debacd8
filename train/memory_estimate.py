"""Estimates the memory of training for the command `plan`: a student's weights, gradients and optimiser state.

Nothing but configurations is read. The formulae per GPU are those of ZeRO (arXiv 1910.02054, sections 3.1 and 5), with
W bytes of weights, G of gradients and O of optimiser state per parameter, P parameters of which Q are trained, N GPUs:

    stage 0    W P + (G + O) Q
    stage 1    W P + G Q + O Q / N
    stage 2    W P + (G + O) Q / N
    stage 3   (W P + (G + O) Q) / N

If E GPUs divide the experts, a GPU does not hold A = (1 - 1 / E) times the experts' parameters, of which B are trained.
Stages 1 and 2 then have P - A instead of P, and stage 1 has G (Q - B) instead of G Q. The terms that are divided by N
stay the same, because ZeRO divides the experts' states by another N / E.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, assert_never, get_args

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from common.console import plain_text
from common.errors import ModelError
from common.estimates import Estimate, EstimateTable, format_value
from train.choices import ParameterGroup, Precision, ZeroStage
from train.config import TRAINABLE, TrainConfig
from train.model.cached_tower import cached_tower_config
from train.model.student import find_model_class, leave_out_tower, parameter_groups, set_trainable, trained_groups
from train.moe.upcycle import is_sparse, upcycle

STAGES: tuple[ZeroStage, ...] = get_args(ZeroStage)

# Bytes per parameter of the teacher, which is frozen and in bfloat16.
TEACHER_BYTES = 2


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes per parameter: W, G and O of the module's docstring."""

    weight: int
    gradient: int
    optimiser: int


# For Adam: with bf16 a float32 master copy and two float32 moments, with fp32 the two moments.
BYTES: dict[Precision, ParameterBytes] = {"bf16": ParameterBytes(2, 2, 12), "fp32": ParameterBytes(4, 4, 8)}


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters: P, Q, A and B of the module's docstring."""

    total: int
    trained: int
    total_elsewhere: int = 0
    trained_elsewhere: int = 0


@dataclass(frozen=True)
class StageMemory:
    """Bytes per GPU under one ZeRO stage on a number of GPUs; `chosen` marks the stage of the configuration.

    `with_teacher` adds the teacher's weights, which every GPU holds whole up to stage 2, and which stage 3 divides.
    `how` is the student's formula with its values.
    """

    stage: int
    num_gpus: int
    num_bytes: float
    with_teacher: float
    how: str
    chosen: bool

    @property
    def ratio(self) -> float:
        """Returns the factor by which loading the teacher would increase the memory."""
        return self.with_teacher / self.num_bytes


@dataclass(frozen=True)
class TrainerEstimate:
    """Memory of training per GPU, without activations."""

    parameters: EstimateTable
    memory: tuple[StageMemory, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields for JSON."""
        memory = [asdict(row) | {"ratio": row.ratio} for row in self.memory]
        return {"parameters": self.parameters.to_dict(), "memory": memory, "notes": list(self.notes)}

    def render(self) -> RenderableType:
        """Returns the parameters and a table of ZeRO stages and numbers of GPUs; the configured stage is bold."""
        table = Table(title="Trainer's memory a GPU", title_justify="left", title_style="bold")
        for name in ("ZeRO", "GPUs", "student", "with teacher", "ratio"):
            table.add_column(name, justify="right")
        table.add_column("arithmetic of the student")
        for row in self.memory:
            numbers = format_value(row.num_bytes, "bytes"), format_value(row.with_teacher, "bytes"), f"{row.ratio:.1f}"
            style = "bold" if row.chosen else ""
            table.add_row(str(row.stage), str(row.num_gpus), *numbers, plain_text(row.how), style=style)
        return Group(self.parameters.render(), table, *(plain_text(f"- {note}") for note in self.notes))


def memory_bytes(stage: int, num_gpus: int, counts: ParameterCounts, precision: Precision) -> float:
    """Returns the bytes per GPU for weights, gradients and optimiser state, by the module's formulae."""
    size = BYTES[precision]
    weights = size.weight * (counts.total / num_gpus if stage >= 3 else counts.total - counts.total_elsewhere)
    gradients = size.gradient * (counts.trained / num_gpus if stage >= 2 else counts.trained - counts.trained_elsewhere)
    optimiser = size.optimiser * counts.trained / (num_gpus if stage >= 1 else 1)
    return weights + gradients + optimiser


def estimate_training_memory(
    student: Path, num_teacher_parameters: int, *, config: TrainConfig | None = None, gpus: Iterable[int] = (1, 2, 4, 8)
) -> TrainerEstimate:
    """Estimates the memory of a stage; without `config`, of dense-to-dense distillation in bf16.

    Raises:
        ModelError: `student` has no configuration, or one that is not a student's; it lacks a parameter group that is
            trained, or cannot be upcycled as `config` says.
        ConfigError: the sparse layers or experts of `config` do not fit the student.
    """
    model = build_on_meta(student, tower=config is None or not config.data.has_features)
    origin = "counted from config.json"
    groups: frozenset[ParameterGroup] = frozenset(TRAINABLE["dense-to-dense"])
    precision: Precision = "bf16"
    stage = "dense-to-dense"
    if config is not None:
        groups, precision, stage = config.groups, config.run.precision, config.stage
        if config.moe is not None and not is_sparse(model):
            with torch.device("meta"):
                model = upcycle(model, config.moe, seed=config.seed)
            origin += f", upcycled to {config.moe.num_experts} experts"
    groups = trained_groups(model, groups, is_default=config is None or config.trainable is None)
    set_trainable(model, groups)
    expert_parallel_size = 1 if config is None else config.run.expert_parallel_size
    counts = _count_parameters(model, expert_parallel_size)
    teacher_bytes = TEACHER_BYTES * num_teacher_parameters
    parameters = EstimateTable(
        f"Student in stage {stage}, {precision}",
        (
            Estimate("parameters", counts.total, origin),
            Estimate("trained", counts.trained, ", ".join(sorted(groups))),
            Estimate("frozen", counts.total - counts.trained, f"{counts.total:,} - {counts.trained:,}"),
            Estimate("teacher's weights", teacher_bytes, f"{TEACHER_BYTES} x {num_teacher_parameters:,}", "bytes"),
        ),
    )
    chosen = None if config is None else config.run.zero_stage
    memory = tuple(
        StageMemory(
            stage=zero_stage,
            num_gpus=num_gpus,
            num_bytes=(num_bytes := memory_bytes(zero_stage, num_gpus, counts, precision)),
            with_teacher=num_bytes + teacher_bytes / (num_gpus if zero_stage == 3 else 1),
            how=_format_formula(zero_stage, num_gpus, counts, BYTES[precision]),
            chosen=zero_stage == chosen,
        )
        # Under stage 0 experts cannot be divided.
        for zero_stage in (STAGES if expert_parallel_size == 1 else STAGES[1:])
        for num_gpus in ([n for n in gpus if n % expert_parallel_size == 0] or [expert_parallel_size])
    )
    return TrainerEstimate(parameters, memory, _explain(precision, expert_parallel_size))


def build_on_meta(path: Path, *, tower: bool = True) -> PreTrainedModel:
    """Builds the model of a student's config.json without weights; `tower=False` leaves out its vision tower.

    Raises:
        ModelError: there is no configuration, or it is not that of a LLaVA or a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        auto_class = AutoModelForImageTextToText if config.model_type == "llava" else find_model_class(config)
        if auto_class is None:
            raise ValueError(f"model type {config.model_type!r}")
        config = config if tower else cached_tower_config(config)
        with torch.device("meta"):
            model: PreTrainedModel = auto_class.from_config(config)
        if not tower:
            leave_out_tower(model)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{path}: its config.json makes no student ({error}); expected a LLaVA or a causal language model"
        ) from error
    return model


def _count_parameters(model: PreTrainedModel, expert_parallel_size: int) -> ParameterCounts:
    """Counts a student's parameters, and those of experts that a GPU does not hold."""
    groups = parameter_groups(model)
    experts = [parameter for name, parameter in model.named_parameters() if "experts" in groups[name]]
    num_expert = sum(parameter.numel() for parameter in experts)
    num_trained_expert = sum(parameter.numel() for parameter in experts if parameter.requires_grad)
    return ParameterCounts(
        total=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        total_elsewhere=num_expert - num_expert // expert_parallel_size,
        trained_elsewhere=num_trained_expert - num_trained_expert // expert_parallel_size,
    )


def _explain(precision: Precision, expert_parallel_size: int) -> tuple[str, ...]:
    """Returns the notes below the tables."""
    size = BYTES[precision]
    states = "float32 master copy and two moments" if precision == "bf16" else "two moments"
    adam = f"{size.optimiser} ({states})"
    notes = [
        f"bytes a parameter: weight {size.weight}, and if trained gradient {size.gradient}, Adam {adam}",
        "with teacher: what loading it beside the student would add, whole on each GPU, split under ZeRO 3",
    ]
    if expert_parallel_size > 1:
        notes.append(
            f"run.expert_parallel_size {expert_parallel_size}: a GPU holds 1 / {expert_parallel_size} of the experts"
        )
    notes.append("not counted: activations, communication buffers; settings of run.deepspeed are not read")
    return tuple(notes)


def _format_formula(stage: ZeroStage, num_gpus: int, counts: ParameterCounts, size: ParameterBytes) -> str:
    """Returns the formula of `memory_bytes` with its values."""
    p, q = f"{counts.total:,}", f"{counts.trained:,}"
    local_p, local_q = f"{counts.total - counts.total_elsewhere:,}", f"{counts.trained - counts.trained_elsewhere:,}"
    match stage:
        case 0:
            return f"{size.weight} x {p} + {size.gradient + size.optimiser} x {q}"
        case 1:
            return f"{size.weight} x {local_p} + {size.gradient} x {local_q} + {size.optimiser} x {q} / {num_gpus}"
        case 2:
            return f"{size.weight} x {local_p} + {size.gradient + size.optimiser} x {q} / {num_gpus}"
        case 3:
            return f"({size.weight} x {p} + {size.gradient + size.optimiser} x {q}) / {num_gpus}"
        case _:
            assert_never(stage)
