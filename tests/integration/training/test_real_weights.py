"""SmolLM2-135M-Instruct on real text: its scores equal those of transformers, and a student learns from them."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from precompute.logits.run import run_capture
from precompute.verify.logits import verify_logits
from precompute.verify.recompute_logits import recompute_logits
from tests.support.fake_teacher import make_config
from tests.support.hf_reference import assert_agrees, read_rows, reference_rows
from tests.support.real_weights import real_conversations, smollm2_dir
from tests.support.training import run_stages, stage
from train.data.sampling import split_validation
from train.model.student import save_student

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TOP_K = 32


class Scored(NamedTuple):
    """The output of a capture, its dataset and its teacher."""

    output: Path
    dataset: Path
    teacher: Path


@pytest.fixture(scope="module")
def scored(
    tmp_path_factory: pytest.TempPathFactory,
    engine_in_this_process: None,  # noqa: ARG001 - a fixture that is used for its effect
) -> Scored:
    root = tmp_path_factory.mktemp("real")
    teacher = smollm2_dir(tmp_path_factory.getbasetemp())
    engine = {"dtype": "float32", "kv_cache_gib": 1, "max_num_seqs": 8, "enforce_eager": True}
    records = real_conversations(22)
    settings = {"top_k": TOP_K, "precision": "fp32", "samples_per_shard": 8, "max_tokens": 1024, "engine": engine}
    config = make_config(root, teacher, records, **settings)
    run_capture(config, progress=False)
    assert isinstance(config.output, Path)
    assert isinstance(config.dataset, Path)
    return Scored(config.output, config.dataset, teacher)


def test_scores_of_a_real_model_on_real_text_equal_those_of_transformers(scored: Scored) -> None:
    assert verify_logits(scored.output, scored.dataset, progress=False).ok
    model = AutoModelForCausalLM.from_pretrained(scored.teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(scored.teacher)
    rows = read_rows(scored.output)
    num_tokens = 0
    for row in rows:
        tokens, logprobs_RV = reference_rows(model, tokenizer, row, 0, None)
        assert_agrees(row.conversations[0], tokens, logprobs_RV, len(tokenizer), 1e-3, top_k=TOP_K)
        num_tokens += len(tokens)
    assert num_tokens > 1500
    assert max(len(row.sample.conversations[0]) for row in rows) == 4


def test_a_real_model_predicts_the_text_better_than_chance(scored: Scored) -> None:
    """Finds a shift by one token, which passes every check of consistency."""
    own = np.concatenate([row.conversations[0].scores.own_logprobs for row in read_rows(scored.output)])
    kept = np.concatenate([1 - row.conversations[0].scores.rest_mass for row in read_rows(scored.output)])
    assert -own.mean() < 4.0  # uniform over 49,152 tokens would be 10.8
    assert kept.mean() > 0.8


def test_recomputed_rows_of_a_real_model_agree(scored: Scored) -> None:
    result = recompute_logits(scored.output, scored.teacher, 4, progress=False)
    assert result.ok
    assert result.num_rows == 4


def keep_layers(teacher: Path, out: Path, layers: tuple[int, ...]) -> Path:
    """Saves the teacher with some of its layers only."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
    for position, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = position
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in layers]
    save_student(model, teacher, out)
    return out


def held_out_kl(student: Path, output: Path, held_out: list[int]) -> float:
    """Returns the mean KL(teacher || student) of held-out rows over kept entries and rest, in float64 numpy."""
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    rows = read_rows(output)
    total, count = 0.0, 0
    for index in held_out:
        conversation = rows[index].conversations[0]
        ids = torch.from_numpy(conversation.encoded.input_ids.astype(np.int64))[None]
        with torch.no_grad():
            logprobs = model(input_ids=ids).logits[0].log_softmax(-1).double().numpy()
        kept_ids, kept = conversation.scores.topk()
        student_RK = np.take_along_axis(logprobs[conversation.encoded.response_positions - 1], kept_ids, axis=1)
        p, rest = np.exp(kept.astype(np.float64)), conversation.scores.rest_mass.astype(np.float64)
        student_rest = 1.0 - np.exp(student_RK).sum(axis=1)
        total += float((p * (kept - student_RK)).sum() + (rest * np.log(rest / student_rest)).sum())
        count += len(rest)
    return total / count


def test_distillation_lowers_the_kl_on_held_out_text(scored: Scored, tmp_path: Path) -> None:
    student = keep_layers(scored.teacher, tmp_path / "student", (0, 1, 14, 28, 29))
    run_config = stage(
        tmp_path / "run",
        student,
        stage="dense-to-dense",
        trainable=["language_model"],
        data={"shards": str(scored.output), "validation_fraction": 0.2},
        loss={"distillation": 1.0},
        optim={"learning_rate": 3e-4, "global_batch_size": 6, "micro_batch_size": 2, "max_steps": 12},
    )
    run_stages([run_config], tmp_path / "scratch")
    _, held_out = split_validation(len(read_rows(scored.output)), 0.2)
    before = held_out_kl(student, scored.output, held_out)
    after = held_out_kl(tmp_path / "run" / "final", scored.output, held_out)
    assert after < 0.8 * before
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert next(m["eval_distillation"] for m in reversed(logged) if "eval_distillation" in m) == pytest.approx(
        after, rel=1e-3
    )
