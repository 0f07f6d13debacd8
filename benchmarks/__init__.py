"""Benchmarks: one script a figure, each prints one JSON line. Run them with `python -m benchmarks.NAME`."""
