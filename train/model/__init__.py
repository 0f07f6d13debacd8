"""The student: loaded, composed, frozen by parameter group, saved and exported.

`student` is what the others use; `compose` joins a tower and a language model, `cached_tower` takes a tower's place,
`packing` says which students take packed batches. Imports common.
"""
