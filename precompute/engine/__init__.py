"""The teacher under vLLM, with the capture of scores inside it. The only package that imports vLLM.

`teacher` gets requests and returns scores; `vllm_engine` runs the engine; `vllm_patch`, which `plugin` installs in each
of vLLM's processes, has `prefill_capture` and `row_scores` score the rows that a `row_request` names. Imports
precompute.scorer, precompute.config and common.
"""
