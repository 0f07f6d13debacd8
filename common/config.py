"""Strict TOML configuration: one file a run, `--set key=value` on top, an unknown key is an error."""

import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConfigError


class StrictModel(BaseModel):
    """Base of every configuration and manifest model: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


ConfigT = TypeVar("ConfigT", bound=StrictModel)

# The type of a pydantic error whose message says all that may be said of the value.
ADDRESS_ERROR = "address"


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
        _apply(raw, override)
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(top level)'}: {_explain(e)}" for e in error.errors()]
        raise ConfigError(f"{path}: {len(lines)} setting(s) are wrong\n" + "\n".join(lines)) from error


def digest(config: BaseModel) -> str:
    """SHA-256 (hex) of a model's canonical JSON."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _apply(raw: dict[str, Any], override: str) -> None:
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


def _explain(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown key; remove it or correct its spelling"
    if error["type"] == ADDRESS_ERROR:
        # What was found may hold a password.
        return str(error["msg"])
    found = "" if error["type"] == "missing" else f" (found {error['input']!r})"
    return f"{error['msg']}{found}"
