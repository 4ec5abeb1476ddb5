"""What a folder's results were made with: written down beside them, and held to by every later start.

Only what decides a result belongs there, and of a file its content, not its name: a moved file, another address or more
patience change nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_ampo.errors import ConfigError
from nemo_ampo.files import read_record, write_once


def digest(text: str) -> str:
    """16 hex digits that tell texts apart."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_protocol(path: Path) -> dict[str, Any] | None:
    """What was written down; None without the file.

    Raises:
        DataError: unreadable.
    """
    return read_record(path) if path.exists() else None


def keep_protocol(
    path: Path,
    protocol: Mapping[str, Any],
    key: str,
    *,
    growing: Sequence[str] = (),
    parts: Sequence[str] = (),
    cure: str = "",
    results: Path | None = None,
    write: bool = True,
) -> None:
    """Write down what new results are made with; hold old ones to it.

    Args:
        path: the file.
        protocol: JSON values.
        key: config key or option that named the place, for the message.
        growing: keys that may change from start to start.
        parts: keys whose values are compared key by key.
        cure: what to do instead, for the message.
        results: where they are, if they must not be there without a protocol.
        write: False only compares.

    Raises:
        ConfigError: the results were made with another protocol; names each key that differs. A key that the file lacks
            cannot be compared: an older version wrote it. Or there are results and nothing says what they were made with.
        DataError: the file is unreadable.
    """
    old = read_protocol(path)
    if not old and results is not None and results.exists():
        raise ConfigError(f"{key}: {results} is there, but nothing in {path} says what it was made with; {cure}")
    new: dict[str, Any] = json.loads(json.dumps(protocol))
    differing = _differences(old or {}, new, growing, parts)
    if differing:
        shown = "; ".join(f"{name} was {before!r}, is now {now!r}" for name, (before, now) in differing.items())
        raise ConfigError(f"{key}: {path} records another protocol: {shown}{cure and f'; {cure}'}")
    if write and old != new:
        write_once(path, json.dumps(new, ensure_ascii=False, indent=1) + "\n")


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], growing: Sequence[str], parts: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Keys of ``old`` whose values differ, with both."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(set(old) - set(growing)):
        before, now = old[name], new.get(name)
        if name in parts and isinstance(before, dict) and isinstance(now, dict):
            inner = _differences(before, now, (), ())
            found |= {f"{name}.{key}": values for key, values in inner.items()}
        elif before != now or name not in new:
            found[name] = before, now
    return found
