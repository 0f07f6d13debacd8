"""Files on a disk or in an object store, written so that a reader sees a whole file or none.

`files` has the operations for all other packages; `object_store` makes the requests and retries those that failed.
Imports common.config and common.errors alone.
"""
