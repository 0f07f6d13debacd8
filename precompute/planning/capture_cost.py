"""`plan`, the teacher's half: what a capture will write, hold in memory and take, from configurations alone.

    Measured, ModelShape ─ estimate ─> Sections       each number with its arithmetic

Legend: N samples of the dataset, n of them counted, T tokens of a conversation, K kept entries of a scored token.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from common.estimates import Estimate, EstimateTable, format_value
from common.shards.quantization import StoredPrecision
from precompute.config import EngineDtype, PrecomputeConfig
from precompute.engine.row_scores import CHUNK_BYTES_ELSEWHERE
from precompute.logits.job import CaptureInputs, open_inputs, stored_precision
from precompute.planning.workload import ExtrapolatedTotal, ModelShape, Workload, measure_workload

DTYPE_BYTES: dict[EngineDtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}

# Bytes in a finished shard, as `benchmarks.codec` finds them on real text (SmolLM2-135M, 49,152 words, k = 64; drawn:
# 37 draws): of one kept entry by how its log-prob is stored, None for drawn ones, and of one scored token besides: own
# log-prob, rest mass, number of entries. A larger vocabulary or a smaller shard takes a little more.
ENTRY_BYTES: dict[StoredPrecision, float] = {"fp32": 3.6, "fp16": 2.05, "q8": 1.2, "q6": 1.05, None: 1.4}
ROW_BYTES = 7.0
TEXT_COMPRESSION = 0.33

# Copies in float32, rounded up: of a chunk, its logits in the engine's dtype and in float32; of all positions, for
# vLLM's own prompt log-probs, their log-softmax besides.
CAPTURE_COPIES = 2
STOCK_COPIES = 3

# Shares of a GPU's peak that a large model under vLLM may reach. Assumed, not measured.
COMPUTE_UTILISATION = 0.4
BANDWIDTH_UTILISATION = 0.6


@dataclass(frozen=True)
class Gpu:
    """`peak_flops`: dense bf16 operations a second. `bandwidth`: bytes of its memory a second."""

    name: str
    peak_flops: float
    bandwidth: float


# One number, or one for each of several samples.
Amount = Any

# From NVIDIA's data sheets; where one states bf16 with sparsity, half of that.
GPUS = (
    Gpu("L4", 121e12, 300e9),
    Gpu("L40S", 362e12, 864e9),
    Gpu("A100 80GB", 312e12, 2039e9),
    Gpu("H100 SXM", 989e12, 3350e9),
    Gpu("B200", 2250e12, 8000e9),
)


@dataclass(frozen=True)
class Flops:
    """Operations of the forward passes over the dataset; a multiplication and an addition are two.

    A weight takes part in one of each for every token (arXiv 2001.08361, section 2.1). Attention compares T^2 / 2 pairs
    of tokens, once for the scores and once for the values.
    """

    body: Amount
    attention: Amount
    adapter: Amount
    vision: Amount
    output: Amount

    @property
    def total(self) -> Amount:
        """Their sum."""
        return self.body + self.attention + self.adapter + self.vision + self.output


def forward_flops(
    shape: ModelShape, *, tokens: Amount, squares: Amount, image_tokens: Amount, scored: Amount, tokens_per_image: int
) -> Flops:
    """Operations to read `tokens`, `image_tokens` of them from the tower, and to give the logits of `scored` of them.

    `squares` is the sum of T^2. The tower is taken to see as many patches as it gives tokens, each attending to all.
    """
    return Flops(
        body=2 * shape.body_parameters * tokens,
        attention=4 * shape.num_layers * shape.num_heads * shape.head_size * squares / 2,
        adapter=2 * shape.adapter_parameters * image_tokens,
        vision=(2 * shape.vision_parameters + 4 * shape.vision_layers * shape.vision_hidden_size * tokens_per_image)
        * image_tokens,
        output=2 * shape.hidden_size * shape.vocab_size * scored,
    )


def kv_bytes(shape: ModelShape, dtype: EngineDtype) -> int:
    """Bytes that one token takes in the key-value cache: a key and a value a layer and key-value head."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * DTYPE_BYTES[dtype]


def gpu_hours(gpu: Gpu, flops: float, num_bytes: float = 0.0) -> float:
    """Hours of one GPU, or of several that share the work: operations first, then bytes read while decoding."""
    seconds = flops / (gpu.peak_flops * COMPUTE_UTILISATION) + num_bytes / (gpu.bandwidth * BANDWIDTH_UTILISATION)
    return seconds / 3600


def kept_entries(config: PrecomputeConfig, vocab_size: int) -> tuple[int, int]:
    """Fewest and most entries that a scored token keeps; the same unless the distribution decides."""
    most = vocab_size if config.top_k == "all" else min(config.top_k, vocab_size)
    if config.num_draws is not None:
        return 1, min(config.num_draws, vocab_size)
    return (min(config.min_k, most), most) if config.top_p is not None else (most, most)


def estimate_capture(
    config: PrecomputeConfig, *, progress: bool = True
) -> tuple[ModelShape, tuple[EstimateTable, ...]]:
    """The teacher's shape, and everything that is known of a capture before it starts.

    Raises:
        DataError: the dataset is unreadable, broken, empty or has duplicate ids.
        ModelError: the teacher's configuration, tokenizer or image processor is missing or cannot be used.
    """
    inputs = open_inputs(config)
    shape = ModelShape.load(config.teacher)
    measured = measure_workload(inputs, progress=progress)
    sections = (
        _dataset(inputs, measured),
        _shards(inputs, measured),
        _memory(inputs, shape),
        _hours(inputs, shape, measured),
    )
    return shape, sections


def _dataset(inputs: CaptureInputs, measured: Workload) -> EstimateTable:
    counted, num_samples = measured.num_counted, measured.num_samples

    def figure(name: str, values_n: npt.NDArray[np.number]) -> Estimate:
        total = measured.total(values_n)
        how = "sum over all samples"
        if counted < num_samples:
            how = f"{format_value(values_n.sum())} x {num_samples:,} / {counted:,}"
        return Estimate(name, total.value, how, error=total.error)

    where = "exact" if counted == num_samples else f"{counted:,} random samples, extrapolated ± one standard error"
    generate = inputs.config.generate
    per_image = 0 if inputs.image_spec is None else inputs.image_spec.tokens_per_image
    notes = tuple(f"cannot be used: {reason}" for reason in measured.reasons)
    if generate is not None:
        longest = f"{generate.num_samples} x at most {generate.max_new_tokens:,} tokens"
        notes = (f"generate: an upper bound, {longest} a sample; prompts count once a response", *notes)
    return EstimateTable(
        f"Dataset: {where}",
        (
            Estimate("samples", num_samples, "in the file"),
            figure("samples that cannot be used", measured.unusable_n),
            figure("images", measured.images_n),
            figure(f"image tokens, {per_image:,} an image", measured.image_tokens_n),
            figure("prompt tokens, images included", measured.prompt_n),
            figure("response tokens, scored", measured.scored_n),
            figure("tokens that the teacher reads", measured.prompt_n + measured.scored_n),
        ),
        notes,
    )


def _shards(inputs: CaptureInputs, measured: Workload) -> EstimateTable:
    config = inputs.config
    low, high = kept_entries(config, inputs.encoder.vocab_size)
    form = stored_precision(config)
    entry_bytes = ENTRY_BYTES[form]
    scored, text = measured.total(measured.scored_n), measured.total(measured.text_bytes_n)

    def total(kept: int) -> ExtrapolatedTotal:
        per_token = ROW_BYTES + kept * entry_bytes
        return measured.total(per_token * measured.scored_n + TEXT_COMPRESSION * measured.text_bytes_n)

    def entries(kept: int) -> float:
        return scored.value * kept * entry_bytes

    least, most = total(low), total(high)
    ranged = low != high
    k = f"{low:,} to {high:,}" if ranged else f"{high:,}"
    num_shards = -(-measured.num_samples // config.samples_per_shard)
    notes = [f"K = {k} entries, {form or 'drawn'}, {entry_bytes} bytes each after compression, as on real text"]
    if form is None:
        notes.append("draws that repeat an id are one entry, so K lies between 1 and num_draws")
    elif ranged:
        notes.append("top_p decides K for each token: the range is min_k to top_k")
    return EstimateTable(
        "Shards",
        (
            Estimate(
                "kept entries",
                entries(low),
                f"{format_value(scored.value)} x K x {entry_bytes}",
                "bytes",
                high=entries(high),
            ),
            Estimate(
                "own log-probs, rests, counts",
                scored.value * ROW_BYTES,
                f"{format_value(scored.value)} x {ROW_BYTES}",
                "bytes",
            ),
            Estimate(
                "token ids and messages",
                text.value * TEXT_COMPRESSION,
                f"{format_value(text.value)} x {TEXT_COMPRESSION}",
                "bytes",
            ),
            Estimate(
                "all shards", least.value, "sum of the last three", "bytes", 0.0 if ranged else most.error, most.value
            ),
            Estimate(
                "number of shards", num_shards, f"{measured.num_samples:,} / {config.samples_per_shard:,}, rounded up"
            ),
        ),
        tuple(notes),
    )


def _memory(inputs: CaptureInputs, shape: ModelShape) -> EstimateTable:
    engine = inputs.config.engine
    size = DTYPE_BYTES[engine.dtype]
    tensor, pipeline = engine.tensor_parallel_size, engine.pipeline_parallel_size
    other: EngineDtype = "bfloat16" if engine.dtype == "float32" else "float32"
    weights, kv = shape.num_parameters * size, kv_bytes(shape, engine.dtype)
    # Each rank has a whole head at least.
    kv_ranks = min(tensor, shape.num_kv_heads) * pipeline
    length = inputs.max_tokens + 1
    split = weights / (tensor * pipeline)
    step, full = (num * kv / kv_ranks for num in (engine.max_num_batched_tokens, engine.max_num_seqs * length))
    peak = CAPTURE_COPIES * CHUNK_BYTES_ELSEWHERE
    positions = min(engine.max_num_batched_tokens, length)
    stock = STOCK_COPIES * 4 * positions * shape.vocab_size
    return EstimateTable(
        f"Teacher's memory (tensor parallel {tensor}, pipeline parallel {pipeline})",
        (
            Estimate("parameters", shape.num_parameters, "counted from config.json"),
            Estimate(f"weights, {engine.dtype}", weights, f"{shape.num_parameters:,} x {size}", "bytes"),
            Estimate(
                f"weights, {other}",
                shape.num_parameters * DTYPE_BYTES[other],
                f"{shape.num_parameters:,} x {DTYPE_BYTES[other]}",
                "bytes",
            ),
            Estimate("weights a GPU", split, f"{weights:,} / ({tensor} x {pipeline})", "bytes"),
            Estimate(
                "KV cache a token",
                kv,
                f"2 x {shape.num_layers} layers x {shape.num_kv_heads} KV heads x {shape.head_size} x {size}",
                "bytes",
            ),
            Estimate(
                "KV of one step, a GPU",
                step,
                f"max_num_batched_tokens {engine.max_num_batched_tokens:,} x {kv:,} / {kv_ranks}",
                "bytes",
            ),
            Estimate(
                "KV of all sequences, a GPU",
                full,
                f"max_num_seqs {engine.max_num_seqs:,} x {length:,} tokens x {kv:,} / {kv_ranks}",
                "bytes",
            ),
            Estimate(
                "capture, in-engine",
                peak,
                f"{CAPTURE_COPIES} x {format_value(CHUNK_BYTES_ELSEWHERE, 'bytes')} of logits",
                "bytes",
            ),
            Estimate(
                "capture, stock vLLM",
                stock,
                f"{positions:,} positions x {shape.vocab_size:,} x 4 x {STOCK_COPIES}",
                "bytes",
            ),
            Estimate(
                "at least, a GPU",
                split + step + (stock if engine.capture == "stock" else peak),
                f"weights + KV of one step + capture, {'stock' if engine.capture == 'stock' else 'in-engine'}",
                "bytes",
            ),
        ),
        (
            "stock vLLM scores each position of a prompt's chunk: min(max_num_batched_tokens, max_tokens + 1)",
            "copies: logits in the engine's dtype and in float32; in stock vLLM their log-softmax, too",
            "not counted: activations, compiled graphs, the engine's own buffers; an even split is assumed",
        ),
    )


def _hours(inputs: CaptureInputs, shape: ModelShape, measured: Workload) -> EstimateTable:
    config = inputs.config
    # Generated tokens are not read in one pass; their time is that of the decoding steps.
    read_n = measured.prompt_n if config.generate else measured.prompt_n + measured.scored_n
    per_image = 0 if inputs.image_spec is None else inputs.image_spec.tokens_per_image

    def flops(columns: tuple[Any, Any, Any, Any]) -> Flops:
        names = ("tokens", "squares", "image_tokens", "scored")
        return forward_flops(shape, tokens_per_image=per_image, **dict(zip(names, columns, strict=True)))

    # vLLM's own prompt log-probs need the logits of every position.
    rows_n = read_n if config.engine.capture == "stock" else measured.scored_n
    columns = (read_n, measured.squares_n, measured.image_tokens_n, rows_n)
    tokens, squares, image_tokens, rows = (measured.total(column).value for column in columns)
    parts, total = flops((tokens, squares, image_tokens, rows)), measured.total(flops(columns).total)
    heads = f"{shape.num_layers} x {shape.num_heads} x {shape.head_size}"
    patches = f"4 x {shape.vision_layers} x {shape.vision_hidden_size} x {per_image}"
    figures = [
        Estimate("language model", parts.body, f"2 x {shape.body_parameters:,} x {tokens:,.0f} tokens", "FLOP"),
        Estimate("its attention", parts.attention, f"4 x {heads} x {squares:.3e} / 2", "FLOP"),
        Estimate(
            "output layer",
            parts.output,
            f"2 x {shape.hidden_size:,} x {shape.vocab_size:,} x {rows:,.0f} rows",
            "FLOP",
        ),
    ]
    if image_tokens:
        figures += [
            Estimate(
                "vision tower",
                parts.vision,
                f"(2 x {shape.vision_parameters:,} + {patches}) x {image_tokens:,.0f}",
                "FLOP",
            ),
            Estimate("adapter", parts.adapter, f"2 x {shape.adapter_parameters:,} x {image_tokens:,.0f}", "FLOP"),
        ]
    figures.append(Estimate("all operations", total.value, "their sum", "FLOP", total.error))
    notes = [
        f"assumed: {COMPUTE_UTILISATION} of the data sheet's dense bf16 peak; 3,600 seconds an hour",
        "heads x head size stand for the hidden size in attention; squares: sum of T^2 over the sequences",
        "all nodes together; starting the engine and reading images are not counted",
    ]
    decoded = ExtrapolatedTotal(0.0, 0.0)
    if config.generate is not None:
        decode_figures, decoded = _decoding(config, shape, measured)
        figures += decode_figures
        notes += [
            f"decoding is bound by memory: {BANDWIDTH_UTILISATION} of the data sheet's bandwidth is assumed",
            "cached tokens: L x (P + L / 2) summed over responses of length L after prompts of length P",
        ]
    for gpu in GPUS:
        how = f"{total.value:.3e} / ({gpu.peak_flops / 1e12:,.0f}e12 x {COMPUTE_UTILISATION}) / 3,600"
        if decoded.value:
            how += f" + {decoded.value:.3e} / ({gpu.bandwidth / 1e9:,.0f}e9 x {BANDWIDTH_UTILISATION}) / 3,600"
        hours, error = (gpu_hours(gpu, a, b) for a, b in ((total.value, decoded.value), (total.error, decoded.error)))
        figures.append(Estimate(gpu.name, hours, how, "hours", error))
    if config.engine.dtype == "float32":
        notes.append("engine.dtype is float32, which is several times slower than the bf16 peak assumed here")
    return EstimateTable("GPU hours", tuple(figures), tuple(notes))


def _decoding(
    config: PrecomputeConfig, shape: ModelShape, measured: Workload
) -> tuple[list[Estimate], ExtrapolatedTotal]:
    """Bytes that the decoding steps read: the language model's weights each step, each sequence's cache each token."""
    assert config.generate is not None
    num_sequences, size = config.engine.max_num_seqs, DTYPE_BYTES[config.engine.dtype]
    weights = (shape.num_parameters - shape.vision_parameters - shape.adapter_parameters) * size
    # A response of length L after a prompt of length P reads P + L / 2 cached tokens a step on average.
    per_response = config.generate.num_samples
    cached_n = measured.scored_n * (measured.prompt_n + measured.scored_n / 2) / per_response
    scored, cached = measured.total(measured.scored_n), measured.total(cached_n)
    kv = kv_bytes(shape, config.engine.dtype)
    read = measured.total(measured.scored_n / num_sequences * weights + cached_n * kv)
    return [
        Estimate(
            "decoding, weights read",
            scored.value / num_sequences * weights,
            f"{scored.value:,.0f} / max_num_seqs {num_sequences:,} x {weights:,}",
            "bytes",
        ),
        Estimate(
            "decoding, KV cache read",
            cached.value * kv,
            f"{cached.value:.3e} cached tokens x {kv:,}",
            "bytes",
        ),
    ], read
