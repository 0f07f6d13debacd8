"""Strict TOML configuration: one file a run, `--set key=value` on top, an unknown key is an error."""

import difflib
import hashlib
import json
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import MAX_SHOWN, ConfigError, describe_value


class StrictModel(BaseModel):
    """Base of every configuration and manifest model: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ConfigT = TypeVar("ConfigT", bound=StrictModel)

# Type of a pydantic error whose message is complete: it is shown without the value, which may hold a password.
ADDRESS_ERROR = "address"

# TOML's names of the types in pydantic's errors.
_EXPECTED = {
    "model_type": "a table",
    "dict_type": "a table",
    "tuple_type": "a list",
    "string_type": "a string",
    "path_type": "a path",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}

# Raised by a validator of ours, whose own message says what is wrong and what to do.
_OWN_ERRORS = frozenset({"value_error", "assertion_error"})


def load_config(schema: type[ConfigT], path: Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Reads a TOML file, applies `a.b=value` overrides and validates the whole.

    An override's value is read as TOML where it parses (`3`, `true`, `[1, 2]`, `"x"`), else as a bare string.
    Relative paths stay as written: they are relative to the working directory, as on any command line.

    Raises:
        ConfigError: unreadable file, broken TOML (with its line), unknown key or wrong value (all at once).
    """
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give --config a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(raw, override)
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {line}" for line in describe_errors(error, schema, raw)]
        raise ConfigError(f"{path}: {len(lines)} setting(s) are wrong\n" + "\n".join(lines)) from error


def describe_errors(error: ValidationError, schema: type[BaseModel], raw: dict[str, Any]) -> list[str]:
    """Returns one line for each wrong key of `raw`, in the order of pydantic's errors.

    A line names the key with its tables, and says what was found, what was expected or what to do.
    """
    # A key that takes values of several types has one error for each of them.
    errors_by_key: dict[tuple[str | int, ...], list[Any]] = {}
    for each in error.errors():
        key = _written_key(each["loc"], raw, missing=each["type"] == "missing")
        errors_by_key.setdefault(key, []).append(each)
    return [_describe_key(key, errors, schema, raw) for key, errors in errors_by_key.items()]


def digest(config: BaseModel) -> str:
    """Returns the SHA-256 (hex) of a model's canonical JSON."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one key of the tables in `raw`, and makes the tables that lead to it."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override}: expected key=value, such as --set engine.dtype=float32")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {part} is a value in the file, not a table")
    table[parts[-1]] = value


def _written_key(location: tuple[str | int, ...], raw: Any, *, missing: bool) -> tuple[str | int, ...]:
    """Returns the part of a pydantic location that is written in `raw`; the rest names members of a union.

    The last part of a missing key stays.
    """
    for depth, part in enumerate(location):
        is_key = isinstance(raw, dict) and part in raw
        is_index = isinstance(raw, list) and isinstance(part, int) and part < len(raw)
        if not (is_key or is_index):
            return location if missing else location[:depth]
        raw = raw[part]
    return location


def _describe_key(key: tuple[str | int, ...], errors: Sequence[Any], schema: type[BaseModel], raw: Any) -> str:
    name = ".".join(map(str, key))
    first = errors[0]
    if first["type"] == "extra_forbidden":
        return f"{name}: unknown key; {_suggest_key(key, schema)}"
    if first["type"] == "missing":
        return f"{name}: required, but not set"
    if first["type"] == ADDRESS_ERROR:
        return f"{name}: {first['msg']}"
    found = _describe_value(key, raw)
    if first["type"] in _OWN_ERRORS:
        message = f"{name}: {first['ctx']['error']}" if name else str(first["ctx"]["error"])
        return f"{message} (found {found})" if found else message
    expected = " or ".join(dict.fromkeys(map(_expected, errors)))
    return f"{name}: expected {expected}, found {found or 'a table'}"


def _describe_value(key: tuple[str | int, ...], raw: Any) -> str | None:
    """Returns the shortened value of a key, or None for a table, whose keys a message names, and for an address."""
    for part in key:
        raw = raw[part]
    # An address may hold a password.
    if isinstance(raw, dict) or (isinstance(raw, str) and "://" in raw):
        return None
    return describe_value(raw)


def _expected(error: Any) -> str:
    """Returns the end of a sentence that begins with "expected"."""
    kind = str(error["type"])
    message = str(error["msg"]).removeprefix("Input should be ")
    if kind.startswith(("greater_than", "less_than")):
        return f"a number {message}"
    return _EXPECTED.get(kind, message)


def _suggest_key(key: tuple[str | int, ...], schema: type[BaseModel]) -> str:
    """Returns the known key of the same table that is spelt most alike, or else the table's known keys."""
    *parents, unknown = key
    table = schema
    for part in parents:
        if isinstance(part, str):
            table = next(_models_in(table.model_fields[part].annotation))
    prefix = "".join(f"{part}." for part in parents)
    if near := difflib.get_close_matches(str(unknown), table.model_fields, n=1):
        return f"did you mean {prefix}{near[0]}?"
    listed = textwrap.shorten(", ".join(table.model_fields), MAX_SHOWN, placeholder=" ...")
    return f"known keys{f' of {prefix[:-1]}' if prefix else ''}: {listed}"


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yields the models within a type such as `Model | None` or `tuple[Model, ...]`."""
    if arguments := get_args(annotation):
        for argument in arguments:
            yield from _models_in(argument)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
