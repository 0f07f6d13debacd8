"""Configuration of `precompute-logits`: one TOML file a run."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, PositiveInt, field_validator, model_validator

from common.config import IsoDate, StrictModel
from common.data.chat_encoding import ScoredTokens
from common.data.images import AspectRatio, ImageRoot, image_root_of
from common.data.sample_ids import IdPolicy
from common.data.samples import Kind
from common.shards.quantization import Precision
from common.shards.scores import MAX_DRAWS, MAX_VOCAB_SIZE
from common.storage.files import NOT_HERE, LocalPath, LocationField

EngineDtype = Literal["bfloat16", "float16", "float32"]

CaptureMode = Literal["auto", "in-engine", "stock"]

DEFAULT_TOP_K: dict[str, int] = {"kd": 64, "dpo": 0}

# Options of vLLM that this program sets, because scores depend on them or other settings must agree with them.
_RESERVED_OPTIONS = frozenset(
    {
        "model",
        "tokenizer",
        "skip_tokenizer_init",
        "dtype",
        "seed",
        "load_format",
        "max_model_len",
        "max_logprobs",
        "logprobs_mode",
        "enable_prefix_caching",
        "limit_mm_per_prompt",
        "mm_processor_cache_gb",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enforce_eager",
    }
)


class EngineConfig(StrictModel):
    """Settings of vLLM. `kv_cache_gib` replaces the share of the device's memory that vLLM would take.

    `data_parallel_size` is for mixture-of-experts teachers whose replicas share their experts and so work in step: one
    process each, as `num_nodes` and `node_rank` say, which meet at VLLM_DP_MASTER_IP and VLLM_DP_MASTER_PORT. vLLM
    refuses it for dense teachers, whose replicas are independent.
    `capture` "in-engine" scores the wanted rows inside the engine and refuses a vLLM that it does not know; "stock"
    uses vLLM's own prompt log-probs, which score every row; "auto" takes the first of the two that works.
    """

    dtype: EngineDtype = "bfloat16"
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    data_parallel_size: PositiveInt = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.8
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    max_num_seqs: PositiveInt = 64
    max_num_batched_tokens: PositiveInt = 8192
    enforce_eager: bool = False
    capture: CaptureMode = "auto"
    options: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _check_options(cls, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if taken := sorted(_RESERVED_OPTIONS & set(options)):
            raise ValueError(f"{', '.join(taken)}: set by this program or by a key of [engine], not through options")
        return options


class GenerateConfig(StrictModel):
    """Settings for responses that the teacher writes: `num_samples` a prompt, up to `max_new_tokens` each.

    They replace the last response of a sample. `temperature` 0 is greedy; `top_p` limits sampling to the best tokens
    that hold this mass. Both change the text, not the stored distribution.
    """

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    num_samples: PositiveInt = 1
    max_new_tokens: PositiveInt = 512

    @model_validator(mode="after")
    def _check_num_samples(self) -> Self:
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError(
                f"num_samples = {self.num_samples} at temperature 0 would write the same response each time; "
                "set num_samples = 1 or a temperature above 0"
            )
        return self


class RayConfig(StrictModel):
    """Settings of `--engine ray`: the cluster, and the resources of each actor, which holds a teacher.

    `address` absent: the cluster of RAY_ADDRESS or of this machine, else one that is started for the run. `max_actors`
    absent: as many as the cluster has room for. `num_gpus` absent: the product of the engine's parallel sizes, but none
    in a cluster without GPUs.
    """

    address: Annotated[str, Field(min_length=1)] | None = None
    max_actors: PositiveInt | None = None
    num_gpus: Annotated[float, Field(ge=0)] | None = None
    num_cpus: Annotated[float, Field(gt=0)] = 1.0


class PrecomputeConfig(StrictModel):
    """Settings of a run of the teacher over a dataset.

    Of each distribution the `top_k` best entries are kept ("all": the whole vocabulary; absent, 64 for "kd" and 0 for
    "dpo"); with `top_p`, only as many of them as hold that mass, but at least `min_k`; with `num_draws`, the ids of
    that many draws from the distribution instead, with replacement. `precision` is the form of kept log-probs: q8 in
    127 to 255 steps of sqrt(p), by `top_k`, q6 in 63, fp16, or exactly as fp32; absent, q8.
    Images are opened below `image_root` alone; with `follow_symlinks` a symbolic link there may lead anywhere.
    `chat_template_date` is shown by a chat template that shows the date; absent, the day on which the output was begun.
    `score` "response" scores every assistant turn, "last" the last one, "all" every token but images and the first.
    `store_images` puts the image files into the shards, so that training needs no image folder; those inside the
    dataset are stored in any case. With `ids` "strict" every sample must have a unique `id`; "any" makes ids that are
    missing or repeated from positions. `seed` is for draws and `generate`. `max_tokens` counts an image by the
    tokens it expands to. Without `image_aspect_ratio` images are padded for LLaVA and kept as they are for other
    teachers. With `on_bad_sample` "skip" the run fails if a larger share of the dataset than `max_skipped` is skipped.
    Of `num_nodes` processes that share an output, the one with number `node_rank` takes
    every num_nodes-th shard.
    """

    kind: Kind = "kd"
    teacher: LocalPath
    dataset: LocationField
    image_root: LocationField | None = None
    follow_symlinks: bool = False
    output: Annotated[LocationField, NOT_HERE]
    chat_template: LocalPath | None = None
    chat_template_date: IsoDate | None = None
    score: ScoredTokens = "response"
    image_aspect_ratio: AspectRatio | None = None
    top_k: Annotated[int, Field(ge=0, lt=MAX_VOCAB_SIZE)] | Literal["all"]
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_k: PositiveInt = 1
    num_draws: Annotated[int, Field(gt=0, lt=MAX_DRAWS)] | None = None
    precision: Precision | None = None
    store_images: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    generate: GenerateConfig | None = None
    samples_per_shard: PositiveInt = 1024
    max_tokens: Annotated[int, Field(ge=2)] = 2048
    ids: IdPolicy = "any"
    on_bad_sample: Literal["stop", "skip"] = "stop"
    max_skipped: Annotated[float, Field(ge=0, le=1)] = 0.05
    preflight: bool = True
    num_loader_threads: PositiveInt = 4
    num_nodes: PositiveInt = 1
    node_rank: Annotated[int, Field(ge=0)] = 0
    engine: EngineConfig = EngineConfig()
    ray: RayConfig = RayConfig()

    @property
    def images_below(self) -> ImageRoot | None:
        """Returns where images are opened."""
        return image_root_of(self.image_root, self.follow_symlinks)

    @model_validator(mode="before")
    @classmethod
    def _set_default_top_k(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "top_k" not in raw:
            drawn = raw.get("num_draws") is not None
            return {**raw, "top_k": 0 if drawn else DEFAULT_TOP_K.get(str(raw.get("kind", "kd")), 0)}
        return raw

    @model_validator(mode="after")
    def _check_kept_entries(self) -> Self:
        if self.num_draws is not None and (self.top_k != 0 or self.top_p is not None):
            raise ValueError("num_draws keeps drawn entries, top_k and top_p the best ones; give one of the two")
        if self.num_draws is not None and self.precision is not None:
            raise ValueError(
                "precision is for log-probs; num_draws stores numbers of draws, which are exact; remove precision"
            )
        if self.top_p is not None and self.top_k == 0:
            raise ValueError("top_p needs top_k, the most entries that a row may keep; set top_k above 0")
        if self.top_p is None and self.min_k != 1:
            raise ValueError("min_k is the least that top_p keeps; give top_p as well")
        if self.top_k != "all" and self.top_p is not None and self.min_k > self.top_k:
            raise ValueError(f"min_k = {self.min_k} exceeds top_k = {self.top_k}; lower min_k or raise top_k")
        return self

    @model_validator(mode="after")
    def _check_generate(self) -> Self:
        if self.generate is not None and (self.kind != "kd" or self.score != "response"):
            raise ValueError('generate writes one response a prompt: it needs kind = "kd" and score = "response"')
        return self

    @model_validator(mode="after")
    def _check_node_rank(self) -> Self:
        if self.node_rank >= self.num_nodes:
            raise ValueError(
                f"node_rank = {self.node_rank}, but num_nodes = {self.num_nodes}; nodes count from 0 to num_nodes - 1"
            )
        return self
