"""The teacher under vLLM, with the capture of scores inside it. The only package that imports vLLM.

`teacher` takes requests and yields scores; `vllm_engine` starts and feeds the engine; `generate` has it answer prompts.
`plugin` installs `vllm_patch` in each of vLLM's processes. What needs no vLLM is in modules of its own:
`prefill_capture` scores the rows that a `row_request` names, chunk by chunk of a prompt, by `row_scores`, and
`score_conversion` turns them into what shards store. Imports precompute.scorer, .config, .fingerprints, and common.
"""
