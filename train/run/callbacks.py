"""What a run shows while it goes: a progress bar for eyes, a JSONL file for programs."""

import json
import math
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from common.storage.files import publish


class ProgressBar(TrainerCallback):
    """One line: step, loss, tokens/s, time left."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Opens the bar at the step that the run continues from."""
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self._stage, unit="step", dynamic_ncols=True
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Moves the bar."""
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Shows loss and speed."""
        if self._bar is not None and "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.4f}, {logs['tokens_per_s']:,.0f} tokens/s")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leaves the finished bar on the screen."""
        self._bar.close()


class MetricsWriter(TrainerCallback):
    """Appends every log as a JSON line; a resumed run first drops the lines after the step it continues from."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Cuts the file at the current step."""
        kept = []
        for line in self._path.read_text("utf-8").splitlines() if self._path.exists() else []:
            try:
                if json.loads(line)["step"] <= state.global_step and state.global_step:
                    kept.append(line)
            except (ValueError, KeyError):
                # The line that a killed run was writing.
                break
        publish(self._path, "".join(f"{line}\n" for line in kept).encode())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any
    ) -> None:
        """Writes one line."""
        values = {k: v for k, v in logs.items() if isinstance(v, int | float) and math.isfinite(v)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **values}) + "\n")
