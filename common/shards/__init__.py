"""The format of an output: its manifest and receipts, shards of scores and shards of features.

`score_shard` and `feature_shard` write rows through `parquet_shard`; `codec`, `quantization`, `byte_streams` and
`token_order` turn a row's kept entries into bytes and back. Imports common.data and common.storage, and neither torch
nor an engine.
"""
