"""One rank: runs the stages of a JSON list in this process, one after the other."""

import gc
import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

from train.config import TrainConfig
from train.stage import train

if __name__ == "__main__":
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        train(TrainConfig.model_validate(settings))
        # The next stage has its own DeepSpeed configuration.
        gc.collect()
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
