"""A table of substitutes: what is replaced upstream, in which version, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Substitute:
    """One upstream symbol we replace.

    Attributes:
        upstream: dotted name of what is replaced.
        version: upstream version the replacement was written for.
        reason: what happens without it.
        apply: installs the replacement.
    """

    upstream: str
    version: str
    reason: str
    apply: Callable[[], None]


class Table:
    """Substitutes in the order they must be applied."""

    def __init__(self) -> None:
        self.rows: list[Substitute] = []

    def add(self, upstream: str, version: str, reason: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """Register the decorated function as the installer of one substitute."""

        def register(apply: Callable[[], None]) -> Callable[[], None]:
            self.rows.append(Substitute(upstream, version, reason, apply))
            return apply

        return register

    def apply_all(self) -> None:
        """Install every row, in order."""
        for row in self.rows:
            row.apply()
