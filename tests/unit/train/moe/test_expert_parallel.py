"""Tests of what DeepSpeed is told about a student with divided experts."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from common.errors import ConfigError
from tests.support.models import tiny_causal_lm, tiny_llava
from train.config import MoEConfig
from train.model.student import load_student
from train.moe.expert_parallel import check_same_num_ranks, expert_parallel_settings, split_experts
from train.moe.upcycle import upcycle


def sparse(directory: Path) -> PreTrainedModel:
    return upcycle(load_student(directory, dtype=torch.float32), MoEConfig(num_experts=4, top_k=2), seed=0)


@pytest.mark.parametrize("make", [tiny_llava, tiny_causal_lm])
def test_the_settings_match_the_sparse_blocks_and_their_routing(make: Callable[..., Path], tmp_path: Path) -> None:
    model = sparse(make(tmp_path, num_layers=2))
    settings = expert_parallel_settings(model, 2)
    blocks = [name for name, module in model.named_modules() if hasattr(module, "experts")]
    assert len(blocks) == 1
    assert re.fullmatch(settings["moe_layer_pattern"], blocks[0])
    assert not any(
        re.fullmatch(settings["moe_layer_pattern"], name) for name, _ in model.named_modules() if "vis" in name
    )
    assert (settings["autoep_size"], settings["top_k"], settings["route_norm"]) == (2, 2, True)


def test_experts_get_optimiser_groups_of_their_own_with_the_same_settings(tmp_path: Path) -> None:
    model = sparse(tiny_causal_lm(tmp_path, num_layers=2))
    parameters = dict(model.named_parameters())
    matrices = [p for p in parameters.values() if p.ndim > 1]
    vectors = [p for p in parameters.values() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    split = split_experts(model, groups, 2)
    assert [group["weight_decay"] for group in split] == [0.1, 0.1, 0.0, 0.0]
    assert [group.get("moe", False) for group in split] == [False, True, False, True]
    assert [group.get("name") for group in split] == [None, "ep_size_2", None, "ep_size_2"]
    experts = {id(p) for name, p in parameters.items() if ".mlp.experts." in name}
    assert {id(p) for group in split if group.get("moe") for p in group["params"]} == experts
    assert sorted(id(p) for group in split for p in group["params"]) == sorted(map(id, parameters.values()))


def test_divided_experts_are_continued_on_the_same_number_of_ranks() -> None:
    check_same_num_ranks(Path("checkpoint-3"), 2, 2)
    with pytest.raises(ConfigError, match=r"checkpoint-3: was written by 2 rank\(s\) .* this run has 4"):
        check_same_num_ranks(Path("checkpoint-3"), 2, 4)
