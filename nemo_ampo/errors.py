"""One error type per boundary the program can fail at.

``UserError`` and its children are what somebody running a recipe can cause and cure: the command line prints them as
one line and exits with status 2. The others are facts about one sample (a bad reply, a judge call that failed) or about
an engine; the stage that sees them decides what they mean.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something the person at the keyboard can fix; the message says what to change."""


class ConfigError(UserError):
    """A configuration key is unknown, missing, or contradicts another. The message names the key."""


class DataError(UserError):
    """A data file is missing or holds a bad row. The message names file, line and field."""


class DiskError(OSError, UserError):
    """A file cannot be read or written: a full or read-only disk, a missing right. The message names the file."""

    def __str__(self) -> str:
        return str(self.strerror)


class JudgeOutageError(RuntimeError):
    """Too many verdicts of a step could not be had, and asking again did not help. Nothing is wrong with the run itself:
    it stops at a checkpoint, and the same command goes on when the judge is back."""


class FormatError(ValueError):
    """A reply breaks the mode grammar.

    Attributes:
        rule: which rule failed first: ``level``, ``tags``, ``order``, ``answer``, ``sections`` or (strict only)
            ``outside``.
    """

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(message)
        self.rule = rule


class BudgetError(UserError):
    """The calls or the money the job may spend on its judge are spent. The message names the limit."""


class AskedToStopError(BudgetError):
    """The job asks nothing more, as if its budget were spent: somebody wants it to end."""


class ChatError(RuntimeError):
    """A chat endpoint gave no usable answer.

    Attributes:
        kind: ``parse``, ``timeout``, ``connection``, ``status`` or ``empty``.
        permanent: the same question would fail again, until somebody changes the settings or the endpoint.
    """

    def __init__(self, kind: str, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.permanent = permanent


class JudgeError(ChatError):
    """The judge gave no usable verdict. A missing value, never a score."""


class EngineError(RuntimeError):
    """A rollout engine refused a request or returned something that cannot be trained on.

    Attributes:
        is_bug: of the caller; nobody at the keyboard can mend it, so a stage ends with a traceback, not with one line.
    """

    is_bug = False


class Stopped(BaseException):
    """The scheduler asked this process to end while it had nothing to save; like KeyboardInterrupt, not to be caught."""
