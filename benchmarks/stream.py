"""Speed of the trainer's batches from shards, k = 64, against the steps that use them, for two sizes of students.

    python -m benchmarks.stream

Both students are distilled by the real trainer, stream and collation, with one worker process and one micro-batch a
step. The demo's student has the demo's data, models and batch of 64 conversations with an image; the scores are those
of its untrained teacher. The other one, of 100M parameters, is a language model in the shape of SmolLM2 with 20 layers;
it reads docstrings in batches of 4 with SmolLM2-135M's scores.

`speedup_vs_step`: time of a step whose batch is ready, over the time of a batch that no step waits for.
`speedup_first_epoch`: the same ratio while row groups and images are read for the first time.
`wait_fraction`: share of the training time spent waiting for a batch, without the first, which starts the worker.

On two cores, the demo's steps have one thread, as the demo sets it, and the worker has the other core; the larger
student's steps have a thread for each core and share the cores with the worker. Batches without steps have both cores:
one process makes them and another receives them. Runs alternate; figures are medians over `NUM_ROUNDS`.
"""

import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train.run.trainer
from common.config import load_config
from demo.data import write_dataset
from demo.models import build_models
from demo.run import CONFIGS
from tests.support.real_weights import real_conversations, smollm2_dir, write_jsonl
from tests.support.training import LiveTeacher, stage
from train.config import TrainConfig
from train.data.collator import Batch
from train.data.loader import MicroBatchLoader
from train.model.compose import compose_student
from train.run.stage import train_stage as run_stage

NUM_ROUNDS = 3
TOP_K = 64
NUM_EPOCHS_ALONE = 8


class _TimedLoader(MicroBatchLoader):
    """Loader that records when each batch was requested and when it arrived."""

    last: "_TimedLoader"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.marks: list[tuple[float, float]] = []
        _TimedLoader.last = self

    def __iter__(self) -> Iterator[Batch]:
        batches = self._batches()
        while True:
            requested = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.marks.append((requested, time.perf_counter()))
            yield batch

    def _batches(self) -> Iterator[Batch]:
        return super().__iter__()

    def step_s(self) -> float:
        """Returns the median time from a batch's arrival to the next one's request."""
        return statistics.median(b[0] - a[1] for a, b in itertools.pairwise(self.marks))

    def wait_fraction(self) -> float:
        """Returns the share of the time after the first batch that was spent waiting."""
        waited = sum(arrived - requested for requested, arrived in self.marks[1:])
        return waited / (self.marks[-1][1] - self.marks[0][1])


class _PreparedLoader(_TimedLoader):
    """Loader that repeats four real batches, which it makes before the first is requested."""

    def _batches(self) -> Iterator[Batch]:
        ready = list(itertools.islice(super()._batches(), 4))
        return itertools.islice(itertools.cycle(ready), len(self))


def main() -> None:
    """Prints one JSON line."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as directory:
        results = {
            "demo": _measure(_demo_config(Path(directory) / "demo"), num_threads=1),
            "100m": _measure(_hundred_million_config(Path(directory)), num_threads=len(os.sched_getaffinity(0))),
        }
    print(json.dumps(results))


def _measure(config: TrainConfig, num_threads: int) -> dict[str, float]:
    steps, batches, first, waits = [], [], [], []
    # Without the variable, accelerate would choose the number of threads.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    torch.set_num_threads(num_threads)
    for _ in range(NUM_ROUNDS):
        steps.append(_train(config, _PreparedLoader).step_s())
        trained = _train(config, _TimedLoader)
        waits.append(trained.wait_fraction())
        epoch = trained.dataset.num_steps
        alone = _TimedLoader(trained.dataset, range(epoch * NUM_EPOCHS_ALONE), config.data.num_workers)
        for _ in alone:
            pass
        arrived = [mark[1] for mark in alone.marks]
        first.append((arrived[epoch - 1] - arrived[0]) / (epoch - 1))
        batches.append((arrived[-1] - arrived[epoch - 1]) / (len(arrived) - epoch))
    step_s = statistics.median(steps)
    return {
        "speedup_vs_step": round(step_s / statistics.median(batches), 1),
        "wait_fraction": round(statistics.median(waits), 5),
        "speedup_first_epoch": round(step_s / statistics.median(first), 1),
        "step_ms": round(step_s * 1e3, 1),
        "batch_ms": round(statistics.median(batches) * 1e3, 2),
    }


def _train(config: TrainConfig, loader: type[_TimedLoader]) -> _TimedLoader:
    """Trains from the start, and returns the loader that the trainer used."""
    shutil.rmtree(config.output, ignore_errors=True)
    train.run.trainer.MicroBatchLoader = loader  # type: ignore[attr-defined]
    run_stage(config)
    # The next run has its own DeepSpeed configuration, and accelerate has no public way to drop the old one.
    AcceleratorState._reset_state(reset_partial_state=False)  # noqa: SLF001 - see above
    GradientState._reset_state()  # noqa: SLF001 - see above
    return _TimedLoader.last


def _demo_config(root: Path) -> TrainConfig:
    data = write_dataset(root / "data", seed=0)
    models = build_models(root / "models", data, seed=0)
    compose_student(models.teacher, models.student_language, root / "student", seed=0)
    LiveTeacher(models.teacher, data.root).write_output(
        root / "scores", data.student_conversations, "kd", top_k=TOP_K, shard=256
    )
    changes = {
        "output": root / "run",
        "model.path": root / "student",
        "data.shards": root / "scores",
        "data.image_root": data.root,
        "optim.max_steps": 60,
    }
    return load_config(
        TrainConfig, CONFIGS / "dense-to-dense.toml", [f"{key}={value}" for key, value in changes.items()]
    )


def _hundred_million_config(root: Path) -> TrainConfig:
    teacher = smollm2_dir(root)
    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(teacher, num_hidden_layers=20))
    student.save_pretrained(root / "student")
    AutoTokenizer.from_pretrained(teacher).save_pretrained(root / "student")
    dataset = write_jsonl(root / "text.jsonl", real_conversations(64, max_chars=600))
    LiveTeacher(teacher, None).write_output(root / "scores", dataset, "kd", top_k=TOP_K, shard=64)
    settings = stage(
        root / "run",
        root / "student",
        trainable=["language_model"],
        data={"shards": str(root / "scores"), "num_workers": 1},
        loss={"distillation": 1.0},
        optim={"global_batch_size": 4, "micro_batch_size": 4, "max_steps": 5},
        run={"zero_stage": 1},
    )
    return TrainConfig.model_validate(settings)


if __name__ == "__main__":
    main()
