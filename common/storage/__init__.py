"""Files on a disk or in an object store, written so that a reader sees a whole one or none.

`files` has the operations that everything else uses; `object_store` makes the requests and repeats those that failed.
Imports common.config and common.errors alone.
"""
