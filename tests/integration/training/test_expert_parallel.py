"""Experts that DeepSpeed divides among ranks train to the same losses, metrics and weights as undivided ones."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, PreTrainedModel, Qwen2MoeModel, Qwen3MoeForCausalLM

from common.errors import ConfigError
from tests.integration.training.test_parallel import make_sparse
from tests.support.models import tiny_causal_lm, tiny_llava
from tests.support.training import largest_difference, losses, run_stages, stage, weights, write_mixed_dataset
from train.config import MoEConfig, TrainConfig
from train.model.export import export_student
from train.model.student import language_model, load_student, set_trainable
from train.moe.expert_parallel import check_expert_parallel_supported
from train.moe.upcycle import upcycle
from train.run.stage import train_stage

NUM_STEPS = 4
# Student and ZeRO stage. The LLaVA has a Qwen2-MoE with its zero shared expert and a tied output layer; the text model
# is a Qwen3-MoE.
CASES = [("llava", 1), ("llava", 3), ("text", 2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains undivided experts on one rank, divided ones on two. In the last step of the epoch a rank has no sample."""
    root = tmp_path_factory.mktemp("divided")
    mixed = write_mixed_dataset(root / "data", 26)
    records = [record for record in json.loads(mixed.read_text()) if "image" not in record]
    (root / "data" / "text.json").write_text(json.dumps(records + [{**r, "id": r["id"] + "b"} for r in records]))
    students = {
        "llava": make_sparse(tiny_llava(root / "dense-llava", tied=True), root / "llava"),
        "text": make_sparse(tiny_causal_lm(root / "dense-text", "qwen3"), root / "text"),
    }

    def config(name: str, output: str, zero: int, size: int) -> dict[str, Any]:
        data: dict[str, Any] = {"dataset": str(root / "data" / "text.json")}
        if name == "llava":
            data = {"dataset": str(mixed), "image_root": str(root / "data"), "validation_fraction": 0.1}
        return stage(
            root / output,
            students[name],
            trainable=["language_model"],
            data=data,
            loss={"cross_entropy": 1.0, "balance": 0.01, "router_z": 0.001},
            optim={"max_steps": NUM_STEPS, "weight_decay": 0.1},
            # Gradient norms are above 1, so that gradients are clipped.
            run={
                "zero_stage": zero,
                "save_steps": 2,
                "eval_steps": 2,
                "expert_parallel_size": size,
                "activation_checkpointing": zero == 3,
            },
        )

    run_stages([config(name, f"{name}-undivided", 1, 1) for name in students], root / "scratch", 1)
    divided = [config(name, f"{name}-{zero}", zero, 2) for name, zero in CASES]
    run_stages(divided, root / "scratch", 2)
    # Turns the runs back into ones that ended after their second step.
    for name, zero in CASES:
        output = root / f"{name}-{zero}"
        shutil.copytree(output, root / f"{name}-{zero}-uninterrupted")
        shutil.rmtree(output / "checkpoints" / f"checkpoint-{NUM_STEPS}")
        shutil.rmtree(output / "final")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "4")
        # The other three ranks do not exist.
        patch.setattr("deepspeed.comm.init_distributed", lambda **_: None)
        patch.setattr("torch.distributed.new_group", lambda **_: None)
        with pytest.raises(ConfigError) as refused:
            train_stage(TrainConfig.model_validate(divided[0]))
    (root / "refused").write_text(str(refused.value))
    run_stages(divided, root / "scratch", 2)
    return root


def metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero"), CASES)
def test_divided_experts_train_as_undivided_ones(runs: Path, name: str, zero: int) -> None:
    undivided, divided = runs / f"{name}-undivided", runs / f"{name}-{zero}-uninterrupted"
    assert losses(divided) == pytest.approx(losses(undivided), rel=2e-6)
    assert len(losses(divided)) == NUM_STEPS
    assert weights(divided)
    # The learning rate is 1e-3.
    assert largest_difference(weights(divided), weights(undivided)) < 5e-6
    for expected, found in zip(metrics(undivided), metrics(divided), strict=True):
        assert expected.keys() == found.keys()
        for key in expected.keys() - {"tokens_per_s", "wait_fraction", "train_runtime"}:
            if not key.endswith(("_per_second", "runtime")):
                assert found[key] == pytest.approx(expected[key], rel=2e-5), key
    assert max(line.get("grad_norm", 0.0) for line in metrics(undivided)) > 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero"), CASES)
def test_the_loads_of_divided_experts_are_counted_over_all_ranks(runs: Path, name: str, zero: int) -> None:
    for step in (2, NUM_STEPS):
        path = Path("checkpoints", f"checkpoint-{step}", "expert-load.json")
        found = json.loads((runs / f"{name}-{zero}-uninterrupted" / path).read_text())
        assert found == json.loads((runs / f"{name}-undivided" / path).read_text())
        assert (found["tokens"]["image"] > 0) == (name == "llava")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero"), [("llava", 1), ("text", 2)])
def test_the_experts_were_divided(runs: Path, name: str, zero: int) -> None:
    """Looks at DeepSpeed's files, where each divided expert has its own and the rest of the model has none."""
    (state,) = (runs / f"{name}-{zero}-uninterrupted" / "checkpoints" / f"checkpoint-{NUM_STEPS}").glob("global_step*")
    assert len(list(state.glob("layer_*_expert_*_model_states.pt"))) == 2 * 8
    module = torch.load(state / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    assert not any(".experts." in name for name in module)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero"), CASES)
def test_the_result_is_a_plain_model_directory(runs: Path, name: str, zero: int, tmp_path: Path) -> None:
    output = runs / f"{name}-{zero}-uninterrupted"
    model = load_student(output / "final", dtype=torch.float32)
    assert type(model) is (LlavaForConditionalGeneration if name == "llava" else Qwen3MoeForCausalLM)
    if name == "llava":
        assert type(language_model(model)) is Qwen2MoeModel
    export_student(output / "checkpoints" / f"checkpoint-{NUM_STEPS}", tmp_path / "exported")
    exported = load_student(tmp_path / "exported", dtype=torch.float32).state_dict()
    assert exported.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, exported[key]) for key, tensor in model.state_dict().items())
    config = json.loads((output / "final" / "config.json").read_text())
    assert config == json.loads((runs / f"{name}-undivided" / "final" / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "zero"), CASES)
def test_a_continued_run_ends_with_the_same_weights_bit_for_bit(runs: Path, name: str, zero: int) -> None:
    output = runs / f"{name}-{zero}"
    starts = [start["step"] for start in json.loads((output / "starts.json").read_text())]
    assert starts == [0, 2]
    assert largest_difference(weights(output), weights(runs / f"{name}-{zero}-uninterrupted")) == 0.0


@pytest.mark.slow
def test_another_number_of_ranks_is_refused(runs: Path) -> None:
    assert (
        "was written by 2 rank(s) with divided experts, this run has 4; continue it on 2"
        in (runs / "refused").read_text()
    )


# Refusals


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    dense = load_student(tiny_llava(tmp_path_factory.mktemp("llava")), dtype=torch.float32)
    return upcycle(dense, MoEConfig(), seed=0)


def test_experts_that_can_be_divided_are_accepted(sparse: PreTrainedModel) -> None:
    set_trainable(sparse, frozenset({"experts", "router"}))
    for size, num_ranks in ((2, 2), (2, 4), (4, 4)):
        check_expert_parallel_supported(sparse, size, num_ranks=num_ranks, zero_stage=2)


@pytest.mark.parametrize(
    ("size", "num_ranks", "zero", "groups", "problem"),
    [
        (2, 3, 2, {"experts"}, r"does not divide the 3 rank\(s\) of this run"),
        (3, 3, 2, {"experts"}, "does not divide the student's 4 experts"),
        (8, 8, 2, {"experts"}, "does not divide the student's 4 experts"),
        (2, 2, 2, {"adapter", "router"}, "this stage trains no expert"),
        (2, 2, 0, {"experts"}, r"needs run\.zero_stage 1, 2 or 3"),
    ],
)
def test_experts_that_cannot_be_divided_are_refused(  # noqa: PLR0913, PLR0917 - one argument per column of the table
    sparse: PreTrainedModel, size: int, num_ranks: int, zero: int, groups: set[str], problem: str
) -> None:
    set_trainable(sparse, frozenset(groups))
    with pytest.raises(ConfigError, match=rf"run\.expert_parallel_size {size}: {problem}"):
        check_expert_parallel_supported(sparse, size, num_ranks=num_ranks, zero_stage=zero)


def test_a_dense_student_has_no_experts_to_divide(tmp_path: Path) -> None:
    dense = load_student(tiny_causal_lm(tmp_path, "llama"), dtype=torch.float32)
    with pytest.raises(ConfigError, match="text model is llama, expected qwen2_moe or qwen3_moe"):
        check_expert_parallel_supported(dense, 2, num_ranks=2, zero_stage=2)


def test_the_key_in_the_deepspeed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_mixed_dataset(tmp_path / "data", 8)
    (tmp_path / "ds.json").write_text(json.dumps({"expert_parallel": {"enabled": True, "autoep_size": 2}}))
    config = stage(
        tmp_path / "out",
        tiny_llava(tmp_path / "dense"),
        data={"dataset": str(dataset), "image_root": str(dataset.parent)},
        loss={"cross_entropy": 1.0},
        run={"deepspeed": str(tmp_path / "ds.json")},
    )
    for variable, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=r"expert_parallel follows from run\.expert_parallel_size"):
        train_stage(TrainConfig.model_validate(config))
