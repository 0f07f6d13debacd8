"""The text half of the results: SmolLM2-135M-Instruct on documentation of the standard library.

    docstrings ─> train.jsonl, held_out.jsonl          no document is in both
    teacher ─> student: some of its layers, all of its embeddings
            ─> scores/TARGET, once for all seeds
            ─> log-probs of held-out text by transformers, once
    train, each target x each seed ─> metrics of each student on held-out text

The seed of a run decides its order of samples. All runs of a seed see the same samples in the same steps.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.results.measures import mean_divergence, token_metrics
from benchmarks.results.steps import CONFIGS, CROSS_ENTROPY_ALONE, SAVE_LAST_STEP, Steps
from common.data.chat_encoding import ChatEncoder, EncodedChat, predicting_positions
from common.data.dataset import Dataset
from tests.support.real_weights import real_conversations, smollm2_dir, write_jsonl
from train.model.student import load_student, save_student

# The number of all documents. Long ones are cut, so that samples have similar lengths.
NUM_RECORDS = 338
MAX_CHARS = 400
HELD_OUT_EVERY = 12
# Every fifth layer, and the last one, because the teacher's final norm and output layer were trained on its output.
LAYERS = (0, 5, 10, 15, 20, 25, 29)

# Captures of the distribution at each token. The full one is in fp16, because 49,152 entries in steps of q8 would
# be off by a tenth of a nat; the others have the default precision.
TARGETS: dict[str, dict[str, Any]] = {
    "full": {"top_k": "all", "precision": "fp16"},
    "top-64": {"top_k": 64},
    "top-8": {"top_k": 8},
    "top-p": {"top_k": 64, "top_p": 0.95, "min_k": 1},
    "sampled": {"top_k": 0, "num_draws": 37},
}


@dataclass(frozen=True)
class TextSizes:
    """Numbers of samples and steps; `batch_size` is in samples a step."""

    train_samples: int
    held_out_samples: int
    steps: int
    batch_size: int
    learning_rate: float


FULL = TextSizes(train_samples=68, held_out_samples=28, steps=40, batch_size=2, learning_rate=1e-3)
QUICK = TextSizes(train_samples=8, held_out_samples=3, steps=4, batch_size=2, learning_rate=1e-3)


def run_text(out: Path, sizes: TextSizes, num_seeds: int) -> None:
    """Measures every target with each seed below `out`; steps that are finished do not run again.

    Raises:
        StepError: a command failed.
    """
    torch.set_num_threads(1)
    steps = Steps(out)
    steps.begin({**asdict(sizes), "targets": TARGETS, "layers": LAYERS})
    root = steps.directory
    teacher = smollm2_dir(root)
    train, held_out = write_texts(root, sizes)
    if not (root / "student").exists():
        save_layers(teacher, root / "student", LAYERS)
    encoder = ChatEncoder.load(teacher)
    texts = list(_encoded(encoder, held_out))
    teacher_RV = _teacher_logprobs(root, teacher, texts)
    steps.measure("teacher", lambda: _metrics(teacher_RV, teacher_RV, texts))
    steps.measure("start", lambda: _evaluate(root / "student", teacher_RV, texts))
    steps.measure("sizes", lambda: _counts(encoder, train, texts, teacher, root / "student"))
    config = CONFIGS / "dense-to-dense.toml"
    for target, kept in TARGETS.items():
        steps.capture(target, CONFIGS / "precompute-kd.toml", train.name, {**_CAPTURE, **kept}, verify=target != "full")
    for seed in range(num_seeds):
        for target in (*TARGETS, "ce"):
            alone = target == "ce"
            data = {"data.shards": f"scores/{'top-64' if alone else target}"}
            overrides = _training(sizes, seed) | data | (CROSS_ENTROPY_ALONE if alone else {})
            final = root / steps.train(f"{target}-{seed}", config, overrides)
            steps.measure(f"{target}@{seed}", partial(_evaluate, final, teacher_RV, texts))


# Changes to the demo's captures: another teacher, longer texts.
_CAPTURE: dict[str, Any] = {
    "teacher": "smollm2",
    "max_tokens": 512,
    "samples_per_shard": 32,
    "engine.max_num_seqs": 8,
    "engine.max_num_batched_tokens": 1024,
}


def _training(sizes: TextSizes, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "trainable": ["language_model"],
        "model.path": "student",
        "data.max_tokens": 512,
        "data.num_workers": 0,
        "optim.learning_rate": sizes.learning_rate,
        "optim.global_batch_size": sizes.batch_size,
        "optim.micro_batch_size": sizes.batch_size,
        "optim.max_steps": sizes.steps,
        **SAVE_LAST_STEP,
    }


def write_texts(root: Path, sizes: TextSizes) -> tuple[Path, Path]:
    """Writes `train.jsonl` and `held_out.jsonl` once: records evenly spread over the library, no answer in both files.

    The docstrings depend on the version of Python, and a little on packages that add to the standard library.
    """
    train_path, held_out_path = root / "train.jsonl", root / "held_out.jsonl"
    if train_path.exists():
        return train_path, held_out_path
    records = real_conversations(NUM_RECORDS, max_chars=MAX_CHARS)
    held_out = records[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    answers = {message["content"] for record in held_out for message in record["messages"]}
    rest = [r for r in records if not any(message["content"] in answers for message in r["messages"])]
    write_jsonl(held_out_path, _evenly_spaced(held_out, sizes.held_out_samples))
    # Written last, because its presence means that both files are complete.
    return write_jsonl(train_path, _evenly_spaced(rest, sizes.train_samples)), held_out_path


def _evenly_spaced(records: list[Any], number: int) -> list[Any]:
    return [records[i * len(records) // number] for i in range(number)]


def save_layers(teacher: Path, out: Path, layers: tuple[int, ...]) -> None:
    """Saves a student of some of the teacher's layers, and all of its embeddings, norms and output layer."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList(model.model.layers[i] for i in layers)
    model.config.num_hidden_layers = len(layers)
    save_student(model, teacher, out)


def _encoded(encoder: ChatEncoder, path: Path) -> Iterator[EncodedChat]:
    dataset = Dataset.open(path, "kd")
    for index in range(len(dataset)):
        yield encoder.encode_sample(dataset[index])[0]


def _teacher_logprobs(root: Path, teacher: Path, texts: list[EncodedChat]) -> Tensor:
    """Returns the teacher's log-probs of the held-out responses, float32 [R, V]; computed once."""
    path = root / "held_out_logprobs.npy"
    if not path.exists():
        unfinished = root / "unfinished.npy"
        np.save(unfinished, _logprobs(load_student(teacher, dtype=torch.float32).eval(), texts).numpy())
        unfinished.replace(path)
    return torch.from_numpy(np.load(path))


@torch.inference_mode()
def _logprobs(model: PreTrainedModel, texts: list[EncodedChat]) -> Tensor:
    """Returns log-probs at the scored tokens of all texts in order, float32 [R, V]."""
    parts = []
    for text in texts:
        logits_TV = model(torch.from_numpy(text.input_ids.astype(np.int64))[None]).logits[0]
        parts.append(logits_TV[predicting_positions(text.response_positions)].log_softmax(-1))
    return torch.cat(parts)


def _metrics(teacher_RV: Tensor, student_RV: Tensor, texts: list[EncodedChat]) -> dict[str, float]:
    targets_R = torch.from_numpy(np.concatenate([text.response_ids for text in texts]).astype(np.int64))
    return {"kl": mean_divergence(teacher_RV, student_RV), **token_metrics(student_RV, targets_R)}


def _evaluate(student: Path, teacher_RV: Tensor, texts: list[EncodedChat]) -> dict[str, float]:
    return _metrics(teacher_RV, _logprobs(load_student(student, dtype=torch.float32).eval(), texts), texts)


def _counts(
    encoder: ChatEncoder, train: Path, texts: list[EncodedChat], teacher: Path, student: Path
) -> dict[str, float]:
    paths = {"teacher": teacher, "student": student}
    models = {name: load_student(path, dtype=torch.float32) for name, path in paths.items()}
    return {
        "train_tokens": sum(len(text.response_ids) for text in _encoded(encoder, train)),
        "held_out_tokens": sum(len(text.response_ids) for text in texts),
        "vocab_size": encoder.vocab_size,
        **{f"{name}_parameters": sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        **{f"{name}_layers": model.config.num_hidden_layers for name, model in models.items()},
    }
