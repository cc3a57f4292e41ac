"""Strict TOML reader and writer for frozen dataclasses."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from afterimage.config.errors import AfterimageError, printable_path, unknown_choice_error

T = typing.TypeVar("T")
MAX_PARAMETERS = 10**10
"""Largest number of parameters of a decoder, which would take 40 GB in float32."""

Count = typing.NewType("Count", int)
"""A whole number, which a file may also write as short text: 250k, 4M, 1.5M, 4_000_000."""


MAX_TEXT = 2**28
"""Largest size in bytes of a text file to read: four times the scores of a million images."""


def read_text(path: str | Path) -> str:
    """Read a regular file as UTF-8 text.

    Raises:
        AfterimageError: the file cannot be read, is too large or not a regular file; the message names it
    """
    path = Path(path)
    try:
        # Check before opening: a named pipe would block, and a device has no end.
        size = path.stat().st_size
        if not path.is_file() or size > MAX_TEXT:
            what = f"is larger than {MAX_TEXT / 2**20:.0f} MiB" if path.is_file() else "is not a regular file"
            raise AfterimageError(f"cannot read {printable_path(path)}: it {what}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise AfterimageError(f"cannot read {printable_path(path)}: {error.strerror}") from None
    except ValueError as error:
        raise AfterimageError(f"cannot read {printable_path(path)}: {error}") from None


def parse_count(value: Any, where: str) -> Count:
    """Parse a whole number from 1 to 10^10, an integer or text such as `4M`; an `AfterimageError` names `where`."""
    number = value if isinstance(value, int) and not isinstance(value, bool) else None
    if isinstance(value, str) and (match := re.fullmatch(r"(\d(?:_?\d)*(?:\.\d+)?)([kKmM]?)", value.strip())):
        exact = Decimal(match[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[match[2].lower()]
        number = int(exact) if exact == int(exact) else None
    if number is None or not 0 < number <= MAX_PARAMETERS:
        raise AfterimageError(
            f"{where} must be a whole number such as 4000000, 250k or 1.5M, at most 10000M, got {_abbreviate(value)}"
        )
    return Count(number)


def to_dict(config: Any) -> Any:
    """Return a config, or a value in one, as plain JSON and TOML values, without the settings that are None."""
    if dataclasses.is_dataclass(config):
        config = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items() if value is not None}
    if isinstance(config, list | tuple):
        return [to_dict(value) for value in config]
    return config


def from_dict(cls: type[T], settings: Mapping[str, Any], where: str = "") -> T:
    """Build a config from plain values; a nested dataclass is a table, or just the text of its `name`.

    Raises:
        AfterimageError: a setting is unknown, missing or of the wrong type; the message names it, after `where`
    """
    hints = typing.get_type_hints(cls)
    for key in settings:
        if key not in hints:
            raise unknown_choice_error("setting", f"{where}{key}", [f"{where}{name}" for name in hints])
    values = {key: _convert(hints[key], value, f"{where}{key}") for key, value in settings.items()}
    required = [
        f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing := [f"{where}{name}" for name in required if name not in settings]:
        raise AfterimageError(f"missing setting: {', '.join(missing)}")
    return cls(**values)


def _abbreviate(value: Any) -> str:
    """Return a value as text for an error message: the type of a container, else at most 200 characters."""
    return f"a {type(value).__name__}" if isinstance(value, list | Mapping) and value else f"{value!r:.200}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(value):  # already built
        return value
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        if inner == [int, str] and isinstance(value, str):
            return value
        return None if value is None else _convert(inner[0], value, where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, str) and any(f.name == "name" for f in dataclasses.fields(hint)):
            return hint(name=value)
        if not isinstance(value, Mapping):
            raise AfterimageError(f"{where} must be a table, got {_abbreviate(value)}")
        return from_dict(hint, value, f"{where}.")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise AfterimageError(f"{where} must be a list, got {_abbreviate(value)}")
        return tuple(_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if hint is Any:
        return value
    if hint is Count:
        return parse_count(value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise AfterimageError(f"{where} must be a table, got {_abbreviate(value)}")
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, int) and abs(value) >= 2**63:
        raise AfterimageError(f"{where} must lie between -2^63 and 2^63")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise AfterimageError(f"{where} must be a finite number, got {value}")
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise AfterimageError(f"{where} must be {hint.__name__}, got {_abbreviate(value)}")
    return value


def load_toml(cls: type[T], path: str | Path) -> T:
    """Read a config of the dataclass `cls` from the TOML file at `path`; every `AfterimageError` names the file."""
    try:
        text = read_text(path)
        return from_dict(cls, tomllib.loads(text))
    except (ValueError, RecursionError) as error:
        raise AfterimageError(f"{printable_path(path)} is not valid TOML: {error}") from None
    except AfterimageError as error:
        if printable_path(path) in str(error):
            raise
        raise AfterimageError(f"{printable_path(path)}: {error}") from None


def dump_toml(config: Any) -> str:
    """Return a config as TOML text, from which `load_toml` reads an equal config."""
    import tomli_w

    return tomli_w.dumps(to_dict(config))
