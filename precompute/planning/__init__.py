"""`plan`, the teacher's half: what a capture will write, hold in memory and take, before anything is spent.

`workload` counts tokens and parameters, `capture_cost` works out bytes, memory and hours. Imports precompute.logits.job
for the inputs of a capture, precompute.engine.row_scores for its memory, and common.
"""
