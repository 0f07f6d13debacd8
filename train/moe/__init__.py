"""Sparse students: mixtures of experts made from dense ones, and what is measured of them in training.

`upcycle` copies dense layers into experts; `router_monitor` counts tokens and gradients by hooks, `expert_load` writes
the counts, `expert_parallel` divides experts among GPUs. Imports train.model and train.data.
"""
