"""Configuration of one training stage. One TOML file a stage; configs/llava-mod/ holds the paper's four."""

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator
from upath import UPath

from common.config import StrictModel
from common.errors import ConfigError
from common.storage.files import LocalPath, Location, LocationField

Stage = Literal["init", "dense-to-dense", "dense-to-sparse", "preference", "sft"]
Group = Literal["vision_tower", "adapter", "language_model", "experts", "router"]

# What each stage trains (LLaVA-MoD, arXiv 2408.15881, section 3); the vision tower is frozen in all of them.
TRAINABLE: dict[Stage, tuple[Group, ...]] = {
    "init": ("adapter",),
    "sft": ("adapter", "language_model"),
    "dense-to-dense": ("adapter", "language_model"),
    "dense-to-sparse": ("adapter", "experts", "router"),
    "preference": ("adapter", "experts", "router"),
}


class ModelConfig(StrictModel):
    """The student: a local Hugging Face directory, as `init-student`, `export` or a stage's `final/` left it."""

    path: LocalPath
    chat_template: LocalPath | None = None


class MoEConfig(StrictModel):
    """Sparse upcycling of a dense student at the start of the stage; a sparse one is left as it is.

    `noise` tells the experts apart from the first step on: the standard deviation of Gaussian noise on every copy's
    weights, in standard deviations of the dense weight. With 0 the sparse student starts exactly as the dense one.
    Much less than 0.01 is lost in the rounding of a bf16 stage.
    """

    num_experts: int = Field(4, ge=2)
    top_k: int = Field(2, ge=1)
    layers: Literal["every-second", "first-half", "second-half", "all"] | tuple[int, ...] = "every-second"
    noise: float = Field(0.0, ge=0.0, allow_inf_nan=False)


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str | os.PathLike | UPath) else value


Caches = Annotated[tuple[LocationField, ...], BeforeValidator(_one_or_more)]


class SetConfig(StrictModel):
    """One of several sets to train on: an output of `precompute-logits`, or a dataset file.

    `weight` is the set's share of the samples of every stretch of training, relative to the other sets' weights.
    `image_root` is that of this set alone, and `features` are the caches of its images.
    """

    shards: LocationField | None = None
    dataset: LocationField | None = None
    image_root: LocationField | None = None
    features: Caches = ()
    weight: float | None = Field(None, gt=0.0, allow_inf_nan=False)

    @property
    def location(self) -> Location:
        """The output or the file."""
        found = self.dataset if self.shards is None else self.shards
        assert found is not None
        return found

    @model_validator(mode="after")
    def _one_source(self) -> "SetConfig":
        if (self.shards is None) == (self.dataset is None):
            raise ValueError("give exactly one of shards and dataset for each set")
        return self


class DataConfig(StrictModel):
    """Where samples come from: shards of teacher scores, or a dataset file when no teacher is needed.

    `mix` instead names several of them. An epoch has as many samples as all sets together: without weights each
    sample once; with weights, which all sets or none have, a set below its size goes on in the next epoch where it
    stood, and one above is begun again.
    `validation` is an output or a file like the source; `validation_fraction` instead holds out evenly spread
    samples of each set itself. `max_tokens` counts the student's expanded image tokens.
    `shuffle_window` bounds how far apart on disk the samples of one batch may come from; so many samples are held
    decoded in each worker. `num_workers` processes a rank make batches; with 0 a thread does.
    `features` names one or several outputs of `precompute-features`: images are taken from there as the frozen vision
    tower sees them, and neither it nor they are opened.
    `batching` "packed" puts the samples of a micro-batch end to end into one sequence without padding, across whose
    borders nothing attends; losses are those of "padded". A micro-batch stays `optim.micro_batch_size` samples and is
    not filled to a number of tokens, so that steps are a function of seed and epoch: such a sequence has up to that
    many times `max_tokens` tokens. Without flash-attn its mask takes their square in bytes and attention as much work,
    so that "padded" with `group_by_length` is faster where samples are long.
    `group_by_length` deals each step's samples to micro-batches by length, the longest first, so that little of a
    padded batch is padding, and ranks work on equal lengths at a time. A step keeps its samples and its loss, but for
    what is defined within a micro-batch: the balance loss and kto_pair. Each worker then reads and holds whole windows.
    """

    shards: LocationField | None = None
    dataset: LocationField | None = None
    mix: tuple[SetConfig, ...] = ()
    image_root: LocationField | None = None
    features: Caches = ()
    image_aspect_ratio: Literal["pad", "keep"] = "pad"
    score: Literal["response", "all"] = "response"
    max_tokens: int = Field(2048, ge=8)
    validation: LocationField | None = None
    validation_fraction: float = Field(0.0, ge=0.0, le=0.5)
    shuffle_window: int = Field(8192, ge=1)
    num_workers: int = Field(2, ge=0)
    batching: Literal["padded", "packed"] = "padded"
    group_by_length: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> "DataConfig":
        if sum((self.shards is not None, self.dataset is not None, bool(self.mix))) != 1:
            raise ValueError("give exactly one of shards (with teacher scores), dataset (without) and mix (several)")
        if len({each.shards is None for each in self.mix}) > 1:
            raise ValueError("mix: give shards for every set, or dataset for every set")
        if len({each.weight is None for each in self.mix}) > 1:
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
        """What is trained on, in order; one set where there is no mix."""
        return self.mix or (SetConfig(shards=self.shards, dataset=self.dataset),)

    @property
    def has_features(self) -> bool:
        """Whether images come from feature caches."""
        return bool(self.features) or any(each.features for each in self.mix)

    @property
    def feature_caches(self) -> tuple[tuple[Location | None, tuple[Location, ...]], ...]:
        """(Image root, caches that know the paths below it) of each set in order, then of all others."""
        own = [
            (each.image_root or self.image_root, each.features or (() if each.image_root else self.features))
            for each in self.sets
        ]
        return (*own, (self.image_root, self.features))

    @property
    def has_scores(self) -> bool:
        """Whether the samples come with a teacher's scores."""
        return self.sets[0].shards is not None


class LossConfig(StrictModel):
    """Weights of the terms of the objective, and the form of each.

    `divergence` is that of the distillation term, over the teacher's kept entries and what `tail` makes of the others;
    a `temperature` other than 1 needs tail "renormalise". `tail` absent is "bucket" for best entries of the teacher,
    and "ignore" for entries drawn from its distribution, which take no other, nor another divergence or temperature.
    `balance` spreads tokens over the experts of a sparse student; `router_z` keeps its router logits small, which the
    paper that has it (ST-MoE) weights with 0.001.
    `length_normalised` compares log-probs a token in place of whole responses' sums; "ipo" always does.
    """

    distillation: float = Field(0.0, ge=0.0)
    cross_entropy: float = Field(0.0, ge=0.0)
    balance: float = Field(0.0, ge=0.0)
    router_z: float = Field(0.0, ge=0.0)
    preference: float = Field(0.0, ge=0.0)
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"] = "forward_kl"
    temperature: float = Field(1.0, gt=0.0, allow_inf_nan=False)
    tail: Literal["bucket", "renormalise", "ignore"] | None = None
    preference_type: Literal["sigmoid", "ipo", "hinge", "kto_pair"] = "sigmoid"
    beta: float = Field(0.1, gt=0.0)
    label_smoothing: float = Field(0.0, ge=0.0, lt=0.5)
    length_normalised: bool = False

    @property
    def of_routers(self) -> str | None:
        """The first weight above 0 that a dense student has no use for."""
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


class OptimConfig(StrictModel):
    """AdamW and its schedule. `global_batch_size` is samples a step over all ranks and accumulation steps."""

    learning_rate: float = Field(gt=0.0)
    global_batch_size: int = Field(256, ge=1)
    micro_batch_size: int = Field(8, ge=1)
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0.0, lt=1.0)
    weight_decay: float = Field(0.0, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0.0)
    max_grad_norm: float = Field(1.0, ge=0.0)

    def accumulation_steps(self, num_ranks: int) -> int:
        """Micro-batches that each rank accumulates for a global step.

        Raises:
            ConfigError: the global batch cannot be dealt out evenly.
        """
        at_once = self.micro_batch_size * num_ranks
        if self.global_batch_size % at_once:
            raise ConfigError(
                f"optim.global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.micro_batch_size} x {num_ranks} ranks; change one of them"
            )
        return self.global_batch_size // at_once


class RunConfig(StrictModel):
    """Precision, memory, checkpoints, logs.

    `resume` "auto" continues from the output's newest whole checkpoint; "never" refuses an output that has one.
    `expert_parallel_size` ranks share the experts of a sparse student among them, and send each other the tokens; it
    divides the number of ranks and that of experts.
    `deepspeed` is a DeepSpeed JSON file whose settings are laid over the ones made from this configuration;
    `training_arguments` go to Hugging Face's `TrainingArguments` and may not name what this file sets.
    `report_to` names where metrics go beside `metrics.jsonl`; W&B and trackio are packages of their own.
    A loss that is no number always stops the run; one above `max_loss_ratio` times the median of the 50 steps before
    it does too (a median counts as 0.1 at least; nothing is compared before there are 50). 0 allows any finite loss.
    """

    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 2
    expert_parallel_size: int = Field(1, ge=1)
    activation_checkpointing: bool = True
    save_steps: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    eval_steps: int = Field(500, ge=1)
    log_steps: int = Field(1, ge=1)
    resume: Literal["auto", "never"] = "auto"
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    max_loss_ratio: float = Field(10.0, ge=0.0, allow_inf_nan=False)
    deepspeed: LocalPath | None = None
    training_arguments: dict[str, Any] = {}


class TrainConfig(StrictModel):
    """One stage."""

    stage: Stage
    output: LocalPath
    seed: int = 0
    model: ModelConfig
    moe: MoEConfig | None = None
    data: DataConfig
    loss: LossConfig
    optim: OptimConfig
    run: RunConfig = RunConfig()
    trainable: tuple[Group, ...] | None = None

    @model_validator(mode="after")
    def _stage_is_consistent(self) -> "TrainConfig":
        if self.loss.distillation and not self.data.has_scores:
            raise ValueError("loss.distillation needs data.shards: the teacher's scores come from there")
        if self.loss.preference and not self.data.has_scores:
            raise ValueError("loss.preference needs data.shards of kind dpo: the reference log-probs come from there")
        if (weight := self.loss.of_routers) and self.stage in ("init", "dense-to-dense"):
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
    def groups(self) -> frozenset[str]:
        """Parameter groups that this run trains."""
        return frozenset(TRAINABLE[self.stage] if self.trainable is None else self.trainable)
