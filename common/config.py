"""Strict TOML configuration: one file a run, `--set key=value` on top, an unknown key is an error."""

import datetime
import difflib
import hashlib
import json
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic_core import PydanticCustomError

from common.errors import MAX_SHOWN, ConfigError, describe_value, shorten


class StrictModel(BaseModel):
    """Base of every configuration and manifest model: unknown keys are refused, values never change.

    A value has the type of its field: `true` and `"1"` are no numbers, 1.0 is no whole number, `nan` and `inf` are
    refused. Only a whole number is taken where a number is expected.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=StrictModel)

# For fields that are tuples: TOML and JSON have lists, which strict models do not take for tuples.
FROM_LIST = Field(strict=False)

# The context of a validation of what a user wrote. A recorded configuration also holds the defaults.
_WRITTEN = {"written": True}


def _refuse_empty(value: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
    if not value and info.context is _WRITTEN:
        raise PydanticCustomError("too_short", "an empty list", {"min_length": 1})
    return value


# For lists whose default is empty: an empty one in a file asks for nothing, so its writer meant something else.
NOT_EMPTY_IF_WRITTEN = AfterValidator(_refuse_empty)


def _check_whole_number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PydanticCustomError("int_type", "a whole number")
    return value


# For a Literal of whole numbers: pydantic takes true and 1.0 for 1 there, even in strict models.
WHOLE_NUMBER = BeforeValidator(_check_whole_number)

# The range that NumPy's global generator takes, which transformers' set_seed also sets.
MAX_SEED = 2**32 - 1
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


def _parse_date(value: Any) -> Any:
    try:
        # A date with a time is a date too.
        is_plain = isinstance(value, datetime.date) and not isinstance(value, datetime.datetime)
        return (value if is_plain else datetime.date.fromisoformat(value)).isoformat()
    except (TypeError, ValueError) as error:
        raise PydanticCustomError("date", "a date such as 2026-01-31") from error


# A date in ISO 8601, written with or without quotes.
IsoDate = Annotated[str, BeforeValidator(_parse_date)]

# Type of a pydantic error whose message is complete: it is shown without the value, which may hold a password.
ADDRESS_ERROR = "address"

# Tables and lists within each other; no key needs as many.
_MAX_DEPTH = 64

# TOML's names of the types in pydantic's errors.
_EXPECTED = {
    "model_type": "a table",
    "dict_type": "a table",
    "tuple_type": "a list",
    "string_type": "a string",
    "string_too_short": "a string that is not empty",
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
    raw = _read_toml(path)
    for override in overrides:
        _apply_override(raw, override)
    if problem := _find_unusable(raw):
        raise ConfigError(f"{path}: 1 setting(s) are wrong\n  {problem}")
    try:
        return schema.model_validate(raw, context=_WRITTEN)
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


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give --config a TOML file") from error
    # Besides TOMLDecodeError and UnicodeDecodeError, a ValueError comes of a number with thousands of digits.
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {shorten(str(error))}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid TOML: lists or tables are nested too deep") from error


def _apply_override(raw: dict[str, Any], override: str) -> None:
    """Sets one key of the tables in `raw`, and makes the tables that lead to it."""
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {shorten(override)}: expected key=value, such as --set engine.dtype=float32")
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {shorten(override)}: {shorten(part)} is a value in the file, not a table")
    table[parts[-1]] = _parse_value(text)


def _parse_value(text: str) -> Any:
    """Returns the value of an override: TOML where it parses as one value, else the text itself."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # A line break in the text may begin another key.
    return parsed["value"] if len(parsed) == 1 else text


def _find_unusable(raw: dict[str, Any]) -> str | None:
    """Returns a line on the first value that no key takes and other libraries fail on, or None.

    These are nesting without end, and whole numbers beyond the 64 bits that TOML promises.
    """
    remaining: list[tuple[tuple[str | int, ...], Any]] = [((), raw)]
    while remaining:
        key, value = remaining.pop()
        if len(key) > _MAX_DEPTH:
            return f"{_key_name(key)}: expected at most {_MAX_DEPTH} tables and lists within each other, found more"
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return f"{_key_name(key)}: expected a number of at most 64 bits, found one of {value.bit_length():,} bits"
        if isinstance(value, dict):
            remaining += [((*key, name), member) for name, member in value.items()]
        if isinstance(value, list):
            remaining += [((*key, index), member) for index, member in enumerate(value)]
    return None


def _key_name(key: Sequence[str | int]) -> str:
    """Returns a key with its tables, as it is written after --set, and shortened."""
    return shorten(".".join(str(part) if str(part).isprintable() else repr(part) for part in key))


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
    first = errors[0]
    if first["type"] == "missing" and isinstance(index := key[-1], int):
        found = _describe_value(key[:-1], raw)
        return f"{_key_name(key[:-1])}: expected a value at position {index + 1}, found {found}"
    name = _key_name(key)
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


def _describe_value(key: Sequence[str | int], raw: Any) -> str | None:
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
    if kind == "too_short":
        return f"a list of at least {error['ctx']['min_length']}"
    if kind == "too_long":
        return f"a list of at most {error['ctx']['max_length']}"
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
