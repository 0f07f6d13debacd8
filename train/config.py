"""Configuration of one training stage, read from one TOML file; configs/llava-mod/ holds the paper's four."""

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, JsonValue, model_validator
from upath import UPath

from common.config import FROM_LIST, NOT_EMPTY_IF_WRITTEN, WHOLE_NUMBER, IsoDate, Seed, StrictModel
from common.data.chat_encoding import ScoredTokens
from common.data.images import AspectRatio, ImageRoot, image_root_of
from common.data.sample_ids import IdPolicy
from common.data.samples import Kind
from common.errors import ConfigError
from common.shards.manifest import ShardCheck
from common.storage.files import NOT_HERE, LocalPath, Location, LocationField
from train.choices import (
    Divergence,
    ParameterGroup,
    Precision,
    PreferenceLossType,
    SparsePattern,
    Stage,
    Tail,
    ZeroStage,
)

# Parameter groups that each stage trains (LLaVA-MoD, arXiv 2408.15881, section 3). The vision tower is in none of them.
TRAINABLE: dict[Stage, tuple[ParameterGroup, ...]] = {
    "init": ("adapter",),
    "sft": ("adapter", "language_model"),
    "dense-to-dense": ("adapter", "language_model"),
    "dense-to-sparse": ("adapter", "experts", "router"),
    "preference": ("adapter", "experts", "router"),
}


class ModelConfig(StrictModel):
    """The student: a local Hugging Face directory, made by `init-student`, by `export`, or as `final/` of a stage.

    `chat_template_date` is shown by a chat template that shows the date; absent, with shards that of the capture,
    otherwise the day on which the run was begun.
    """

    path: LocalPath
    chat_template: LocalPath | None = None
    chat_template_date: IsoDate | None = None


class MoEConfig(StrictModel):
    """Sparse upcycling of a dense student at the start of the stage; a sparse student is not changed.

    `noise` makes the experts differ from the first step on. It is the standard deviation of Gaussian noise on the
    weights of every copy, in standard deviations of the dense weight. With 0 the sparse student starts exactly as the
    dense one. A value far below 0.01 is lost in the rounding of a bf16 stage.
    """

    num_experts: int = Field(4, ge=2)
    top_k: int = Field(2, ge=1)
    layers: SparsePattern | Annotated[tuple[int, ...], FROM_LIST, Field(min_length=1)] = "every-second"
    noise: float = Field(0.0, ge=0.0)

    @model_validator(mode="after")
    def _check_top_k(self) -> "MoEConfig":
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k = {self.top_k} exceeds num_experts = {self.num_experts}; lower top_k or raise num_experts"
            )
        return self


def _wrap_single_path(value: Any) -> Any:
    return [value] if isinstance(value, str | os.PathLike | UPath) else value


Caches = Annotated[tuple[LocationField, ...], FROM_LIST, NOT_EMPTY_IF_WRITTEN, BeforeValidator(_wrap_single_path)]


class SetConfig(StrictModel):
    """One of several training sets: an output of `precompute-logits`, or a dataset file.

    `weight` is the set's share of the samples, relative to the weights of the other sets; it holds throughout training.
    `image_root` and `features`, the caches of its images, apply to this set alone.
    """

    shards: LocationField | None = None
    dataset: LocationField | None = None
    image_root: LocationField | None = None
    features: Caches = ()
    weight: float | None = Field(None, gt=0.0)

    @property
    def location(self) -> Location:
        """Returns the address of the output or of the file."""
        location = self.dataset if self.shards is None else self.shards
        assert location is not None
        return location

    @model_validator(mode="after")
    def _one_source(self) -> "SetConfig":
        if (self.shards is None) == (self.dataset is None):
            raise ValueError("give exactly one of shards and dataset for each set")
        return self


class DataConfig(StrictModel):
    """Source of the samples: shards of teacher scores, or a dataset file if no teacher is needed.

    `mix` names several sets instead of one. An epoch has as many samples as all sets together. Without weights it has
    each sample once. Weights are given to all sets or to none. With weights, a set whose share is below its size
    continues in the next epoch where it stopped; a set whose share is above its size starts again within the epoch.
    `validation` is an output or a file of the same kind as the source. `validation_fraction` holds out evenly spread
    samples of each set instead, at least one. `max_tokens` counts the student's expanded image tokens.
    `shuffle_window` limits how far apart on disk the samples of one batch may be; each worker keeps that many samples
    decoded. Each rank has `num_workers` processes that make batches; with 0 a thread makes them.
    `features` names one or more outputs of `precompute-features`. The stored outputs of the frozen vision tower are
    then used, and neither the tower nor the images are loaded.
    `batching` "packed" puts the samples of a micro-batch end to end into one sequence without padding. No sample
    attends to another, and losses equal those of "padded". A micro-batch still has `optim.micro_batch_size` samples and
    is not filled to a number of tokens, so that steps depend on seed and epoch alone; its sequence has at most
    `optim.micro_batch_size` times `max_tokens` tokens. Without flash-attn the attention mask takes the square of the
    number of tokens in bytes, and attention does as much work, so "padded" with `group_by_length` is faster for long
    samples.
    `group_by_length` deals the samples of each step to micro-batches by length, the longest first. Batches then have
    little padding, and ranks process similar lengths at the same time. A step keeps its samples and its loss, except
    for losses that are defined within a micro-batch: the balance loss and kto_pair. Each worker then reads and keeps
    whole windows.
    Images are opened below their image root alone; with `follow_symlinks` a symbolic link there may lead anywhere.
    With `ids` "strict" every sample of a dataset file must have a unique `id`.
    With `preflight` every sample is looked at before the first step: if its template, its length and its images fit
    this student. `on_bad_sample` "skip" leaves out those that do not; the run fails if they are a larger share of a set
    of samples than `max_skipped`.
    `check` says how a shard is compared with its receipt before it is read: "sha256" reads all of its bytes once in
    each process that reads it, "size" trusts a shard that has the right size.
    """

    shards: LocationField | None = None
    dataset: LocationField | None = None
    mix: Annotated[tuple[SetConfig, ...], FROM_LIST, NOT_EMPTY_IF_WRITTEN] = ()
    image_root: LocationField | None = None
    follow_symlinks: bool = False
    features: Caches = ()
    image_aspect_ratio: AspectRatio | None = None
    score: ScoredTokens = "response"
    ids: IdPolicy = "any"
    preflight: bool = True
    on_bad_sample: Literal["stop", "skip"] = "stop"
    max_skipped: float = Field(0.05, ge=0.0, le=1.0)
    max_tokens: int = Field(2048, ge=8)
    validation: LocationField | None = None
    validation_fraction: float = Field(0.0, ge=0.0, le=0.5)
    shuffle_window: int = Field(8192, ge=1)
    num_workers: int = Field(2, ge=0)
    batching: Literal["padded", "packed"] = "padded"
    group_by_length: bool = False
    check: ShardCheck = "sha256"

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if sum((self.shards is not None, self.dataset is not None, bool(self.mix))) != 1:
            raise ValueError("give exactly one of shards (with teacher scores), dataset (without) and mix (several)")
        if len({member.shards is None for member in self.mix}) > 1:
            raise ValueError("mix: give shards for every set, or dataset for every set")
        if len({member.weight is None for member in self.mix}) > 1:
            raise ValueError("mix: give every set a weight, or none; without, each sample is seen once an epoch")
        if self.validation is not None and self.validation_fraction:
            raise ValueError("give validation or validation_fraction, not both")
        return self

    @model_validator(mode="after")
    def _every_image_has_features(self) -> "DataConfig":
        if not self.has_features:
            return self
        for number, (_, caches) in enumerate(self.feature_caches, 1):
            if not caches and number <= len(self.sets):
                raise ValueError(
                    f"set {number} has no features: data.features is for images below data.image_root; name the "
                    "caches of its images in features of the set itself"
                )
            if not caches and self.validation is not None:
                raise ValueError("validation has no features: its images are looked for in data.features")
        return self

    @property
    def sets(self) -> tuple[SetConfig, ...]:
        """Returns the training sets in order; a single one without `mix`."""
        return self.mix or (SetConfig(shards=self.shards, dataset=self.dataset),)

    @property
    def has_features(self) -> bool:
        """Returns True if images come from feature caches."""
        return bool(self.features) or any(member.features for member in self.mix)

    @property
    def images_below(self) -> tuple[ImageRoot | None, ...]:
        """Returns where the images of each set are opened, None for one without a root of its own; then all others."""
        roots = [*(member.image_root for member in self.sets), self.image_root]
        return tuple(image_root_of(root, self.follow_symlinks) for root in roots)

    @property
    def feature_caches(self) -> tuple[tuple[ImageRoot | None, tuple[Location, ...]], ...]:
        """Returns (image root, caches of the images below it) of each set in order, then of all other images."""
        *roots, common_root = self.images_below
        caches_of_sets = [
            (root or common_root, member.features or (() if member.image_root else self.features))
            for root, member in zip(roots, self.sets, strict=True)
        ]
        return (*caches_of_sets, (common_root, self.features))

    @property
    def has_scores(self) -> bool:
        """Returns True if the samples come with a teacher's scores."""
        return self.sets[0].shards is not None


class LossConfig(StrictModel):
    """Weights of the terms of the objective, and their forms.

    `divergence` is computed over the teacher's kept entries, and `tail` says how its other entries count. A
    `temperature` other than 1 needs tail "renormalise". The default tail is "bucket" for the best entries of the
    teacher, and "ignore" for entries drawn from its distribution. Drawn entries allow no other tail, no other
    divergence than "forward_kl" and no other temperature than 1.
    `balance` spreads tokens over the experts of a sparse student. `router_z` keeps its router logits small; the paper
    that introduced it (ST-MoE) weights it with 0.001.
    `length_normalised` compares mean log-probs per token instead of sums over responses; "ipo" always does.
    """

    distillation: float = Field(0.0, ge=0.0)
    cross_entropy: float = Field(0.0, ge=0.0)
    balance: float = Field(0.0, ge=0.0)
    router_z: float = Field(0.0, ge=0.0)
    preference: float = Field(0.0, ge=0.0)
    divergence: Divergence = "forward_kl"
    temperature: float = Field(1.0, gt=0.0)
    tail: Tail | None = None
    preference_type: PreferenceLossType = "sigmoid"
    beta: float = Field(0.1, gt=0.0)
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    length_normalised: bool = False

    @property
    def sample_kind(self) -> Kind:
        """Returns the kind of samples that the objective needs: pairs for a preference loss, else conversations."""
        return "dpo" if self.preference else "kd"

    @property
    def router_term(self) -> str | None:
        """Returns the first term with a weight that only a sparse student has, or None."""
        return next((name for name in ("balance", "router_z") if getattr(self, name)), None)

    @model_validator(mode="after")
    def _something_to_optimise(self) -> "LossConfig":
        if not (self.distillation or self.cross_entropy or self.preference):
            raise ValueError("every weight is 0; set distillation, cross_entropy or preference")
        if self.preference and (self.distillation or self.cross_entropy):
            raise ValueError("preference needs pairs, distillation and cross_entropy need conversations; set one kind")
        if self.temperature != 1.0 and self.tail != "renormalise":
            raise ValueError(
                f"temperature {self.temperature}: how much mass the teacher has outside its kept entries is known at "
                'temperature 1 alone; add tail = "renormalise", which compares the kept entries (with top_k = "all" '
                "that is everything), or leave temperature at 1"
            )
        if self.divergence != "forward_kl" and self.tail == "ignore":
            raise ValueError(
                f'divergence "{self.divergence}" with tail "ignore", which is defined for forward_kl alone; '
                'use tail = "bucket" or "renormalise"'
            )
        if self.label_smoothing and self.preference_type != "sigmoid":
            raise ValueError(
                f'label_smoothing is for preference_type "sigmoid", found "{self.preference_type}"; '
                "set label_smoothing = 0 or the other type"
            )
        return self


_Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimConfig(StrictModel):
    """AdamW and its schedule. `global_batch_size` counts the samples of a step over all ranks and micro-batches."""

    learning_rate: float = Field(gt=0.0)
    global_batch_size: int = Field(256, ge=1)
    micro_batch_size: int = Field(8, ge=1)
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0.0, lt=1.0)
    weight_decay: float = Field(0.0, ge=0.0)
    betas: Annotated[tuple[_Beta, _Beta], FROM_LIST] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0.0)
    max_grad_norm: float = Field(1.0, ge=0.0)

    def accumulation_steps(self, num_ranks: int) -> int:
        """Returns the number of micro-batches that each rank accumulates for a global step.

        Raises:
            ConfigError: the global batch cannot be divided evenly.
        """
        num_parallel_samples = self.micro_batch_size * num_ranks
        if self.global_batch_size % num_parallel_samples:
            raise ConfigError(
                f"optim.global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {num_ranks} ranks; change one of them"
            )
        return self.global_batch_size // num_parallel_samples


class RunConfig(StrictModel):
    """Precision, memory, checkpoints, logs.

    `resume` "auto" continues from the newest complete checkpoint of the output; "never" refuses an output that has one.
    `expert_parallel_size` ranks divide the experts of a sparse student among themselves and send each other the tokens.
    It must divide the number of ranks and the number of experts.
    `deepspeed` is a DeepSpeed JSON file whose settings override the ones made from this configuration.
    `training_arguments` are passed to Hugging Face's `TrainingArguments` and may not name settings of this file.
    `report_to` names where metrics go in addition to `metrics.jsonl`; W&B and trackio have to be installed separately.
    A loss that is not finite always stops the run. A loss above `max_loss_ratio` times the median of the 50 steps
    before it stops the run too. The median counts as at least 0.1, and a start compares nothing in its first 50 steps.
    With 0 every finite loss is allowed.
    """

    precision: Precision = "bf16"
    zero_stage: Annotated[ZeroStage, WHOLE_NUMBER] = 2
    expert_parallel_size: int = Field(1, ge=1)
    activation_checkpointing: bool = True
    save_steps: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    eval_steps: int = Field(500, ge=1)
    log_steps: int = Field(1, ge=1)
    resume: Literal["auto", "never"] = "auto"
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], FROM_LIST] = ("tensorboard",)
    max_loss_ratio: float = Field(10.0, ge=0.0)
    deepspeed: LocalPath | None = None
    training_arguments: dict[str, JsonValue] = {}


class TrainConfig(StrictModel):
    """One stage: the student, its data, the objective, the optimiser and the run.

    `trainable` replaces the parameter groups that the stage trains by default.
    """

    stage: Stage
    output: Annotated[LocalPath, NOT_HERE]
    seed: Seed = 0
    model: ModelConfig
    moe: MoEConfig | None = None
    data: DataConfig
    loss: LossConfig
    optim: OptimConfig
    run: RunConfig = RunConfig()
    trainable: Annotated[tuple[ParameterGroup, ...], FROM_LIST, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _stage_is_consistent(self) -> "TrainConfig":
        if self.loss.distillation and not self.data.has_scores:
            raise ValueError("loss.distillation needs data.shards: the teacher's scores come from there")
        if self.loss.preference and not self.data.has_scores:
            raise ValueError("loss.preference needs data.shards of kind dpo: the reference log-probs come from there")
        if (weight := self.loss.router_term) and self.stage in ("init", "dense-to-dense"):
            raise ValueError(
                f"loss.{weight} is for sparse students; stage {self.stage} trains a dense one, so set loss.{weight} = 0"
            )
        if self.data.has_features and "vision_tower" in self.groups:
            raise ValueError(
                "trainable: the vision tower cannot be trained from data.features, what it gave once; "
                "remove vision_tower from trainable, or data.features"
            )
        return self

    @property
    def groups(self) -> frozenset[ParameterGroup]:
        """Returns the parameter groups that this run trains."""
        return frozenset(TRAINABLE[self.stage] if self.trainable is None else self.trainable)
