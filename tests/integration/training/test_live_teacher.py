"""Training from shards gives the losses of training with the teacher in memory."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor

from common.data.chat_encoding import EncodedChat, predicting_positions
from common.data.dataset import Dataset
from common.data.images import load_image
from common.data.model_images import LlavaImages
from common.data.samples import Sample
from precompute.config import PrecomputeConfig
from precompute.logits.run import run_capture
from tests.support.forward import expand
from tests.support.models import tiny_llava
from tests.support.training import LiveTeacher, losses, run_stages, stage, write_mixed_dataset
from train.data.sampling import shuffled_order
from train.model.student import load_student

NUM_STEPS, BATCH = 20, 8


def live_distillation(teacher_dir: Path, student_dir: Path, dataset_path: Path) -> list[float]:
    """Distils with both models in memory, one sample at a time, and returns KL(teacher || student) of each step."""
    teacher = LiveTeacher(teacher_dir, dataset_path.parent)
    student = load_student(student_dir, dtype=torch.float32)
    student.train()
    trained = [p for n, p in student.named_parameters() if "vision_tower" not in n]
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.999), eps=1e-4, weight_decay=0.0)
    dataset = Dataset.open(dataset_path, "kd")
    steps_per_epoch = -(-len(dataset) // BATCH)
    found = []
    for step in range(NUM_STEPS):
        epoch, position = divmod(step, steps_per_epoch)
        order = shuffled_order(len(dataset), 0, epoch, 8192)[position * BATCH : (position + 1) * BATCH]
        total, count = torch.zeros(()), 0
        for index in order:
            sample = dataset[int(index)]
            encoded, teacher_RV = teacher.logprobs(sample, 0)
            student_RV = student_logits(student, student_dir, sample, encoded, dataset_path.parent)
            vocab = teacher.encoder.vocab_size
            student_RV = student_RV[:, :vocab].log_softmax(-1)
            loss = torch.nn.functional.kl_div(student_RV, teacher_RV[:, :vocab], reduction="sum", log_target=True)
            total, count = total + loss, count + len(teacher_RV)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(total.detach()) / count)
    return found


def student_logits(
    student: torch.nn.Module, student_dir: Path, sample: Sample, encoded: EncodedChat, root: Path
) -> torch.Tensor:
    spec = LlavaImages.load(student_dir)
    assert spec is not None
    ids, positions = expand(encoded.input_ids, encoded.image_token_id, spec.tokens_per_image)
    inputs = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None]}
    if sample.images:
        images = [load_image(ref, root, "pad", spec.mean_rgb, "") for ref in sample.images]
        processor = AutoImageProcessor.from_pretrained(student_dir)
        inputs["pixel_values"] = processor(images=images, return_tensors="pt")["pixel_values"]
    rows = positions[predicting_positions(encoded.response_positions)]
    logits: torch.Tensor = student(**inputs).logits[0]
    return logits[torch.from_numpy(rows)]


@pytest.mark.vllm
def test_with_every_entry_kept_the_losses_equal_those_of_the_live_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    dataset = write_mixed_dataset(tmp_path / "data", 40)
    # The teacher's output layer has no padding, so that every entry belongs to the vocabulary; the student's is padded.
    teacher = tiny_llava(tmp_path / "teacher", seed=1, padded_rows=0)
    student = tiny_llava(tmp_path / "student", seed=2, num_layers=2)
    run_capture(
        PrecomputeConfig.model_validate(
            {
                "kind": "kd",
                "teacher": teacher,
                "dataset": dataset,
                "image_root": dataset.parent,
                "output": tmp_path / "scores",
                "top_k": "all",
                "precision": "fp32",
                "samples_per_shard": 16,
                "max_tokens": 512,
                "engine": {"dtype": "float32", "kv_cache_gib": 1, "enforce_eager": True},
            }
        ),
        progress=False,
    )
    config = stage(
        tmp_path / "run",
        student,
        stage="dense-to-dense",
        data={"shards": str(tmp_path / "scores"), "image_root": str(dataset.parent)},
        loss={"distillation": 1.0},
        optim={"max_steps": NUM_STEPS, "global_batch_size": BATCH},
    )
    run_stages([config], tmp_path / "scratch")
    expected = live_distillation(teacher, student, dataset)
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.9 * expected[0], "equal losses prove little unless they fall"
