"""Comparison of students trained on stored scores: `python -m benchmarks.results.run OUT` writes docs/results.md."""
