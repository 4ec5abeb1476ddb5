"""Every reply on disk, found again by what was asked: free repetition, and replay of a whole run.

One SQLite file, written by any number of processes of one machine at a time. The key is a hash of the question
(:meth:`nemo_ampo.chat.question.Question.key`), which holds model, messages, sampling parameters and the number of the
attempt, but not the address. The first reply to a question stays; who asked the same at the same time gets that one
too, so that a recorded run and its replay see equal verdicts. A question that failed for good is recorded as failed:
a replay fails there again, a later run asks again.

SQLite's write-ahead log needs memory shared by all writers, so the processes must run on one machine. Over several
machines only the main rank opens the file and the others reach it through :mod:`nemo_ampo.chat.broker`. A replay writes
nothing, neither into the file nor beside it. A full or broken disk is a :class:`~nemo_ampo.errors.DiskError`; whoever
asked has the reply all the same.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from nemo_ampo.chat.completion import Completion
from nemo_ampo.errors import ChatError, ConfigError, DiskError
from nemo_ampo.files import disk_errors, is_file, strict_json
from nemo_ampo.output.lock import hold_output

SCHEMA_VERSION = 1
"""Raised whenever a key or a column changes its meaning."""

_APPLICATION_ID = 0x616D706F
_BUSY_TIMEOUT_S = 60.0
_COLUMNS = ("text", "reasoning", "prompt_tokens", "completion_tokens", "finish_reason", "failure_kind", "failure")
_TYPES = (str, str | None, int, int, str | None, str | None, str | None)
_TABLES = f"""
CREATE TABLE replies (key TEXT PRIMARY KEY, {", ".join(_COLUMNS)}) WITHOUT ROWID;
CREATE TABLE recordings (settings TEXT PRIMARY KEY) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""


class Cache(Protocol):
    """Where replies are kept."""

    async def get(self, key: str, *, failures: bool = False) -> Completion | None:
        """The reply to a question, or None.

        Args:
            key: of the question.
            failures: raise what the question failed with, if it did.

        Raises:
            DiskError: the file cannot be read.
        """
        ...

    async def put(self, key: str, outcome: Completion | ChatError) -> Completion | None:
        """Keep an outcome unless there is a reply already; returns the reply that is kept now.

        Raises:
            DiskError: the file cannot be written; what it holds is still there.
        """
        ...

    async def aclose(self) -> None:
        """Let go of the file."""
        ...


class ReplyFile:
    """A :class:`Cache` in a file.

    Args:
        path: the file; created with its folders unless ``replay``.
        key: config key that named it, for messages.
        replay: only read, and expect the file to be there.

    Raises:
        ConfigError: no such file, not a cache, or one of another schema version.
        DiskError: its folder cannot be written.
    """

    def __init__(self, path: str | Path, key: str, *, replay: bool = False) -> None:
        self.path, self.config_key, self.replay = Path(path), key, replay
        self._copy: TemporaryDirectory[str] | None = None
        try:
            if replay:
                if not is_file(self.path):
                    raise ConfigError(f"{key}: no such file: {path}")
                self._db = self._open_replay()
            else:
                with disk_errors(f"{key}: cannot create {path}"):
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    # Several processes that create the file at one moment all get it: changing the journal waits for nobody.
                    with hold_output(self.path, key, _BUSY_TIMEOUT_S):
                        # What endpoints said is for the owner only; the files beside it take their mode from this one.
                        os.close(os.open(self.path, os.O_CREAT | os.O_RDONLY, 0o600))
                        self._db = _connect(str(self.path))
                        self._db.execute("PRAGMA journal_mode = WAL")
                        self._db.execute("PRAGMA synchronous = NORMAL")
                        self._prepare()
        except sqlite3.Error as error:
            raise ConfigError(f"{key}: {path} cannot be used as a cache: {error}") from None

    def _open_replay(self) -> sqlite3.Connection:
        """Reading leaves nothing behind and needs no right to write, not even where a killed run left its journal."""
        address, journal = self.path.resolve().as_uri(), Path(f"{self.path}-wal")
        try:
            # Without a journal nobody writes here, and nothing need be locked.
            self._db = _connect(f"{address}?mode=ro" + ("" if journal.exists() else "&immutable=1"), uri=True)
            self._prepare()
        except sqlite3.OperationalError:
            if not journal.exists():
                raise
            with disk_errors(f"{self.config_key}: cannot copy {self.path}"):
                self._copy = TemporaryDirectory(prefix="nemo-ampo-replay-")
                copy = Path(self._copy.name) / "replies"
                shutil.copyfile(self.path, copy)
                shutil.copyfile(journal, f"{copy}-wal")
            self._db = _connect(str(copy))
            self._prepare()
        self._db.execute("PRAGMA query_only = 1")
        return self._db

    @contextlib.contextmanager
    def _as_disk_errors(self, doing: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DiskError(errno.EIO, f"{self.config_key}: cannot {doing} {self.path}: {error}") from None

    async def get(self, key: str, *, failures: bool = False) -> Completion | None:
        """See :class:`Cache`."""
        with self._as_disk_errors("read"):
            row = self._db.execute(f"SELECT {', '.join(_COLUMNS)} FROM replies WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        text, reasoning, prompt_tokens, completion_tokens, finish_reason, kind, failure = row
        if not all(map(isinstance, row, _TYPES)) or (kind is None) != (failure is None):
            why = f"{self.config_key}: cannot read {self.path}: the reply with key {key} was damaged or edited"
            raise DiskError(errno.EIO, why)
        if kind is None:
            return Completion(text, reasoning, prompt_tokens, completion_tokens, finish_reason, cached=True)
        if failures:
            raise ChatError(kind, failure)
        return None

    async def put(self, key: str, outcome: Completion | ChatError) -> Completion | None:
        """See :class:`Cache`."""
        if isinstance(outcome, ChatError):
            row: tuple[Any, ...] = ("", None, 0, 0, None, outcome.kind, str(outcome))
        else:
            o = outcome
            row = (o.text, o.reasoning, o.prompt_tokens, o.completion_tokens, o.finish_reason, None, None)
        values = ", ".join("?" * (1 + len(_COLUMNS)))
        updates = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS)
        with self._as_disk_errors("write"):
            self._db.execute(
                f"INSERT INTO replies VALUES ({values}) ON CONFLICT (key) DO UPDATE SET {updates} "
                "WHERE failure_kind IS NOT NULL AND excluded.failure_kind IS NULL",
                (key, *row),
            )
        kept = await self.get(key)
        # What this very call brought is not a hit.
        return replace(kept, cached=False) if kept is not None and kept == _as_cached(outcome) else kept

    def forget(self, keys: Iterable[str]) -> None:
        """Remove what is kept of these questions."""
        with self._as_disk_errors("write"):
            self._db.executemany("DELETE FROM replies WHERE key = ?", [(key,) for key in keys])

    async def aclose(self) -> None:
        """See :class:`Cache`."""
        with contextlib.suppress(sqlite3.Error):  # a full disk: everything that could be kept is kept
            self._db.close()
        if self._copy is not None:
            self._copy.cleanup()

    def record(self, settings: Mapping[str, Any]) -> None:
        """Note the settings of a run that writes here."""
        with self._as_disk_errors("write"):
            self._db.execute("INSERT OR IGNORE INTO recordings VALUES (?)", (_canonical(settings),))

    def require(self, settings: Mapping[str, Any]) -> None:
        """Check that a run with these settings was recorded here.

        Raises:
            ConfigError: naming the settings that differ.
        """
        with self._as_disk_errors("read"):
            rows = self._db.execute("SELECT settings FROM recordings").fetchall()
        try:
            recorded = [_object(row[0]) for row in rows]
        except ValueError as error:
            raise ConfigError(f"{self.config_key}: {self.path} was damaged or edited: {error}") from None
        wanted = json.loads(_canonical(settings))
        if wanted in recorded:
            return
        nearest: dict[str, Any] = min(recorded, key=lambda other: len(_differences(wanted, other)), default={})
        differing = ", ".join(_differences(wanted, nearest)) or "everything"
        raise ConfigError(f"{self.config_key}: {self.path} was recorded with other settings; these differ: {differing}")

    def _prepare(self) -> None:
        """Look at the file as it is at one moment; make the tables where it has none."""
        self._db.execute("BEGIN" if self.replay else "BEGIN IMMEDIATE")
        try:
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            empty = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
            if empty and not self.replay:
                for statement in filter(str.strip, _TABLES.split(";")):
                    self._db.execute(statement)
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        if empty and not self.replay:
            return
        if application != _APPLICATION_ID:
            raise ConfigError(f"{self.config_key}: {self.path} is not a cache of replies")
        if version != SCHEMA_VERSION:
            raise ConfigError(
                f"{self.config_key}: {self.path} has cache schema version {version}, this program reads "
                f"{SCHEMA_VERSION}; name another file"
            )


def _connect(address: str, *, uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(address, uri=uri, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def _as_cached(outcome: Completion | ChatError) -> Completion | None:
    return replace(outcome, cached=True) if isinstance(outcome, Completion) else None


def _object(text: Any) -> dict[str, Any]:
    record = strict_json(text if isinstance(text, str) else "", finite=False)
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    return record


def _canonical(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, ensure_ascii=True)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
