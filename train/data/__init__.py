"""Shards or a dataset file in, micro-batches out.

`sources` give examples by position, `sampling` says which positions a micro-batch holds, `collator` pads or packs them
with images (`image_cache`) or cached features (`feature_source`), and `loader` does it ahead in worker processes.
Imports common.
"""
