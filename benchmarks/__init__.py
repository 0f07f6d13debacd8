"""Benchmarks: one script for each figure, which prints one JSON line. Run one with `python -m benchmarks.NAME`."""

import os

# transformers imports DeepSpeed, which would otherwise look for an accelerator and print what it found.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
