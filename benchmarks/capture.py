"""Overhead of the capture over reading the prompts: tokens a second of vLLM, SmolLM2-135M on real text, k = 64.

    python -m benchmarks.capture

One process, one engine. The variants run in turn, and `bare` runs between any two of them: each variant is compared
with the runs of `bare` before and after it, because the machine's speed drifts. Medians over the rounds.

    bare       vLLM reads the prompts and scores nothing
    stock      vLLM's own prompt log-probs in their flat form, which score every row
    all        capture in the engine, every row
    quarter    capture in the engine, the last quarter of the rows
    floor      the output layer's product, logsumexp and top-k of as many rows as `all`, in torch, without an engine

An overhead is a variant's time above the mean of these two runs of `bare`. Times end with vLLM's finished
outputs. Reading scores out of them is not timed, though that takes longer on the stock path. Prompts are 2,048 tokens
long, the longest that Decant captures by default.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.real_text import real_ids
from tests.support.real_weights import smollm2_dir

if TYPE_CHECKING:
    from vllm import SamplingParams

    from precompute.engine.score_conversion import ExpandedPrompt

TOP_K = 64
PROMPT_TOKENS = 2048
VARIANTS = ("stock", "all", "quarter")


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    num_rounds = parser.parse_args().rounds
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    with tempfile.TemporaryDirectory() as directory:
        seconds = _measure(smollm2_dir(Path(directory)), num_rounds)
    bare = statistics.median(seconds["bare"])
    overhead = {
        name: statistics.median(
            value - (before + after) / 2 for before, value, after in zip(*_with_neighbours(seconds, name), strict=True)
        )
        for name in VARIANTS
    }
    result = {"bare_tps": round(PROMPT_TOKENS / bare, 1)}
    result |= {f"{name}_tps": round(PROMPT_TOKENS / (bare + value), 1) for name, value in overhead.items()}
    result |= {
        "quarter_vs_bare": round(bare / (bare + overhead["quarter"]), 3),
        "overhead_all_vs_stock": round(overhead["all"] / overhead["stock"], 3),
        "overhead_quarter_vs_stock": round(overhead["quarter"] / overhead["stock"], 3),
        "floor_overhead_all_vs_stock": round(statistics.median(seconds["floor"]) / overhead["stock"], 3),
    }
    print(json.dumps(result))


def _with_neighbours(seconds: dict[str, list[float]], name: str) -> tuple[list[float], list[float], list[float]]:
    """Returns seconds of the `bare` runs before a variant's runs, of these runs, and of the `bare` runs after them."""
    place, bare = VARIANTS.index(name), seconds["bare"]
    return bare[place :: len(VARIANTS)][: len(seconds[name])], seconds[name], bare[place + 1 :: len(VARIANTS)]


def prefill_params(ids: list[int], vocab_size: int, *, num_captured: int = 0, stock: bool = False) -> "SamplingParams":
    """Returns vLLM's settings that read a prompt and score its best 64 ids.

    Args:
        num_captured: rows at the end of the prompt that the engine captures.
        stock: uses vLLM's own prompt log-probs instead.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from precompute.engine.row_request import RowRequest

    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    params.output_kind = RequestOutputKind.FINAL_ONLY
    if stock:
        params.prompt_logprobs, params.flat_logprobs = TOP_K, True
    elif num_captured:
        rows = np.arange(len(ids) - 1 - num_captured, len(ids) - 1, dtype=np.int32)
        params.extra_args = RowRequest(rows, np.array(ids, np.int32)[rows + 1], vocab_size, TOP_K).extra_args()
    return params


def _measure(model_dir: Path, num_rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of each run of each variant. `bare` has one run more, after the last variant."""
    from safetensors.torch import load_file

    from precompute.config import EngineConfig
    from precompute.engine.vllm_engine import Engine, EngineLimits, Prompt
    from precompute.engine.vllm_patch import start_capture

    settings = EngineConfig(dtype="float32", kv_cache_gib=1, enforce_eager=True, max_num_batched_tokens=PROMPT_TOKENS)
    engine = Engine(model_dir, settings, EngineLimits(PROMPT_TOKENS + 1, max_images=0, max_logprobs=TOP_K))
    if problem := start_capture(engine.collective_rpc):
        raise SystemExit(f"no capture in the engine: {problem}")
    texts = real_ids(model_dir, 16 * PROMPT_TOKENS).reshape(16, PROMPT_TOKENS)
    # SmolLM2 ties its output layer to the embedding.
    output_layer = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"]
    hidden = torch.randn(PROMPT_TOKENS, output_layer.shape[1])

    def params(name: str, read: "ExpandedPrompt") -> "SamplingParams":
        ids = read.token_ids.tolist()
        num_captured = {"all": len(ids) - 1, "quarter": len(ids) // 4}.get(name, 0)
        return prefill_params(ids, len(output_layer), num_captured=num_captured, stock=name == "stock")

    def read(name: str, number: int) -> float:
        prompt = Prompt(texts[number % len(texts)], (), "benchmark")
        started = time.perf_counter()
        outputs = list(engine.run([(name, prompt)], params))
        assert len(outputs) == 1
        return time.perf_counter() - started

    def floor() -> float:
        started = time.perf_counter()
        for rows in hidden.split(128):
            logits = rows @ output_layer.T
            logits.logsumexp(1)
            logits.topk(TOP_K, dim=1)
        return time.perf_counter() - started

    seconds: dict[str, list[float]] = {name: [] for name in ("bare", *VARIANTS, "floor")}
    try:
        for name in (*VARIANTS, "bare"):
            read(name, 0)
        floor()
        for number in range(num_rounds):
            for name in VARIANTS:
                seconds["bare"].append(read("bare", number))
                seconds[name].append(read(name, number))
            seconds["floor"].append(floor())
        seconds["bare"].append(read("bare", 0))
    finally:
        engine.close()
    return seconds


if __name__ == "__main__":
    main()
