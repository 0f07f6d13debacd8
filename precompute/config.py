"""Configuration of `precompute-logits`: one TOML file a run."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, PositiveInt, field_validator, model_validator

from common.config import Strict
from common.encoding import Score
from common.images import AspectRatio
from common.samples import Kind
from common.scores import MAX_VOCAB_SIZE

EngineDtype = Literal["bfloat16", "float16", "float32"]

DEFAULT_TOP_K: dict[str, int] = {"kd": 64, "dpo": 0}

# Given by this program, because scores depend on them or other settings must agree with them.
_OWN_OPTIONS = frozenset(
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
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enforce_eager",
    }
)


class EngineConfig(Strict):
    """How vLLM runs a model. `kv_cache_gib` replaces the share of the device's memory that vLLM would take."""

    dtype: EngineDtype = "bfloat16"
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.8
    kv_cache_gib: Annotated[float, Field(gt=0)] | None = None
    max_num_seqs: PositiveInt = 64
    max_num_batched_tokens: PositiveInt = 8192
    enforce_eager: bool = False
    options: dict[str, JsonValue] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _leave_ours_alone(cls, options: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if taken := sorted(_OWN_OPTIONS & set(options)):
            raise ValueError(f"{', '.join(taken)}: set by this program or by a key of [engine], not through options")
        if "data_parallel_size" in options:
            raise ValueError("data_parallel_size: run one process a replica, with num_nodes and node, instead")
        return options


class PrecomputeConfig(Strict):
    """A run of the teacher over a dataset.

    `top_k` "all" keeps the whole vocabulary; absent, it is 64 for "kd" and 0 for "dpo". `max_tokens` counts an
    image by the tokens it expands to. Of `num_nodes` processes that share an output, the one with number `node`
    takes every num_nodes-th shard.
    """

    kind: Kind = "kd"
    teacher: Path
    dataset: Path
    image_root: Path | None = None
    output: Path
    chat_template: Path | None = None
    score: Score = "response"
    image_aspect_ratio: AspectRatio = "pad"
    top_k: Annotated[int, Field(ge=0, lt=MAX_VOCAB_SIZE)] | Literal["all"]
    samples_per_shard: PositiveInt = 1024
    max_tokens: Annotated[int, Field(ge=2)] = 2048
    on_bad_sample: Literal["stop", "skip"] = "stop"
    preflight: bool = True
    num_loader_threads: PositiveInt = 4
    num_nodes: PositiveInt = 1
    node: Annotated[int, Field(ge=0)] = 0
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_top_k(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "top_k" not in raw:
            return {**raw, "top_k": DEFAULT_TOP_K.get(str(raw.get("kind", "kd")), 0)}
        return raw

    @model_validator(mode="after")
    def _node_exists(self) -> Self:
        if self.node >= self.num_nodes:
            raise ValueError(f"node = {self.node}, but num_nodes = {self.num_nodes}; nodes are numbered from 0")
        return self
