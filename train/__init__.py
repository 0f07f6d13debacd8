"""Training of a student from stored teacher scores.

`run` trains one stage, whose settings are in `config` and their possible values in `choices`. It uses `data` (samples
to batches), `model` (loading and saving students), `loss` (the objective) and `moe` (mixtures of experts).
`memory_estimate` predicts the memory of a stage. Imports common.
"""
