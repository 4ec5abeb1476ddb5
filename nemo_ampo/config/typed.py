"""Plain values of YAML as one of our dataclasses: every key known, every value of the type that is written beside it."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from nemo_ampo.errors import ConfigError
from nemo_ampo.ranges import as_yaml, text_problem
from nemo_ampo.text import one_line

C = TypeVar("C")

LARGEST_NUMBER = 10**300
"""Integers from here on are no floats; what a key allows is said by its range."""
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping of names to values",
    "dataclass_type": "a mapping of keys to values",
    "int_parsing": "a whole number",
}
"""pydantic's kinds of errors in words."""


def typed(name: str, schema: type[C], given: Any) -> C:
    """A section as an object.

    Types are held strictly: no text is read as a number, no number as text.

    Args:
        name: of the section, for error messages; empty for a whole file.
        schema: dataclass; its own rules (``__post_init__``) hold too.
        given: what the YAML says; ``???`` where a required value is still to be given.

    Raises:
        ConfigError: unknown key, wrong type or a missing value, naming the key.
    """
    try:
        # As JSON: there a list may become a tuple and a word a member of its enum, and nothing else changes its type.
        text = json.dumps({"section": _sayable(name, given)})
        found: C = _reader(schema).model_validate_json(text).section  # type: ignore[attr-defined, arg-type]
    except ValidationError as error:
        raise ConfigError(_said(name, schema, error.errors()[0])) from None
    for key, hint, value in _fields(name, schema, found):
        if value == MISSING:
            raise ConfigError(f"{key}: a value is required")
        if value == "" and hint == str | None:
            raise ConfigError(f"{key}: must not be empty; null stands for none")
    return found


def plain(given: Any, name: str) -> Any:
    """OmegaConf's values as Python's own, with what ``${...}`` stands for.

    Raises:
        ConfigError: one stands for nothing, naming the key.
    """
    try:
        return OmegaConf.to_container(given, resolve=True) if OmegaConf.is_config(given) else given
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or name}: {str(error).splitlines()[0]}") from None


def meant(key: str, known: Sequence[str]) -> str:
    """The known key that a misspelt one may stand for, or all there are, in words."""
    near = difflib.get_close_matches(key, known, 1)
    return f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"


@cache
def _reader(schema: type[Any]) -> type[BaseModel]:
    return create_model("Reader", __config__=ConfigDict(extra="forbid", strict=True), section=(schema, ...))


def _sayable(key: str, value: Any) -> Any:
    """A value as JSON can say it, without what is still missing."""
    if isinstance(value, Mapping):
        return {str(name): _sayable(f"{key}.{name}".lstrip("."), inner) for name, inner in value.items() if inner != MISSING}
    if isinstance(value, list | tuple):
        return [_sayable(key, inner) for inner in value]
    if isinstance(value, int) and abs(value) >= LARGEST_NUMBER:
        raise ConfigError(f"{key}: a number of {len(str(abs(value)))} digits is too large")
    problem = text_problem(value.lstrip("~")) if isinstance(value, str) else None
    if problem is not None:
        raise ConfigError(f"{key}: {problem}")
    return value


def _fields(name: str, schema: type[Any], values: Any) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, type and value of every field, those of sections inside too."""
    hints = get_type_hints(schema)
    for f in dataclasses.fields(schema):
        key, value = f"{name}.{f.name}".lstrip("."), getattr(values, f.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _fields(key, type(value), value)
        else:
            yield key, hints[f.name], value


def _said(name: str, schema: type[Any], error: Mapping[str, Any]) -> str:
    """One of pydantic's errors as a line that names the key."""
    kind, given = error["type"], error["input"]
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    path = [part for part in error["loc"][1:] if part != "[key]"]
    key = name
    for part in path:
        key = f"{key}[{part}]" if isinstance(part, int) else f"{key}.{part}".lstrip(".")
    if kind == "missing":
        return f"{key}: a value is required"
    if kind == "unexpected_keyword_argument":
        return f"{key}: no such key; {meant(str(path[-1]), _known(schema, path[:-1]))}"
    if kind == "string_type" and isinstance(given, int | float):
        return f"{key}: YAML reads {as_yaml(given)} where text is expected; put quotes around it"
    if kind == "enum":
        words = error["ctx"]["expected"].replace("'", "").replace(" or ", ", ")
        return f"{key}: expected one of {words}, got {as_yaml(given)}"
    if kind in EXPECTED:
        return f"{key}: expected {EXPECTED[kind]}, got {as_yaml(given)}"
    return f"{key}: {one_line(error['msg'].removeprefix('Value error, '))}, got {as_yaml(given)}"


def _known(schema: type[Any], path: Sequence[int | str]) -> list[str]:
    """Keys of the dataclass that a path leads to."""
    for part in path:
        hint: Any = get_type_hints(schema).get(str(part))
        inside = [kind for kind in (hint, *getattr(hint, "__args__", ())) if dataclasses.is_dataclass(kind)]
        schema = inside[0] if inside else schema  # type: ignore[assignment]
    return [f.name for f in dataclasses.fields(schema)]
