"""Estimates what a capture will write, hold in memory and take (`plan`), before a model is loaded.

    Workload, ModelShape ─ estimate_capture ─> EstimateTables       each number with its arithmetic

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

# Bytes in a finished shard, measured by `benchmarks.codec` on real text (SmolLM2-135M, 49,152 words, k = 64, 37 draws).
# A larger vocabulary or a smaller shard takes a little more.
# A kept entry, by the precision of its log-prob; None for drawn entries.
ENTRY_BYTES: dict[StoredPrecision, float] = {"fp32": 3.6, "fp16": 2.05, "q8": 1.2, "q6": 1.05, None: 1.4}
# A scored token besides its entries: own log-prob, rest mass, number of entries.
ROW_BYTES = 7.0
# Compressed share of the token ids' and messages' bytes.
TEXT_COMPRESSION = 0.33

# Copies of the logits, each counted as float32. In the engine, a chunk exists in the engine's dtype and in float32. For
# vLLM's own prompt log-probs, all positions also have a log-softmax.
CAPTURE_COPIES = 2
STOCK_COPIES = 3

# Shares of a GPU's peak that a large model reaches under vLLM. These are assumptions, not measurements.
COMPUTE_UTILISATION = 0.4
BANDWIDTH_UTILISATION = 0.6


@dataclass(frozen=True)
class Gpu:
    """A GPU: `peak_flops` dense bf16 operations a second, `bandwidth` of its memory in bytes a second."""

    name: str
    peak_flops: float
    bandwidth: float


# A number, or an array with one for each counted sample.
Amount = Any

# From NVIDIA's data sheets. Where a sheet states bf16 with sparsity, half of that number is taken.
GPUS = (
    Gpu("L4", 121e12, 300e9),
    Gpu("L40S", 362e12, 864e9),
    Gpu("A100 80GB", 312e12, 2039e9),
    Gpu("H100 SXM", 989e12, 3350e9),
    Gpu("B200", 2250e12, 8000e9),
)


@dataclass(frozen=True)
class ForwardCounts:
    """Counts of forward passes: `tokens`, of which `image_tokens` come from the tower and `scored` get logits.

    `squares` is the sum of T^2 over the sequences, `image_squares` that of an image's tokens, squared.
    """

    tokens: Amount
    squares: Amount
    image_tokens: Amount
    image_squares: Amount
    scored: Amount


@dataclass(frozen=True)
class Flops:
    """Operations of forward passes; a multiplication and an addition count as two.

    Each weight is multiplied and added once for every token (arXiv 2001.08361, section 2.1). Attention works on T^2 / 2
    pairs of tokens, once for the scores and once for the values.
    """

    body: Amount
    attention: Amount
    adapter: Amount
    vision: Amount
    output: Amount

    @property
    def total(self) -> Amount:
        """Operations of all parts together."""
        return self.body + self.attention + self.adapter + self.vision + self.output


def forward_flops(shape: ModelShape, counts: ForwardCounts) -> Flops:
    """Returns the operations of forward passes over `counts`.

    The tower is assumed to have as many patches as it gives tokens, and each patch to attend to all of an image.
    """
    return Flops(
        body=2 * shape.body_parameters * counts.tokens,
        attention=4 * shape.num_layers * shape.num_heads * shape.head_size * counts.squares / 2,
        adapter=2 * shape.adapter_parameters * counts.image_tokens,
        vision=2 * shape.vision_parameters * counts.image_tokens
        + 4 * shape.vision_layers * shape.vision_hidden_size * counts.image_squares,
        output=2 * shape.hidden_size * shape.vocab_size * counts.scored,
    )


def kv_bytes(shape: ModelShape, dtype: EngineDtype) -> int:
    """Returns the bytes of one token in the key-value cache: a key and a value for each layer and key-value head."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * DTYPE_BYTES[dtype]


def gpu_hours(gpu: Gpu, flops: float, num_bytes: float = 0.0) -> float:
    """Returns the GPU hours of `flops` operations and of the `num_bytes` that decoding reads, one after the other."""
    seconds = flops / (gpu.peak_flops * COMPUTE_UTILISATION) + num_bytes / (gpu.bandwidth * BANDWIDTH_UTILISATION)
    return seconds / 3600


def kept_entries(config: PrecomputeConfig, vocab_size: int) -> tuple[int, int]:
    """Returns the minimum and the maximum number of entries that a scored token keeps.

    They differ where the distribution decides, which it does with top_p and with draws.
    """
    if config.num_draws is not None:
        return 1, min(config.num_draws, vocab_size)
    max_kept = vocab_size if config.top_k == "all" else min(config.top_k, vocab_size)
    min_kept = max_kept if config.top_p is None else min(config.min_k, max_kept)
    return min_kept, max_kept


def estimate_capture(
    config: PrecomputeConfig, *, progress: bool = True
) -> tuple[ModelShape, tuple[EstimateTable, ...]]:
    """Returns the teacher's shape, and tables of a capture's data, shards, memory and hours.

    Raises:
        DataError: the dataset is unreadable, broken, empty or has duplicate ids.
        ModelError: the teacher's configuration, tokenizer or image processor is missing or cannot be used.
    """
    inputs = open_inputs(config)
    shape = ModelShape.load(config.teacher)
    workload = measure_workload(inputs, progress=progress)
    tables = (
        _estimate_dataset(inputs, workload),
        _estimate_shards(inputs, workload),
        _estimate_memory(inputs, shape),
        _estimate_hours(inputs, shape, workload),
    )
    return shape, tables


def _estimate_dataset(inputs: CaptureInputs, workload: Workload) -> EstimateTable:
    counted, num_samples = workload.num_counted, workload.num_samples

    def estimate(name: str, values_n: npt.NDArray[np.number]) -> Estimate:
        total = workload.total(values_n)
        how = "sum over all samples"
        if counted < num_samples:
            how = f"{format_value(values_n.sum())} x {num_samples:,} / {counted:,}"
        return Estimate(name, total.value, how, error=total.error)

    where = "exact" if counted == num_samples else f"{counted:,} random samples, extrapolated ± one standard error"
    generate = inputs.config.generate
    per_image = None if inputs.images is None else inputs.images.tokens_per_image
    notes = tuple(f"cannot be used: {reason}" for reason in workload.reasons)
    if generate is not None:
        longest = f"{generate.num_samples} x at most {generate.max_new_tokens:,} tokens"
        notes = (f"generate: an upper bound, {longest} a sample; prompts count once a response", *notes)
    return EstimateTable(
        f"Dataset: {where}",
        (
            Estimate("samples", num_samples, "in the file"),
            estimate("samples that cannot be used", workload.unusable_n),
            estimate("images", workload.images_n),
            estimate(
                "image tokens" if per_image is None else f"image tokens, {per_image:,} an image",
                workload.image_tokens_n,
            ),
            estimate("prompt tokens, images included", workload.prompt_n),
            estimate("response tokens, scored", workload.scored_n),
            estimate("tokens that the teacher reads", workload.prompt_n + workload.scored_n),
        ),
        notes,
    )


def _estimate_shards(inputs: CaptureInputs, workload: Workload) -> EstimateTable:
    config = inputs.config
    min_kept, max_kept = kept_entries(config, inputs.encoder.vocab_size)
    precision = stored_precision(config)
    entry_bytes = ENTRY_BYTES[precision]
    scored, text = workload.total(workload.scored_n), workload.total(workload.text_bytes_n)

    def all_bytes(num_kept: int) -> ExtrapolatedTotal:
        per_token = ROW_BYTES + num_kept * entry_bytes
        return workload.total(per_token * workload.scored_n + TEXT_COMPRESSION * workload.text_bytes_n)

    def kept_bytes(num_kept: int) -> float:
        return scored.value * num_kept * entry_bytes

    low, high = all_bytes(min_kept), all_bytes(max_kept)
    is_range = min_kept != max_kept
    k = f"{min_kept:,} to {max_kept:,}" if is_range else f"{max_kept:,}"
    num_shards = -(-workload.num_samples // config.samples_per_shard)
    notes = [f"K = {k} entries, {precision or 'drawn'}, {entry_bytes} bytes each after compression, as on real text"]
    if precision is None:
        notes.append("draws that repeat an id are one entry, so K lies between 1 and num_draws")
    elif is_range:
        notes.append("top_p decides K for each token: the range is min_k to top_k")
    return EstimateTable(
        "Shards",
        (
            Estimate(
                "kept entries",
                kept_bytes(min_kept),
                f"{format_value(scored.value)} x K x {entry_bytes}",
                "bytes",
                high=kept_bytes(max_kept),
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
                "all shards",
                low.value,
                "sum of the last three",
                "bytes",
                error=0.0 if is_range else high.error,
                high=high.value,
            ),
            Estimate(
                "number of shards", num_shards, f"{workload.num_samples:,} / {config.samples_per_shard:,}, rounded up"
            ),
        ),
        tuple(notes),
    )


def _estimate_memory(inputs: CaptureInputs, shape: ModelShape) -> EstimateTable:
    engine = inputs.config.engine
    size = DTYPE_BYTES[engine.dtype]
    tensor, pipeline = engine.tensor_parallel_size, engine.pipeline_parallel_size
    other: EngineDtype = "bfloat16" if engine.dtype == "float32" else "float32"
    weights, kv = shape.num_parameters * size, kv_bytes(shape, engine.dtype)
    # A key-value head is not divided, so ranks beyond their number hold copies.
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


def _estimate_hours(inputs: CaptureInputs, shape: ModelShape, workload: Workload) -> EstimateTable:
    config = inputs.config
    # Generated tokens are not read in one pass; their time is that of the decoding steps.
    read_n = workload.prompt_n if config.generate else workload.prompt_n + workload.scored_n
    # vLLM's own prompt log-probs need the logits of every position.
    rows_n = read_n if config.engine.capture == "stock" else workload.scored_n
    counts_n = ForwardCounts(read_n, workload.squares_n, workload.image_tokens_n, workload.image_squares_n, rows_n)
    counts = ForwardCounts(
        workload.total(counts_n.tokens).value,
        workload.total(counts_n.squares).value,
        workload.total(counts_n.image_tokens).value,
        workload.total(counts_n.image_squares).value,
        workload.total(counts_n.scored).value,
    )
    total = workload.total(forward_flops(shape, counts_n).total)
    estimates = _estimate_flops(shape, counts)
    estimates.append(Estimate("all operations", total.value, "their sum", "FLOP", total.error))
    notes = [
        f"assumed: {COMPUTE_UTILISATION} of the data sheet's dense bf16 peak; 3,600 seconds an hour",
        "heads x head size stand for the hidden size in attention; squares: sum of T^2 over the sequences",
        "all nodes together; starting the engine and reading images are not counted",
    ]
    decoded = ExtrapolatedTotal(0.0, 0.0)
    if config.generate is not None:
        decode_estimates, decoded = _estimate_decoding(config, shape, workload)
        estimates += decode_estimates
        notes += [
            f"decoding is bound by memory: {BANDWIDTH_UTILISATION} of the data sheet's bandwidth is assumed",
            "cached tokens: L x (P + L / 2) summed over responses of length L after prompts of length P",
        ]
    for gpu in GPUS:
        how = f"{total.value:.3e} / ({gpu.peak_flops / 1e12:,.0f}e12 x {COMPUTE_UTILISATION}) / 3,600"
        if decoded.value:
            how += f" + {decoded.value:.3e} / ({gpu.bandwidth / 1e9:,.0f}e9 x {BANDWIDTH_UTILISATION}) / 3,600"
        hours, error = (gpu_hours(gpu, a, b) for a, b in ((total.value, decoded.value), (total.error, decoded.error)))
        estimates.append(Estimate(gpu.name, hours, how, "hours", error))
    if config.engine.dtype == "float32":
        notes.append("engine.dtype is float32, which is several times slower than the bf16 peak assumed here")
    return EstimateTable("GPU hours", tuple(estimates), tuple(notes))


def _estimate_flops(shape: ModelShape, counts: ForwardCounts) -> list[Estimate]:
    """Returns the operations of each part of the model; those of the tower only where there are images."""
    parts = forward_flops(shape, counts)
    heads = f"{shape.num_layers} x {shape.num_heads} x {shape.head_size}"
    estimates = [
        Estimate("language model", parts.body, f"2 x {shape.body_parameters:,} x {counts.tokens:,.0f} tokens", "FLOP"),
        Estimate("its attention", parts.attention, f"4 x {heads} x {counts.squares:.3e} / 2", "FLOP"),
        Estimate(
            "output layer",
            parts.output,
            f"2 x {shape.hidden_size:,} x {shape.vocab_size:,} x {counts.scored:,.0f} rows",
            "FLOP",
        ),
    ]
    if counts.image_tokens:
        patches = f"4 x {shape.vision_layers} x {shape.vision_hidden_size} x {counts.image_squares:.3e}"
        tower = f"2 x {shape.vision_parameters:,} x {counts.image_tokens:,.0f} + {patches}"
        adapter = f"2 x {shape.adapter_parameters:,} x {counts.image_tokens:,.0f}"
        estimates += [
            Estimate("vision tower", parts.vision, tower, "FLOP"),
            Estimate("adapter", parts.adapter, adapter, "FLOP"),
        ]
    return estimates


def _estimate_decoding(
    config: PrecomputeConfig, shape: ModelShape, workload: Workload
) -> tuple[list[Estimate], ExtrapolatedTotal]:
    """Returns the bytes that decoding reads, as estimates and as one total.

    Each step reads the language model's weights, and for each sequence its key-value cache.
    """
    assert config.generate is not None
    num_sequences, size = config.engine.max_num_seqs, DTYPE_BYTES[config.engine.dtype]
    weights = (shape.num_parameters - shape.vision_parameters - shape.adapter_parameters) * size
    # A response of length L after a prompt of length P reads P + L / 2 cached tokens a step on average.
    per_response = config.generate.num_samples
    cached_n = workload.scored_n * (workload.prompt_n + workload.scored_n / 2) / per_response
    scored, cached = workload.total(workload.scored_n), workload.total(cached_n)
    kv = kv_bytes(shape, config.engine.dtype)
    read = workload.total(workload.scored_n / num_sequences * weights + cached_n * kv)
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
