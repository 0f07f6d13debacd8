"""Benchmarks: one script a figure, each prints one JSON line. Run them with `python -m benchmarks.NAME`."""

import os

# transformers imports DeepSpeed, which would print what it found on the machine; nothing here uses it.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
