"""Peak memory of scoring one long prompt over a large vocabulary, above what the engine holds at rest.

    python -m benchmarks.capture_memory

The model is a Llama of one narrow layer with random weights and a vocabulary of 151,936. Prompts of 1,024 and of 4,096
tokens are read in one step and every row is scored, k = 64: in the engine, and by vLLM's own prompt log-probs. Each
measurement has its own process, because an allocator keeps memory that it once had. The engine is at rest after it has
read the same prompt without scoring. The peak is the process's highest resident set from then on (VmHWM, reset before)
less its resident set at rest.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.capture import TOP_K, prefill_params
from benchmarks.memory import reset_peak, status_mib

VOCAB_SIZE = 151_936
LONG_TOKENS, SHORT_TOKENS = 4096, 1024


def main() -> None:
    """Prints one JSON line."""
    with tempfile.TemporaryDirectory() as directory:
        model_dir = _write_model(Path(directory))
        peak = {
            (way, length): _measure_in_subprocess(model_dir, way, length)
            for way in ("in-engine", "stock")
            for length in (SHORT_TOKENS, LONG_TOKENS)
        }
    result = {
        "peak_vs_stock": round(peak["in-engine", LONG_TOKENS] / peak["stock", LONG_TOKENS], 4),
        "peak_mib": round(peak["in-engine", LONG_TOKENS], 1),
        "peak_mib_1024_tokens": round(peak["in-engine", SHORT_TOKENS], 1),
        "stock_peak_mib": round(peak["stock", LONG_TOKENS], 1),
        "stock_peak_mib_1024_tokens": round(peak["stock", SHORT_TOKENS], 1),
    }
    print(json.dumps(result))


def _measure_in_subprocess(model_dir: Path, way: str, length: int) -> float:
    command = [sys.executable, "-m", "benchmarks.capture_memory", str(model_dir), way, str(length)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def _write_model(directory: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.support.models import tiny_tokenizer

    tiny_tokenizer(directory)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2 * LONG_TOKENS,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _measure(model_dir: Path, way: str, length: int) -> float:
    """Returns the peak in MiB."""
    from precompute.config import EngineConfig
    from precompute.engine.score_conversion import ExpandedPrompt
    from precompute.engine.vllm_engine import Engine, EngineLimits, Prompt
    from precompute.engine.vllm_patch import start_capture

    settings = EngineConfig(
        dtype="float32", kv_cache_gib=0.25, enforce_eager=True, max_num_batched_tokens=LONG_TOKENS, max_num_seqs=1
    )
    engine = Engine(model_dir, settings, EngineLimits(LONG_TOKENS + 1, max_images=0, max_logprobs=TOP_K))
    if problem := start_capture(engine.collective_rpc):
        raise SystemExit(f"no capture in the engine: {problem}")

    def params(way: str, read: ExpandedPrompt) -> Any:
        ids = read.token_ids.tolist()
        num_captured = len(ids) - 1 if way == "in-engine" else 0
        return prefill_params(ids, VOCAB_SIZE, num_captured=num_captured, stock=way == "stock")

    prompt = Prompt(np.random.default_rng(0).integers(0, VOCAB_SIZE, length, np.int32), (), "benchmark")
    try:
        assert len(list(engine.run([("bare", prompt)], params))) == 1
        resting = reset_peak()
        assert len(list(engine.run([(way, prompt)], params))) == 1
        return status_mib("VmHWM") - resting
    finally:
        engine.close()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(_measure(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
