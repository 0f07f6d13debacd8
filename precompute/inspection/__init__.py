"""`inspect-shards`: shows what an output holds, in a terminal, as JSON, as a page, or unpacked into list columns.

`collect` reads shards into an `Inspection`, with `statistics` and `sample_view`; `terminal` and `html_page` show it,
with texts from `formatting`. Needs neither torch nor vLLM. Imports precompute.report and common.
"""
