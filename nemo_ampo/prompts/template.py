"""A prompt file and its placeholders.

``{{name}}`` is a placeholder; everything else is text. All placeholders are filled in one pass over the file,
so braces inside a value are never looked at again and a JSON example in the file needs no escaping.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from nemo_ampo.errors import ConfigError

_PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")
_LAST_LINE_END = re.compile(r"\r?\n\Z")
_SHIPPED_NAME = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True)
class PromptTemplate:
    """The text of one prompt file.

    Attributes:
        source: shipped name or path, used in error messages.
        text: the file's text, its line ends as they are, without the one that ends it.
    """

    source: str
    text: str

    @cached_property
    def placeholders(self) -> frozenset[str]:
        """Names that occur as ``{{name}}``."""
        return frozenset(_PLACEHOLDER.findall(self.text))

    def require(self, required: Iterable[str], optional: Iterable[str] = ()) -> None:
        """Check that the file has all placeholders of ``required`` and no others, save those of ``optional``.

        Raises:
            ConfigError: naming the placeholders that are missing or unknown.
        """
        required_names = frozenset(required)
        missing = required_names - self.placeholders
        if missing:
            raise ConfigError(f"prompt {self.source}: placeholder {_braced(missing)} is missing; add it to the text")
        unknown = self.placeholders - required_names - frozenset(optional)
        if unknown:
            known = _braced(required_names | frozenset(optional)) or "none"
            raise ConfigError(f"prompt {self.source}: unknown placeholder {_braced(unknown)}; the known ones are {known}")

    def render(self, **values: str) -> str:
        """Fill every placeholder in one pass.

        Raises:
            ConfigError: if a placeholder has no value, or a value has no placeholder.
        """
        self.require(values)
        return _PLACEHOLDER.sub(lambda match: values[match.group(1)], self.text)


def load_prompt(name_or_path: str | Path) -> PromptTemplate:
    """Read a prompt.

    Args:
        name_or_path: the bare name of a shipped prompt (``judge``, ``modes_system``), or the path of a file;
            a file in the working directory needs its suffix or a leading ``./``.

    Raises:
        ConfigError: if there is no such prompt, or the file is not UTF-8 text.
    """
    name = str(name_or_path)
    file: Traversable = Path(name)
    if isinstance(name_or_path, str) and _SHIPPED_NAME.fullmatch(name):
        file = resources.files(__package__) / f"{name}.txt"
    try:
        there = file.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there:
        shipped = ", ".join(sorted(_shipped_names()))
        raise ConfigError(f"prompt {name!r}: no such file; name one, or a shipped prompt ({shipped})")
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"prompt {name}: not UTF-8 text (byte {error.start}); save the file as UTF-8") from None
    return PromptTemplate(source=name, text=_LAST_LINE_END.sub("", text))


def _shipped_names() -> list[str]:
    files = resources.files(__package__).iterdir()
    return [file.name.removesuffix(".txt") for file in files if file.name.endswith(".txt")]


def _braced(names: Iterable[str]) -> str:
    return ", ".join("{{" + name + "}}" for name in sorted(names))
