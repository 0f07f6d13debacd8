"""Callbacks that show a run's progress in the terminal and write its metrics to a file."""

import json
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.storage.files import publish

# ruff: noqa: ARG002 - the Trainer passes args, state and control to every callback, by position


class ProgressBar(TrainerCallback):
    """Progress bar with the step, the loss, tokens/s and the time left."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Opens the bar at the step that the run continues from."""
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self._stage, unit="step", dynamic_ncols=True
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advances the bar."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Shows loss and speed."""
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.4f}, {logs['tokens_per_s']:,.0f} tokens/s")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Closes the bar and leaves it on the screen."""
        self._bar.close()


class MetricsWriter(TrainerCallback):
    """Appends every log to a JSON Lines file; a resumed run first removes the lines after its start step."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Cuts the file off after the current step; a new run starts with an empty file."""
        lines = self._path.read_text("utf-8").splitlines() if self._path.exists() else []
        kept = []
        for line in lines:
            try:
                if json.loads(line)["step"] <= state.global_step and state.global_step:
                    kept.append(line)
            except (ValueError, KeyError):
                # A killed run leaves its last line unfinished.
                break
        publish(self._path, "".join(f"{line}\n" for line in kept).encode())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Writes one line with the finite numbers of a log."""
        values = {k: v for k, v in logs.items() if isinstance(v, int | float) and math.isfinite(v)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **values}) + "\n")
