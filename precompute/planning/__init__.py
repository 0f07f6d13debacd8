"""The teacher's half of `plan`: what a capture will write, hold in memory and take, before anything is spent.

`workload` counts tokens and parameters, `capture_cost` computes bytes, memory and hours from them. Imports
precompute.config, .logits.job for the inputs of a capture, .engine.row_scores for its memory, and common.
"""
