"""The teacher under vLLM, with the capture of scores inside it. The only package that imports vLLM.

`teacher` scores requests on the engine that `vllm_engine` starts; `generate` has it answer prompts. `plugin` installs
`vllm_patch` in vLLM's processes. Without vLLM, `prefill_capture` scores what a `row_request` names by `row_scores`, and
`score_conversion` makes it what shards store. Imports precompute.scorer, .config, .fingerprints, and common.
"""
