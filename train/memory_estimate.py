"""`plan`, the trainer's half: the memory that a student's weights, gradients and optimiser take, from configurations.

The formulae are those of ZeRO (arXiv 1910.02054, sections 3.1 and 5): W bytes of weights, G of gradients and O of
optimiser state a parameter, P parameters of which Q are trained, N GPUs.

    stage 0    W P + (G + O) Q
    stage 1    W P + G Q + O Q / N
    stage 2    W P + (G + O) Q / N
    stage 3   (W P + (G + O) Q) / N

Where E GPUs share the experts, a GPU lacks A = (1 - 1 / E) of the experts' parameters, B of the trained ones': stages 1
and 2 take P - A for P, and stage 1 takes Q - B for the Q beside G. What is divided by N stays the same, since experts
are divided by N / E once more.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from common.errors import ModelError
from common.estimates import Estimate, EstimateTable, format_value
from train.config import TRAINABLE, TrainConfig
from train.model.cached_tower import cached_tower_config
from train.model.student import groups_of, is_multimodal, set_trainable
from train.moe.upcycle import is_sparse, upcycle

Precision = Literal["bf16", "fp32"]

STAGES = (0, 1, 2, 3)

TEACHER_BYTES = 2


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes that the state of one parameter takes: W, G and O of the module's docstring."""

    weight: int
    gradient: int
    optimiser: int


# Adam: under bf16 a float32 master copy and two float32 moments, in float32 the two moments.
BYTES: dict[Precision, ParameterBytes] = {"bf16": ParameterBytes(2, 2, 12), "fp32": ParameterBytes(4, 4, 8)}


@dataclass(frozen=True)
class StageMemory:
    """One ZeRO stage on a number of GPUs, in bytes a GPU; `chosen` marks the stage that the configuration sets.

    `with_teacher` adds the teacher's weights, whole on every GPU up to stage 2 and split in stage 3.
    """

    stage: int
    num_gpus: int
    num_bytes: float
    with_teacher: float
    how: str
    chosen: bool

    @property
    def ratio(self) -> float:
        """How many times the memory the teacher's presence would have taken."""
        return self.with_teacher / self.num_bytes


@dataclass(frozen=True)
class TrainerEstimate:
    """What training takes a GPU, beside activations."""

    parameters: EstimateTable
    memory: tuple[StageMemory, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"memory": [asdict(row) | {"ratio": row.ratio} for row in self.memory]}

    def render(self) -> RenderableType:
        """The parameters, and a table of ZeRO stages and numbers of GPUs; the configured stage is bold."""
        table = Table(title="Trainer's memory a GPU", title_justify="left", title_style="bold")
        for name in ("ZeRO", "GPUs", "student", "with teacher", "ratio"):
            table.add_column(name, justify="right")
        table.add_column("arithmetic of the student")
        for row in self.memory:
            numbers = format_value(row.num_bytes, "bytes"), format_value(row.with_teacher, "bytes"), f"{row.ratio:.1f}"
            style = "bold" if row.chosen else ""
            table.add_row(str(row.stage), str(row.num_gpus), *numbers, Text(row.how), style=style)
        return Group(self.parameters.render(), table, *(Text(f"- {note}") for note in self.notes))


def memory_bytes(
    stage: int,
    num_gpus: int,
    num_parameters: int,
    num_trained: int,
    precision: Precision,
    elsewhere: tuple[int, int] = (0, 0),
) -> float:
    """Bytes a GPU for weights, gradients and optimiser, by the formulae above; `elsewhere` is A and B."""
    each = BYTES[precision]
    weights = each.weight * (num_parameters / num_gpus if stage >= 3 else num_parameters - elsewhere[0])
    gradients = each.gradient * (num_trained / num_gpus if stage >= 2 else num_trained - elsewhere[1])
    optimiser = each.optimiser * num_trained / (num_gpus if stage >= 1 else 1)
    return weights + gradients + optimiser


def estimate_training_memory(
    student: Path, num_teacher_parameters: int, *, config: TrainConfig | None = None, gpus: Iterable[int] = (1, 2, 4, 8)
) -> TrainerEstimate:
    """What a stage takes; without `config`, dense-to-dense distillation in bf16.

    Raises:
        ModelError: no configuration in `student`, or one that transformers builds no student from; a group that it
            does not have, or a dense student that cannot be upcycled as `config` says.
        ConfigError: the sparse layers or experts that `config` wants do not fit the student.
    """
    model = student_on_meta(student, tower=config is None or not config.data.has_features)
    counted = "counted from config.json"
    groups: frozenset[str] = frozenset(TRAINABLE["dense-to-dense"])
    if not is_multimodal(model):
        groups -= {"adapter"}
    precision: Precision = "bf16"
    stage = "dense-to-dense"
    if config is not None:
        groups, precision, stage = config.groups, config.run.precision, config.stage
        if config.moe is not None and not is_sparse(model):
            with torch.device("meta"):
                model = upcycle(model, config.moe, seed=config.seed)
            counted += f", upcycled to {config.moe.num_experts} experts"
    num_trained = set_trainable(model, groups)
    size = 1 if config is None else config.run.expert_parallel_size
    experts = [parameter for name, parameter in model.named_parameters() if "experts" in groups_of(name)]
    num_expert_parameters = sum(parameter.numel() for parameter in experts)
    num_trained_of_experts = sum(parameter.numel() for parameter in experts if parameter.requires_grad)
    elsewhere = (
        num_expert_parameters - num_expert_parameters // size,
        num_trained_of_experts - num_trained_of_experts // size,
    )
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    each = BYTES[precision]
    teacher = TEACHER_BYTES * num_teacher_parameters
    parameters = EstimateTable(
        f"Student in stage {stage}, {precision}",
        (
            Estimate("parameters", num_parameters, counted),
            Estimate("trained", num_trained, ", ".join(sorted(groups))),
            Estimate("frozen", num_parameters - num_trained, f"{num_parameters:,} - {num_trained:,}"),
            Estimate("teacher's weights", teacher, f"{TEACHER_BYTES} x {num_teacher_parameters:,}", "bytes"),
        ),
    )
    chosen = None if config is None else config.run.zero_stage
    memory = tuple(
        StageMemory(
            stage=zero,
            num_gpus=num_gpus,
            num_bytes=(own := memory_bytes(zero, num_gpus, num_parameters, num_trained, precision, elsewhere)),
            with_teacher=own + teacher / (num_gpus if zero == 3 else 1),
            how=_arithmetic(zero, num_gpus, num_parameters, num_trained, each, elsewhere),
            chosen=zero == chosen,
        )
        # Experts are not divided under stage 0.
        for zero in (STAGES if size == 1 else STAGES[1:])
        for num_gpus in ([n for n in gpus if n % size == 0] or [size])
    )
    notes = (
        f"bytes a parameter: weight {each.weight}, and if trained gradient {each.gradient}, Adam {each.optimiser} "
        + ("(float32 master copy and two moments)" if precision == "bf16" else "(two moments)"),
        "with teacher: what loading it beside the student would add, whole on each GPU, split under ZeRO 3",
        *([f"run.expert_parallel_size {size}: a GPU holds 1 / {size} of the experts"] if size > 1 else []),
        "not counted: activations, communication buffers; settings of run.deepspeed are not read",
    )
    return TrainerEstimate(parameters, memory, notes)


def student_on_meta(path: Path, *, tower: bool = True) -> PreTrainedModel:
    """The model that a student's config.json describes, without weights, and perhaps without its vision tower.

    Raises:
        ModelError: no configuration there, or not that of a LLaVA or a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        auto_class: Any = AutoModelForImageTextToText if config.model_type == "llava" else AutoModelForCausalLM
        config = config if tower else cached_tower_config(config)
        with torch.device("meta"):
            model: PreTrainedModel = auto_class.from_config(config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{path}: its config.json makes no student ({error}); expected a LLaVA or a causal language model"
        ) from error
    return model


def _arithmetic(
    stage: int, num_gpus: int, num_parameters: int, num_trained: int, each: ParameterBytes, elsewhere: tuple[int, int]
) -> str:
    """The formula of `memory_bytes` with its values."""
    p, q = f"{num_parameters:,}", f"{num_trained:,}"
    held_p, held_q = f"{num_parameters - elsewhere[0]:,}", f"{num_trained - elsewhere[1]:,}"
    match stage:
        case 0:
            return f"{each.weight} x {p} + {each.gradient + each.optimiser} x {q}"
        case 1:
            return f"{each.weight} x {held_p} + {each.gradient} x {held_q} + {each.optimiser} x {q} / {num_gpus}"
        case 2:
            return f"{each.weight} x {held_p} + {each.gradient + each.optimiser} x {q} / {num_gpus}"
        case _:
            return f"({each.weight} x {p} + {each.gradient + each.optimiser} x {q}) / {num_gpus}"
