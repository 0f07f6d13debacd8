"""Losses on the student's output layer.

`fused_output` gives logits of the kept ids and logsumexps without the matrix of tokens x vocabulary, `functional` has
each loss as a pure function of these, `objective` computes a micro-batch's sums. Imports train.data for the batch.
"""
