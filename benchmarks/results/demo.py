"""The demo half of the results: questions about handwritten digits, a teacher of 1.1M parameters, its students.

    data, teacher ─> scores/TARGET, once for all seeds, and exact scores of held-out conversations
    student + fresh adapter ─> init ─> dense under each target (ce: without; all-tokens: instructions too)
                                        top-64 ─> dense on, at equal steps
                                               └> sparse ─> preference

The seed of a run decides its adapter, its routers and its order of samples. All runs of a seed share these and the
number of steps.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.results.measures import token_metrics
from benchmarks.results.steps import CONFIGS, CROSS_ENTROPY_ALONE, SAVE_LAST_STEP, Steps
from common.data.chat_encoding import ChatEncoder
from demo.data import write_dataset
from demo.evaluate import evaluate
from train.data.collator import Batch, Collator, StudentInputs
from train.data.image_cache import ImageCache
from train.data.sources import ShardSource
from train.model.student import load_student

DATA_SEED = 0
MAX_TOKENS = 256
BATCH_SIZE = 64

# Captures of the distribution at each token: changes to configs/demo/precompute-kd.toml. The number of draws that gives
# 12 different ids with SmolLM2 gives 1.5 here, because this teacher is surer. 12 ids would take 12,500 draws, more work
# than all other captures together; "more-draws" is a compromise.
TARGETS: dict[str, dict[str, Any]] = {
    "full": {"top_k": "all", "precision": "fp32"},
    "top-64": {"top_k": 64},
    "top-8": {"top_k": 8},
    "top-p": {"top_k": 64, "top_p": 0.95, "min_k": 1},
    "sampled": {"top_k": 0, "num_draws": 37},
    "more-draws": {"top_k": 0, "num_draws": 1_000},
}
# Whole distributions too, of every token but the image's.
ALL_TOKENS: dict[str, Any] = {"top_k": "all", "precision": "fp32", "score": "all"}


@dataclass(frozen=True)
class DemoSizes:
    """Steps of each stage; all other settings are those of configs/demo."""

    teacher_init_steps: int
    teacher_steps: int
    init_steps: int
    dense_steps: int
    second_steps: int
    preference_steps: int


FULL = DemoSizes(20, 900, 40, 200, 120, 80)
QUICK = DemoSizes(3, 30, 3, 6, 4, 3)


def run_demo_task(out: Path, sizes: DemoSizes, num_seeds: int) -> None:
    """Measures every comparison with each seed below `out`; steps that are finished do not run again.

    Raises:
        StepError: a command failed.
    """
    torch.set_num_threads(1)
    steps = Steps(out)
    steps.begin({**asdict(sizes), "targets": TARGETS})
    root = steps.directory
    data = write_dataset(root / "data", seed=DATA_SEED)
    steps.module("models", "demo.models", "models", str(DATA_SEED))
    steps.train("teacher-init", CONFIGS / "teacher-init.toml", _steps(sizes.teacher_init_steps))
    steps.train("teacher", CONFIGS / "teacher.toml", _steps(sizes.teacher_steps))
    steps.decant("teacher", "export", "runs/teacher", "teacher")
    for target, kept in {**TARGETS, "all-tokens": ALL_TOKENS}.items():
        steps.capture(target, CONFIGS / "precompute-kd.toml", "data/student_conversations.json", kept)
    steps.capture("test", CONFIGS / "precompute-test.toml", "data/test_conversations.jsonl", {})
    steps.capture("preferences", CONFIGS / "precompute-dpo.toml", "data/train_preferences.jsonl", {})
    steps.measure("teacher", lambda: _evaluate(root, Path("teacher")))
    steps.measure("sizes", lambda: {"train_images": data.num_student_images, "held_out_images": data.num_test_images})
    for seed in range(num_seeds):
        _one_seed(steps, sizes, seed)


def _one_seed(steps: Steps, sizes: DemoSizes, seed: int) -> None:
    root = steps.directory
    student = f"models/student-{seed}"
    parts = ("--vision", "teacher", "--language", "models/student_language", "--seed", str(seed))
    steps.decant(f"student-{seed}", "init-student", student, *parts)

    def trained(name: str, config: str, model: Path, num_steps: int, overrides: dict[str, Any]) -> Path:
        common = {"seed": seed, "model.path": str(model), **_steps(num_steps)}
        final = steps.train(f"{name}-{seed}", CONFIGS / config, common | overrides)
        steps.measure(f"{name}@{seed}", lambda: _evaluate(root, final))
        return final

    start = trained("init", "init.toml", Path(student), sizes.init_steps, {})
    finals = {}
    for target in (*TARGETS, "all-tokens", "ce"):
        overrides: dict[str, Any] = {"data.shards": f"scores/{'top-64' if target == 'ce' else target}"}
        if target == "all-tokens":
            overrides["data.score"] = "all"
        if target == "ce":
            overrides |= CROSS_ENTROPY_ALONE
        finals[target] = trained(target, "dense-to-dense.toml", start, sizes.dense_steps, overrides)
    shards = {"data.shards": "scores/top-64"}
    # The same loss and rate as the sparse student, apart from the routers' term.
    dense = {**shards, "loss.cross_entropy": 1.0, "optim.learning_rate": 1e-3}
    trained("dense", "dense-to-dense.toml", finals["top-64"], sizes.second_steps, dense)
    sparse = trained("sparse", "dense-to-sparse.toml", finals["top-64"], sizes.second_steps, shards)
    trained("preference", "preference.toml", sparse, sizes.preference_steps, {"data.shards": "scores/preferences"})


def _steps(number: int) -> dict[str, Any]:
    return {"optim.max_steps": number, **SAVE_LAST_STEP}


def _evaluate(root: Path, model: Path) -> dict[str, float]:
    """Returns the demo's figures, and the calibration of the likeliest token at each held-out response token."""
    found = evaluate(root / model, root / "data/test_questions.jsonl", root / "scores/test")
    tokens = _token_metrics(root, root / model)
    parameters = sum(p.numel() for p in load_student(root / model, dtype=torch.float32).parameters())
    return {
        "kl": found.kl_to_teacher,
        "nll": found.nll,
        "accuracy": found.accuracy,
        "wrong": found.hallucination_rate,
        "top1": tokens["top1"],
        "ece": tokens["ece"],
        "parameters": parameters,
    }


@torch.inference_mode()
def _token_metrics(root: Path, model_dir: Path) -> dict[str, float]:
    model = load_student(model_dir, dtype=torch.float32).eval()
    encoder = ChatEncoder.load(model_dir)
    images = ImageCache.load(model_dir, "pad")
    student = StudentInputs(images, encoder.image_token_id, encoder.tokenizer.pad_token_id)
    collator = Collator(student, kind="kd", image_root=root / "data", max_tokens=MAX_TOKENS)
    source = ShardSource(root / "scores/test", encoder, "pad", cached_groups=BATCH_SIZE)
    logprobs, targets = [], []
    for start in range(0, len(source), BATCH_SIZE):
        batch: Batch = collator([source[i] for i in range(start, min(start + BATCH_SIZE, len(source)))])
        output = model(**batch.model_inputs).logits.flatten(0, 1)[batch.rows]
        logprobs.append(output[:, : encoder.vocab_size].log_softmax(1))
        targets.append(batch.targets)
    return token_metrics(torch.cat(logprobs), torch.cat(targets))
