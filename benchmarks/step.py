"""A whole training step of a 100M student: cross-entropy, distillation from shards, distillation with a live teacher.

    python -m benchmarks.step

`ce` is plain fine-tuning on the dataset with the fused output layer. `offline` distils from shards, k = 64, which are
read and decoded during training. `online` runs a live teacher of four times the student's parameters in each step,
computes the same k = 64 entries, and distils from them with the same fused loss. All use the real trainer: stream,
collation, forward, backward, AdamW, in float32, with a thread that makes batches in the same process. The student has
SmolLM2's shape with 20 layers; the teacher, random too but with larger logits, has hidden size 960 and 35 layers. The
text is real.

`offline` is measured against `ce`, and `online` against `offline`: two processes run in turn, step by step. Each pair
is measured three times with new processes, because the speed of a process depends on where its memory lies. A ratio is
the median of the three rounds' ratios, and a round's times are medians over steps, from one request for a batch to the
next. Memory is the highest resident set (VmHWM) of the whole run, less what was resident before the student was loaded:
weights, gradients, optimiser states, activations, batches, and the live teacher where there is one.
`loss_difference`: largest relative difference of a step's loss between offline and online, which see the same entries.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train.run.stage
import train.run.trainer
from benchmarks.memory import status_mib
from tests.support.real_weights import real_conversations, smollm2_dir, write_jsonl
from tests.support.training import LiveTeacher, losses, stage
from train.config import TrainConfig
from train.data.collator import Batch
from train.data.loader import MicroBatchLoader
from train.loss.objective import Term
from train.model.student import load_student
from train.run.trainer import StudentTrainer

# Each pair compares the first with the second.
PAIRS = (("offline", "ce"), ("online", "offline"))
NUM_ROUNDS = 3
NUM_STEPS = 5
# Not timed, because the first steps compile, allocate, and create the optimiser's states.
NUM_WARM_STEPS = 2
BATCH = 8
TOP_K = 64
STUDENT = {"num_hidden_layers": 20}
TEACHER = {
    "num_hidden_layers": 35,
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
}


def main() -> None:
    """Prints one JSON line."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        parameters = _build(root)
        rounds: dict[tuple[str, str], list[list[Measured]]] = {pair: [] for pair in PAIRS}
        for number in range(NUM_ROUNDS):
            for pair in PAIRS:
                # The order alternates, so that neither always runs first.
                order = pair if number % 2 else pair[::-1]
                found = _train_interleaved(root, root / f"{'-'.join(pair)}-{number}", order)
                rounds[pair].append([found[way] for way in pair])
    result: dict[str, Any] = {}
    for (way, other), name in zip(PAIRS, ("vs_ce", "vs_offline"), strict=True):
        measured = rounds[way, other]
        prefix = "online_" if way == "online" else ""
        result[f"{prefix}time_{name}"] = round(statistics.median(a.seconds / b.seconds for a, b in measured), 3)
        result[f"{prefix}memory_{name}"] = round(statistics.median(a.memory_mib / b.memory_mib for a, b in measured), 3)
        result[f"{way}_and_{other}_seconds"] = [[round(each.seconds, 2) for each in pair] for pair in measured]
        result[f"{way}_and_{other}_mib"] = [[round(each.memory_mib) for each in pair] for pair in measured]
    differences = [
        abs(a / b - 1) for pair in rounds[PAIRS[1]] for a, b in zip(*(each.losses for each in pair), strict=True)
    ]
    result["loss_difference"] = float(f"{max(differences):.2g}")
    print(json.dumps({**result, **parameters, "threads": len(os.sched_getaffinity(0))}))


@dataclass(frozen=True)
class Measured:
    """Figures of one process: median seconds a step, peak memory, and the loss of each step."""

    seconds: float
    memory_mib: float
    losses: list[float]


def _train_interleaved(root: Path, output: Path, ways: tuple[str, ...]) -> dict[str, Measured]:
    """Trains each way in a new process; the processes run in turn, step by step."""
    command = [sys.executable, "-m", "benchmarks.step", str(root), str(output)]
    children = {
        way: subprocess.Popen(
            [*command, way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment()
        )
        for way in ways
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(NUM_STEPS):
        for way, child in children.items():
            seconds[way].append(float(_request_line(child)))
    measured = {}
    for way, child in children.items():
        # This request starts the last step, after which the process prints its peak.
        memory_mib = float(_request_line(child))
        child.communicate()
        measured[way] = Measured(statistics.median(seconds[way][NUM_WARM_STEPS:]), memory_mib, losses(output / way))
    return measured


def _build(root: Path) -> dict[str, int]:
    """Writes student, teacher, text and the teacher's scores; returns the models' numbers of parameters."""
    real = smollm2_dir(root)
    sizes = {}
    for seed, (name, shape) in enumerate({"student": STUDENT, "teacher": TEACHER}.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(real, **shape))
        if name == "teacher":
            # Larger logits make the teacher's distribution peaked, like a trained model's. With two nearly uniform
            # distributions the gradients are so small that AdamW's second moments are denormal numbers, which a CPU
            # computes many times slower.
            model.get_output_embeddings().weight.data *= 4
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(real).save_pretrained(root / name)
        sizes[f"{name}_parameters"] = sum(p.numel() for p in model.parameters())
    dataset = write_jsonl(root / "text.jsonl", real_conversations(BATCH * (NUM_STEPS + 1), max_chars=600))
    LiveTeacher(root / "teacher", None).write_output(root / "scores", dataset, "kd", top_k=TOP_K, shard=BATCH * 4)
    return sizes


def _config(root: Path, output: Path, way: str) -> TrainConfig:
    source = {"dataset": str(root / "text.jsonl")} if way == "ce" else {"shards": str(root / "scores")}
    return TrainConfig.model_validate(
        stage(
            output / way,
            root / "student",
            trainable=["language_model"],
            data={**source, "num_workers": 0},
            loss={"cross_entropy": 1.0} if way == "ce" else {"distillation": 1.0},
            optim={"global_batch_size": BATCH, "micro_batch_size": BATCH, "max_steps": NUM_STEPS + 1, "eps": 1e-8},
            run={"zero_stage": 1, "report_to": []},
        )
    )


def _train(root: Path, output: Path, way: str) -> None:
    """Trains one step for each line on stdin and prints its seconds; prints the peak in MiB at the end."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = _config(root, output, way)
    resting_mib = status_mib("VmRSS")
    train.run.trainer.MicroBatchLoader = _SteppedLoader  # type: ignore[attr-defined]
    if way == "online":
        _OnlineTrainer.teacher = load_student(root / "teacher", dtype=torch.float32).eval()
        train.run.stage.StudentTrainer = _OnlineTrainer  # type: ignore[attr-defined]
    train.run.stage.train_stage(config)
    print(status_mib("VmHWM") - resting_mib, flush=True)


class _SteppedLoader(MicroBatchLoader):
    """Yields a batch for each line on stdin, and prints the seconds until the next batch is requested."""

    def __iter__(self) -> Iterator[Batch]:
        batches = super().__iter__()
        for _ in range(len(self)):
            sys.stdin.readline()
            started = time.perf_counter()
            yield next(batches)
            print(time.perf_counter() - started, flush=True)


class _OnlineTrainer(StudentTrainer):
    """Trainer that computes the teacher's entries in each step, in place of reading them from shards."""

    teacher: Any

    def compute_batch_terms(self, model: Any, batch: Batch) -> dict[str, Term]:
        with torch.no_grad():
            output = self.teacher(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            logprobs_RV: Tensor = output.logits.flatten(0, 1)[batch.rows].log_softmax(-1)
            best = logprobs_RV.topk(TOP_K)
        kept = {"topk_ids": best.indices, "topk_logprobs": best.values, "rest_mass": 1 - best.values.exp().sum(1)}
        return super().compute_batch_terms(model, dataclasses.replace(batch, **kept))


def _environment() -> dict[str, str]:
    # Without the variable, accelerate would choose the number of threads.
    threads = str(len(os.sched_getaffinity(0)))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": threads}


def _request_line(child: subprocess.Popen[str]) -> str:
    """Sends a line to the process and returns the line that it prints."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("\n")
    child.stdin.flush()
    return child.stdout.readline()


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case [root, output, way]:
            _train(Path(root), Path(output), way)
