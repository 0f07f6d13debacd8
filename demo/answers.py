"""Answers held-out questions with a student under vLLM: `python -m demo.answers MODEL QUESTIONS NUMBER OUT`."""

import json
import sys
from pathlib import Path

from common.data.dataset import Dataset
from demo.data import MAX_NEW_TOKENS
from precompute.config import EngineConfig
from precompute.engine.generate import generate_answers

if __name__ == "__main__":
    model, questions, number, out = sys.argv[1:]
    dataset = Dataset.open(Path(questions), "kd")
    samples = [dataset[i] for i in range(int(number))]
    answers = generate_answers(
        Path(model),
        samples,
        max_new_tokens=MAX_NEW_TOKENS,
        max_tokens=256,
        image_root=Path(questions).parent,
        engine=EngineConfig(dtype="float32", kv_cache_gib=1, enforce_eager=True),
    )
    Path(out).write_text(json.dumps(answers, indent=1) + "\n", "utf-8")
