"""The dense-to-sparse stage: the student is upcycled, trained and exported, and generates in both engines."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from common.data.chat_encoding import ChatEncoder
from common.data.dataset import Dataset
from common.data.images import load_image
from common.data.model_images import LlavaImages
from tests.support.forward import expand
from tests.support.models import tiny_llava
from tests.support.training import (
    ROOT,
    LiveTeacher,
    environment,
    losses,
    run_stages,
    stage,
    weights,
    write_mixed_dataset,
)
from train.model.export import export_student
from train.model.student import load_student

ANSWER_TOKENS = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trains a dense student, and the same one dense-to-sparse under ZeRO-1 and ZeRO-3."""
    root = tmp_path_factory.mktemp("sparse")
    teacher = tiny_llava(root / "teacher", seed=1)
    student = tiny_llava(root / "student", seed=2)
    dataset = write_mixed_dataset(root / "data", 24)
    LiveTeacher(teacher, root / "data").write_output(root / "scores", dataset, "kd", top_k=16)
    common = {
        "stage": "dense-to-sparse",
        "data": {"shards": str(root / "scores"), "image_root": str(root / "data")},
        "loss": {"distillation": 1.0, "cross_entropy": 1.0, "balance": 0.01},
        "moe": {"num_experts": 4, "top_k": 2, "layers": "every-second"},
        "optim": {"max_steps": 4},
    }
    dense = stage(root / "dense", student, **{**common, "stage": "sft", "moe": None, "optim": {"max_steps": 1}})
    dense["loss"]["balance"] = 0.0
    configs = [stage(root / f"zero{zero}", student, **common, run={"zero_stage": zero}) for zero in (1, 3)]
    run_stages([{k: v for k, v in dense.items() if v is not None}, *configs], root / "scratch")
    return root


@pytest.mark.slow
def test_the_first_loss_of_the_sparse_student_equals_that_of_the_dense_one(root: Path) -> None:
    sparse_loss, dense_loss = losses(root / "zero1")[0], losses(root / "dense")[0]
    metrics = (root / "zero1" / "metrics.jsonl").read_text().splitlines()[0]
    assert '"balance"' in metrics
    # The balance term adds 0.01 times a number between top_k (even) and the number of experts (collapsed).
    assert dense_loss + 0.01 * 2 * 0.99 <= sparse_loss <= dense_loss + 0.01 * 4


@pytest.mark.slow
def test_zero_3_upcycles_and_trains_as_zero_1(root: Path) -> None:
    assert losses(root / "zero3") == pytest.approx(losses(root / "zero1"), rel=2e-6)
    assert losses(root / "zero1")[-1] < losses(root / "zero1")[0]


@pytest.mark.slow
def test_only_experts_routers_and_adapter_change(root: Path) -> None:
    before, after = load_file(root / "student" / "model.safetensors"), weights(root / "zero3")
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert all(any(part in name for part in (".mlp.", "multi_modal_projector")) for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    # Layers 1 and 3 are sparse, so their dense networks are gone; layers 0 and 2 have not changed.
    assert not any(f"layers.{dense}." in name for dense in (0, 2) for name in changed)
    assert all(not after[name].any() for name in after if ".shared_expert." in name)
    experts = [after[name] for name in after if "layers.1.mlp.experts" in name and "down_proj" in name]
    assert len(experts) == 4
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.vllm
def test_the_trained_sparse_student_generates_the_same_text_in_transformers_and_vllm(root: Path) -> None:
    exported = root / "exported"
    export_student(root / "zero3", exported)
    dataset = Dataset.open(root / "data" / "kd.json", "kd")
    samples = [dataset[i] for i in range(12)]
    encoder, spec = ChatEncoder.load(exported), LlavaImages.load(exported)
    assert spec is not None
    model = load_student(exported, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(exported)
    expected = []
    for sample in samples:
        ids = encoder.encode_prompt(sample.conversations[0][:-1])
        ids, _ = expand(ids, encoder.image_token_id, spec.tokens_per_image)
        inputs = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None]}
        if sample.images:
            images = [load_image(ref, root / "data", "pad", spec.mean_rgb, "") for ref in sample.images]
            inputs["pixel_values"] = processor(images=images, return_tensors="pt")["pixel_values"]
        generated = model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        expected.append(encoder.tokenizer.decode(generated[0, len(ids) :], skip_special_tokens=True))
    assert len(set(expected)) > 1
    script = f"""
import json, sys
from pathlib import Path
from common.data.dataset import Dataset
from precompute.config import EngineConfig
from precompute.engine.generate import generate_answers
dataset = Dataset.open(Path({str(root / "data" / "kd.json")!r}), "kd")
generated = generate_answers(
    Path({str(exported)!r}), [dataset[i] for i in range(12)], max_new_tokens={ANSWER_TOKENS}, max_tokens=256,
    image_root=Path({str(root / "data")!r}),
    engine=EngineConfig(dtype="float32", kv_cache_gib=1, enforce_eager=True),
)
Path({str(root / "generated.json")!r}).write_text(json.dumps(generated))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((root / "generated.json").read_text()) == expected
