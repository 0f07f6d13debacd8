"""Loads, composes, freezes, saves and exports students.

`student` is the base of the others; `compose` joins a vision tower and a language model, `cached_tower` replaces a
vision tower by cached features, `packing` checks that a student can take packed batches, `export` writes a plain model
directory. Imports common.
"""
