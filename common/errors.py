"""Every error that a user can cause or must act on.

    DecantError
    ├── ConfigError       a key, a value or a combination of them
    ├── DataError         a dataset line, a sample or an image
    ├── ModelError        a model directory
    ├── ProvenanceError   things that do not belong together: another teacher, dataset, tokenizer
    ├── ShardError        an output whose bytes, schema or values are not what was written
    ├── StorageError      the disk or the object store said no
    └── DivergedError     a training loss that is no number or exploded (train.run.divergence)

A message says where, what was found, what was expected and what to do. Anything else that is raised
is a defect of this project.
"""


class DecantError(Exception):
    """Base of all errors shown to the user without a traceback."""


class ConfigError(DecantError):
    """A configuration key or value is wrong."""


class DataError(DecantError):
    """A dataset line, a sample or an image cannot be used."""


class ModelError(DecantError):
    """A model directory is missing, incomplete or of a kind that is not supported."""


class ProvenanceError(DecantError):
    """Two artefacts were made by different models, tokenizers, datasets or settings."""


class ShardError(DecantError):
    """A shard or its manifest is damaged or incomplete."""


class StorageError(DecantError):
    """Reading or writing failed in the storage itself."""
