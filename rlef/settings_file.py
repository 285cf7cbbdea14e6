"""Settings from a run file and the command line, and what is wrong with them, in one line."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from rlef.arithmetic import check_arithmetic
from rlef.config import Config, ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a TOML file, with `section.key=value` overrides; a `ConfigError` names what to mend."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no run file {str(path)!r}; configs/ has examples") from None
    except OSError as error:
        raise ConfigError(f"the run file {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    for override in overrides:
        _apply(tree, override)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
    check_arithmetic(config)
    return config


def _apply(tree: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not separator or not dot:
        raise ConfigError(f"override {override!r} is not of the form section.key=value, such as run.seed=2")
    value = _read_value(_annotation(section, key), text)
    table = tree.setdefault(section, {})
    if not isinstance(table, dict):
        raise ConfigError(f"override {override!r}: {section!r} is not a section")
    table[key] = value


def _annotation(section: str, key: str) -> object:
    """The type of a setting, or None where there is no such setting."""
    table = Config.model_fields[section].annotation if section in Config.model_fields else None
    if not isinstance(table, type) or not issubclass(table, BaseModel) or key not in table.model_fields:
        return None
    return table.model_fields[key].annotation


def _read_value(annotation: object, text: str) -> Any:
    """The command line's text in the setting's type: bare words need no quotes, lists no brackets."""
    value = _read_toml(text)
    if get_origin(annotation) is tuple and not isinstance(value, list):
        words = [word.strip() for word in text.split(",") if word.strip()]
        return words if _is_text(get_args(annotation)[0]) else [_read_toml(word) for word in words]
    return text if _is_text(annotation) and not isinstance(value, str) else value


def _read_toml(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _is_text(annotation: object) -> bool:
    return annotation is str or get_origin(annotation) is Literal


def explain(invalid: ValidationError) -> str:
    """The first fault that pydantic found in settings, in one line."""
    error = invalid.errors()[0]
    path = tuple(str(part) for part in error["loc"])
    name = ".".join(path)
    if error["type"] == "missing":
        return f"{name} is missing; give it beside the others"
    if error["type"] != "extra_forbidden":
        said = _mend_of(error["type"], error["input"], error.get("ctx", {})) or error["msg"]
        return f"{name} = {error['input']!r}: {said}" if name else said
    known = _settings_beside(path)
    near = difflib.get_close_matches(path[-1], known, n=1)
    hint = f"did you mean {'.'.join((*path[:-1], near[0]))!r}?" if near else "known keys: " + ", ".join(known)
    return f"unknown setting {name!r}; {hint}"


# By pydantic's name of a fault, which says what it expected.
_MENDS = {
    "bool_type": "write true or false",
    "finite_number": "give a finite number",
    "float_type": "give a number",
    "greater_than": "give more than {gt:g}",
    "greater_than_equal": "give at least {ge:g}",
    "int_type": "give a whole number",
    "less_than_equal": "give at most {le:g}",
    "literal_error": "use {expected}",
    "model_type": "write a table of settings",
    "string_pattern_mismatch": "use letters, digits and _ . + -, with a letter, a digit or _ at the start",
    "string_type": "write text",
    "too_short": "give at least {min_length}",
    "tuple_type": "write a list, as in [1, 3]",
}


def _mend_of(fault: str, value: object, expected: Mapping[str, Any]) -> str:
    """Empty for a fault that no setting has so far."""
    mend = _MENDS.get(fault, "").format_map(expected)
    if fault == "literal_error":
        names = re.findall("'([^']*)'", expected["expected"])
        near = difflib.get_close_matches(str(value), names, n=1)
        return f"{mend}; did you mean {near[0]!r}?" if near else mend
    return mend


def _settings_beside(path: Sequence[str]) -> list[str]:
    """What could stand in the place of a path's last name: in the tree, a section or a section's tables."""
    table: Any = Config
    for name in path[:-1]:
        if name.isdecimal():  # the place in a list of tables
            continue
        annotation = table.model_fields[name].annotation
        table = get_args(annotation)[0] if get_origin(annotation) is tuple else annotation
    return list(table.model_fields)
