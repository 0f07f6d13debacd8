"""Trains the stages of a JSON list as one rank, one after the other in this process."""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from train.config import TrainConfig
from train.run.shutdown import TrainingInterrupted
from train.run.stage import train_stage


def run(stages: list[dict[str, Any]]) -> None:
    for settings in stages:
        try:
            train_stage(TrainConfig.model_validate(settings))
        except TrainingInterrupted as interrupt:
            print(interrupt, file=sys.stderr)  # noqa: T201
            sys.exit(interrupt.exit_code)
        # The next stage has another DeepSpeed configuration, which accelerate keeps in process-wide state.
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=False)  # noqa: SLF001 - there is no public way to reset it
        GradientState._reset_state()  # noqa: SLF001 - as above


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text()))
