"""SmolLM2-135M-Instruct over real text: what `precompute-logits` stores is what transformers computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from precompute.config import PrecomputeConfig
from precompute.recompute import recompute
from precompute.run import run
from precompute.verify import verify
from tests.precompute.hf_reference import assert_agrees, reference_rows, rows_of
from tests.precompute.stand_in import make_config
from tests.real_weights import real_conversations, smollm2_dir

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TOP_K = 32


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, engine_in_this_process: None) -> tuple[PrecomputeConfig, Path]:
    root = tmp_path_factory.mktemp("real")
    teacher = smollm2_dir(tmp_path_factory.getbasetemp())
    engine = {"dtype": "float32", "kv_cache_gib": 1, "max_num_seqs": 8, "enforce_eager": True}
    records = real_conversations(22)
    config = make_config(root, teacher, records, top_k=TOP_K, samples_per_shard=8, max_tokens=1024, engine=engine)
    run(config, progress=False)
    return config, teacher


def test_scores_of_a_real_model_over_real_text_are_those_of_transformers(scored: tuple[PrecomputeConfig, Path]) -> None:
    config, teacher = scored
    assert verify(config.output, config.dataset, progress=False).ok
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    rows = rows_of(config.output)
    num_tokens = 0
    for row in rows:
        tokens, logprobs_RV = reference_rows(model, tokenizer, row, 0, None)
        assert_agrees(row.conversations[0], tokens, logprobs_RV, len(tokenizer), 1e-3, top_k=TOP_K)
        num_tokens += len(tokens)
    assert num_tokens > 1500
    assert max(len(row.sample.conversations[0]) for row in rows) == 4


def test_a_real_model_knows_the_text_better_than_chance(scored: tuple[PrecomputeConfig, Path]) -> None:
    """A shift by one token would leave every check of consistency whole, and this one not."""
    own = np.concatenate([row.conversations[0].scores.own_logprobs for row in rows_of(scored[0].output)])
    kept = np.concatenate([1 - row.conversations[0].scores.rest_mass for row in rows_of(scored[0].output)])
    assert -own.mean() < 4.0  # uniform over 49,152 tokens would be 10.8
    assert kept.mean() > 0.8


def test_recomputed_rows_of_a_real_model_agree(scored: tuple[PrecomputeConfig, Path]) -> None:
    config, teacher = scored
    result = recompute(config.output, teacher, 4, progress=False)
    assert result.ok
    assert result.num_rows == 4
