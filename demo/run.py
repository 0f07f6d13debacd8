"""The whole chain on real handwritten digits, with the commands that a user would type.

    data, models ─> teacher: init, sft ─> precompute-logits (kd, dpo) ─> verify-shards
        ─> student: init, dense-to-dense, dense-to-sparse, preference ─> export ─> vLLM
        ─> the same student by cross-entropy alone, for comparison
        ─> one table on held-out images, one picture of the losses

A family that no standard class of experts carries has no dense-to-sparse stage. Every step is a command of its own
process, run in the demo's directory, and shown before it runs. A demo that was stopped continues when it is started
again.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from common.console import plain_text
from common.data.dataset import Dataset
from common.errors import DecantError
from demo.data import MAX_NEW_TOKENS, write_dataset
from demo.models import LLAVA

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "demo"

# Turns a distillation stage into the same stage without a teacher: same student, data, batch order, steps and rate.
CROSS_ENTROPY_ALONE = ("--set", "loss.distillation=0.0", "--set", "loss.cross_entropy=1.0")

# Held-out questions that the exported student answers under vLLM.
NUM_ANSWERS = 64


class DemoError(DecantError):
    """A step of the demo failed; its own message stands above."""


def run_demo(out: Path, *, seed: int, family: str = LLAVA, max_steps: int | None = None) -> None:
    """Runs every step in `out`, then prints the table and writes `report.json` and `losses.png`.

    `family` is `LLAVA` or one of `demo.families`; `max_steps` ends each stage of training after so many steps.

    Raises:
        DemoError: a step failed, or `out` has a demo of another family or seed.
    """
    console = Console(stderr=True, highlight=False)
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    _begin(out, {"family": family, "seed": seed, "max_steps": max_steps})
    sparse = family == LLAVA
    chain = _Chain(out.resolve(), seed, max_steps, console)

    console.rule("Data and untrained models")
    data = write_dataset(out / "data", seed=seed)
    console.print(
        f"{data.num_train_images:,} images to learn from, {data.num_test_images} held out; the student sees "
        f"conversations about {data.num_student_images} of them"
    )
    chain.module("demo.models", "models", str(seed), family, unless="models")

    console.rule("The teacher")
    chain.train("teacher-init")
    chain.train("teacher")
    chain.decant("export", "runs/teacher", "teacher", unless="teacher")

    console.rule("Its scores, once")
    for name, output, dataset in (
        ("kd", "train", "student_conversations.json"),
        ("test", "test", "test_conversations.jsonl"),
        ("dpo", "preferences", "train_preferences.jsonl"),
    ):
        chain.decant("precompute-logits", "--config", str(CONFIGS / f"precompute-{name}.toml"))
        recompute = ("--recompute", "16", "--teacher", "teacher") if name != "test" else ()
        chain.decant("verify-shards", f"scores/{output}", "--dataset", f"data/{dataset}", *recompute)

    if sparse:
        console.rule("The student, four stages")
        chain.decant(
            "init-student", "models/student", "--vision", "teacher", "--language", "models/student_language",
            unless="models/student",
        )  # fmt: skip
        for stage in ("init", "dense-to-dense", "dense-to-sparse", "preference"):
            chain.train(stage)
    else:
        console.rule("The student, three stages")
        chain.module(
            "demo.models", "give-tower", "teacher", "models/student", "models/student_with_tower",
            unless="models/student_with_tower",
        )  # fmt: skip
        chain.train("init", "init", "models/student_with_tower")
        chain.train("dense-to-dense")
        # The whole language model is trained, which a rate for experts alone takes far from what it has learned.
        chain.train(
            "preference", "preference", "runs/dense-to-dense/final",
            "--set", "loss.balance=0.0", "--set", "optim.learning_rate=1e-4",
        )  # fmt: skip

    console.rule("The same student by cross-entropy alone")
    chain.train("dense-to-dense", "ce-dense", "runs/init/final", *CROSS_ENTROPY_ALONE)
    if sparse:
        chain.train("dense-to-sparse", "ce-sparse", "runs/ce-dense/final", *CROSS_ENTROPY_ALONE)

    console.rule("Export, and the exported student under vLLM")
    chain.decant("export", "runs/preference", "student", unless="student")
    chain.module("demo.answers", "student", "data/test_questions.jsonl", str(NUM_ANSWERS), "answers.json")

    console.rule("Held-out images")
    chain.module("demo.report", ".")

    console.rule("Talk to it, and look back")
    question = Dataset.open(data.test_questions, "kd")[0]
    chain.decant(
        "chat", "student", "--image", f"data/{question.images[0].path}", "--ask", "Which digit is this?",
        "--max-new-tokens", str(MAX_NEW_TOKENS),
    )  # fmt: skip
    chain.decant("report", "runs/preference", "--html", "report.html", "--markdown", "report.md")
    minutes = (time.monotonic() - started) / 60
    _add_to_report(out, {"minutes": round(minutes, 2), "seconds": chain.seconds})
    done = (
        f"{out}: finished in {minutes:.1f} minutes; the exported student is {out / 'student'}, and "
        f"{out / 'report.html'} shows its training"
    )
    console.print(plain_text(done))


def _begin(out: Path, settings: dict[str, object]) -> None:
    """Writes the demo's settings, or compares them with those that the directory was begun with."""
    path = out / "demo.json"
    if path.exists() and (found := json.loads(path.read_text("utf-8"))) != settings:
        raise DemoError(f"{out}: begun with {found}, asked for {settings}; choose another directory with --out")
    path.write_text(json.dumps(settings) + "\n", "utf-8")


class _Chain:
    """The demo's directory, in which it runs one step after another."""

    def __init__(self, directory: Path, seed: int, max_steps: int | None, console: Console) -> None:
        self._directory = directory
        self._settings = ["--set", f"seed={seed}"]
        if max_steps is not None:
            self._settings += ["--set", f"optim.max_steps={max_steps}"]
        self._console = console
        self.seconds: dict[str, float] = {}

    def train(self, config: str, name: str | None = None, model: str | None = None, *overrides: str) -> None:
        """Trains the stage of a configuration, under another name and on another student if they are given."""
        renamed = ("--set", f"output=runs/{name}", "--set", f"model.path={model}") if name else ()
        self.decant("train", "--config", str(CONFIGS / f"{config}.toml"), *self._settings, *renamed, *overrides)

    def decant(self, *arguments: str, unless: str | None = None) -> None:
        """Runs a command of the command line."""
        self._run("decant", ["-m", "cli", *arguments], arguments, unless)

    def module(self, name: str, *arguments: str, unless: str | None = None) -> None:
        """Runs a module of the demo."""
        # No module trains. DeepSpeed, which transformers imports to save a model, would warn of a missing GPU.
        self._run(f"python -m {name}", ["-m", name, *arguments], arguments, unless, DS_ACCELERATOR="cpu")

    def _run(
        self, shown: str, command: Sequence[str], arguments: Sequence[str], unless: str | None, **variables: str
    ) -> None:
        """Runs Python with a command and these environment variables, and prints `shown` with the arguments."""
        line = f"{shown} {shlex.join(_shorten_config_path(a) for a in arguments)}"
        if unless is not None and (self._directory / unless).exists():
            self._console.print(plain_text(f"$ {line}   (done before)", "dim"))
            return
        self._console.print(plain_text(f"\n$ {line}", "bold"))
        started = time.monotonic()
        environment = {
            **os.environ,
            # The engine in the command's own process starts in a third of the time.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Models this small lose more time to the synchronisation of threads than a second thread saves.
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            # Hides transformers' bars, because the steps have bars of their own.
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **variables,
        }
        code = subprocess.run([sys.executable, *command], cwd=self._directory, env=environment, check=False).returncode
        self.seconds[line] = round(time.monotonic() - started, 1)
        if code:
            raise DemoError(f"{line}: exit code {code}; see its message above. Run the demo again to continue here")
        self._console.print(plain_text(f"{self.seconds[line]:.0f} s", "dim"))


def _shorten_config_path(argument: str) -> str:
    return f"configs/demo/{Path(argument).name}" if argument.startswith(str(CONFIGS)) else argument


def _add_to_report(out: Path, entries: dict[str, object]) -> None:
    path = out / "report.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **entries}, indent=1) + "\n", "utf-8")
