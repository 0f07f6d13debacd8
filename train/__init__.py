"""Training of a student from stored teacher scores.

`run` trains one stage by its `config`, with `data` (samples to batches), `model` (loading and saving students), `loss`
(the objective) and `moe` (experts); `memory_estimate` predicts its memory. Imports common.
"""
