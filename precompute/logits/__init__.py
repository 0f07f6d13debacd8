"""`precompute-logits`: a dataset and a teacher in, shards of scores out.

`run` prepares a `job`, starts a scorer and has `pipeline` stream the samples of all missing shards through it, here, on
one of several `nodes`, or in the actors of a Ray cluster (`ray_backend`). Imports the modules of precompute itself,
precompute.engine when it starts the teacher, and common.
"""
