"""`verify-shards`: checks that an output is complete and undamaged; `--repair`, `--against`, `--recompute`.

`base` checks what all outputs have; `logits` and `features` check their rows with the `*_checks`; all add to a report.
Nothing but `--recompute` needs torch. Imports precompute.features, .fingerprints and .report, and common.
"""
