"""The errors that a user can cause or has to act on.

    DecantError
    ├── ConfigError       a key, a value or a combination of them
    ├── DataError         a dataset line, a sample or an image
    ├── ModelError        a model directory
    ├── ProvenanceError   artefacts that do not belong together: another teacher, dataset, tokenizer
    ├── ShardError        an output whose bytes, schema or values are not those that were written
    ├── StorageError      a read or a write that the disk or the object store refused
    └── DivergedError     a training loss that is not finite or exploded (train.run.divergence)

Each message says where the error is, what was found, what was expected and what to do. Any other exception is a
defect of this project.
"""

# Longest part of a message that repeats a value or lists keys, in characters.
MAX_SHOWN = 200


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


def shorten(text: str, limit: int = MAX_SHOWN) -> str:
    """Returns `text`, cut to `limit` characters, because a value from outside may have millions."""
    return text if len(text) <= limit else f"{text[: limit - 4]} ..."


def describe_value(value: object) -> str:
    """Returns a value as a message shows it: its `repr`, cut to 200 characters."""
    try:
        # The repr of a long text is not made whole.
        return shorten(repr(value[:MAX_SHOWN] if isinstance(value, str) else value))
    except RecursionError:
        return f"a deeply nested {type(value).__name__}"
