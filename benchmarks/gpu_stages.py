"""The parts of `benchmarks.gpu` that run students: features of a vision tower, and stages of the real trainer.

python -m benchmarks.gpu_stages SETTINGS OUT     one stage, in a process of its own
"""

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.gpu import DEVICE, Result
from tests.support.models import tiny_llava

MIB = 2**20
NUM_STEPS, NUM_WARM_STEPS = 12, 4
NUM_SAMPLES = 24
# Layers of a 0.5B student, though only 12 of them. The words give it that student's vocabulary, of which the byte-level
# tokenizer of the tests has the first 300.
STUDENT = {
    "num_layers": 12,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tied": True,
}
NUM_EXTRA_WORDS = 151_600
# ViT-L/14 at 336 pixels.
TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


# Features


def check_features(root: Path, *, quick: bool) -> Result:
    """Compares features that were computed ahead, 16 images at a time, with those of a live tower in bfloat16.

    Both go through the projector as in training: the cached ones through a student without a tower, the live ones
    through one with a tower.
    """
    from common.shards.encoder_identity import compute_encoder_identity
    from precompute.features.vision_tower import VisionTower
    from train.model.student import load_student, set_trainable

    model_dir = tiny_llava(root) if quick else _llava_with_large_tower(root)
    tower = VisionTower(model_dir, compute_encoder_identity(model_dir, "pad"))
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (400, 400, 3), dtype=np.uint8)) for _ in range(16)]
    pixels = tower.preprocess(images)
    cached = torch.from_numpy(tower.encode(pixels)).to(DEVICE, torch.bfloat16)
    students = {}
    for live in (True, False):
        students[live] = load_student(model_dir, dtype=torch.bfloat16, tower=live).to(DEVICE).train()
        set_trainable(students[live], frozenset({"adapter", "language_model"}))
        if tower.description.endswith("flash_attention_2"):
            students[live].set_attn_implementation("flash_attention_2")
    from_cache = _projected(students[False], cached)
    found: Result = {"num_images": len(images), "tower": tower.description}
    for size in (16, 4, 1):
        parts = pixels.to(DEVICE, torch.bfloat16).split(size)
        live_output = torch.cat([_projected(students[True], part) for part in parts])
        in_parts = torch.cat([_projected(students[False], part) for part in cached.split(size)])
        found[f"live, {size} at a time"] = {
            "bit_equal": torch.equal(live_output, in_parts),
            "max_difference": float((live_output - in_parts).abs().max()),
            "max_value": float(in_parts.abs().max()),
            "projector_alone_bit_equal": torch.equal(from_cache, in_parts),
        }
    return found


def _projected(student: Any, pixel_values: Tensor) -> Tensor:
    """Returns what the language model gets for each image, float32."""
    features = student.get_image_features(pixel_values=pixel_values)
    features = getattr(features, "pooler_output", features)
    return torch.stack(list(features)).detach().float()


def _llava_with_large_tower(root: Path) -> Path:
    """Saves a random LLaVA with a tower of ViT-L/14's shape and a tiny language model; returns its directory."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    tiny_llava(root)
    config = LlavaConfig.from_pretrained(root)
    config.vision_config = CLIPVisionConfig(**TOWER)
    config.image_seq_length = (TOWER["image_size"] // TOWER["patch_size"]) ** 2
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(root)
    size = TOWER["image_size"]
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    for name in ("processor_config.json", "preprocessor_config.json"):
        (root / name).unlink(missing_ok=True)
    processor.save_pretrained(root)
    return root


# Training


def write_data(root: Path, stages: dict[str, Any], *, quick: bool) -> Result:
    """Writes a random student, samples and a tiny teacher's scores; fills `stages` with the settings of each stage.

    The teacher shares the student's tokenizer, and its scores are made on the CPU.
    """
    from tests.support.real_weights import real_conversations
    from tests.support.training import LiveTeacher, stage

    if importlib.util.find_spec("deepspeed") is None:
        raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")
    num_words = 0 if quick else NUM_EXTRA_WORDS
    sizes: dict[str, Any] = {} if quick else STUDENT
    student = tiny_llava(root / "student", padded_rows=num_words, **sizes)
    teacher = tiny_llava(root / "teacher", padded_rows=num_words, num_layers=2, seed=1)
    for directory in (student, teacher):
        _add_words(directory, num_words)
    rng = np.random.default_rng(0)
    records = real_conversations(NUM_SAMPLES, max_chars=60 if quick else 600)
    for number, record in enumerate(records[::2]):
        Image.fromarray(rng.integers(0, 255, (60, 40, 3), dtype=np.uint8)).save(root / f"{number}.png")
        record["images"] = [f"{number}.png"]
        record["messages"][0]["content"] = "<image>\n" + record["messages"][0]["content"]
    dataset = root / "samples.json"
    dataset.write_text(json.dumps(records))
    LiveTeacher(teacher, root).write_output(root / "scores", dataset, "kd", top_k=64)
    for kind in ("dense", "sparse"):
        for batching in ("padded", "packed"):
            sparse = {"moe": {"num_experts": 4, "top_k": 2}} if kind == "sparse" else {}
            stages[f"{kind}, {batching}"] = stage(
                root / f"{kind}-{batching}",
                student,
                stage="dense-to-sparse" if sparse else "dense-to-dense",
                data={"shards": str(root / "scores"), "image_root": str(root), "batching": batching},
                loss={"distillation": 1.0, **({"balance": 0.01} if sparse else {})},
                optim={"learning_rate": 1e-4, "micro_batch_size": 4, "max_steps": NUM_STEPS, "eps": 1e-8},
                run={"precision": "bf16", "zero_stage": 2, "activation_checkpointing": True, "report_to": []},
                **sparse,
            )
    return {"num_samples": len(records)}


def _add_words(directory: Path, num_words: int) -> None:
    """Appends words that no text is encoded with to the vocabulary of a tokenizer."""
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf-8"))
    vocab = tokenizer["model"]["vocab"]
    # Added tokens that the vocabulary lacks get ids after it, so without this line the new words would shift their ids.
    vocab |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    first = max(vocab.values()) + 1
    vocab |= {f"<word {number}>": first + number for number in range(num_words)}
    path.write_text(json.dumps(tokenizer), "utf-8")


def train_in_child(settings: dict[str, Any], *, timeout_s: float) -> Result:
    """Trains a stage in a new process, and returns its speed, losses and memory."""
    output = Path(settings["output"])
    settings_path, result_path = (output.with_name(f"{output.name}-{name}.json") for name in ("settings", "measured"))
    settings_path.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "benchmarks.gpu_stages", str(settings_path), str(result_path)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {process.stderr[-2500:]}")
    found: Result = json.loads(result_path.read_text())
    return found


def _train(settings_path: Path, result_path: Path) -> None:
    import train.run.stage
    from train.config import TrainConfig
    from train.memory_estimate import estimate_training_memory
    from train.run.trainer import StudentTrainer

    config = TrainConfig.model_validate(json.loads(settings_path.read_text()))
    marks: list[dict[str, float]] = []

    class MeasuredTrainer(StudentTrainer):
        """Records time, loss and memory after each step."""

        attention = ""

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)
            if "tokens_per_s" not in logs:
                return
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            mark = {"s": time.perf_counter(), "loss": logs["loss"], "tokens_per_s": logs["tokens_per_s"]}
            if DEVICE == "cuda":
                mark["held"], mark["peak"] = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
            marks.append(mark)
            text_config = self.accelerator.unwrap_model(self.model).config.get_text_config()
            MeasuredTrainer.attention = text_config._attn_implementation  # noqa: SLF001 - it has no public name

    train.run.stage.StudentTrainer = MeasuredTrainer  # type: ignore[attr-defined]
    train.run.stage.train_stage(config)
    estimate = estimate_training_memory(config.model.path, 0, config=config, gpus=(1,))
    parameters, trained = (row.value for row in estimate.parameters.estimates[:2])
    estimated_mib = next(row.num_bytes for row in estimate.memory if row.chosen) / MIB
    steps = marks[NUM_WARM_STEPS:]
    found: Result = {
        "attention": MeasuredTrainer.attention,
        "parameters": parameters,
        "trained_parameters": trained,
        "steps_per_s": round((len(steps) - 1) / (steps[-1]["s"] - steps[0]["s"]), 3),
        "tokens_per_s": round(statistics.median(mark["tokens_per_s"] for mark in steps)),
        "first_loss": marks[0]["loss"],
        "last_loss": marks[-1]["loss"],
        "estimated_mib": round(estimated_mib, 1),
    }
    if DEVICE == "cuda":
        found |= {
            "held_between_steps_mib": round(marks[-1]["held"] / MIB, 1),
            "peak_mib": round(marks[-1]["peak"] / MIB, 1),
            "held_vs_estimate": round(marks[-1]["held"] / MIB / estimated_mib, 3),
            "peak_vs_estimate": round(marks[-1]["peak"] / MIB / estimated_mib, 3),
        }
    result_path.write_text(json.dumps(found))


if __name__ == "__main__":
    _train(*map(Path, sys.argv[1:]))
