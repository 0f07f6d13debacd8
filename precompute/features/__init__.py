"""`precompute-features`: the output of a frozen vision tower for each distinct image of a dataset.

`run` lists the images, has `vision_tower` compute what is missing and publishes shards. Imports
precompute.shard_writer and common.
"""
