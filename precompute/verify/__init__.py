"""`verify-shards`: checks that an output is whole and is what it claims to be; `--repair`, `--against`, `--recompute`.

`base` checks what all outputs have, `logits` and `features` their rows, by the `*_checks`; all add to a report. Needs
neither torch nor vLLM, except `--recompute`. Imports precompute.features, precompute.report and common.
"""
