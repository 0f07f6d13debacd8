"""Measures what students learn from stored scores: `python -m benchmarks.results.run OUT` makes docs/results.md."""
