"""What the numbers of our own sections may be, asked before anything is divided by them, allocated or loaded.

A number has its range beside its default: ``seed: int = number(1, least=1)``. NeMo's keys have theirs in
:mod:`nemo_ampo.config.nemo_keys`, by the same rules.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any

from nemo_ampo.errors import ConfigError
from nemo_ampo.text import one_line

LARGEST_INT = 2**31 - 1
"""Counts, steps and seeds end up in 32-bit integers of one framework or another."""
LARGEST_SEED = LARGEST_INT - 2**20
"""Ranks and purposes add small numbers to a seed, which numpy and Megatron must still take."""
LARGEST_PORT = 65535
SMALLEST_DRAW = 1e-5
"""Of a temperature that is not 0, and of ``top_p``: below, a reply is as good as greedy and numbers leave their range."""
YEAR_S = 365 * 24 * 3600.0
"""No wait is longer; the system's clocks overflow at a few hundred of them."""


class Switch(StrEnum):
    """Words of a key, `on` or `off` among them, which a bare YAML reads as truth values."""

    @classmethod
    def _missing_(cls, value: object) -> Switch | None:
        return cls.__members__.get("on" if value else "off") if isinstance(value, bool) else None


@dataclass(frozen=True)
class Range:
    """Finite numbers between two limits.

    Attributes:
        least, most: limits.
        whole: integers only.
        above, below: ``least``, ``most`` itself is not allowed.
        or_else: values allowed besides.
    """

    least: float
    most: float = LARGEST_INT
    whole: bool = True
    above: bool = False
    below: bool = False
    or_else: tuple[Any, ...] = ()

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is allowed."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return any(value is other for other in self.or_else)
        if value in self.or_else:
            return True
        # An integer without end cannot even become a float.
        low = value > self.least if self.above else value >= self.least
        high = value < self.most if self.below else value <= self.most
        return low and high and (isinstance(value, int) or math.isfinite(value))

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a number"
        low = f"{'above' if self.above else 'of at least'} {self.least:.10g}"
        high = "" if self.most == LARGEST_INT else f" and {'below' if self.below else 'at most'} {self.most:.10g}"
        others = "".join(f", or {as_yaml(other)}" for other in self.or_else)
        return f"{kind} {low}{high}{others}"


def number(
    default: Any = dataclasses.MISSING,
    least: float = 0,
    most: float | None = None,
    *,
    whole: bool | None = None,
    above: bool = False,
    below: bool = False,
    or_else: tuple[Any, ...] = (),
) -> Any:
    """A dataclass field that holds a number, or numbers, or None, with their :class:`Range` beside the default.

    Args:
        default: as in a plain field; a list becomes a factory.
        least, most, above, below, or_else: as in :class:`Range`; without ``most`` the range ends at a 32-bit integer.
        whole: integers only; by default what the default is.
    """
    whole = isinstance(default, int) if whole is None else whole
    allowed = Range(least, LARGEST_INT if most is None else most, whole, above, below, or_else)
    metadata = {"range": allowed}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def seconds(default: float, least: float = 0, *, above: bool = True) -> Any:
    """A field with a time to wait, seconds."""
    return number(float(default), least, YEAR_S, above=above)


def check_numbers(section: str, values: Any) -> None:
    """Hold every number of a dataclass, and of those below it, to its range; text must be something a system call takes.

    Args:
        section: name of the config section, for error messages; empty for what holds sections.
        values: the section as an object.

    Raises:
        ConfigError: naming the first key whose value is not allowed, and what would be.
    """
    for key, value, allowed in _leaves(section, values, None):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and allowed is not None and not allowed.holds(value):
            raise ConfigError(f"{key}: must be {told(allowed, value)}")
        check_leaf(key, value)


def check_leaf(key: str, value: Any) -> None:
    """What every value of a config obeys, one without a rule of its own too.

    Raises:
        ConfigError: naming the key of a number that is not finite, or of text that no system call takes.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: must be {told('a finite number', value)}")
    problem = text_problem(value) if isinstance(value, str) else None
    if problem is not None:
        raise ConfigError(f"{key}: {problem}")


def told(rule: object, value: Any) -> str:
    """A rule and the value that breaks it, to complete "must be"."""
    high = isinstance(rule, Range) and isinstance(value, int | float) and value > rule.most == LARGEST_INT
    return f"{rule}{f' and at most {LARGEST_INT}' if high else ''}, got {as_yaml(value)}"


def text_problem(text: str) -> str | None:
    """Why a text can stand in no file name, header or JSON document, or would not mean what it says; None when it can."""
    if text.startswith("~"):
        return f"{text}: nothing here expands ~; write the whole path, or ./~ for a name that starts so"
    if "\0" in text:
        return "holds a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "is not valid UTF-8"
    return None


def _leaves(key: str, value: Any, allowed: Range | None) -> Iterator[tuple[str, Any, Range | None]]:
    if is_dataclass(value):
        for f in fields(value):
            yield from _leaves(f"{key}.{f.name}".lstrip("."), getattr(value, f.name), f.metadata.get("range"))
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner, allowed)
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _leaves(f"{key}[{place}]" if is_dataclass(inner) else key, inner, allowed)
    else:
        yield key, value, allowed


def as_yaml(value: Any) -> str:
    """A value as it would stand in a config file, shortened."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    text = repr(value) if len(str(value)) <= 60 else f"{str(value)[:40]}…"
    return one_line(text)
