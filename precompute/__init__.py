"""The inference node: from a dataset and a teacher to verified shards.

`logits` and `features` write outputs, `logits` with the teacher of `engine`; `verify`, `inspection`, `merge` and
`planning` are the other commands. `commands` calls each with its `config`. Imports common; only `engine` imports vLLM.
"""
