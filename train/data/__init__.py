"""Makes micro-batches of shards or of a dataset file.

`sources` give examples by position, `sampling` says which positions a micro-batch holds, `collator` pads or packs them
with images (`image_cache`) or cached features (`feature_source`), and `loader` does this ahead of training in worker
processes. Imports common.
"""
