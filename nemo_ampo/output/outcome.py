"""How far did it get? One answer for every job that works off a plan: evaluate, SOTOPIA, generate.

What is not complete is PARTIAL: it says so in one line, its exit status is not 0, and no pipeline takes it as done.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

EXIT_COMPLETE = 0
EXIT_USER_ERROR = 2
"""Something only the person at the keyboard can change; the same command would end the same way."""
EXIT_UNFINISHED = 75
"""Not finished; the same command continues (EX_TEMPFAIL)."""

PARTIAL_FOLDER = "partial"
"""Where a result lies that is not complete, so that nothing takes it for one that is."""

_SHOWN_FAILURES = 5
TRIED_IN_VAIN = 3
"""Where so many were refused and none was not, the others will be too."""


@dataclass
class Outcome:
    """How far a job got.

    Attributes:
        planned: how many there should be, whether they were begun or not.
        begun, done: how many got to the middle, and to the end.
        words: what is counted and what happens to it there and there.
        missing: reason to how many were tried in vain.
        reasons: why even all of the plan would be no whole result.
        stopped: what ended the job before its end, such as a spent budget or an endpoint that refuses every call; only the
            user can change it.
        failures: the first few of what is missing, one line each.
    """

    planned: int
    begun: int = 0
    done: int = 0
    words: tuple[str, str] = ("situations begun", "finished")
    missing: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    stopped: str | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """All of the whole plan is done."""
        return self.planned > 0 and self.done == self.planned and not self.reasons and self.stopped is None

    @property
    def status(self) -> int:
        """Exit status of the command."""
        if self.stopped is not None:
            return EXIT_USER_ERROR
        return EXIT_COMPLETE if self.complete else EXIT_UNFINISHED

    def line(self) -> str:
        """For the terminal."""
        counts = f"{self.begun} of {self.planned} {self.words[0]}, {self.done} {self.words[1]}"
        if self.complete:
            return f"complete: {counts}"
        missing = ", ".join(f"{kind} {number}" for kind, number in sorted(self.missing.items()))
        reasons = [f"missing: {missing}"] if missing else []
        reasons += [self.stopped] if self.stopped is not None else []
        return "; ".join([f"PARTIAL: {counts}", *reasons, *self.reasons])

    @property
    def in_vain(self) -> bool:
        """Nothing is done, and several were tried: whatever refused them will refuse the others."""
        return self.done == 0 and self.missing.total() >= TRIED_IN_VAIN

    def miss(self, kind: str, failure: str) -> None:
        """Count one that was tried in vain, and keep the first few.

        Args:
            kind: of the failure, a word or two.
            failure: which one and why, one line.
        """
        self.missing[kind] += 1
        if len(self.failures) < _SHOWN_FAILURES:
            self.failures.append(failure)
