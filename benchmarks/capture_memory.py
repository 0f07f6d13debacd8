"""Peak memory of scoring one long prompt over a large vocabulary, above what the engine holds at rest.

    python -m benchmarks.capture_memory

A Llama of one narrow layer with random weights and 151,936 words, prompts of 1,024 and of 4,096 tokens read in one
step, every row scored, k = 64: in the engine, and by vLLM's own prompt log-probs. Each has a process of its own, since
an allocator keeps what it once had. The engine rests after it has read the same prompt without scoring; the peak is the
process's highest resident set from there on (VmHWM, set back before) less its resident set at rest.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.memory import forget_peak, status_mib

TOP_K = 64
VOCAB_SIZE = 151_936
LONG, SHORT = 4096, 1024


def main() -> None:
    """Prints one JSON line."""
    with tempfile.TemporaryDirectory() as directory:
        model_dir = _model(Path(directory))
        peak = {
            (way, length): _in_process_of_its_own(model_dir, way, length)
            for way in ("in-engine", "stock")
            for length in (SHORT, LONG)
        }
    result = {
        "peak_vs_stock": round(peak["in-engine", LONG] / peak["stock", LONG], 4),
        "peak_mib": round(peak["in-engine", LONG], 1),
        "peak_mib_1024_tokens": round(peak["in-engine", SHORT], 1),
        "stock_peak_mib": round(peak["stock", LONG], 1),
        "stock_peak_mib_1024_tokens": round(peak["stock", SHORT], 1),
    }
    print(json.dumps(result))


def _in_process_of_its_own(model_dir: Path, way: str, length: int) -> float:
    command = [sys.executable, "-m", "benchmarks.capture_memory", str(model_dir), way, str(length)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def _model(directory: Path) -> Path:
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
        max_position_embeddings=2 * LONG,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _measure(model_dir: Path, way: str, length: int) -> float:
    """Peak in MiB."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from precompute.config import EngineConfig
    from precompute.engine.row_request import RowRequest
    from precompute.engine.vllm_engine import Engine, EngineLimits, Prompt
    from precompute.engine.vllm_patch import start_capture

    settings = EngineConfig(
        dtype="float32", kv_cache_gib=0.25, enforce_eager=True, max_num_batched_tokens=LONG, max_num_seqs=1
    )
    engine = Engine(model_dir, settings, EngineLimits(LONG + 1, max_images=0, max_logprobs=TOP_K))
    if lacks := start_capture(engine.collective_rpc):
        raise SystemExit(f"no capture in the engine: {lacks}")

    def params(way: str, ids: list[int]) -> SamplingParams:
        made = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        made.output_kind = RequestOutputKind.FINAL_ONLY
        if way == "stock":
            made.prompt_logprobs, made.flat_logprobs = TOP_K, True
        elif way == "in-engine":
            rows = np.arange(len(ids) - 1, dtype=np.int32)
            made.extra_args = RowRequest(rows, np.array(ids[1:], np.int32), VOCAB_SIZE, TOP_K).extra_args()
        return made

    prompt = Prompt(np.random.default_rng(0).integers(0, VOCAB_SIZE, length, np.int32), (), "benchmark")
    try:
        assert len(list(engine.run([("bare", prompt)], params))) == 1
        resting = forget_peak()
        assert len(list(engine.run([(way, prompt)], params))) == 1
        return status_mib("VmHWM") - resting
    finally:
        engine.close()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        print(_measure(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
