"""Makes sparse students, mixtures of experts, from dense ones and monitors their routers in training.

`upcycle` copies dense layers into experts; `router_monitor` counts tokens and gradients by hooks, `expert_load` writes
the counts, `expert_parallel` divides experts among GPUs. Imports train.model and train.data.
"""
