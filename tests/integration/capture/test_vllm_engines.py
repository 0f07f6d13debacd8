"""Tests that each start an engine: a text model's whole vocabulary, generation, and engines in other processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from common.data.dataset import Dataset
from common.errors import ModelError
from precompute.config import EngineConfig
from precompute.engine.generate import generate_answers
from precompute.logits.run import run_capture
from precompute.verify.logits import verify_logits
from precompute.verify.recompute_logits import recompute_logits
from tests.support.fake_teacher import conversation_records, make_config
from tests.support.hf_reference import ENGINE, TOP_K, assert_agrees, greedy_answers, read_rows, reference_rows
from tests.support.models import randomise, tiny_siglip
from train.choices import AdapterType
from train.model.compose import compose_student
from train.model.student import load_student, save_student

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[3]
NUM_SAMPLES = 9


@pytest.mark.usefixtures("engine_in_this_process")
def test_the_whole_vocabulary_of_a_text_model_sums_to_one(text_dir: Path, tmp_path: Path) -> None:
    records = [record for record in conversation_records(tmp_path, 9) if "image" not in record]
    config = make_config(tmp_path, text_dir, records, top_k="all", precision="fp32", engine=ENGINE)
    run_capture(config, progress=False)
    assert verify_logits(config.output, config.dataset, progress=False).ok
    model = AutoModelForCausalLM.from_pretrained(text_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(text_dir)
    rows = read_rows(config.output)
    assert len(rows) == 3
    for row in rows:
        tokens, logprobs_RV = reference_rows(model, tokenizer, row, 0, None)
        scores = row.conversations[0].scores
        assert row.conversations[0].encoded.response_ids.tolist() == tokens
        ids_RK, stored_RK = scores.topk()
        assert ids_RK.shape == (len(tokens), len(tokenizer))
        np.testing.assert_allclose(stored_RK, np.take_along_axis(logprobs_RV, ids_RK, axis=1), atol=1e-4)
        assert model.config.vocab_size == len(tokenizer) + 13
        assert not scores.rest_mass.any()


@pytest.mark.usefixtures("engine_in_this_process")
def test_generation_with_the_engine_in_this_process_is_transformers_greedy_text(
    llava_dir: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, llava_dir, conversation_records(tmp_path, 4))
    dataset = Dataset.open(config.dataset, "kd")
    samples = [dataset[index] for index in range(4)]
    engine = EngineConfig.model_validate(ENGINE)
    answers = generate_answers(llava_dir, samples, max_new_tokens=6, image_root=tmp_path, engine=engine)
    assert answers == greedy_answers(llava_dir, samples, tmp_path)


@pytest.mark.usefixtures("engine_in_this_process")
@pytest.mark.parametrize(
    ("tower", "adapter", "num_slices"),
    [("siglip", "linear", None), ("clip", "attention", None), ("siglip", "mlp", 4), ("clip", "attention", 4)],
)
def test_vllm_serves_students_of_every_tower_and_adapter(
    llava_dir: Path, tmp_path: Path, tower: str, adapter: AdapterType, num_slices: int | None
) -> None:
    """All parameters are drawn anew, but for the identity behind a linear projector."""
    vision = tiny_siglip(tmp_path / "siglip") if tower == "siglip" else llava_dir
    compose_student(vision, llava_dir, tmp_path / "student", seed=0, adapter=adapter, num_slices=num_slices)
    student = load_student(tmp_path / "student", dtype=torch.float32)
    randomise([(name, p) for name, p in student.named_parameters() if "projector.linear_2" not in name], seed=1)
    save_student(student, tmp_path / "student", tmp_path / "model")
    config = make_config(tmp_path, tmp_path / "model", conversation_records(tmp_path, 4), engine=ENGINE)
    if num_slices is not None:
        config = config.model_copy(update={"image_aspect_ratio": "keep", "max_tokens": 512})
    run_capture(config, progress=False)
    result = recompute_logits(config.output, tmp_path / "model", 4, progress=False)
    assert result.ok
    assert result.num_rows == 4
    assert result.max_own_difference < 1e-4


@pytest.mark.usefixtures("engine_in_this_process")
def test_vllm_refuses_replicas_of_a_dense_teacher(text_dir: Path, tmp_path: Path) -> None:
    """vLLM's data-parallel mode is for mixtures of experts. The setting reaches it, and its reason reaches the user."""
    records = [record for record in conversation_records(tmp_path, 4) if "image" not in record]
    engine = {**ENGINE, "data_parallel_size": 2}
    config = make_config(tmp_path, text_dir, records, num_nodes=2, engine=engine)
    with pytest.raises(ModelError, match="data parallel mode is not supported/useful for dense models"):
        run_capture(config, progress=False)


SEPARATE = """
import sys
from precompute.config import PrecomputeConfig
from precompute.logits.run import run_capture

if __name__ == "__main__":
    assert run_capture(PrecomputeConfig.model_validate_json(sys.argv[1]), progress=False).complete
"""


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_engines_in_processes_of_their_own_give_the_scores_of_transformers(
    num_ranks: int, llava_dir: Path, tmp_path: Path
) -> None:
    """One process has the model, or two share it by tensor parallelism and gather the logits."""
    records = conversation_records(tmp_path, NUM_SAMPLES)
    engine = {**ENGINE, "tensor_parallel_size": num_ranks, "capture": "in-engine"}
    config = make_config(tmp_path, llava_dir, records, top_k=TOP_K, precision="fp32", engine=engine)
    script = tmp_path / "separate.py"
    script.write_text(SEPARATE)
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "PYTHONPATH": str(ROOT)}
    if num_ranks > 1:
        # Without this, vLLM would want a NUMA node for each rank.
        cores = sorted(os.sched_getaffinity(0))
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in range(num_ranks))
    subprocess.run(
        [sys.executable, str(script), config.model_dump_json()], check=True, env={**os.environ, **settings}, cwd=ROOT
    )
    assert verify_logits(config.output, config.dataset, progress=False).ok
    model = LlavaForConditionalGeneration.from_pretrained(llava_dir, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(llava_dir)
    for row in read_rows(config.output):
        tokens, logprobs_RV = reference_rows(model, processor, row, 0, tmp_path)
        assert_agrees(row.conversations[0], tokens, logprobs_RV, len(processor.tokenizer), 1e-4)
