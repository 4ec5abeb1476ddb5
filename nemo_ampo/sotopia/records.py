"""Episodes on disk: one append-only JSONL file per episode, readable while it grows, never rewritten.

A folder of results holds ``protocol.json`` (what the numbers were made with) and one file per episode at
``episodes/seed<seed>/<seat>/<env_id>.jsonl``. Its lines, in order of time::

    {"record": "start", ...}         once: who meets whom, in which view
    {"record": "turn", ...}          one utterance, with what the model wrote and what it cost
    {"record": "end", ...}           why it stopped; after ``failed`` a later run goes on with more turns
    {"record": "scores", ...}        what one judge thinks of it; several judges, several lines
    {"record": "score_error", ...}   a judge that gave no usable scores

A line is written in one piece before the next call depends on it, so a killed process loses no answered call. Each is
sealed: one that was edited is named by whoever reads it.
The last line may be torn by the kill: readers leave it out, the next writer cuts it off. After ``end`` and ``scores``
the file is also forced to the disk, by a thread beside the run, so that it survives the machine. All readers hold one
episode at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from nemo_ampo.dialogue.records import Episode, EpisodeKey, Termination, Turn
from nemo_ampo.dialogue.scenarios import SEATS
from nemo_ampo.errors import DataError, UserError
from nemo_ampo.files import disk_errors, sealed, strict_json, unsealed
from nemo_ampo.output.lock import hold_run
from nemo_ampo.output.protocol import keep_protocol, read_protocol
from nemo_ampo.reply.modes import MODES
from nemo_ampo.sotopia.dimensions import DIMENSIONS, ScoreError, Scores
from nemo_ampo.text import one_line

FORMAT = 1
"""Version of the records."""
PROTOCOL_FILE = "protocol.json"
EPISODES_FOLDER = "episodes"
GROWING = ("subsets", "episodes")
"""Keys of the protocol that say how much was asked for so far: a folder may get more seeds, or all after the hard ones."""
SPEAKERS = ("policy", "partner")
"""Keys of the protocol that hold an agent's settings."""
_LATER = ("turns", "terminated_by", "error")


@dataclass(frozen=True)
class EpisodeResult:
    """An episode with the latest outcome of one scoring.

    Attributes:
        episode: as far as it was played.
        scores: None when not scored (yet), or not played.
        score_error: why not, when the judge was asked in vain.
    """

    episode: Episode
    scores: Scores | None = None
    score_error: ScoreError | None = None


class EpisodeStore:
    """The episodes of one result folder.

    Args:
        folder: with or without ``episodes``; nothing is created before the first write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[EpisodeKey, tuple[Path, FileIO]] = {}
        self._syncer: ThreadPoolExecutor | None = None
        self._unsynced: UserError | None = None

    def path(self, key: EpisodeKey) -> Path:
        """Where an episode lives."""
        return Path(f"{self.folder}/{EPISODES_FOLDER}/seed{key.seed}/{key.seat}/{key.env_id:04d}.jsonl")

    def episodes(self) -> Iterator[Episode]:
        """All begun episodes by seed, seat, env_id; one in memory at a time.

        Raises:
            DataError: a damaged file, naming file and line.
        """
        return (result.episode for result in self.results())

    def scores(self) -> Iterator[tuple[EpisodeKey, Scores]]:
        """Every record of scores, of every judge, in the order of :meth:`episodes`."""
        for path in self._paths():
            records = _read(path)
            episode = _episode(records, path)
            for record in records:
                if episode is not None and record["record"] == "scores":
                    yield episode.key, _from(Scores, record, path)

    def results(self, judge: str | None = None) -> Iterator[EpisodeResult]:
        """Episodes with their scores.

        Args:
            judge: name of the scoring; None takes the latest scores of each episode, whoever gave them.

        Raises:
            DataError: a damaged file, naming file and line.
        """
        for path in self._paths():
            result = _result(_read(path), path, judge)
            if result is not None:
                yield result

    def read(self, key: EpisodeKey, judge: str | None = None) -> EpisodeResult | None:
        """One episode, None when it was not begun.

        Raises:
            DataError: a damaged file, or an episode of another model.
        """
        path = self.path(key)
        result = _result(_read(path), path, judge) if path.exists() else None
        if result is not None and result.episode.key != key:
            raise DataError(f"{path}: holds {result.episode.key}, expected {key}; evaluate into another folder")
        return result

    def begin(self, episode: Episode) -> None:
        """Make an episode's file ready to be appended to: its first line, or no torn last line.

        Raises:
            UserError: the file cannot be written.
        """
        path, file = self._opened(episode.key)
        with disk_errors(f"cannot write {path}"):
            kept = _cut_torn_line(file)
        if kept == 0:
            values = {name: value for name, value in vars(episode).items() if name not in _LATER}
            self._append(episode.key, "start", {"format": FORMAT, **values, "key": vars(episode.key)})

    def add_turn(self, key: EpisodeKey, turn: Turn) -> None:
        """Append one utterance.

        Raises:
            UserError: the file cannot be written, as on a full disk; so do :meth:`end` and :meth:`add_scores`.
        """
        self._append(key, "turn", vars(turn))

    def end(self, key: EpisodeKey, terminated_by: Termination, error: str | None = None) -> None:
        """Append why it stopped."""
        self._append(key, "end", {"terminated_by": terminated_by.value, "error": error})
        self._keep(key, done=terminated_by is Termination.failed)

    def add_scores(self, key: EpisodeKey, scores: Scores | ScoreError) -> None:
        """Append a judge's outcome."""
        kind = "scores" if isinstance(scores, Scores) else "score_error"
        self._append(key, kind, vars(scores))
        self._keep(key, done=True)

    def protocol(self, name: str = PROTOCOL_FILE) -> dict[str, Any] | None:
        """What the folder's episodes were made with; None for a new folder.

        Args:
            name: another file of this kind, see :meth:`keep_protocol`.

        Raises:
            DataError: unreadable.
        """
        return read_protocol(self.folder / name)

    def keep_protocol(self, protocol: Mapping[str, Any], name: str = PROTOCOL_FILE, *, write: bool = True) -> None:
        """Write down what new records are made with; hold old ones to it.

        Args:
            protocol: JSON values. Those of :data:`GROWING` may change from run to run.
            name: file; a scoring has one of its own.
            write: False only compares.

        Raises:
            ConfigError: the folder's records were made with another protocol; names each key that differs.
        """
        path = self.folder / name
        cure, results = "give another judge.name", None
        if name == PROTOCOL_FILE:
            cure, results = "give another run.dir", self.folder / EPISODES_FOLDER
        keep_protocol(path, protocol, "run.dir", growing=GROWING, parts=SPEAKERS, cure=cure, results=results, write=write)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process may write; the lock ends with the process, however it ends.

        Raises:
            UserError: another one does; or, at the next record or at the end, something did not reach the disk.
        """
        with hold_run(self.folder, patience_s=0):
            try:
                with ThreadPoolExecutor(1, "fsync") as self._syncer:
                    yield
            finally:
                self._syncer = None
                while self._open:
                    self._open.popitem()[1][1].close()
            self._require_synced()

    def _require_synced(self) -> None:
        failure, self._unsynced = self._unsynced, None
        if failure is not None:
            raise failure

    def _sync_later(self, path: Path, file: FileIO, done: bool) -> None:
        try:
            _sync(path, file, done)
        except UserError as error:
            self._unsynced = error

    def _paths(self) -> Iterator[Path]:
        root = self.folder / EPISODES_FOLDER
        seeds = sorted(root.glob("seed*"), key=lambda path: (len(path.name), path.name)) if root.is_dir() else []
        return (path for seed in seeds for seat in SEATS for path in sorted((seed / seat).glob("*.jsonl")))

    def _append(self, key: EpisodeKey, kind: str, values: Mapping[str, Any]) -> None:
        self._require_synced()
        # Lone surrogates can come out of a model's bytes; escaped they are plain ASCII.
        line = (json.dumps(sealed({"record": kind, **values})) + "\n").encode("ascii")
        path, file = self._opened(key)
        with disk_errors(f"cannot write {path}"):
            written = file.write(line)
        if written != len(line):
            raise UserError(f"{path}: only {written} of {len(line)} bytes could be written; is the disk full?")

    def _keep(self, key: EpisodeKey, done: bool) -> None:
        """Force what was written so far to the disk; ``done`` closes the file then."""
        path, file = self._open.pop(key) if done else self._open[key]
        if self._syncer is not None:
            self._syncer.submit(self._sync_later, path, file, done)
        else:
            _sync(path, file, done)

    def _opened(self, key: EpisodeKey) -> tuple[Path, FileIO]:
        """The file of an episode, open until it is scored or has failed."""
        if key not in self._open:
            path = self.path(key)
            with disk_errors(f"cannot write {path}"):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._open[key] = path, path.open("a+b", buffering=0)
        return self._open[key]


def _sync(path: Path, file: FileIO, done: bool) -> None:
    with disk_errors(f"cannot write {path}"):
        try:
            os.fsync(file)
        finally:
            if done:
                file.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """Complete records; a torn last line is left out.

    Raises:
        DataError: any other line that is no record.
    """
    with disk_errors(f"cannot read {path}"):
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line feed is torn, or empty
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = strict_json(line)
            kind = record["record"]
        except (ValueError, LookupError, TypeError):
            raise DataError(f"{path}, line {number}: not a record of an episode") from None
        if kind not in ("start", "turn", "end", "scores", "score_error"):
            raise DataError(f"{path}, line {number}: unknown kind of record {kind!r}")
        problem = _problem(kind, record)
        if problem is not None:
            raise DataError(f"{path}, line {number}: {problem}; the file was damaged or edited")
        records.append(unsealed(record, f"{path}, line {number}"))
    return records


def _problem(kind: str, record: Mapping[str, Any]) -> str | None:
    """What in a record no run writes, None if nothing."""
    if kind == "end" and record.get("terminated_by") not in list(Termination):
        return f"'terminated_by' is none of {', '.join(Termination)}"
    if kind == "end" and not isinstance(record.get("error", False), str | None):
        return "'error' is no text"
    if kind == "start":
        bad = [name for name in ("pairing", "view", "environment_id", "codename") if not isinstance(record.get(name), str)]
        bad += [] if _is_whole(record.get("relationship")) else ["relationship"]
        bad += [] if isinstance(record.get("hard"), bool) else ["hard"]
        key = record.get("key")
        bad += [] if isinstance(key, dict) and key.get("seat") in SEATS and _is_whole(key.get("env_id")) else ["key"]
        return f"{bad[0]!r} holds what no run writes" if bad else None
    if kind == "turn":
        whole = ("index", "prompt_tokens", "completion_tokens")
        bad = [name for name in whole if not _is_whole(record.get(name, 0)) or record.get(name, 0) < 0]
        bad += [name for name in ("seat", "speaker", "text", "raw") if not isinstance(record.get(name), str)]
        bad += ["seat"] if record.get("seat") not in SEATS else []
        bad += ["mode"] if record.get("mode") not in (None, *range(len(MODES) + 1)) else []
        return f"{bad[0]!r} holds what no run writes" if bad else None
    if kind not in ("scores", "score_error"):
        return None
    if not isinstance(record.get("judge"), str):
        return "'judge' is no name"
    if kind == "score_error":
        texts = (record.get("kind"), record.get("message"))
        return None if all(isinstance(text, str) for text in texts) else "'kind' or 'message' is no text"
    for agent in SEATS:
        scores = record.get(agent)
        if not isinstance(scores, dict) or set(scores) != set(DIMENSIONS):
            return f"{agent!r} does not hold the seven dimensions"
        for name, (low, high) in DIMENSIONS.items():
            value = scores[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                return f"{agent}.{name} is no number from {low} to {high}"
    return None


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _cut_torn_line(file: FileIO) -> int:
    """Remove what follows the last line feed: its writer died. Returns the bytes that remain."""
    file.seek(0)
    content = file.readall()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    return whole


def _result(records: list[dict[str, Any]], path: Path, judge: str | None) -> EpisodeResult | None:
    episode = _episode(records, path)
    if episode is None:
        return None
    result = EpisodeResult(episode)
    for record in records:
        if record["record"] == "scores" and judge in (None, record["judge"]):
            result = EpisodeResult(episode, scores=_from(Scores, record, path))
        elif record["record"] == "score_error" and judge in (None, record["judge"]) and result.scores is None:
            result = EpisodeResult(episode, score_error=_from(ScoreError, record, path))
    return result


def _episode(records: list[dict[str, Any]], path: Path) -> Episode | None:
    if not records:
        return None
    start = dict(records[0])
    if start["record"] != "start" or start.get("format") != FORMAT:
        raise DataError(f"{path}, line 1: expected the start of an episode in format {FORMAT}")
    key = _from(EpisodeKey, start.pop("key", {}), path)
    del start["format"]
    turns = tuple(_from(Turn, record, path) for record in records if record["record"] == "turn")
    if [turn.index for turn in turns] != list(range(len(turns))):
        raise DataError(f"{path}: turns out of order: {[turn.index for turn in turns]}")
    episode = _from(Episode, {**start, "key": key, "turns": turns}, path)
    last = next((r for r in reversed(records) if r["record"] in ("turn", "end")), None)
    if last is None or last["record"] == "turn":
        return episode
    return replace(episode, terminated_by=Termination(last["terminated_by"]), error=last["error"])


def _from(kind: type[Any], values: Mapping[str, Any], path: Path) -> Any:
    try:
        return kind(**{name: value for name, value in values.items() if name != "record"})
    except TypeError as error:
        raise DataError(f"{path}: not a record of format {FORMAT}: {one_line(str(error))}; was it edited?") from None
