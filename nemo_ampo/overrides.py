"""Keys and paths on a command line: any path survives as ``key=value``, and what does not is read with a cure."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_ampo.errors import ConfigError
from nemo_ampo.ranges import text_problem


def override(key: str, value: object) -> str:
    """``key=value`` as Hydra and OmegaConf read it back: exactly this value, whatever a path may hold.

    A text that starts with ``~`` is written ``./~``: nothing here expands it.
    """
    if isinstance(value, int | float):
        return f"{key}={value}"
    text = f"./{value}" if str(value).startswith("~") else str(value)
    plain = _PLAIN_PATH.fullmatch(text) or (_PLAIN_WORD.fullmatch(text) and text.lower() not in _NOT_WORDS)
    return f"{key}={text if plain else quoted(text)}"


_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./:-]*/[A-Za-z0-9_./:-]*")
_PLAIN_WORD = re.compile(r"[A-Za-z][A-Za-z_-]*")
_NOT_WORDS = ("null", "true", "false", "nan", "inf")


def typed_path(text: str) -> Path:
    """A path given to an option, by the rule that ``key=value`` has.

    Raises:
        argparse.ArgumentTypeError: it starts with ``~``, which the shell left as it is.
    """
    if text.startswith("~"):
        raise argparse.ArgumentTypeError(text_problem(text))
    return Path(text)


def dotted(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """``section.key`` and value of every leaf of nested mappings; lists and empty mappings are leaves."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from dotted(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def literal(text: str) -> str:
    """A text that OmegaConf hands back as it is: a backslash keeps ``${`` from being an interpolation."""
    return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)


def quoted(text: str) -> str:
    """A text as a quoted value of a Hydra override, which neither Hydra nor OmegaConf changes."""
    # A backslash is doubled in front of a quote, where the closing one counts.
    text = re.sub(r'(\\*)"', lambda found: found[1] * 2 + '\\"', literal(text))
    text = re.sub(r"(\\+)\Z", lambda found: found[1] * 2, text)
    return f'"{text}"'


def _without_home(text: str) -> str:
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:  # nobody of that name
        return f"./{text}"


def as_typed(given: str, is_text: Callable[[str], bool]) -> str:
    """An override as typed, but for a text key that was given what reads as a number: ``run.dir=1e-4`` is no 0.0001.

    Args:
        given: ``key=value``.
        is_text: whether a key holds text.

    Raises:
        ConfigError: it does not parse, naming it with its quoted form.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    key, equals, text = given.partition("=")
    cure = f"{key}={quoted(_without_home(text))}"
    instead = f"{given}: cannot be read as key=value; quote the value: {shlex.quote(cure)}"
    try:
        parsed = OverridesParser.create().parse_override(given)
        OmegaConf.create([parsed.value()])
    except (HydraException, OmegaConfBaseException):
        if not equals:
            raise ConfigError(f"{given}: expected key=value") from None
        raise ConfigError(instead) from None
    if parsed.is_sweep_override():
        raise ConfigError(instead)
    number = equals and not parsed.is_delete() and isinstance(parsed.value(), int | float)
    return f"{key}={quoted(text)}" if number and is_text(key.lstrip("+")) else given
